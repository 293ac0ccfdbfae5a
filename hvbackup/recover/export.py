"""Export: views as read-only NBD exports, one for each disk, named by the disk's id."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hvbackup.model import DiskRoot, RecoveryPoint
from hvbackup.nbd.export import Export
from hvbackup.nbd.protocol import STATE_HOLE, STATE_ZERO
from hvbackup.store.chunks.view import DiskView
from hvbackup.store.journal.layered import LayeredView


class ViewExport(Export):
    """One view as the NBD server sees it."""

    read_only = True

    def __init__(self, view: DiskView | LayeredView, description: str = "") -> None:
        self.size, self.description = view.size, description
        self.preferred_block = view.block
        self._view = view

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes at `offset`.  Raises ChunkDamaged."""
        self._view.read_into(offset, target)

    def try_read_cached(self, offset: int, length: int) -> memoryview | None:
        """The bytes of a read inside one block, when the block is in memory."""
        return self._view.cached(offset, length)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Blocks that are read soon are fetched at once."""
        self._view.expect(ranges)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Runs of data, and of holes that read as zeroes."""
        return ((n, 0 if data else STATE_HOLE | STATE_ZERO) for n, data in self._view.runs(offset, length))


def exports(
    point: RecoveryPoint, disks: Sequence[DiskRoot], view: Callable[[DiskRoot], DiskView | LayeredView]
) -> dict[str, Export]:
    """An export for each disk, by its id."""
    when = f"{point.machine.name} at {point.id}"
    return {d.disk.id: ViewExport(view(d), f"disk {d.disk.id} of {when}") for d in disks}
