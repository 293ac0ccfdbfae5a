"""Images for the tests: made, written to and served by QEMU's own programs; loop devices; reading whole disks."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hvbackup import extents
from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors import Frozen, FrozenDisk, Hypervisor
from hvbackup.hypervisors.image import ImageSource, ImageSpec
from hvbackup.model import DiskId, LeaseId, Token
from hvbackup.nbd.client import NbdClient
from hvbackup.nbd.uri import NbdUri

STORE = "00c0ffee"
KEEP_ALL: Mapping[DiskId, Token] = {}


def run(*command: str | Path) -> str:
    """Run a program that must not fail."""
    done = subprocess.run([str(c) for c in command], check=True, timeout=60, capture_output=True, text=True)
    return done.stdout


def make(path: Path, size: int, *options: str) -> Path:
    """An empty qcow2 image."""
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size))
    return path


def poke(path: Path, *commands: str, format_: str = "qcow2") -> None:
    """Let QEMU write to an image, as a machine would between two captures."""
    run("qemu-io", "-f", format_, *(word for command in commands for word in ("-c", command)), path)


@contextmanager
def runtime() -> Generator[Path]:
    """A folder with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="hvb", dir="/tmp") as folder:
        yield Path(folder) / "run"


@contextmanager
def loop_device(path: Path, sector: int) -> Generator[Path]:
    """A block device over a file."""
    device = run("losetup", "--find", "--show", "-b", str(sector), path).strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "-d", device)


@contextmanager
def running_machine(path: Path, format_: str) -> Generator[subprocess.Popen[bytes]]:
    """A QEMU that has the image open for writing, as a running machine has."""
    with tempfile.TemporaryDirectory(prefix="hvb", dir="/tmp") as folder:
        socket = Path(folder) / "s"
        process = subprocess.Popen(["qemu-nbd", "-t", "-f", format_, "-k", str(socket), str(path)])
        try:
            wait_for(lambda: serves(socket))  # the socket is there before the image is open
            yield process
        finally:
            process.kill()
            process.wait(120)


def serves(socket: Path) -> bool:
    """Whether a server answers."""
    try:
        NbdClient.open(NbdUri(socket=str(socket))).close()
    except HostUnreachable:
        return False
    return True


def wait_for(condition: object, seconds: float = 120) -> None:
    """Until a condition holds."""
    deadline = time.monotonic() + seconds
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def source(runtime_folder: Path, *specs: Path | ImageSpec) -> ImageSource:
    """The adapter under test."""
    wanted = [spec if isinstance(spec, ImageSpec) else ImageSpec(spec) for spec in specs]
    return ImageSource(wanted, STORE, runtime=runtime_folder)


@contextmanager
def frozen(hypervisor: Hypervisor, since: Mapping[DiskId, Token] = KEEP_ALL, lease: str = "lease") -> Generator[Frozen]:
    """A snapshot of the only machine."""
    [machine] = hypervisor.machines()
    with hypervisor.snapshot(machine, LeaseId(lease), since, None) as found:
        yield found


def content(disk: FrozenDisk, wanted: extents.Spans | None = None) -> bytes:
    """The bytes of a frozen disk, or of some of it and zeroes elsewhere."""
    image = bytearray(disk.disk.size)
    reader = disk.open()
    try:
        with memoryview(image) as view:
            for start, length in (extents.whole(disk.disk.size) if wanted is None else wanted).tolist():
                reader.read_into(start, view[start : start + length])
    finally:
        reader.close()
    return bytes(image)


def servers(folder: Path) -> Sequence[int]:
    """The qemu-nbd processes that serve from below a folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(os.fsencode(folder)) for word in words):
            found.append(int(pid))
    return found
