"""Exports for the tests: a disk in memory, and one that misbehaves on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from hvbackup.nbd.export import Export
from hvbackup.nbd.protocol import BASE_ALLOCATION, STATE_DIRTY, STATE_HOLE, STATE_ZERO

DIRTY = "qemu:dirty-bitmap:changed"


class MemoryExport(Export):
    """A writable disk in memory that reports zero grains as holes and remembers which grains were written."""

    read_only = False

    def __init__(self, size: int, *, grain: int = 4096, contexts: tuple[str, ...] = (BASE_ALLOCATION, DIRTY)) -> None:
        self.size = size
        self.grain = grain
        self.contexts = contexts
        self.data = bytearray(size)
        self.dirty: set[int] = set()
        self.flushes = 0
        self.trims: list[tuple[int, int]] = []

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = memoryview(self.data)[offset : offset + len(target)]

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.data[offset : offset + len(data)] = data
        self.dirty.update(range(offset // self.grain, -(-(offset + len(data)) // self.grain)))
        self.flushes += fua

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        self.trims.append((offset, length))

    def flush(self) -> None:
        self.flushes += 1

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for start, end in self._grains(offset, length):
            first = start // self.grain * self.grain
            yield end - start, 0 if any(self.data[first : first + self.grain]) else STATE_HOLE | STATE_ZERO

    def context_extents(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        assert context == DIRTY
        for start, end in self._grains(offset, length):
            yield end - start, STATE_DIRTY if start // self.grain in self.dirty else 0

    def _grains(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        end = offset + length
        while offset < end:
            stop = min(self.size, (offset // self.grain + 1) * self.grain)
            yield offset, stop
            offset = stop


class CachedExport(MemoryExport):
    """The same, with every other 64 KiB at hand without a worker."""

    def try_read_cached(self, offset: int, length: int) -> memoryview | None:
        return memoryview(self.data)[offset : offset + length] if offset // 65536 % 2 else None


class TrickExport(MemoryExport):
    """Runs a hook before each read: to fail, to wait, to count."""

    def __init__(self, size: int, hook: Callable[[int, int], None]) -> None:
        super().__init__(size)
        self.hook = hook
        self.inside = 0
        self.most_inside = 0
        self._lock = threading.Lock()

    def read_into(self, offset: int, target: memoryview) -> None:
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        try:
            self.hook(offset, len(target))
            super().read_into(offset, target)
        finally:
            with self._lock:
                self.inside -= 1
