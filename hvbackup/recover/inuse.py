"""Who uses a file or device that a restore would overwrite: nothing that somebody has open as a disk is written to."""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from hvbackup.errors import Busy, HvbackupError, UsageError

# QEMU locks single bytes of an image, from 100 on for what it does with it and from 200 on for what others may not do.
QEMU_LOCKS = (100, 200)
FLOCK = struct.Struct("hhqqi4x")
BLKROGET = 0x125E


def refuse_file(path: Path) -> None:
    """Raises Busy when QEMU has the image open, or a loop device stands on it."""
    for device, backing in _loops():
        if backing == str(path.resolve()):
            raise Busy(
                f"{path} is in use: {device} stands on it; detach it with `losetup -d {device}`, or choose another name"
            )
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise HvbackupError(f"Cannot open {path}: {e.strerror}") from e
    try:
        # A lock for writing conflicts with every lock that others hold there, and is only asked about.
        wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, QEMU_LOCKS[0], QEMU_LOCKS[1], 0)
        kind = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))[0]
    finally:
        os.close(fd)
    if kind != fcntl.F_UNLCK:
        raise Busy(f"{path} is in use by a virtual machine; switch it off, or choose another name")


def refuse_device(path: Path) -> None:
    """Raises Busy when a device is mounted, part of something, or somebody has it alone; UsageError when it is read-only."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as e:
        if isinstance(e, PermissionError):
            raise UsageError(f"{path} can't be written by this user; run as root, or choose another device") from e
        raise Busy(f"{path} is in use{_by(path)}; choose another device") from e
    try:
        (read_only,) = struct.unpack("i", fcntl.ioctl(fd, BLKROGET, bytes(4)))
    finally:
        os.close(fd)
    if read_only:
        raise UsageError(
            f"{path} is read-only; choose another device, or make it writable with `blockdev --setrw {path}`"
        )


def _by(path: Path) -> str:
    """Who, as far as the system tells."""
    number = path.stat().st_rdev
    name = f"{os.major(number)}:{os.minor(number)}"
    users = [f"mounted at {where}" for where in _mounts(name)]
    users += [f"part of {holder}" for holder in _names(Path(f"/sys/dev/block/{name}/holders"))]
    return f" ({', '.join(users)})" if users else " by another program"


def _mounts(number: str) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields = line.split()
        if fields[2] == number:
            yield re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])


def _loops() -> Iterator[tuple[str, str]]:
    """(loop device, the file that it stands on)."""
    for folder in Path("/sys/block").glob("loop*/loop"):
        try:
            yield f"/dev/{folder.parent.name}", (folder / "backing_file").read_text().removesuffix("\n")
        except OSError:
            continue  # detached meanwhile


def _names(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir())
    except OSError:
        return []
