"""Small file systems of their own, so that a full disk is a real one."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.model import KiB, MiB

BALLAST = "ballast"

needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")


class SmallDisk:
    """A mounted ext4 that can be filled up and freed again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def free_bytes(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, left_bytes: int) -> None:
        """So much room is left, within a block or two."""
        with open(self.path / BALLAST, "wb") as file:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, self.free_bytes - left_bytes))
            while self.free_bytes > left_bytes:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, 4 * KiB)
                except OSError:
                    return

    def empty(self) -> None:
        """There is room again."""
        (self.path / BALLAST).unlink()


@contextlib.contextmanager
def small_disk(folder: Path, name: str, size: int = 32 * MiB) -> Iterator[SmallDisk]:
    """An ext4 of its own at `folder/name`."""
    image, path = folder / f"{name}.ext4", folder / name
    path.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    for command in (["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(path)]):
        subprocess.run(
            command, check=True, timeout=120, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        )
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, timeout=120)
