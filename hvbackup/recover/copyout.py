"""Files out of a disk into a folder here.

Names come from a guest and may be anything: each is one name in one folder, opened without following links, and nothing that is
here is overwritten unless that was said.  A file that can't be read whole is not left behind in part.  Owners, special
permissions (setuid and the like), attributes and devices are not made again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvbackup.errors import (
    FileSystemUnreadable,
    HvbackupError,
    Interrupted,
    PartlyFailed,
    SpaceExhausted,
    StoreDamage,
    UsageError,
)
from hvbackup.files import named_errors
from hvbackup.recover.browse import Facts, Found, Kind, Volumes, shown

PERMISSIONS = 0o777
DEPTH = 256  # folders within folders, each of them open while what is in it is copied
FAILED_MOST = 1000  # told one by one


@dataclass(slots=True)
class Copied:
    """What was copied, and what was not."""

    files: int = 0
    folders: int = 0
    links: int = 0
    bytes: int = 0
    left_out: int = 0  # devices, sockets and pipes
    failed: list[tuple[str, HvbackupError]] = field(default_factory=list)
    failures: int = 0

    def fail(self, path: str, error: HvbackupError) -> None:
        """One file or folder is not there, or not whole."""
        self.failures += 1
        if len(self.failed) < FAILED_MOST:
            self.failed.append((path, error))

    def verdict(self) -> HvbackupError | None:
        """The error that stands for all that failed."""
        if not self.failed:
            return None
        first = self.failed[0][1]
        what = f"{self.failures} of what was asked for could not be copied; the first: {first}"
        damaged = next((e for _, e in self.failed if isinstance(e, StoreDamage)), None)
        return StoreDamage(what) if damaged else PartlyFailed(what)


class CopyOut:
    """Copies what is found on a disk into a folder."""

    def __init__(self, volumes: Volumes, progress: Callable[[int], None], *, force: bool) -> None:
        self._volumes, self._progress, self._force = volumes, progress, force
        self._seen: set[Any] = set()
        self.done = Copied()

    def copy(self, found: Found, to: Path) -> Path:
        """The file, folder or link is in the folder under its own name when this returns its path.  Raises UsageError."""
        if to.exists() and not to.is_dir():
            raise UsageError(f"{to} is no folder; --to takes the folder that the file is put into")
        with named_errors("make the folder", to):
            to.mkdir(parents=True, exist_ok=True)
            fd = os.open(to, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            name = _local_name(found.name)
            if not self._force and _there(name, fd):
                raise UsageError(
                    f"{to / os.fsdecode(name)} exists; say --force to overwrite it, or choose another folder"
                )
            self._put(found, fd, DEPTH)
        finally:
            os.close(fd)
        return to / os.fsdecode(name)

    def _put(self, found: Found, into: int, depth: int) -> None:
        """One thing, and what is in it; what is wrong with it is kept, and does not stop the others."""
        try:
            name, facts = _local_name(found.name), self._volumes.facts(found)
            with named_errors("write", Path(shown(found.name))):
                self._make(found, facts, name, into, depth)
        except (SpaceExhausted, Interrupted):
            raise
        except HvbackupError as e:
            self.done.fail(found.path, e)

    def _make(self, found: Found, facts: Facts, name: bytes, into: int, depth: int) -> None:
        if facts.kind is Kind.FOLDER:
            self._folder(found, facts, name, into, depth)
        elif facts.kind is Kind.FILE:
            self._file(found, facts, name, into)
        elif facts.kind is Kind.LINK:
            self._clear(found, name, into)
            os.symlink(os.fsencode(shown(facts.target) if _odd(facts.target) else facts.target), name, dir_fd=into)
            self.done.links += 1
        else:
            self.done.left_out += 1

    def _folder(self, found: Found, facts: Facts, name: bytes, into: int, depth: int) -> None:
        if depth == 0:
            raise FileSystemUnreadable(f"{found.path}: folders lie in folders more than {DEPTH} deep")
        self._volumes.enter(found, self._seen)
        children = self._volumes.children(found)
        mode = facts.mode
        try:
            os.mkdir(name, 0o700 if mode is not None else 0o777, dir_fd=into)
        except FileExistsError:
            mode = None  # ours, as it is
            if not self._force:
                raise UsageError(f"{found.path}: its folder has this name twice") from None
        with _opened(name, os.O_RDONLY | os.O_DIRECTORY, into) as fd:
            for child in children:
                self._put(child, fd, depth - 1)
            if mode is not None:
                os.fchmod(fd, mode & PERMISSIONS & ~_umask())
            self._dated(fd, facts)
        self.done.folders += 1

    def _file(self, found: Found, facts: Facts, name: bytes, into: int) -> None:
        self._clear(found, name, into)
        mode = 0o666 if facts.mode is None else facts.mode & PERMISSIONS
        with _opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, into, mode) as fd:
            try:
                self._fill(found, facts, fd)
            except BaseException:
                os.unlink(name, dir_fd=into)
                raise
        self.done.files += 1

    def _fill(self, found: Found, facts: Facts, fd: int) -> None:
        for offset, data in self._volumes.pieces(found):
            view = memoryview(data)
            while view:
                n = os.pwrite(fd, view, offset)
                view, offset = view[n:], offset + n
            self.done.bytes += len(data)
            self._progress(self.done.bytes)
        os.truncate(fd, facts.size)
        self._dated(fd, facts)

    @staticmethod
    def _dated(fd: int, facts: Facts) -> None:
        if facts.mtime is not None:
            with contextlib.suppress(OSError, OverflowError):  # a time that this file system does not have
                os.utime(fd, ns=(facts.mtime, facts.mtime))

    def _clear(self, found: Found, name: bytes, into: int) -> None:
        """No file and no link has the name.  Raises UsageError."""
        if not _there(name, into):
            return
        if not self._force:
            raise UsageError(f"{found.path}: its folder has this name twice")
        try:
            os.unlink(name, dir_fd=into)
        except (IsADirectoryError, PermissionError) as e:
            raise UsageError(f"{found.path}: a folder has its name here; remove it, or choose another folder") from e


def _local_name(name: str) -> bytes:
    """The name as one of this system.  Raises UsageError where it is none."""
    raw = os.fsencode(shown(name) if _odd(name) else name)
    if raw in (b"", b".", b"..") or b"/" in raw or b"\0" in raw:
        raise UsageError(f"{shown(name)!r} can't be the name of a file here; it is left out")
    return raw


def _odd(name: str) -> bool:
    """Whether halves of characters are in it, which only Windows has."""
    return any(0xD800 <= ord(c) <= 0xDFFF and not 0xDC80 <= ord(c) <= 0xDCFF for c in name)


def _there(name: bytes, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def _opened(name: bytes, flags: int, folder: int, mode: int = 0o600) -> Iterator[int]:
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)
