"""The only module that makes bytes durable: nobody else calls fsync, rename, unlink or flock.

A file of a store is created complete and never edited, but for open logs: bytes go to `tmp/XXXX`, fsync, rename to its name,
fsync of the directory it is in.  When `write_new`, `NewFile.commit`, `replace` or `remove` returns, its effect survives a power
cut.

    killed after            left behind                         cleaned by
    create, write, fsync    a file in tmp/ nobody reads         sweep(), when a writer opens the store
    mkdir, rename, unlink   a name that a power cut takes back  settle(), before anything is built upon it
    fsync of the directory  the file

`Kernel` holds the calls themselves; the tests put a recording one in its place, and replay every prefix of what it
recorded, with unsynced writes dropped and reordered.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hvbackup.endings import let_finish
from hvbackup.errors import Busy, HvbackupError, SpaceExhausted, StoreDamage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

PARTIAL = ".partial"  # behind the name of an image that is not restored to its end
TMP = "tmp"  # the directory of files that are not finished
LOCK_POLL_SECONDS = 0.05
OPEN_FILES_MAX = 256  # handles kept for reading; each pack is one file
_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10  # of linux/fs.h, on 64 bits
_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h


class Kernel:
    """The system calls that change a disk, one method each, so that tests can record and refuse them."""

    def create(self, path: str, mode: int) -> int:
        """Open a new file for writing; it must not exist."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def write(self, fd: int, data: Buffer) -> None:
        """Append all of `data`."""
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(fd, view) :]

    def write_at(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`, both in whole blocks."""
        view = memoryview(data).cast("B")
        while view:
            try:
                done = os.pwrite(fd, view, offset)
            except OSError as e:
                if e.errno != errno.EINVAL or not self._is_direct(fd):
                    raise
                self.set_direct(fd, False)  # a disk with larger blocks
                continue
            view, offset = view[done:], offset + done

    def set_direct(self, fd: int, on: bool) -> None:
        """Write past the page cache from here on, where the file system can (O_DIRECT), or through it."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    @staticmethod
    def _is_direct(fd: int) -> bool:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def fsync(self, fd: int) -> None:
        """Make the file's bytes durable."""
        os.fsync(fd)

    def links(self, fd: int) -> int:
        """How many names the file has; 0 once somebody has removed it."""
        return os.fstat(fd).st_nlink

    def begin_write_back(self, fd: int) -> None:
        """Have the kernel begin to write what waits in memory, so that a later fsync finds little left; promises nothing."""
        import ctypes

        ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)

    def close(self, fd: int) -> None:
        """Close; never the place where an error is first seen, because fsync came before."""
        os.close(fd)

    def rename(self, old: str, new: str) -> None:
        """Give a finished file its name."""
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def mkdir(self, path: str, mode: int) -> None:
        """Make a directory."""
        os.mkdir(path, mode)

    def set_immutable(self, path: str, on: bool) -> None:
        """Let nobody, root included, change, rename or remove a file (`chattr +i`), or let them again."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            flags = _flags(fd)
            wanted = flags | _IMMUTABLE if on else flags & ~_IMMUTABLE
            if wanted != flags:
                fcntl.ioctl(fd, _SET_FLAGS, wanted.to_bytes(8, sys.byteorder))
        finally:
            os.close(fd)

    def sync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _flags(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, _GET_FLAGS, bytes(8))[:4], sys.byteorder)


@contextmanager
def named_errors(what: str, path: Path) -> Iterator[None]:
    """System errors become ours, with the path and what to do."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceExhausted(
                f"No room left on {path.parent} while writing {path.name}; free some space and run again: "
                "nothing that was committed is lost"
            ) from e
        if isinstance(e, FileNotFoundError | FileExistsError):
            raise
        raise HvbackupError(f"Cannot {what} {path}: {e.strerror}") from e


class NewFile:
    """A file being written.  It exists under its name only after `commit`; leaving the context without it removes it."""

    def __init__(self, files: Files, mode: int) -> None:
        self._files = files
        files.make_dir(TMP)
        self._tmp = files.path(TMP) / secrets.token_hex(8)
        with named_errors("create", self._tmp):
            self._fd = self._create(mode)
        self._open, self._named = True, False
        self.size = 0

    def _create(self, mode: int) -> int:
        """A new file that is locked for as long as we live and write it, so that no `sweep` takes it for a dead writer's."""
        while True:
            fd = self._files.kernel.create(str(self._tmp), mode)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:
                return fd
            self._files.kernel.close(fd)  # swept between the two calls

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        with named_errors("write", self._tmp):
            self._files.kernel.write(self._fd, data)
        self.size += memoryview(data).nbytes

    def allocate(self, size: int) -> None:
        """The file has this size, and room for it, when this returns."""
        with named_errors("write", self._tmp):
            os.posix_fallocate(self._fd, 0, size)

    @let_finish
    def commit(self, name: str) -> None:
        """The file exists as `name`, durably, when this returns."""
        target = self._files.path(name)
        self._files.make_dir(os.path.dirname(name))
        with named_errors("write", target):
            self._files.kernel.fsync(self._fd)
            self._close()
            self._files.release(name)
            self._files.kernel.rename(str(self._tmp), str(target))
            self._named = True
            self._files.kernel.sync_dir(str(target.parent))
        self._files.protect(name)

    @let_finish
    def abandon(self) -> None:
        """Remove what was written; nothing happens after `commit`."""
        if self._open:
            self._close()
        if not self._named:
            self._named = True
            with named_errors("remove", self._tmp):
                self._files.kernel.unlink(str(self._tmp))

    def _close(self) -> None:
        self._open = False
        self._files.kernel.close(self._fd)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def _unreadable(path: Path, error: OSError) -> HvbackupError:
    """A disk that has lost the bytes has damaged them; whoever has no right or no room to read will have it another time."""
    kind = StoreDamage if error.errno in (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA) else HvbackupError
    return kind(f"Cannot read {path}: {error.strerror}")


class Opened:
    """A file open for reading, also when it has lost its name; closed when the last one that uses it lets go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, fewer at the end of the file.  Raises HvbackupError."""
        try:
            return os.pread(self.fd, length, offset)
        except OSError as e:
            raise _unreadable(self._path, e) from e

    def sync(self) -> None:
        """What was read of it is durable when this returns, whoever wrote it.  Raises HvbackupError."""
        with named_errors("read", self._path):
            try:
                os.fsync(self.fd)
            except OSError as e:
                if e.errno not in (errno.EROFS, errno.EINVAL):  # what can't be written has nothing that is not durable
                    raise

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Files:
    """A directory tree of write-once files; names are relative, with `/`.

    Thread safety: every method may be called from any thread.
    """

    def __init__(self, root: Path | str, kernel: Kernel | None = None, mode: int = 0o600) -> None:
        self.root = Path(root)
        self.kernel = kernel or Kernel()
        self.mode = mode
        self.immutable: tuple[str, ...] = ()  # names that begin so are made immutable
        self.open_max = OPEN_FILES_MAX
        self._handles: OrderedDict[str, Opened] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Where a name lives."""
        return self.root / name if name else self.root

    def make_dir(self, name: str) -> None:
        """The directory exists, durably, when this returns."""
        path = self.path(name)
        if path.is_dir():
            return
        if name:
            self.make_dir(os.path.dirname(name))
        elif not path.parent.is_dir():
            Files(path.parent, self.kernel, self.mode).make_dir("")
        with named_errors("make directory", path):
            try:
                self.kernel.mkdir(str(path), 0o700)
            except FileExistsError:
                return
            self.kernel.sync_dir(str(path.parent))

    def new(self) -> NewFile:
        """Begin a file; it gets its name when it is committed."""
        return NewFile(self, self.mode)

    def write_new(self, name: str, data: Buffer) -> None:
        """The file exists with this content when this returns.  Raises HvbackupError when it exists with another."""
        if self.exists(name):
            if self.read(name) == bytes(data):
                return
            raise HvbackupError(f"{self.path(name)} exists already with other content; nothing was overwritten")
        self.replace(name, data)

    def replace(self, name: str, data: Buffer) -> None:
        """The file has this content when this returns, and its old content (if any) until then."""
        with self.new() as f:
            f.write(data)
            f.commit(name)
        self.forget(name)

    def allocate(self, name: str, size: int) -> None:
        """A file of this size, whose room on the disk is its own, exists when this returns.  Raises SpaceExhausted."""
        with self.new() as f:
            f.allocate(size)
            f.commit(name)

    def remove(self, name: str) -> None:
        """The file is gone, durably, when this returns; nothing happens when it was."""
        path = self.path(name)
        self.forget(name)
        self.release(name)
        with named_errors("remove", path):
            try:
                self.kernel.unlink(str(path))
            except FileNotFoundError:
                return
            self.kernel.sync_dir(str(path.parent))

    def protect(self, name: str) -> None:
        """Nobody changes or removes the file when this returns, if its name is one of those.  Raises HvbackupError."""
        if name.startswith(self.immutable or ("\0",)):
            with named_errors("make immutable", self.path(name)):
                self.kernel.set_immutable(str(self.path(name)), True)

    def release(self, name: str) -> None:
        """The opposite, for whoever replaces or removes it in order."""
        if name.startswith(self.immutable or ("\0",)) and self.exists(name):
            with named_errors("make mutable", self.path(name)):
                self.kernel.set_immutable(str(self.path(name)), False)

    def is_immutable(self, name: str) -> bool:
        """Whether the file has that flag; also False where the file system knows none."""
        fd = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return bool(_flags(fd) & _IMMUTABLE)
        except OSError:
            return False
        finally:
            os.close(fd)

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self.path(name).is_file()

    def size(self, name: str) -> int:
        """Length in bytes.  Raises FileNotFoundError."""
        return self.path(name).stat().st_size

    def modified(self, name: str) -> int:
        """When the file was last written, in nanoseconds since 1970.  Raises FileNotFoundError."""
        return self.path(name).stat().st_mtime_ns

    def read(self, name: str) -> bytes:
        """All bytes of a file.  Raises FileNotFoundError, HvbackupError."""
        path = self.path(name)
        with named_errors("read", path):
            try:
                return path.read_bytes()
            except NotADirectoryError as e:
                raise FileNotFoundError(e.errno, e.strerror, str(path)) from e

    def open_now(self, name: str) -> Opened:
        """A file that somebody else appends to, with the size it has now.  Raises FileNotFoundError, HvbackupError."""
        with named_errors("read", self.path(name)):
            return Opened(self.path(name))

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, fewer at the end of the file.  Raises FileNotFoundError, HvbackupError."""
        try:
            return self._handle(name).read_at(offset, length)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise _unreadable(self.path(name), e) from e

    def will_read(self, name: str, offset: int, length: int) -> None:
        """The disk may begin to fetch this range; nothing happens where it can't, or where the kernel has it."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._handle(name).fd, offset, length, os.POSIX_FADV_WILLNEED)

    @let_finish  # a lock that is taken is given back
    def _handle(self, name: str) -> Opened:
        with self._lock:
            handle = self._handles.pop(name, None) or Opened(self.path(name))
            self._handles[name] = handle
            while len(self._handles) > self.open_max:
                self._handles.popitem(last=False)
            return handle

    @let_finish  # a lock that is taken is given back
    def forget(self, name: str) -> None:
        """Drop a cached handle, so that the next read sees the file of that name as it is now."""
        with self._lock:
            self._handles.pop(name, None)

    @let_finish  # a lock that is taken is given back
    def close(self) -> None:
        """Drop all cached handles; the object stays usable."""
        with self._lock:
            self._handles.clear()

    def names(self, directory: str) -> list[str]:
        """Everything directly in a directory, sorted, without the directory; [] when there is none."""
        try:
            with os.scandir(self.path(directory)) as entries:
                return sorted(e.name for e in entries)
        except (FileNotFoundError, NotADirectoryError):  # a stray file where a directory belongs holds nothing of ours
            return []

    def sweep(self) -> int:
        """Remove what killed writers left unfinished, and nothing that a living one still writes.  Returns how many files."""
        return sum(self._sweep(self.path(TMP) / name) for name in self.names(TMP))

    def _sweep(self, path: Path) -> bool:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False  # its writer has just given it its name
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.kernel.unlink(str(path))
        except (BlockingIOError, FileNotFoundError):
            return False
        finally:
            os.close(fd)
        return True

    def settle(self) -> None:
        """Every name that is there stays there after a power cut; a killed writer may have left some that would not."""
        self.kernel.sync_dir(str(self.root.parent))
        for path, _, _ in os.walk(self.root):
            self.kernel.sync_dir(path)

    @contextmanager
    def owner(self, name: str, what: str, *, shared: bool = False, wait_seconds: float = 0.0) -> Iterator[None]:
        """Hold a lock file, alone or with others that share it, for as long as the context lasts.

        Raises Busy, naming `what` and who holds it, when it is not to be had in time.
        """
        path = self.path(name)
        self.make_dir(os.path.dirname(name))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, self.mode)
        try:
            _lock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, what, wait_seconds)
            if not shared:
                with contextlib.suppress(OSError):  # on a full disk: the lock holds, only our number is not in it
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(fd)


@contextlib.contextmanager
def exclusive(path: Path, what: str, wait_seconds: float) -> Iterator[int]:
    """A small file that processes share, made when it is not there, and held alone while the context lasts.  Raises Busy."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(fd, fcntl.LOCK_EX, what, wait_seconds)
        yield fd
    finally:
        os.close(fd)


def locked(fd: int, what: str) -> None:
    """Nobody else who asks has `what` until `fd` is closed.  Raises Busy."""
    _lock(fd, fcntl.LOCK_EX, what, 0.0)


def _lock(fd: int, how: int, what: str, wait_seconds: float) -> None:
    end = time.monotonic() + wait_seconds
    while True:
        try:
            return fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise Busy(f"{what} is in use by {_holders(fd)}; wait for it to end, or stop it") from None
            time.sleep(LOCK_POLL_SECONDS)


def _holders(fd: int) -> str:
    """The processes that hold a lock, as the kernel lists them, or else as the last one wrote."""
    found = os.fstat(fd)
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError):
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pids = {row[4] for row in rows if row[1:2] == ["FLOCK"] and row[5:6] == [file] and int(row[4]) > 0}
        if pids:
            return f"process{'es' * (len(pids) > 1)} {', '.join(sorted(pids, key=int))}"
    return f"process {os.pread(fd, 32, 0).decode(errors='replace').strip() or 'unknown'}"
