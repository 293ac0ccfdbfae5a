"""A disk as it was at one moment, read-only: the one way out of the store for every kind of recovery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import UsageError
from hvbackup.model import ZERO_CHUNK, DiskRoot
from hvbackup.store.chunks.reader import ChunkReader
from hvbackup.store.format.blockmap import BlockMap, Ids
from hvbackup.store.format.layout import PAGE_IDS

MANY_BLOCKS = 16  # from here on reading neighbours together saves more than looking up all of them at once costs


class DiskView:
    """One disk of a recovery point.

    Every byte handed out has been verified against its chunk's id.  Thread safety: every method from any thread.
    """

    read_only = True

    def __init__(self, chunks: ChunkReader, root: DiskRoot, block: int) -> None:
        self.disk, self.size, self.block = root.disk, root.disk.size, block
        self.blocks = -(-self.size // block)
        self.map = BlockMap(root.root, self.blocks, chunks.page)
        self._chunks = chunks
        self._zeroes = bytes(block)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.  Raises ChunkDamaged, UsageError beyond the end."""
        length = len(buffer)
        if offset < 0 or offset + length > self.size:
            raise UsageError(f"Disk {self.disk.id} ends at {self.size}; {length} bytes at {offset} are not in it")
        first = offset // self.block
        last = (offset + length - 1) // self.block
        if last - first >= MANY_BLOCKS:
            self._read_many(offset, buffer, first, last)
            return
        done = 0
        while done < length:
            number, inside = divmod(offset + done, self.block)
            n = min(self.block - inside, length - done)
            chunk = self.map.id(number)
            data = bytes(n) if chunk == ZERO_CHUNK else self._chunks.block(chunk)[inside : inside + n]
            buffer[done : done + n] = data
            done += n

    def cached(self, offset: int, length: int) -> memoryview | None:
        """The bytes of a range inside one block when they are in memory, else None; never reads a file."""
        number, inside = divmod(offset, self.block)
        chunk = self.map.cached_id(number)
        if chunk is None or inside + length > self.block:
            return None
        if chunk == ZERO_CHUNK:
            return memoryview(self._zeroes)[:length]
        data = self._chunks.cached(chunk)
        return None if data is None else memoryview(data)[inside : inside + length]

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These (offset, length) are read soon.  Never raises; only what the map pages in memory tell of is fetched."""
        blocks = {b for o, n in ranges for b in range(o // self.block, min(o + n, self.size - 1) // self.block + 1)}
        found = [self.map.cached_id(b) for b in blocks]
        self._chunks.expect([chunk for chunk in found if chunk is not None and chunk != ZERO_CHUNK])

    def _read_many(self, offset: int, buffer: memoryview, first: int, last: int) -> None:
        ids = self.map.ids(first, last - first + 1)
        some = np.flatnonzero(ids.any(axis=1))
        np.frombuffer(buffer, np.uint8)[:] = 0
        for row, data in self._chunks.blocks(np.ascontiguousarray(ids[some])):
            begin = (first + int(some[row])) * self.block - offset
            lo, hi = max(0, -begin), min(len(data), len(buffer) - begin)
            buffer[begin + lo : begin + hi] = data[lo:hi]

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """(length, whether it holds data) of the runs that make up [offset, offset + length).

        A run without data reads as zeroes and is stored nowhere.
        """
        end, at = min(offset + length, self.size), offset
        for start, stop in self._data_runs(offset, end):
            if start > at:
                yield start - at, False
            yield stop - start, True
            at = stop
        if at < end:
            yield end - at, False

    def _data_runs(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Byte ranges within [offset, end) that hold data, joined."""
        run: tuple[int, int] | None = None
        for first, ids in self.map.leaves_in(offset // self.block, -(-end // self.block)):
            edges = np.flatnonzero(np.diff(np.r_[False, ids.any(axis=1), False].astype(np.int8)))
            for lo, hi in edges.reshape(-1, 2).tolist():
                start = max(offset, (first + lo) * self.block)
                stop = min(end, (first + hi) * self.block)
                if start >= stop:
                    continue
                if run and run[1] == start:
                    run = (run[0], stop)
                else:
                    if run:
                        yield run
                    run = (start, stop)
        if run:
            yield run

    def leaves(self) -> Iterator[tuple[int, Ids]]:
        """(first block, ids of 256 blocks) of every part of the disk that is not all zero: how a restore walks it."""
        return self.map.leaves()

    def contents(self, first: int, ids: Ids) -> Iterator[tuple[int, memoryview]]:
        """(offset on the disk, bytes) of every block of a leaf that is not zero, clipped at the end of the disk."""
        some = np.flatnonzero(ids.any(axis=1))
        return self.contents_of(first + some, np.ascontiguousarray(ids[some]))

    def contents_of(self, blocks: NDArray[np.int64], ids: Ids) -> Iterator[tuple[int, memoryview]]:
        """The same of any blocks, whose ids are not zero."""
        for row, data in self._chunks.blocks(ids):
            offset = int(blocks[row]) * self.block
            yield offset, data[: max(0, self.size - offset)]

    def reading_order(self, ids: Ids) -> NDArray[np.int64]:
        """In which order these blocks, whose ids are not zero, are read best: as the packs have them."""
        return self._chunks.reading_order(ids)


def leaf_count(size: int, block: int) -> int:
    """How many leaves the map of a disk of this size has at most."""
    return -(-size // (block * PAGE_IDS))
