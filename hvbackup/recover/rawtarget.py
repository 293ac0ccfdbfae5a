"""A raw image or block device that a disk is restored to, written in any order.

    killed after               left behind                        cleaned by
    1 an older image renamed   PATH.partial with the older state  `--resume`, `--differential`: compared with what it should be
    2 blocks written           PATH.partial with some of them     the same; `--replace` begins again
    3 renamed                  PATH, whole

So a half-written image is never taken for a whole one.  A block device is written where it is.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hvbackup.errors import HvbackupError, UsageError
from hvbackup.files import PARTIAL, Kernel, locked, named_errors
from hvbackup.model import MiB

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

WRITE_BACK_BYTES = 32 * MiB  # the disk begins on them while the next ones are decoded
_ZEROES = bytes(1024 * 1024)
PUNCH_HOLE, KEEP_SIZE = 2, 1  # of fallocate(2)
NO_HOLES = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)  # then zeroes are written


class RawTarget:
    """A sparse file under `PATH.partial` that gets its name in `finish`, or a device.  Thread safety: every method from any."""

    def __init__(self, path: Path, size: int, *, keep: bool, in_place: bool, kernel: Kernel | None = None) -> None:
        """`keep`: what `PATH.partial` holds stays for now; `in_place`: and so does what `PATH` holds.

        Raises Busy (another restore writes there), UsageError (a device that is too small), HvbackupError.
        """
        self._kernel, self._path, self.size = kernel or Kernel(), path, size
        self._device = path.is_block_device()
        self._written = path if self._device else path.with_name(path.name + PARTIAL)
        if in_place and not self._device and path.exists():
            take_aside(path, self._kernel)
        flags = os.O_EXCL if self._device else os.O_CREAT  # O_EXCL: nobody mounts it meanwhile
        with named_errors("open", self._written):
            self._fd = os.open(self._written, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        self._waiting = 0  # bytes; threads may lose some of it to each other
        try:
            self.blank = self._prepared(keep=keep)
        except BaseException:
            os.close(self._fd)
            raise

    def _prepared(self, *, keep: bool) -> bool:
        """Whether the target, which has its length now, reads as zeroes."""
        if self._device:
            room = os.lseek(self._fd, 0, os.SEEK_END)
            if room < self.size:
                raise UsageError(f"{self._path} has {room} bytes, and the disk has {self.size}; choose a larger device")
            return False
        locked(self._fd, f"{self._written}")
        with named_errors("write", self._written):
            if not keep:
                os.ftruncate(self._fd, 0)
            blank = os.fstat(self._fd).st_size == 0
            os.ftruncate(self._fd, self.size)
        return blank

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what the target holds now."""
        with named_errors("read", self._written):
            if os.preadv(self._fd, [buffer], offset) != len(buffer):
                raise HvbackupError(f"{self._written} ended before byte {offset + len(buffer)}")

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self._waiting += len(view)
        with named_errors("write", self._written):
            while view:
                n = os.pwrite(self._fd, view, offset)
                view, offset = view[n:], offset + n
        if self._waiting >= WRITE_BACK_BYTES:
            self._waiting = 0
            self._kernel.begin_write_back(self._fd)

    def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes: a hole where the file system or device can have one."""
        if not self._punched(offset, length):
            for at in range(offset, offset + length, len(_ZEROES)):
                self.write(at, memoryview(_ZEROES)[: offset + length - at])

    def _punched(self, offset: int, length: int) -> bool:
        import ctypes  # few restores have to make holes

        libc = ctypes.CDLL(None, use_errno=True)
        place = (ctypes.c_int64(offset), ctypes.c_int64(length))
        while libc.fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, *place) != 0:
            code = ctypes.get_errno()
            if code in NO_HOLES:
                return False
            if code != errno.EINTR:
                raise HvbackupError(f"Cannot write {self._written}: {os.strerror(code)}")
        return True

    def finish(self) -> None:
        """What was written is durable, and a file has its name, when this returns."""
        with named_errors("write", self._written):
            self._kernel.fsync(self._fd)
            if not self._device:
                self._kernel.rename(str(self._written), str(self._path))
                self._kernel.sync_dir(str(self._path.parent))

    def close(self) -> None:
        """Let go; what was written stays."""
        os.close(self._fd)


def take_aside(path: Path, kernel: Kernel) -> None:
    """What was `PATH` is `PATH.partial`, durably, when this returns: from now on it is neither the old disk nor the new one."""
    partial = path.with_name(path.name + PARTIAL)
    with named_errors("rename", path):
        kernel.rename(str(path), str(partial))
        kernel.sync_dir(str(path.parent))
