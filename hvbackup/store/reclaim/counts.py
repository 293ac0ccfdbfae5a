"""Counts: how much of each pack was needed when the last mark looked, and a guess at what is not any more.

They choose the candidates, so that a run need not mark only to find that there is nothing to do.  Nothing else trusts them: when
they know of any, a mark looks before packs are condemned, and another one before anything is removed.

A block of a forgotten point is dead, as far as a guess goes, when the points around it that are still there have another one in
its place.  So pages that their maps share are not read, and of very many others a sample is.  The guess is too high where a block
is needed elsewhere, which a mark puts right at the price of having marked; and too low for packs that no point ever needed, as a
capture that died leaves them: new packs count as needed until the next mark.  That is why counts are believed for some days only,
and not at all after a writer of this STATE has died (`writers.remove_dead`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import SpaceExhausted, StoreDamage
from hvbackup.model import ZERO_CHUNK, ChunkId, Instant
from hvbackup.store.chunks.writers import COUNTS
from hvbackup.store.format import pack as packs
from hvbackup.store.format.blockmap import PAGE_BYTES, BlockMap, Ids, page_of
from hvbackup.store.format.layout import PAGE_IDS, parse_json
from hvbackup.store.format.root import Disks, Root, disks_of
from hvbackup.store.index.index import NOWHERE
from hvbackup.store.keep import forget
from hvbackup.store.reclaim.mark import BATCH_IDS, Pause, Share
from hvbackup.store.store import Store

MAGIC = b"hvL1"
HEAD = struct.Struct("<4sII")  # magic, length of what JSON says, packs
PACK = np.dtype([("pack", "V32"), ("live", "<u8"), ("total", "<u8")])
LEAVES_AHEAD = 256  # whose pages the disk fetches at once
LEAVES = 5_000  # compared in one run: 1 to 2 s of CPU


@dataclass(frozen=True, slots=True)
class Counts:
    """What a mark found, and the points that there have been since."""

    t: Instant  # of the mark
    shares: Mapping[str, Share]
    points: Mapping[str, Disks]  # by path


def save(store: Store, counts: Counts) -> None:
    """The next run finds these counts, unless the disk is full: they can be made again, and reclaim must work all the same."""
    points = {path: {disk: root.dump() for disk, root in disks.items()} for path, disks in counts.points.items()}
    told = json.dumps({"t": counts.t, "points": points}).encode()
    rows = np.zeros(len(counts.shares), PACK)
    for row, (name, share) in zip(rows, counts.shares.items(), strict=True):
        row["pack"], row["live"], row["total"] = np.void(bytes.fromhex(name)), share.live, share.total
    data = HEAD.pack(MAGIC, len(told), len(rows)) + told + rows.tobytes()
    with suppress(SpaceExhausted):
        store.state.replace(COUNTS, data + blake3.blake3(data).digest())


def load(store: Store) -> Counts | None:
    """The counts of an earlier run; None when there are none, or the file is not what was written."""
    try:
        data = store.state.read(COUNTS)
        magic, length, count = HEAD.unpack_from(data)
        if magic != MAGIC or blake3.blake3(data[:-32]).digest() != data[-32:]:
            return None
        told = parse_json(data[HEAD.size : HEAD.size + length])
        rows = np.frombuffer(data, PACK, count, HEAD.size + length)
        points = {p: {d: Root.load(r) for d, r in disks.items()} for p, disks in told["points"].items()}
        shares = {row["pack"].tobytes().hex(): Share(int(row["live"]), int(row["total"])) for row in rows}
        return Counts(Instant(int(told["t"])), shares, points)
    except (FileNotFoundError, StoreDamage, ValueError, TypeError, KeyError, AttributeError, struct.error):
        return None


def guess(store: Store, counts: Counts, pause: Pause) -> Counts | None:
    """The same as things are now, without a mark; None when somebody should look, because something can't be read."""
    try:
        there = {*forget.trash_paths(store), *(p for m in store.machine_folders() for p in store.point_paths(m))}
        points = {**counts.points, **dict(_learned(store, there.difference(counts.points)))}
        dead = _Dead(store)
        _compare(store, points, there, dead, counts.t, pause)
        shares = _shares_now(store, counts.shares, dead.found())
    except (StoreDamage, FileNotFoundError):
        return None
    return Counts(counts.t, shares, points)


def _learned(store: Store, paths: set[str]) -> Iterator[tuple[str, Disks]]:
    """Points that came since, so that they are known when they are forgotten."""
    for path in paths:
        trashed = not store.files.exists(path)
        yield path, disks_of(forget.load_trashed(store, path) if trashed else store.load_point(path))


def _shares_now(store: Store, old: Mapping[str, Share], dead: Mapping[str, int]) -> dict[str, Share]:
    shares = {}
    for pack in packs.list_packs(store.files):
        if (share := old.get(pack)) is None:
            plain = int(packs.read_footer(store.files, pack)["plain"].sum())
            share = Share(plain, plain)
        shares[pack] = Share(max(0, share.live - dead.get(pack, 0)), share.total)
    return shares


# -- comparing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Forgotten:
    """A map of a forgotten point, the one that it is compared with, and perhaps another one that keeps blocks as well."""

    mine: BlockMap
    other: BlockMap
    third: BlockMap | None


def _compare(store: Store, points: Mapping[str, Disks], there: set[str], dead: _Dead, salt: int, pause: Pause) -> None:
    """What only forgotten points have is told to `dead`."""
    count = sum(1 for x in _forgotten(store, points, there) for _ in x.mine.leaves_unlike(x.other))
    every = max(1, -(-count // LEAVES))
    dead.weight = every
    for x in _forgotten(store, points, there):
        unlike = x.mine.leaves_unlike(x.other)
        some = (u for u in unlike if u[1] != ZERO_CHUNK and (int.from_bytes(u[1][:4], "big") + salt) % every == 0)
        while together := list(islice(some, LEAVES_AHEAD)):
            store.chunks.expect([page for _, *both in together for page in both if page != ZERO_CHUNK])
            for number, mine, other in together:
                pause(2 * PAGE_BYTES)
                _compare_leaf(store, x.third, number, mine, other, dead)
    dead.settle()


def _compare_leaf(
    store: Store, third: BlockMap | None, number: int, mine: ChunkId, other: ChunkId, dead: _Dead
) -> None:
    ids = page_of(store.chunks.page(mine))
    unlike = ids.any(axis=1)
    if other != ZERO_CHUNK:
        unlike &= _differ(ids, page_of(store.chunks.page(other)))
    if third is not None:
        from_third = _differ(ids, third.ids(number * PAGE_IDS, PAGE_IDS))
        unlike &= from_third
        if not from_third.any():
            return  # it is the same page
    dead.page(mine)
    dead.blocks(ids[unlike])


def _differ(a: Ids, b: Ids) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (a.view("<u8") != b.view("<u8")).any(axis=1)
    return found


def _forgotten(store: Store, points: Mapping[str, Disks], there: set[str]) -> Iterator[_Forgotten]:
    """Every map of every point that is gone.

    It is compared with the next point of its machine that is there.  What it has in common with the point before it is that
    one's affair: if it is there, it keeps it, and if it is gone as well, it was compared already.
    """
    folders: dict[str, list[str]] = {}
    for path in sorted(points):
        folders.setdefault(path.rsplit("/", 1)[0], []).append(path)
    for paths in folders.values():
        after: Disks = {}
        later: list[Disks] = []
        for path in reversed(paths):
            later.append(after)
            after = points[path] if path in there else after
        before: Disks = {}
        for path, after in zip(paths, reversed(later), strict=True):
            for disk, root in points[path].items() if path not in there else ():
                yield _between(store, root, before.get(disk), after.get(disk))
            before = points[path]


def _between(store: Store, root: Root, before: Root | None, after: Root | None) -> _Forgotten:
    mine = _map(store, root)
    earlier = _map(store, before) if before else None
    if after:
        return _Forgotten(mine, _map(store, after), earlier)
    return _Forgotten(mine, earlier or BlockMap(ZERO_CHUNK, mine.blocks, store.chunks.page), None)


def _map(store: Store, root: Root) -> BlockMap:
    return BlockMap(root.id, -(-root.size // store.block), store.chunks.page)


@dataclass
class _Dead:
    """Bytes of plain chunks that nobody seems to need, by pack."""

    store: Store
    weight: int = 1  # one was looked at of so many
    _bytes: dict[str, int] = field(default_factory=dict)
    _waiting: list[Ids] = field(default_factory=list)
    _count: int = 0

    def page(self, chunk: ChunkId) -> None:
        for pack in {place.pack for place in self.store.index.everywhere(chunk)}:
            self._bytes[pack] = self._bytes.get(pack, 0) + PAGE_BYTES * self.weight

    def blocks(self, ids: Ids) -> None:
        self._waiting.append(ids)
        self._count += len(ids)
        if self._count >= BATCH_IDS:
            self.settle()

    def settle(self) -> None:
        """Everything that was said is counted when this returns."""
        if not self._count:
            return
        ids = np.unique(np.ascontiguousarray(np.concatenate(self._waiting)).view("S32").ravel()).view("V32")
        self._waiting, self._count = [], 0
        found = self.store.index.lookup(ids)
        found = found[found["pack"] != NOWHERE]
        sums = np.bincount(found["pack"], found["plain"].astype(np.float64))
        for number in np.flatnonzero(sums).tolist():
            pack = self.store.index.packs[number]
            self._bytes[pack] = self._bytes.get(pack, 0) + int(sums[number]) * self.weight

    def found(self) -> Mapping[str, int]:
        return self._bytes
