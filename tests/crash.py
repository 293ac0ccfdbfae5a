"""Every state in which a crash can leave a disk: a kernel that records, and a replay of each prefix of what it recorded.

    recorder = Recorder(root)           give it to the store, run something, `note` what must hold from then on
    for moment in replay(recorder):     after each step, in order
        moment.killed()                 the process died: every call took effect
        moment.torn()                   and the last write only half
        moment.power_cut(rng)           the power went: what was not synced is lost, kept or torn, at random

The model is harsher than any file system: a name is certain only after its directory was synced, bytes only after their file
was, and each uncertain thing is lost or kept on its own.
"""

from __future__ import annotations

import enum
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvbackup.files import Kernel

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

SECTOR = 512  # is written whole or not at all
Tree = dict[str, bytes | None]  # path -> content; None is a directory


class Op(enum.Enum):
    """What happened."""

    CREATE = "create"
    WRITE = "write"
    FSYNC = "fsync"
    RENAME = "rename"
    UNLINK = "unlink"
    MKDIR = "mkdir"
    SYNC_DIR = "sync_dir"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Step:
    """One call that changed the disk (or a note), as it took effect."""

    op: Op
    path: str = ""
    inode: int = -1
    data: bytes = b""
    offset: int = -1  # of a write; -1: at the end
    target: str = ""
    note: Any = None


class Recorder(Kernel):
    """Does everything for real (but for waiting for the disk) and writes it down."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._inodes: dict[int, int] = {}
        self._count = 0
        self.steps: list[Step] = []

    def continuing(self, before: Recorder) -> list[Step]:
        """The steps of this run as those of one that goes on where another one was cut off."""
        return [replace(s, inode=s.inode + before._count) if s.inode >= 0 else s for s in self.steps]

    def note(self, value: Any) -> None:
        """From here on this holds too."""
        self.steps.append(Step(Op.NOTE, note=value))

    def _name(self, path: str) -> str:
        name = os.path.relpath(path, self._root)
        return "" if name == "." else name

    def create(self, path: str, mode: int) -> int:
        fd = super().create(path, mode)
        self._inodes[fd], self._count = self._count, self._count + 1
        self.steps.append(Step(Op.CREATE, self._name(path), self._inodes[fd]))
        return fd

    def write(self, fd: int, data: Buffer) -> None:
        super().write(fd, data)
        self.steps.append(Step(Op.WRITE, inode=self._inodes[fd], data=bytes(data)))

    def write_at(self, fd: int, data: Buffer, offset: int) -> None:
        super().write_at(fd, data, offset)
        self.steps.append(Step(Op.WRITE, inode=self._inodes[fd], data=bytes(data), offset=offset))

    def fsync(self, fd: int) -> None:
        self.steps.append(Step(Op.FSYNC, inode=self._inodes[fd]))

    def close(self, fd: int) -> None:
        super().close(fd)

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        self.steps.append(Step(Op.RENAME, self._name(old), target=self._name(new)))

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.steps.append(Step(Op.UNLINK, self._name(path)))

    def mkdir(self, path: str, mode: int) -> None:
        super().mkdir(path, mode)
        self.steps.append(Step(Op.MKDIR, self._name(path)))

    def sync_dir(self, path: str) -> None:
        self.steps.append(Step(Op.SYNC_DIR, self._name(path)))


@dataclass(slots=True)
class _File:
    writes: list[tuple[int, bytes]] = field(default_factory=list)  # where, what
    synced: int = 0  # how many of the writes are certain

    def write(self, step: Step) -> None:
        """One more."""
        end = max((at + len(data) for at, data in self.writes), default=0)
        self.writes.append((end if step.offset < 0 else step.offset, step.data))

    def content(self, count: int | None = None) -> bytearray:
        """After so many of the writes, or all of them."""
        content = bytearray()
        for at, data in self.writes[:count]:
            _lay(content, at, data)
        return content


def _lay(content: bytearray, at: int, data: bytes) -> None:
    content.extend(bytes(max(0, at + len(data) - len(content))))
    content[at : at + len(data)] = data


@dataclass(slots=True)
class _Folder:
    certain: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[tuple[str, _File | _Folder | None]] = field(default_factory=list)

    def now(self) -> dict[str, _File | _Folder]:
        """The names a running system sees."""
        return self.after(range(len(self.pending)))

    def after(self, kept: range | list[int]) -> dict[str, _File | _Folder]:
        """The names when these of the uncertain changes took effect."""
        names = dict(self.certain)
        for i in kept:
            name, node = self.pending[i]
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node
        return names


class Fate(enum.Enum):
    """What a power cut does to everything that was not synced."""

    LOST = "lost"
    NAMES_LOST = "names lost"  # bytes kept
    BYTES_LOST = "bytes lost"  # names kept: files without their content
    RANDOM = "random"  # each on its own; bytes out of order, with holes


class Disk:
    """A file system that knows what is certain."""

    def __init__(self) -> None:
        self._root = _Folder()
        self._inodes: dict[int, _File] = {}

    def _folder(self, path: str) -> _Folder:
        node: _File | _Folder = self._root
        for part in [p for p in path.split("/") if p]:
            assert isinstance(node, _Folder)
            node = node.now()[part]
        assert isinstance(node, _Folder)
        return node

    def _link(self, path: str, node: _File | _Folder | None) -> None:
        folder, _, name = path.rpartition("/")
        self._folder(folder).pending.append((name, node))

    def apply(self, step: Step) -> None:
        """Do one step."""
        match step.op:
            case Op.CREATE:
                self._inodes[step.inode] = _File()
                self._link(step.path, self._inodes[step.inode])
            case Op.WRITE:
                self._inodes[step.inode].write(step)
            case Op.FSYNC:
                self._inodes[step.inode].synced = len(self._inodes[step.inode].writes)
            case Op.RENAME:
                folder, _, name = step.path.rpartition("/")
                node = self._folder(folder).now()[name]
                self._link(step.target, node)
                self._link(step.path, None)
            case Op.UNLINK:
                self._link(step.path, None)
            case Op.MKDIR:
                self._link(step.path, _Folder())
            case Op.SYNC_DIR:
                folder_ = self._folder(step.path)
                folder_.certain, folder_.pending = folder_.now(), []

    def tree(self) -> Tree:
        """What a running system sees."""
        return dict(_walk(self._root, "", lambda d: d.now(), lambda f: bytes(f.content())))

    def torn(self, step: Step) -> Tree | None:
        """The same, with the last write only half done; None when the last step is no write."""
        if step.op is not Op.WRITE:
            return None
        file = self._inodes[step.inode]
        at, whole = file.writes.pop()
        file.writes.append((at, whole[: len(whole) // 2]))
        tree = self.tree()
        file.writes[-1] = at, whole
        return tree

    def power_cut(self, fate: Fate, rng: random.Random) -> Tree:
        """What is there when the machine starts again."""

        def names(folder: _Folder) -> dict[str, _File | _Folder]:
            everything = range(len(folder.pending))
            if fate is Fate.RANDOM:
                return folder.after([i for i in everything if rng.random() < 0.5])
            return folder.after(everything if fate is Fate.BYTES_LOST else [])

        def content(file: _File) -> bytes:
            if fate is Fate.NAMES_LOST:
                return bytes(file.content())
            content = file.content(file.synced)
            if fate is Fate.RANDOM:
                _scramble(content, file.writes[file.synced :], rng)
            return bytes(content)

        return dict(_walk(self._root, "", names, content))


def _scramble(content: bytearray, writes: list[tuple[int, bytes]], rng: random.Random) -> None:
    """Unsynced writes, some of which reached the disk, whole or in sectors; what did not is as before, or a hole."""
    for at, data in writes[: rng.randrange(len(writes) + 1)]:
        fate = rng.random()
        content.extend(bytes(max(0, at + len(data) - len(content))))
        if fate < 0.4:
            _lay(content, at, data)
        elif fate < 0.6:
            for begin in range(0, len(data), SECTOR):
                if rng.random() < 0.5:
                    _lay(content, at + begin, data[begin : begin + SECTOR])


def _walk(folder: _Folder, prefix: str, names: Any, content: Any) -> Iterator[tuple[str, bytes | None]]:
    for name, node in names(folder).items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(node, _File):
            yield path, content(node)
        else:
            yield path, None
            yield from _walk(node, path, names, content)


@dataclass(frozen=True)
class Wreck:
    """What a crash left: the disk, and the notes that had been made before it."""

    step: int
    how: str
    tree: Tree
    notes: tuple[Any, ...]

    steps: list[Step]

    def disk(self) -> Disk:
        """The file system right after the step, with all that is uncertain."""
        disk = Disk()
        for step in self.steps[: self.step + 1]:
            disk.apply(step)
        return disk


def put(tree: Tree, where: Path) -> None:
    """The tree exists at `where` when this returns."""
    where.mkdir()
    for name, content in tree.items():
        path = where / name
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)


def wrecks(steps: list[Step], seeds: int, power: bool = True) -> Iterator[Wreck]:
    """Every different state a crash can leave, after each step: killed, torn, and power cut in every way."""
    disk, notes, seen = Disk(), [], set()
    for number, step in enumerate(steps):
        disk.apply(step)
        if step.op is Op.NOTE:
            notes.append(step.note)
        for how, tree in _ways(disk, step, number, seeds, power):
            # A state that was there before, with the same notes, has been looked at.
            key = (len(notes), hash(frozenset(tree.items())))
            if key not in seen:
                seen.add(key)
                yield Wreck(number, how, tree, tuple(notes), steps)


def _ways(disk: Disk, step: Step, number: int, seeds: int, power: bool) -> Iterator[tuple[str, Tree]]:
    yield "killed", disk.tree()
    torn = disk.torn(step)
    if torn is not None:
        yield "torn", torn
    if power:
        for fate in (Fate.LOST, Fate.NAMES_LOST, Fate.BYTES_LOST):
            yield f"power cut, {fate.value}", disk.power_cut(fate, random.Random(0))
        for seed in range(seeds):
            yield f"power cut, seed {seed}", disk.power_cut(Fate.RANDOM, random.Random(f"{number}/{seed}"))
