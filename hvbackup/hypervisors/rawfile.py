"""A raw image or block device, read directly: no server in between, which would cost half a CPU second per GiB.

The file is opened once and stays open: renaming or deleting it meanwhile changes nothing, what was opened is read to its
end.  QEMU's own image locks are taken as a reader would take them (byte 100 + n: "I use permission n", 200 + n: "nobody
else may"), so an image that a running machine writes to is refused, and no
machine starts on it before we are done.  Writers that know no locks are noticed afterwards, by `changed()`.

Thread safety: `RawFile` is used by one thread; each `RawReader` by one thread at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hvbackup.errors import Busy, HostUnreachable, NotFound, ReadFailed, UsageError
from hvbackup.extents import Spans, spans

_BLKSSZGET = 0x1268  # ioctl: logical sector size of a block device
_LOCK_USED, _LOCK_UNSHARED = 100, 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # QEMU's permission numbers
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_SECTORS_WRITTEN, _SECTORS_DISCARDED = 6, 13  # columns of /sys/dev/block/M:N/stat


@dataclass(slots=True)
class RawFile:
    """One image or device, open and locked.  Construction raises NotFound, UsageError, Busy, HostUnreachable."""

    path: Path
    size: int = field(init=False)
    sector: int = field(init=False, default=512)
    in_use: bool = field(init=False, default=False)  # a device that is mounted, or part of something larger
    _fd: int = field(init=False, default=-1)
    _before: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        mode = kind_of(self.path)
        self._fd = _open(self.path, str(self.path))
        try:
            lock_as_reader(self._fd, self.path)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            if stat.S_ISBLK(mode):
                self.sector = sector_size(self._fd)
                self.in_use = _claimed(self.path)
            self._before = self._writes()
        except BaseException:
            self.close()
            raise

    def data(self) -> Spans:
        """What is allocated; a device that cannot tell is allocated whole."""
        return spans(_data_extents(self._fd, self.path, self.size))

    def open(self) -> RawReader:
        """A reader of the very same file, whatever its path leads to now.

        It is opened anew, not duplicated: readers that share one open file disturb each other's read-ahead, which more
        than doubled the CPU time of two threads that read a cold file.
        """
        return RawReader(self.path, _open(self.path, f"/proc/self/fd/{self._fd}"))

    def changed(self) -> str:
        """Why what was read may be of more than one moment, or "".  Raises ReadFailed if the end is gone."""
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size < self.size:
            raise _shrunk(self.path, size)
        if size > self.size:
            return f"{self.path} grew from {self.size} to {size} bytes while it was read: this point may mix moments"
        if self._writes() != self._before:
            return f"{self.path} was written to while it was read: this point may mix moments"
        return f"{self.path} is mounted or in use: this point may mix moments" if self.in_use else ""

    def close(self) -> None:
        """Give the file and its locks back; readers go on without; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _writes(self) -> tuple[int, ...]:
        """Changes when somebody writes: a file's time of change, a device's counters (once its cache is written back)."""
        status = os.fstat(self._fd)
        if not stat.S_ISBLK(status.st_mode):
            return (status.st_mtime_ns,)
        return _device_writes(os.major(status.st_rdev), os.minor(status.st_rdev))


@dataclass(slots=True)
class RawReader:
    """Reads at any offset; short reads are continued."""

    path: Path
    _fd: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.  Raises ReadFailed naming the file."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise ReadFailed(
                    f"{self.path}: {len(buffer)} bytes at {offset} can't be read: {error.strerror}"
                ) from error
            if count == 0:
                raise _shrunk(self.path, os.lseek(self._fd, 0, os.SEEK_END))
            done += count

    def close(self) -> None:
        """Give the file back; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def kind_of(path: Path) -> int:
    """The mode of a disk that is there.  Raises NotFound, UsageError (no disk), HostUnreachable."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"There is no disk at {path}") from None
    except OSError as error:
        raise HostUnreachable(f"{path} can't be looked at: {error.strerror}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise UsageError(f"{path} is neither a file nor a block device")
    return mode


def sector_size(fd: int) -> int:
    """The logical sector size of an open block device."""
    answer = fcntl.ioctl(fd, _BLKSSZGET, struct.pack("@i", 512))
    return int(struct.unpack("@i", answer)[0])


def lock_as_reader(fd: int, path: Path) -> None:
    """Let nobody write until `fd` is closed.  Raises Busy when somebody does already."""
    try:
        for byte in (_LOCK_USED + _CONSISTENT_READ, _LOCK_UNSHARED + _WRITE, _LOCK_UNSHARED + _RESIZE):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        wanted = (_LOCK_UNSHARED + _CONSISTENT_READ, _LOCK_USED + _WRITE, _LOCK_USED + _RESIZE)
        held = any(_is_held(fd, byte) for byte in wanted)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks: `changed` is what is left
        held = True
    if held:
        raise in_use(path)


def in_use(path: Path) -> Busy:
    """The error for an image that a machine is running on."""
    return Busy(
        f"{path} is in use by a running machine: its bytes are of no one moment; protect the machine itself "
        "(qemu:/path/of/its/qmp.sock), or shut it down first"
    )


def _is_held(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _open(path: Path, way: str) -> int:
    try:
        return os.open(way, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostUnreachable(f"{path} can't be opened: {error.strerror}") from error


def _claimed(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _device_writes(major: int, minor: int) -> tuple[int, ...]:
    try:
        columns = Path(f"/sys/dev/block/{major}:{minor}/stat").read_text().split()
    except OSError:
        return ()
    return tuple(int(columns[n]) for n in (_SECTORS_WRITTEN, _SECTORS_DISCARDED) if n < len(columns))


def _data_extents(fd: int, path: Path, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # no data up to the end
            if error.errno == errno.EINVAL:
                yield end, size - end  # it can't tell
                return
            raise ReadFailed(f"{path}: can't tell what is allocated: {error.strerror}") from error
        yield start, min(end, size) - start


def _shrunk(path: Path, size: int) -> ReadFailed:
    return ReadFailed(f"{path} shrank to {size} bytes while it was read: no point was made of it; start again")
