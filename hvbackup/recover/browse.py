"""Files inside a disk: its partitions, the file systems on them, folders, and the bytes of files.

A path begins with the number of the partition: `/1/etc/hosts`; a disk without partitions is `/0`.

    with_disk = browse.open(view, sector)      partitions are found
    with_disk.list("/1/etc")                   what is in a folder
    with_disk.stat("/1/etc/hosts")             one file, folder or link
    with_disk.read("/1/etc/hosts")             its bytes

Links on the way are followed within their file system, a link at the end is not.  What a broken file system leads to is
FileSystemUnreadable; a stored chunk that is damaged is ChunkDamaged, as everywhere; neither is ever read as zeroes.
"""

from __future__ import annotations

import enum
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvbackup.errors import FileSystemUnreadable, HvbackupError, NotFound, UsageError
from hvbackup.model import Instant, KiB, MiB
from hvbackup.recover.partitions import READABLE, Part, parts
from hvbackup.recover.window import Run, View, Window

if TYPE_CHECKING:
    from hvbackup.recover.filesystems import FileSystem

PIECE_BYTES = 1 * MiB
LINKS = 40  # followed on the way to a file
PATH_MOST = 32 * KiB  # characters: deeper no system goes
MOST_NAMES = 2_000_000  # in one folder


class Kind(enum.StrEnum):
    """What a name stands for."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"  # a device, a socket, a pipe; a partition that can't be looked into


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file system says of a file, as far as it keeps such things."""

    kind: Kind
    size: int = 0
    mode: int | None = None  # permissions
    mtime: Instant | None = None
    target: str = ""  # of a link


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder.  `path` finds it again; names that are no text are shown, and found, with \\x.. in them."""

    path: str
    name: str
    kind: Kind
    size: int
    mode: int | None
    mtime: Instant | None
    target: str = ""
    note: str = ""  # of a partition: what is on it


@dataclass(frozen=True, slots=True)
class Found:
    """A file, folder or link, and the file system it is in."""

    system: FileSystem
    node: Any
    path: str
    name: str  # as the file system has it: bytes that are no text are surrogates


def open(view: View, sector: int = 512) -> Volumes:  # noqa: A001  # browse.open, as in gzip.open
    """The partitions of a disk.  Raises ChunkDamaged, and UsageError where the readers of file systems are not installed."""
    return Volumes(view, sector)


class Volumes:
    """Everything that can be found on one disk.  Thread safety: none, one reader at a time."""

    def __init__(self, view: View, sector: int = 512) -> None:
        from hvbackup.recover import filesystems

        filesystems.need()
        self._view = view
        self.parts: Sequence[Part] = parts(Window(view, 0, view.size), sector)
        self._open: dict[int, FileSystem] = {}

    # -- what callers want ---------------------------------------------------------------------------------------------

    def list(self, path: str) -> Sequence[Entry]:
        """What is in a folder, by name; of anything else, itself.  Raises NotFound, FileSystemUnreadable, ChunkDamaged."""
        if not _names(path):
            return [self._partition(p) for p in self.parts]
        found = self.find(path)
        if self._facts(found).kind is not Kind.FOLDER:
            return [self._entry(found)]
        return [self._entry(child) for child in self.children(found)]

    def stat(self, path: str) -> Entry:
        """One file, folder, link or partition.  Raises as `list`."""
        names = _names(path)
        if not names:
            return Entry("/", "", Kind.FOLDER, self._view.size, None, None)
        return self._partition(self._part(names[0])) if len(names) == 1 else self._entry(self.find(path))

    def read(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece.  Raises as `list`, and UsageError where it is none."""
        found = self.find(path)
        size = self.file_size(found)
        at = 0
        for offset, data in self.pieces(found):
            while at < offset:
                n = min(PIECE_BYTES, offset - at)
                yield bytes(n)
                at += n
            yield data
            at += len(data)
        for begin in range(at, size, PIECE_BYTES):
            yield bytes(min(PIECE_BYTES, size - begin))

    def notes(self) -> Sequence[str]:
        """What has to be known of the file systems that were looked into."""
        return [f"/{number}: {note}" for number, system in self._open.items() for note in system.notes]

    # -- for those who walk --------------------------------------------------------------------------------------------

    def find(self, path: str) -> Found:
        """What a path leads to.  Raises NotFound, FileSystemUnreadable, ChunkDamaged."""
        names = _names(path)
        if not names:
            raise UsageError("/ is the disk; choose a partition, such as /1")
        system = self._system(self._part(names[0]))
        top = Found(system, system.root, f"/{names[0]}", names[0])
        return self._descend(top, names[1:], path, LINKS)

    def children(self, folder: Found) -> Sequence[Found]:
        """What is in a folder, by name.  Raises FileSystemUnreadable, ChunkDamaged."""
        found: Any = []
        with self._reading(folder.system, folder.path):
            for name, node in folder.system.children(folder.node):
                folder.system.window.allow()
                if name in ("", ".", ".."):
                    continue
                if len(found) == MOST_NAMES:
                    raise FileSystemUnreadable(f"this folder claims more than {MOST_NAMES} names")
                found.append(Found(folder.system, node, posixpath.join(folder.path, shown(name)), name))
        return sorted(found, key=lambda f: f.path)

    def facts(self, found: Found) -> Facts:
        """What the file system says of it.  Raises FileSystemUnreadable, ChunkDamaged."""
        return self._facts(found)

    def file_size(self, found: Found) -> int:
        """How long a file is.  Raises UsageError where it is none."""
        facts = self._facts(found)
        if facts.kind is not Kind.FILE:
            also = f", to {facts.target}" if facts.target else ""
            raise UsageError(f"{found.path} is no file, it is a {facts.kind}{also}")
        return facts.size

    def runs(self, found: Found) -> Sequence[Run] | None:
        """Where its bytes are, as ranges of the disk; None where its file system can't tell."""
        with self._reading(found.system, found.path):
            runs = found.system.runs(found.node)
        base = found.system.window.start
        return runs and [(None if at is None else at + base, n) for at, n in runs]

    def pieces(self, found: Found) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of a file, in order; what is left out reads as zeroes."""
        with self._reading(found.system, found.path):
            stream = found.system.pieces(found.node, PIECE_BYTES)
        while True:
            with self._reading(found.system, found.path):
                piece = next(stream, None)
            if piece is None:
                return
            yield piece

    def walk(self, found: Found, seen: set[Any] | None = None) -> Iterator[Found]:
        """Everything in a folder, depth first.  Raises FileSystemUnreadable, ChunkDamaged."""
        seen = seen if seen is not None else set()
        self.enter(found, seen)
        for child in self.children(found):
            yield child
            if self._facts(child).kind is Kind.FOLDER:
                yield from self.walk(child, seen)

    def enter(self, folder: Found, seen: set[Any]) -> None:
        """Note that a folder was entered: each is in one place only.  Raises FileSystemUnreadable where it is in several."""
        with self._reading(folder.system, folder.path):
            key = folder.system.key(folder.node)
        if key in seen or len(folder.path) > PATH_MOST:
            raise FileSystemUnreadable(
                f"{folder.path} can't be read: its file system is broken, folders lead in circles"
            )
        seen.add(key)

    # -- the way there -------------------------------------------------------------------------------------------------

    def _descend(self, at: Found, names: Sequence[str], path: str, links: int) -> Found:
        """From a folder along names."""
        way = [at]
        for i, name in enumerate(names):
            if name == "..":
                way = way[:-1] or way
                continue
            child = self._child(way[-1], name, path)
            facts = self._facts(child)
            if facts.kind is Kind.LINK and i < len(names) - 1:
                if links == 0:
                    raise FileSystemUnreadable(f"{path}: links lead in circles")
                child = self._through(way, facts.target, path, links - 1)
            way.append(child)
        return way[-1]

    def _through(self, way: Sequence[Found], target: str, path: str, links: int) -> Found:
        """Where a link in the last folder of a way leads, within its file system."""
        if target[1:2] == ":":
            raise NotFound(f"{path}: a link on the way leads to {target}, which may be another disk; say its own path")
        names = _names(target.replace("\\", "/"))
        back = [way[0]] if target.startswith("/") else list(way)
        while names and names[0] == "..":
            back, names = back[:-1] or back, names[1:]
        found = self._descend(back[-1], names, path, links)
        facts = self._facts(found)
        if facts.kind is not Kind.LINK:
            return found
        if links == 0:
            raise FileSystemUnreadable(f"{path}: links lead in circles")
        return self._through(back, facts.target, path, links - 1)

    def _child(self, folder: Found, name: str, path: str) -> Found:
        if self._facts(folder).kind is not Kind.FOLDER:
            raise NotFound(f"{path} does not exist: {folder.path} is no folder")
        children = self.children(folder)
        same = [c for c in children if name in (c.name, shown(c.name))]
        if not same and not folder.system.case_counts:
            same = [c for c in children if c.name.casefold() == name.casefold()]
        if not same:
            raise NotFound(f"{path} does not exist: there is no {name} in {folder.path}")
        return same[0]

    def _part(self, number: str) -> Part:
        for part in self.parts:
            if str(part.number) == number:
                return part
        known = ", ".join(f"/{p.number} ({p.kind or 'unknown'})" for p in self.parts)
        raise NotFound(f"There is no partition {number} on this disk; it has {known}")

    def _system(self, part: Part) -> FileSystem:
        from hvbackup.recover import filesystems

        if part.number in self._open:
            return self._open[part.number]
        if part.kind not in READABLE:
            what = f"holds {part.kind}" if part.kind else "holds nothing that is known here"
            raise FileSystemUnreadable(
                f"/{part.number} {what}, whose files can't be read; `restore` or `boot` have the disk"
            )
        window = Window(self._view, part.start, part.size)
        with _named(window, f"/{part.number} ({part.kind})"):
            system = self._open[part.number] = filesystems.open_one(part.kind, window)
        return system

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _partition(self, part: Part) -> Entry:
        kind = Kind.FOLDER if part.kind in READABLE else Kind.OTHER
        note = ", ".join(filter(None, (part.kind or "unknown", shown(part.name))))
        return Entry(f"/{part.number}", str(part.number), kind, part.size, None, None, "", note)

    def _entry(self, found: Found) -> Entry:
        facts = self._facts(found)
        return Entry(
            found.path, shown(found.name), facts.kind, facts.size, facts.mode, facts.mtime, shown(facts.target)
        )

    def _facts(self, found: Found) -> Facts:
        with self._reading(found.system, found.path):
            return found.system.facts(found.node)

    @contextmanager
    def _reading(self, system: FileSystem, path: str) -> Iterator[None]:
        with _named(system.window, path):
            yield


@contextmanager
def _named(window: Window, what: str) -> Iterator[None]:
    """Whatever a reader of a file system comes to on bytes that make no sense is FileSystemUnreadable, named.

    What went wrong below it comes first: readers swallow errors, and what they make of that is not what is on the disk.
    """
    window.forgive()
    try:
        yield
    except Exception as e:
        broken = window.error or e
        if isinstance(broken, FileSystemUnreadable):
            raise FileSystemUnreadable(f"{what} can't be read: {broken}") from e
        if isinstance(broken, HvbackupError):
            raise type(broken)(f"{what}: {broken}") from e
        if isinstance(broken, OSError) and not isinstance(broken, EOFError) and broken.errno:
            raise
        why = f"{type(broken).__name__}: {broken}"
        raise FileSystemUnreadable(f"{what} can't be read, its file system is broken ({why})") from e
    if window.error:
        raise type(window.error)(f"{what}: {window.error}") from window.error


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def shown(name: str) -> str:
    """A name as text: bytes that are none as \\x.., halves of characters as \\u...."""
    return "".join(c if not 0xD800 <= ord(c) <= 0xDFFF else _escaped(ord(c)) for c in name)


def _escaped(code: int) -> str:
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
