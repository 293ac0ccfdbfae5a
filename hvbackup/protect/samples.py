"""Trackers can lie: some of what they call unchanged is read again and compared.

At every cycle a few pieces of each disk are read: those that were read at an earlier one must be as they were, for as long as the
tracker does not name them.  Once a minute whole blocks are compared with the journal's newest moment as well, which opening costs
as much as a cycle; only that says that the moments until then are good.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence

from blake3 import blake3

from hvbackup import extents
from hvbackup.copying import read_all
from hvbackup.extents import Spans
from hvbackup.hypervisors import Changes, FrozenDisk, Reader
from hvbackup.model import SECOND, Disk, DiskId, Instant, KiB
from hvbackup.protect.events import TrackerLied
from hvbackup.sampling import sampled
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.journal.layered import LayeredView

PIECE_BYTES = 4 * KiB  # read at each cycle: little, so that a cycle stays short
REMEMBERED = 64  # pieces of each disk
COMPARE_EVERY_NS = 60 * SECOND

Content = dict[DiskId, dict[int, bytes]]  # offset -> bytes


class Samples:
    """What is known of a few pieces of one machine's disks.  Thread safety: one thread."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self._count, self._rng = count, rng
        self._known: dict[DiskId, dict[int, bytes]] = {}  # offset -> digest
        self._compared: Instant | None = None  # when blocks were compared last

    def due(self, t: Instant) -> bool:
        """Whether it is time to compare with the journal."""
        if not self._count or self._compared is None:
            return bool(self._count)
        return not 0 <= t - self._compared < COMPARE_EVERY_NS  # less than nothing: the clock was set back

    def look(self, disk: FrozenDisk, changes: Changes) -> None:
        """Read some pieces of a disk again, and remember some more.  Raises TrackerLied."""
        if not self._count:
            return
        known = self._known.setdefault(disk.disk.id, {})
        same = _unchanged(changes, PIECE_BYTES, disk.disk.size)
        kept = _inside(same, known)
        for offset in known.keys() - kept:
            del known[offset]
        again = self._rng.sample(sorted(kept), min(self._count, len(kept)))
        fresh = sampled(same, PIECE_BYTES, self._count if len(known) < REMEMBERED else 0, self._rng)
        offsets = {*again, *(offset for offset, _ in extents.pieces(fresh, PIECE_BYTES))}
        wanted = {offset: min(PIECE_BYTES, disk.disk.size - offset) for offset in offsets}
        for offset, digest in _digests(disk, wanted).items():
            if known.setdefault(offset, digest) != digest:
                raise _lie(disk, offset)

    def picked(self, history: History, newest: Moment, disks: Sequence[Disk], block: int) -> Content:
        """Some blocks of each disk as they were at the newest moment, wherever it is: read before the machine is frozen."""
        found: Content = {}
        for disk in disks:
            view = history.view(newest, disk.id)
            rows = sampled(extents.whole(view.size), block, self._count, self._rng)
            found[disk.id] = {offset: bytes(_read(view, offset, n)) for offset, n in extents.pieces(rows, block)}
        return found

    def compare(self, picked: Mapping[int, bytes], disk: FrozenDisk, changes: Changes) -> int:
        """How many of the picked blocks of a disk are called unchanged, and are as they were.  Raises TrackerLied."""
        changed = extents.union(changes.data, changes.zero)
        same = {o for o, data in picked.items() if not len(extents.intersect(changed, extents.spans([(o, len(data))])))}
        with contextlib.closing(disk.open()) as reader:
            for offset in sorted(same):
                if _read(reader, offset, len(picked[offset])) != picked[offset]:
                    raise _lie(disk, offset)
        return len(same)

    def compared(self, t: Instant) -> None:
        """All disks were as the tracker said, now."""
        self._compared = t


def _read(reader: Reader | LayeredView, offset: int, length: int) -> bytearray:
    found = bytearray(length)
    reader.read_into(offset, memoryview(found))
    return found


def _unchanged(changes: Changes, piece: int, size: int) -> Spans:
    """The pieces in which nothing is called changed."""
    changed = extents.align(extents.union(changes.data, changes.zero), piece, size)
    return extents.complement(changed, size)


def _inside(same: Spans, known: Mapping[int, bytes]) -> set[int]:
    """The offsets that lie in any of the ranges."""
    rows = same[:, 0].searchsorted(list(known), side="right") - 1
    return {o for o, row in zip(known, rows.tolist(), strict=True) if row >= 0 and o < int(same[row].sum())}


def _digests(disk: FrozenDisk, wanted: Mapping[int, int]) -> dict[int, bytes]:
    if not wanted:
        return {}
    runs = sorted(wanted.items())
    buffer = memoryview(bytearray(sum(wanted.values())))
    with contextlib.closing(disk.open()) as reader:
        read_all(reader, runs, buffer)
    found, at = {}, 0
    for offset, length in runs:
        found[offset] = blake3(buffer[at : at + length]).digest()
        at += length
    return found


def _lie(disk: FrozenDisk, offset: int) -> TrackerLied:
    return TrackerLied(
        f"Disk {disk.disk.id}: the block at {offset} was called unchanged and had changed; all disks are compared whole"
    )
