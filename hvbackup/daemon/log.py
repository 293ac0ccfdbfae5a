"""Log lines: to journald with the fields by which it finds them, elsewhere to stderr with the time in front."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

JOURNAL = Path("/run/systemd/journal/socket")
ABOUT = ("machine", "run", "point")  # what a line may be about: HVBACKUP_MACHINE, …
PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


def begin() -> None:
    """What is logged from now on goes where whoever started us reads it."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_Prioritized("%(message)s"))
        handler = Journal(handler)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what it says besides is of itself


class Journal(logging.Handler):
    """Entries of journald, in its own protocol; what it does not take goes the other way."""

    def __init__(self, otherwise: logging.Handler, path: Path = JOURNAL) -> None:
        super().__init__()
        self._otherwise, self._path = otherwise, str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def emit(self, record: logging.LogRecord) -> None:
        """The entry is kept."""
        about = {f"HVBACKUP_{k.upper()}": str(v) for k in ABOUT if (v := getattr(record, k, ""))}
        fields = {"MESSAGE": self.format(record), "PRIORITY": str(_priority(record)), "SYSLOG_IDENTIFIER": "hvbackup"}
        try:
            self._socket.sendto(entry({**fields, **about}), self._path)
        except OSError:  # nobody listens, or it is too long for one datagram
            self._otherwise.handle(record)

    def close(self) -> None:
        """No more is taken."""
        self._socket.close()
        super().close()


def entry(fields: Mapping[str, str]) -> bytes:
    """Fields as journald reads them: `NAME=value`, or with its length (8 bytes, little-endian) where it has several lines."""
    return b"".join(_field(name.encode(), value.encode(errors="replace")) for name, value in fields.items())


def _field(name: bytes, value: bytes) -> bytes:
    if b"\n" in value:
        return name + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    return name + b"=" + value + b"\n"


def _priority(record: logging.LogRecord) -> int:
    return next((p for level, p in PRIORITIES if record.levelno >= level), 7)


class _Prioritized(logging.Formatter):
    """Lines that journald files by their priority."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{_priority(record)}>{super().format(record)}".replace("\n", " ")
