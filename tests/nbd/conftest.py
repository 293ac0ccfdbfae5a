"""Fixtures of the NBD tests: servers of ours, and real ones."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hvbackup.nbd.export import Export
from hvbackup.nbd.server import NbdServer
from hvbackup.nbd.session import Limits
from hvbackup.nbd.uri import NbdUri

Serve = Callable[..., NbdUri]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for unix sockets (108 bytes), which pytest's may not be."""
    folder = Path(tempfile.mkdtemp(prefix="hvnbd"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def serve(short_path: Path) -> Iterator[Serve]:
    """Serve one export on a unix socket; afterwards every thread has ended."""
    before = set(threading.enumerate())
    with ExitStack() as stack:

        def start(export: Export, name: str = "disk", limits: Limits | None = None, **options: object) -> NbdUri:
            server = stack.enter_context(NbdServer({name: export}, limits=limits, **options))  # type: ignore[arg-type]
            return server.listen_unix(short_path / f"{name}.nbd")

        yield start
    assert wait_for(lambda: not set(threading.enumerate()) - before), set(threading.enumerate()) - before


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> bool:
    """Whether the condition became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def listens(address: Path | tuple[str, int]) -> bool:
    """Whether somebody accepts connections there: the file of a unix socket exists a moment earlier."""
    with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as probe:
        return probe.connect_ex(str(address) if isinstance(address, Path) else address) == 0


@pytest.fixture
def program(short_path: Path) -> Iterator[Callable[..., Path]]:
    """Start a real NBD server: its command with `{socket}` in it gives the path of the socket once it listens."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> Path:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        path = short_path / f"real{len(running)}.nbd"
        process = subprocess.Popen([word.format(socket=path) for word in command])
        running.append(process)
        assert wait_for(lambda: listens(path) or process.poll() is not None), f"{command[0]} did not start"
        assert process.poll() is None, f"{command[0]} ended at once"
        return path

    yield start
    for process in running:
        process.kill()
        process.wait(120)
