"""The block map of a disk: block number -> chunk id, as a tree of pages.

A page is 256 ids of 32 bytes; a leaf's ids name blocks, an interior page's ids name pages.  A map of `depth` levels has room
for 256**depth blocks, and the depth follows from the number of blocks, so it is stored nowhere.  Pages are chunks
themselves: maps share every page that did not change, and an all-zero page has the reserved id and is stored nowhere.

Maps are immutable; `MapEditor` makes the next one.  Blocks may be set in any order, but ascending order keeps one leaf in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from hvbackup.model import ZERO_CHUNK, ChunkId
from hvbackup.store.format.layout import ID_BYTES, PAGE_IDS

Ids = NDArray[np.uint8]  # shape (n, 32)
PAGE_BYTES = PAGE_IDS * ID_BYTES
LEAVES_CACHED = 1024  # of one map: 8 MiB
LoadPage = Callable[[ChunkId], bytes]  # raises ChunkDamaged
PutPage = Callable[[bytes], ChunkId]


def depth_of(blocks: int) -> int:
    """How many levels of pages a map of this many blocks has; at least one."""
    depth = 1
    while PAGE_IDS**depth < blocks:
        depth += 1
    return depth


def page_of(data: bytes) -> Ids:
    """The ids of a page."""
    return np.frombuffer(data, np.uint8).reshape(PAGE_IDS, ID_BYTES)


class BlockMap:
    """The map of one disk at one moment.  Thread safety: as safe as `load`."""

    def __init__(self, root: ChunkId, blocks: int, load: LoadPage) -> None:
        self.root, self.blocks, self.depth = root, blocks, depth_of(blocks)
        self._load = load
        self._leaves: dict[int, Ids | None] = {}  # recently used

    def ids(self, first: int, count: int) -> Ids:
        """The ids of blocks [first, first + count), zero beyond the end.  Raises ChunkDamaged."""
        out = np.zeros((count, ID_BYTES), np.uint8)
        for leaf in range(first // PAGE_IDS, -(-(first + count) // PAGE_IDS)):
            page = self._leaf(leaf)
            if page is not None:
                lo, hi = max(first, leaf * PAGE_IDS), min(first + count, (leaf + 1) * PAGE_IDS)
                out[lo - first : hi - first] = page[lo - leaf * PAGE_IDS : hi - leaf * PAGE_IDS]
        return out

    def id(self, block: int) -> bytes:
        """The id of one block.  Raises ChunkDamaged."""
        page = self._leaf(block // PAGE_IDS)
        return ZERO_CHUNK if page is None else page[block % PAGE_IDS].tobytes()

    def cached_id(self, block: int) -> bytes | None:
        """The id of a block whose leaf is in memory, else None."""
        leaf, leaves = block // PAGE_IDS, self._leaves
        if leaf not in leaves:
            return None
        page = leaves[leaf]
        return ZERO_CHUNK if page is None else page[block % PAGE_IDS].tobytes()

    def _leaf(self, leaf: int) -> Ids | None:
        """A leaf page, or None where all is zero."""
        leaves = self._leaves  # another thread may begin a new one at any moment; nothing is ever taken out of this one
        if leaf not in leaves:
            found = self._find_leaf(leaf)
            if len(leaves) >= LEAVES_CACHED:
                self._leaves = leaves = {}
            leaves[leaf] = found
        return leaves[leaf]

    def _find_leaf(self, leaf: int) -> Ids | None:
        at = self.root
        for level in range(self.depth - 1, -1, -1):
            if at == ZERO_CHUNK or leaf >= PAGE_IDS ** (self.depth - 1):
                return None
            page = page_of(self._load(at))
            if level == 0:
                return page
            at = ChunkId(page[leaf // PAGE_IDS ** (level - 1) % PAGE_IDS].tobytes())
        return None

    def leaves(self) -> Iterator[tuple[int, Ids]]:
        """(number of its first block, ids) of every leaf that is not all zero, ascending."""
        return self.leaves_in(0, self.blocks)

    def leaves_in(self, lo: int, hi: int) -> Iterator[tuple[int, Ids]]:
        """The same for the leaves that hold any of the blocks [lo, hi)."""
        return self._walk(self.root, self.depth - 1, 0, lo, hi)

    def leaves_backwards(self) -> Iterator[tuple[int, Ids]]:
        """The same as `leaves`, descending."""
        return self._walk_back(self.root, self.depth - 1, 0)

    def _walk_back(self, at: ChunkId, level: int, first: int) -> Iterator[tuple[int, Ids]]:
        page = page_of(self._load(at)) if at != ZERO_CHUNK else np.zeros((0, ID_BYTES), np.uint8)
        if level == 0 and len(page):
            yield first, page
            return
        for i in np.flatnonzero(page.any(axis=1))[::-1].tolist():
            yield from self._walk_back(ChunkId(page[i].tobytes()), level - 1, first + i * PAGE_IDS**level)

    def _walk(self, at: ChunkId, level: int, first: int, lo: int, hi: int) -> Iterator[tuple[int, Ids]]:
        if at == ZERO_CHUNK or first >= hi or first + PAGE_IDS ** (level + 1) <= lo:
            return
        page = page_of(self._load(at))
        if level == 0:
            yield first, page
            return
        for i in np.flatnonzero(page.any(axis=1)).tolist():
            yield from self._walk(ChunkId(page[i].tobytes()), level - 1, first + i * PAGE_IDS**level, lo, hi)

    def pages(self) -> Iterator[tuple[ChunkId, int]]:
        """(id, level) of every page, a parent before its children; level 0 are leaves.  Shared pages come again."""
        stack = [(self.root, self.depth - 1)]
        while stack:
            at, level = stack.pop()
            if at == ZERO_CHUNK:
                continue
            yield at, level
            if level:
                stack += [(ChunkId(i.tobytes()), level - 1) for i in page_of(self._load(at)) if i.any()]

    def diff(self, other: BlockMap) -> NDArray[np.int64]:
        """The numbers of blocks whose content differs, ascending; pages that both maps share are not read."""
        empty = bytes(PAGE_BYTES)
        found = [np.zeros(0, np.int64)]
        for leaf, mine, others in self.leaves_unlike(other):
            a, b = (page_of(empty if at == ZERO_CHUNK else self._load(at)) for at in (mine, others))
            found.append(np.flatnonzero((a != b).any(axis=1)) + leaf * PAGE_IDS)
        return np.concatenate(found)

    def leaves_unlike(self, other: BlockMap) -> Iterator[tuple[int, ChunkId, ChunkId]]:
        """(number of a leaf, its id here, its id there) where those differ, ascending; leaves themselves are not read."""
        depth = max(self.depth, other.depth)
        return _unlike(self._raised(depth), other._raised(depth))

    def _raised(self, depth: int) -> _Node:
        """The root as a node of a tree of at least this depth."""
        node = _Node(self._load, self.root, self.depth - 1)
        while node.level < depth - 1:
            node = _Node(self._load, ChunkId(b""), node.level + 1, only=node)
        return node


class _Node:
    """A page seen from `diff`; `only` makes a page that has just its first child, for trees of unequal depth."""

    def __init__(self, load: LoadPage, at: ChunkId, level: int, only: _Node | None = None) -> None:
        self.load, self.at, self.level, self.only = load, at, level, only

    def child(self, i: int) -> _Node:
        if self.only is not None:
            return self.only if i == 0 else _Node(self.load, ZERO_CHUNK, self.level - 1)
        return _Node(self.load, ChunkId(self.page()[i].tobytes()), self.level - 1)

    def page(self) -> Ids:
        return np.zeros((PAGE_IDS, ID_BYTES), np.uint8) if self.at == ZERO_CHUNK else page_of(self.load(self.at))

    def differing(self, other: _Node) -> list[int]:
        if self.only is not None or other.only is not None:
            return list(range(PAGE_IDS))
        found: list[int] = np.flatnonzero((self.page() != other.page()).any(axis=1)).tolist()
        return found


def _unlike(a: _Node, b: _Node, first: int = 0) -> Iterator[tuple[int, ChunkId, ChunkId]]:
    if a.at == b.at and a.only is None and b.only is None:
        return
    if a.level == 0:
        yield first, a.at, b.at
        return
    for i in a.differing(b):
        yield from _unlike(a.child(i), b.child(i), first + i * PAGE_IDS ** (a.level - 1))


class _Edited:
    """An interior page being edited: its ids, and the children that are being edited themselves."""

    __slots__ = ("children", "ids")

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self.children: dict[int, _Edited] = {}


class MapEditor:
    """Makes the next map of a disk out of the one before, which may have had another size.

    `zero` runs first, then `put` in ascending order: each leaf is stored when the next one begins.
    Thread safety: one thread.
    """

    def __init__(self, base: BlockMap | None, blocks: int, load: LoadPage, put: PutPage) -> None:
        self._load, self._put = load, put
        self.blocks, self._depth = blocks, depth_of(blocks)
        self._root = self._resized(base)
        self._leaf_number = -1
        self._leaf: Ids | None = None
        if base is not None and base.blocks > blocks:
            self.zero(blocks, PAGE_IDS**self._depth - blocks)

    def _resized(self, base: BlockMap | None) -> ChunkId | _Edited:
        """The old root as a root of the new depth."""
        if base is None or base.root == ZERO_CHUNK:
            return ZERO_CHUNK
        at, depth = base.root, base.depth
        while depth > self._depth and at != ZERO_CHUNK:
            at, depth = ChunkId(page_of(self._load(at))[0].tobytes()), depth - 1
        root: ChunkId | _Edited = at
        for _ in range(depth, self._depth):
            ids = np.zeros((PAGE_IDS, ID_BYTES), np.uint8)
            parent = _Edited(ids)
            if isinstance(root, _Edited):
                parent.children[0] = root
            else:
                ids[0] = np.frombuffer(root, np.uint8)
            root = parent
        return root

    def _open(self, at: ChunkId) -> _Edited:
        return _Edited(page_of(bytes(PAGE_BYTES) if at == ZERO_CHUNK else self._load(at)).copy())

    def _interior(self, leaf: int) -> tuple[_Edited, int]:
        """The lowest interior page above a leaf, opened for editing, and the leaf's place in it."""
        if not isinstance(self._root, _Edited):
            self._root = self._open(self._root)
        node = self._root
        for level in range(self._depth - 2, 0, -1):
            i = leaf // PAGE_IDS**level % PAGE_IDS
            if i not in node.children:
                node.children[i] = self._open(ChunkId(node.ids[i].tobytes()))
            node = node.children[i]
        return node, leaf % PAGE_IDS

    def zero(self, first: int, count: int) -> None:
        """Blocks [first, first + count) are zero."""
        self._settle_leaf()
        self._root = self._zeroed(self._root, self._depth - 1, 0, first, first + count)

    def _zeroed(self, node: ChunkId | _Edited, level: int, begin: int, lo: int, hi: int) -> ChunkId | _Edited:
        span = PAGE_IDS**level  # blocks below each id of this page
        if node == ZERO_CHUNK or hi <= begin or lo >= begin + span * PAGE_IDS:
            return node
        if lo <= begin and hi >= begin + span * PAGE_IDS:
            return ZERO_CHUNK
        edited = node if isinstance(node, _Edited) else self._open(node)
        whole_lo, whole_hi = max(0, -(-(lo - begin) // span)), min(PAGE_IDS, (hi - begin) // span)
        if whole_lo < whole_hi:
            edited.ids[whole_lo:whole_hi] = 0
            edited.children = {i: c for i, c in edited.children.items() if not whole_lo <= i < whole_hi}
        if level:
            for i in {(lo - begin) // span, (hi - 1 - begin) // span}:
                if 0 <= i < PAGE_IDS and not whole_lo <= i < whole_hi:
                    self._zero_child(edited, i, level, begin + i * span, lo, hi)
            return edited
        return self._put_page(edited.ids)

    def _zero_child(self, node: _Edited, i: int, level: int, begin: int, lo: int, hi: int) -> None:
        old: ChunkId | _Edited = node.children.get(i) or ChunkId(node.ids[i].tobytes())
        new = self._zeroed(old, level - 1, begin, lo, hi)
        if isinstance(new, _Edited):
            node.children[i] = new
        else:
            node.children.pop(i, None)
            node.ids[i] = np.frombuffer(new, np.uint8)

    def put(self, first: int, ids: Ids) -> None:
        """Blocks from `first` on have these ids."""
        done = 0
        while done < len(ids):
            leaf, at = divmod(first + done, PAGE_IDS)
            n = min(PAGE_IDS - at, len(ids) - done)
            self._at_leaf(leaf)[at : at + n] = ids[done : done + n]
            done += n

    def _at_leaf(self, leaf: int) -> Ids:
        if self._leaf is None or leaf != self._leaf_number:
            self._settle_leaf()
            if self._depth == 1:
                at = self._root if not isinstance(self._root, _Edited) else ZERO_CHUNK
            else:
                node, i = self._interior(leaf)
                at = ChunkId(node.ids[i].tobytes())
            self._leaf_number, self._leaf = leaf, self._open(at).ids
        return self._leaf

    def _settle_leaf(self) -> None:
        """Store the leaf being edited."""
        if self._leaf is None:
            return
        at = self._put_page(self._leaf)
        if self._depth == 1:
            self._root = at
        else:
            node, i = self._interior(self._leaf_number)
            node.ids[i] = np.frombuffer(at, np.uint8)
        self._leaf = None

    def _put_page(self, ids: Ids) -> ChunkId:
        return self._put(ids.tobytes()) if ids.any() else ZERO_CHUNK

    def finish(self) -> ChunkId:
        """The root of the new map; every page of it has been put."""
        self._settle_leaf()
        return self._settle(self._root)

    def _settle(self, node: ChunkId | _Edited) -> ChunkId:
        if not isinstance(node, _Edited):
            return node
        for i, child in node.children.items():
            node.ids[i] = np.frombuffer(self._settle(child), np.uint8)
        return self._put_page(node.ids)
