"""Walks the maps of points, visiting what many points share once, and says what of each disk is lost."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged
from hvbackup.model import ChunkId, DiskRoot
from hvbackup.store.format import layout as f
from hvbackup.store.format.blockmap import BlockMap, Ids
from hvbackup.store.index.index import NOWHERE
from hvbackup.store.store import Store

EXTENTS_MAX = 1000  # of one disk are told one by one; the rest are counted
PAGES_MAX = 1 << 20  # remembered as whole: 100 MB; forgetting some costs another look

Seen = Callable[[NDArray[np.void]], None]  # gets the LOCATIONs of blocks that are there


@dataclass(slots=True)
class Lost:
    """What of one disk can't be read: extents, joined."""

    extents: list[tuple[int, int]] = field(default_factory=list)  # (offset, length), the first EXTENTS_MAX of them
    count: int = 0
    bytes: int = 0
    _end: int = -1

    def add(self, offset: int, length: int) -> None:
        """One more, behind the others."""
        self.bytes += length
        if offset == self._end and self.count <= EXTENTS_MAX:
            self.extents[-1] = (self.extents[-1][0], self.extents[-1][1] + length)
        elif offset != self._end:
            self.count += 1
            if self.count <= EXTENTS_MAX:
                self.extents.append((offset, length))
        self._end = offset + length


class Walk:
    """Walks maps.  Thread safety: one thread."""

    def __init__(self, store: Store, seen: Seen | None = None) -> None:
        self._store, self._seen = store, seen
        self._whole: OrderedDict[bytes, None] = OrderedDict()  # pages below which everything is there

    def disk(self, root: DiskRoot) -> Lost:
        """What is lost of a disk."""
        lost = Lost()
        for first, count in self.lost_blocks(root):
            start = first * self._store.block
            end = min((first + count) * self._store.block, root.disk.size)
            if end > start:
                lost.add(start, end - start)
        return lost

    def lost_blocks(self, root: DiskRoot) -> Iterator[tuple[int, int]]:
        """(first block, number of blocks) of what is lost, in order."""
        tree = BlockMap(root.root, -(-root.disk.size // self._store.block), self._store.chunks.page)
        yield from self._page(root.root, tree.depth - 1, 0)

    def _page(self, at: ChunkId, level: int, first: int) -> Iterator[tuple[int, int]]:
        if not any(at) or at in self._whole:
            return
        span = f.PAGE_IDS**level
        try:
            ids = np.frombuffer(self._store.chunks.page(at), np.uint8).reshape(f.PAGE_IDS, f.ID_BYTES)
        except ChunkDamaged:
            yield first, span * f.PAGE_IDS
            return
        broken = False
        for lost in self._leaf(ids, first) if level == 0 else self._below(ids, level, first, span):
            broken = True
            yield lost
        if not broken:
            self._whole[at] = None
            if len(self._whole) > PAGES_MAX:
                self._whole.popitem(last=False)

    def _below(self, ids: Ids, level: int, first: int, span: int) -> Iterator[tuple[int, int]]:
        for i in np.flatnonzero(ids.any(axis=1)).tolist():
            yield from self._page(ChunkId(ids[i].tobytes()), level - 1, first + i * span)

    def _leaf(self, ids: Ids, first: int) -> Iterator[tuple[int, int]]:
        some = np.flatnonzero(ids.any(axis=1))
        places = self._store.index.lookup(np.ascontiguousarray(ids[some]).view("V32").ravel())
        missing = places["pack"] == NOWHERE
        if self._seen is not None:
            self._seen(places[~missing])
        for i in some[missing].tolist():
            yield first + i, 1
