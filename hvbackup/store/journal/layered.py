"""A view made of layers: the pieces of runs of facts, newest first, over a point's disk.

It has what `DiskView` has, so restore, export, boot and fold read it without knowing the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup import extents
from hvbackup.errors import UsageError
from hvbackup.extents import Spans
from hvbackup.model import Disk
from hvbackup.store.chunks.view import DiskView
from hvbackup.store.format.blockmap import Ids
from hvbackup.store.format.layout import ID_BYTES, PAGE_IDS
from hvbackup.store.journal.overlay import Table


@dataclass(frozen=True, slots=True)
class Layer:
    """What one run of facts leaves behind on a disk, and where its bytes are."""

    pieces: Table
    read: Callable[[int, int, int], bytes]  # (source, pos, length)


class LayeredView:
    """One disk at a moment of its journal, read-only.  Thread safety: every method from any thread."""

    read_only = True

    def __init__(self, base: DiskView | None, disk: Disk, block: int, key: bytes, layers: Sequence[Layer]) -> None:
        self.disk, self.size, self.block = disk, disk.size, block
        self.blocks = -(-disk.size // block)
        self._base, self._key, self._layers = base, key, layers

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.  Raises ChunkDamaged, UsageError beyond the end."""
        end = offset + len(buffer)
        if offset < 0 or end > self.size:
            raise UsageError(f"Disk {self.disk.id} ends at {self.size}; {len(buffer)} bytes at {offset} are not in it")
        missing = [(offset, end)]
        for layer in self._layers:
            if not missing:
                return
            missing = [rest for part in missing for rest in self._from_layer(layer, part, offset, buffer)]
        for lo, hi in missing:
            self._from_base(lo, hi, buffer[lo - offset : hi - offset])

    @staticmethod
    def _from_layer(layer: Layer, part: tuple[int, int], offset: int, buffer: memoryview) -> Iterator[tuple[int, int]]:
        """Take what a layer has of a part; yield the ranges it does not have."""
        at, end = part
        table = layer.pieces
        for i in table.within(at, end):
            start, pos = int(table.start[i]), int(table.pos[i])
            lo, hi = max(start, at), min(int(table.end[i]), end)
            if lo > at:
                yield at, lo
            target = buffer[lo - offset : hi - offset]
            target[:] = bytes(hi - lo) if pos < 0 else layer.read(int(table.source[i]), pos + lo - start, hi - lo)
            at = hi
        if at < end:
            yield at, end

    def _from_base(self, lo: int, hi: int, target: memoryview) -> None:
        known = min(hi, self._base.size) if self._base else lo
        if self._base and known > lo:
            self._base.read_into(lo, target[: known - lo])
        start = max(lo, known)
        target[start - lo :] = bytes(hi - start)

    def cached(self, offset: int, length: int) -> memoryview | None:
        """Bytes that are in memory: only where no layer has any."""
        if any(layer.pieces.within(offset, offset + length) for layer in self._layers):
            return None
        if self._base is None or offset + length > self._base.size:
            return None
        return self._base.cached(offset, length)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These (offset, length) are read soon; what layers have is near at hand, and fetched in vain."""
        if self._base is not None:
            size = self._base.size
            self._base.expect([(o, min(n, size - o)) for o, n in ranges if o < size])

    def touched(self) -> Spans:
        """Every range that any layer has."""
        return self._touched(0, self.size)

    def _touched(self, start: int, end: int) -> Spans:
        parts = []
        for layer in self._layers:
            found = layer.pieces.within(start, end)
            lo, hi = layer.pieces.start[found.start : found.stop], layer.pieces.end[found.start : found.stop]
            parts.append(np.column_stack([lo, hi - lo]))
        return extents.clip(extents.spans(np.concatenate(parts)), start, end) if parts else extents.EMPTY

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """(length, whether it may hold data) of the runs that make up [offset, offset + length)."""
        end = min(offset + length, self.size)
        data = extents.union(self._base_data(offset, end), self._touched(offset, end))
        at = offset
        for start, size in data.tolist():
            if start > at:
                yield start - at, False
            yield size, True
            at = start + size
        if at < end:
            yield end - at, False

    def _base_data(self, offset: int, end: int) -> Spans:
        if self._base is None or offset >= self._base.size:
            return extents.EMPTY
        at, found = offset, []
        for length, data in self._base.runs(offset, min(end, self._base.size) - offset):
            if data:
                found.append((at, length))
            at += length
        return extents.spans(found)

    def leaves(self) -> Iterator[tuple[int, Ids]]:
        """(first block, ids of 256 blocks) of every part that may hold data; ids of touched blocks are made here."""
        data = extents.align(extents.spans([(o, n) for o, n in self._data_runs()]), PAGE_IDS * self.block, self.size)
        for offset, _ in extents.pieces(data, PAGE_IDS * self.block):
            first = offset // self.block
            yield first, self._ids(first)

    def _data_runs(self) -> Iterator[tuple[int, int]]:
        at = 0
        for length, data in self.runs(0, self.size):
            if data:
                yield at, length
            at += length

    def _ids(self, first: int) -> Ids:
        """Ids of a leaf: the point's where no layer has anything, else those of what is there now."""
        ids = np.zeros((PAGE_IDS, ID_BYTES), np.uint8)
        count = min(PAGE_IDS, self.blocks - first)
        known = max(0, min(count, self._base.blocks - first)) if self._base else 0
        if self._base and known:
            ids[:known] = self._base.map.ids(first, known)
        for i in np.flatnonzero(self._is_touched(first)[:count]).tolist():
            data = self._block(first + i)
            digest = blake3.blake3(data, key=self._key).digest() if any(data) else bytes(ID_BYTES)
            ids[i] = np.frombuffer(digest, np.uint8)
        return ids

    def _is_touched(self, first: int) -> NDArray[np.bool_]:
        """Which blocks of a leaf any layer, or another end of the disk, has changed."""
        touched = np.zeros(PAGE_IDS, np.bool_)
        end = min(self.size, (first + PAGE_IDS) * self.block)
        for start, length in self._touched(first * self.block, end).tolist():
            touched[start // self.block - first : -(-(start + length) // self.block) - first] = True
        if self._base and self._base.size != self.size:
            edge = min(self._base.size, self.size) // self.block - first
            if 0 <= edge < PAGE_IDS:
                touched[edge] = True
        return touched

    def _block(self, number: int) -> bytearray:
        """A block, padded with zeroes behind the end of the disk."""
        data = bytearray(self.block)
        length = min(self.block, self.size - number * self.block)
        self.read_into(number * self.block, memoryview(data)[:length])
        return data

    def contents(self, first: int, ids: Ids) -> Iterator[tuple[int, memoryview]]:
        """(offset on the disk, bytes) of every block of a leaf whose id is not zero, clipped at the end of the disk."""
        some = np.flatnonzero(ids.any(axis=1))
        return self.contents_of(first + some, np.ascontiguousarray(ids[some]))

    def contents_of(self, blocks: NDArray[np.int64], ids: Ids) -> Iterator[tuple[int, memoryview]]:
        """The same of any blocks, whose ids are not zero."""
        touched = self._touched_among(blocks)
        for number in blocks[touched].tolist():
            offset = number * self.block
            yield offset, memoryview(self._block(number))[: self.size - offset]
        if self._base and not touched.all():
            yield from self._base.contents_of(blocks[~touched], np.ascontiguousarray(ids[~touched]))

    def _touched_among(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the blocks any layer has changed."""
        out, leaves = np.zeros(len(blocks), np.bool_), blocks // PAGE_IDS
        for leaf in np.unique(leaves).tolist():
            here = leaves == leaf
            out[here] = self._is_touched(leaf * PAGE_IDS)[blocks[here] % PAGE_IDS]
        return out

    def reading_order(self, ids: Ids) -> NDArray[np.int64]:
        """In which order these blocks, whose ids are not zero, are read best."""
        return self._base.reading_order(ids) if self._base else np.arange(len(ids))
