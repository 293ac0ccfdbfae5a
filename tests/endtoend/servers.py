"""nbdkit as a disk that fails: with errors when a file says so, slow, or as a file and a block device of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.nbd.conftest import listens

WAIT_SECONDS = 120


def wait(done: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """It is so when this returns."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Server:
    """A running nbdkit."""

    process: subprocess.Popen[bytes]
    uri: str


@contextlib.contextmanager
def nbdkit(folder: Path, *words: str) -> Iterator[Server]:
    """An nbdkit with these plugins and filters."""
    path = folder / "nbdkit.sock"
    path.unlink(missing_ok=True)
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), *words], stderr=subprocess.DEVNULL)
    try:
        wait(lambda: listens(path))
        yield Server(process, f"nbd+unix:///?socket={path}")
    finally:
        process.kill()
        process.wait(WAIT_SECONDS)
        path.unlink(missing_ok=True)


def failing(file: Path, trigger: Path) -> list[str]:
    """The words of an nbdkit that serves the file, and fails every read while the trigger exists."""
    words = ["--filter=error", "file", str(file), "error=EIO", "error-pread-rate=100%"]
    return [*words, f"error-pread-file={trigger}"]


@contextlib.contextmanager
def file_of(server: Server, folder: Path) -> Iterator[Path]:
    """The server's disk as a file of this machine, through FUSE."""
    path = folder / "fuse"
    path.mkdir()
    process = subprocess.Popen(["nbdfuse", str(path / "disk"), server.uri], stderr=subprocess.DEVNULL)
    try:
        wait((path / "disk").exists)
        yield path / "disk"
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, timeout=WAIT_SECONDS, stderr=subprocess.DEVNULL)
        process.kill()
        process.wait(WAIT_SECONDS)


@contextlib.contextmanager
def loop_device(file: Path, *options: str) -> Iterator[Path]:
    """The file as a block device."""
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    command = ["losetup", "--find", "--show", *options, str(file)]
    made = subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT_SECONDS, env=environment)
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=False, timeout=WAIT_SECONDS, env=environment)
