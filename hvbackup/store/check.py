"""Check: what is damaged, and which points need it.

    quick   every point, page and chunk is there: signatures, map pages, footers, sizes, the chain of runs
    deep    every record is read, decoded and hashed as well

Places found damaged leave the index, so that the next capture stores their chunks again; disks that need a lost chunk are
remembered, so that the next capture of that disk looks every block up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import zstandard
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged, StoreDamage
from hvbackup.model import ChunkId, DiskId, DiskRoot, RecoveryPoint
from hvbackup.pipeline import ordered
from hvbackup.store import format as f
from hvbackup.store import pack as packs
from hvbackup.store import records
from hvbackup.store.blockmap import PAGE_BYTES, BlockMap
from hvbackup.store.index import NOWHERE
from hvbackup.store.store import Store

THREADS = 2

Place = tuple[str, int]  # pack, offset of the record


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    kind: str  # "point" | "disk" | "pack" | "chunk" | "runs" | "key"
    what: str  # a sentence
    lost: bool  # whether something we offered can't be recovered because of it


@dataclass(slots=True)
class Report:
    """What a check found."""

    problems: list[Problem] = field(default_factory=list)
    points: int = 0
    disks: int = 0
    packs: int = 0
    chunks: int = 0
    read_bytes: int = 0

    @property
    def lost(self) -> bool:
        """Whether any point or part of one is lost."""
        return any(p.lost for p in self.problems)

    def add(self, kind: str, what: str, *, lost: bool = False) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, what, lost))


def check(
    store: Store, *, deep: bool = False, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Report:
    """Everything that is wrong with the store.  `progress` gets (done, total) bytes of packs, with `deep`."""
    report = Report()
    store.index.rebuild()  # the packs are on trial, not a cache of them
    _keys(store, report)
    bad = _packs(store, report)
    bad |= _records(store, report, progress) if deep else store.index.damaged
    if store.owner:
        store.index.set_damaged(bad)
    lost = _points(store, report)
    if store.owner:
        store.set_damaged_disks(lost)
    for problem in store.runs.problems():
        report.add("runs", problem)
    return report


def _keys(store: Store, report: Report) -> None:
    contents: dict[str, list[bytes]] = {}
    for name in store.files.names("keys"):
        contents.setdefault(name.split(".")[0], []).append(store.files.read(f"keys/{name}"))
    for kid, copies in contents.items():
        if len(copies) != 2 or copies[0] != copies[1] or not _is_json(copies[0]):
            report.add("key", f"Key {kid} has not two equal copies in keys/; copy the good one over the other")


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def _packs(store: Store, report: Report) -> set[Place]:
    """Footers and sizes; the places of the index that lie in no readable record."""
    bad: set[Place] = set()
    for pack in store.index.unreadable:
        report.add("pack", f"Pack {pack} is unreadable: neither its footer nor any record can be made out")
    for pack in sorted(store.index.known()):
        rows, why = _rows(store, pack)
        report.packs += 1
        report.chunks += len(rows)
        if why:
            gone = set() if _header_reads(store, pack) else {int(o) for o in rows["offset"]}
            report.add("pack", f"{why}; {len(gone)} of its records are lost")
            bad |= {(pack, o) for o in gone}
    return bad


def _rows(store: Store, pack: str) -> tuple[NDArray[np.void], str]:
    """The rows of a pack, and what is wrong with its header or footer."""
    why = ""
    try:
        packs.cipher_of(store.files, store.ring, pack)
    except StoreDamage as e:
        why = str(e)
    try:
        return packs.read_footer(store.files, pack), why
    except StoreDamage as e:
        there = store.files.exists(packs.path_of(pack))
        return packs.scan(store.files, pack) if there else np.zeros(0, f.ROW), why or str(e)


def _header_reads(store: Store, pack: str) -> bool:
    try:
        packs.cipher_of(store.files, store.ring, pack)
    except StoreDamage:
        return False
    return True


def _records(store: Store, report: Report, progress: Callable[[int, int], None]) -> set[Place]:
    """Decode and hash every record of every pack."""
    todo = sorted(store.index.known())
    total = sum(store.files.size(packs.path_of(pack)) for pack in todo if store.files.exists(packs.path_of(pack)))
    bad: set[Place] = set()
    with closing(
        ordered(todo, lambda pack: _one_pack(store, pack, _rows(store, pack)[0]), threads=THREADS, depth=THREADS + 1)
    ) as results:
        for pack, (read, damaged) in zip(todo, results, strict=True):
            report.read_bytes += read
            for offset, why in damaged:
                report.add("chunk", f"Pack {pack}: {why}")
                bad.add((pack, offset))
            progress(report.read_bytes, total)
    return bad


def _one_pack(store: Store, pack: str, rows: NDArray[np.void]) -> tuple[int, list[tuple[int, str]]]:
    """(bytes read, damaged records with the reason)."""
    try:
        cipher, bind = packs.cipher_of(store.files, store.ring, pack)
    except StoreDamage:
        return 0, []  # named by `_packs`
    zstd, read, damaged = zstandard.ZstdDecompressor(), 0, []
    for offset, data, inside in records.each(store.files, pack, rows):
        read += len(data)
        try:
            records.verify(store.ring, packs.decode(data, cipher, bind, zstd, f"the record at {offset}"), inside)
        except ChunkDamaged as e:
            damaged.append((offset, str(e)))
    return read, damaged


def _points(store: Store, report: Report) -> list[tuple[str, DiskId]]:
    """Walk every map; the disks (path of the point, id) that need something that is lost."""
    walk, damaged = _Walk(store), []
    for folder in store.machine_folders():
        for path in store.point_paths(folder):
            report.points += 1
            try:
                point = store.load_point(path)
            except StoreDamage as e:
                report.add("point", f"{e}; `hvbackup check --repair` puts its copy back", lost=True)
                continue
            for root in point.disks:
                report.disks += 1
                lost = walk.disk(root)
                if lost:
                    report.add("disk", _sentence(point, root, lost), lost=True)
                    damaged.append((path, root.disk.id))
    return damaged


def _sentence(point: RecoveryPoint, root: DiskRoot, lost: list[tuple[int, int]]) -> str:
    where = ", ".join(f"{start}+{length}" for start, length in lost[:4]) + (", …" if len(lost) > 4 else "")
    total = sum(length for _, length in lost)
    return (
        f"Point {point.id} of {point.machine.name}: disk {root.disk.id} has lost {total} bytes in {len(lost)} places "
        f"(at {where}); everything else of it can be read"
    )


class _Walk:
    """Walks maps, visiting each page that many points share once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._whole: set[bytes] = set()  # pages below which everything is there

    def disk(self, root: DiskRoot) -> list[tuple[int, int]]:
        """(offset, length) of what is lost of a disk, joined."""
        block, size = self._store.block, root.disk.size
        tree = BlockMap(root.root, -(-size // block), self._store.chunks.page)
        spans: list[tuple[int, int]] = []
        for first, count in self._page(root.root, tree.depth - 1, 0):
            start, end = first * block, min((first + count) * block, size)
            if spans and sum(spans[-1]) == start:
                spans[-1] = (spans[-1][0], end - spans[-1][0])
            elif start < size:
                spans.append((start, end - start))
        return spans

    def _page(self, at: ChunkId, level: int, first: int) -> Iterator[tuple[int, int]]:
        """(first block, number of blocks) of what is lost below a page."""
        if not any(at) or at in self._whole:
            return
        span = f.PAGE_IDS**level
        try:
            ids = np.frombuffer(self._store.chunks.page(at), np.uint8)
        except ChunkDamaged:
            yield first, span * f.PAGE_IDS
            return
        assert len(ids) == PAGE_BYTES
        ids = ids.reshape(f.PAGE_IDS, f.ID_BYTES)
        some = np.flatnonzero(ids.any(axis=1))
        broken = False
        if level == 0:
            missing = self._store.index.lookup(np.ascontiguousarray(ids[some]).view("V32").ravel())["pack"] == NOWHERE
            for i in some[missing].tolist():
                broken = True
                yield first + i, 1
        else:
            for i in some.tolist():
                for lost in self._page(ChunkId(ids[i].tobytes()), level - 1, first + i * span):
                    broken = True
                    yield lost
        if not broken:
            self._whole.add(at)
