"""The log of the service, as journald keeps it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.daemon.log import Journal


class Kept(logging.Handler):
    """What went the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "journal"))
        made.settimeout(60)
        yield made


def fields(entry: bytes) -> dict[str, str]:
    """An entry, read as systemd's documentation has it (Native Journal Protocol)."""
    found = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        found[name.decode()] = value.decode()
        entry = rest
    return found


def record(level: int, text: str, **about: str) -> logging.LogRecord:
    made = logging.LogRecord("hvbackup", level, __file__, 1, text, (), None)
    made.__dict__.update(about)
    return made


def test_a_line_is_found_by_what_it_is_about(journald: socket.socket, tmp_path: Path) -> None:
    otherwise = Kept()
    log = Journal(otherwise, tmp_path / "journal")
    log.handle(record(logging.WARNING, "Job 1: backup web1 is failed", machine="uuid-1", run="1"))
    assert fields(journald.recv(65536)) == {
        "MESSAGE": "Job 1: backup web1 is failed", "PRIORITY": "4", "SYSLOG_IDENTIFIER": "hvbackup",
        "HVBACKUP_MACHINE": "uuid-1", "HVBACKUP_RUN": "1",
    }  # fmt: skip
    log.handle(record(logging.ERROR, "two\nlines=\nPRIORITY=7", machine="a\nPRIORITY=7"))
    said = fields(journald.recv(65536))
    assert (said["MESSAGE"], said["PRIORITY"]) == ("two\nlines=\nPRIORITY=7", "3"), "nobody's name adds a field"
    assert otherwise.lines == []


def test_what_journald_does_not_take_is_said_all_the_same(tmp_path: Path) -> None:
    otherwise = Kept()
    log = Journal(otherwise, tmp_path / "nobody")
    log.handle(record(logging.INFO, "Ready"))
    assert otherwise.lines == ["Ready"]
