"""Trackers can lie: some of what they call unchanged is read again and compared.

At every cycle a few pieces of each disk are read: those that were read at an earlier one must be as they were, for as long as the
tracker does not name them.  Once a minute whole blocks are compared with the journal's newest moment as well, which opening costs
as much as a cycle; only that says that the moments until then are good.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping

from blake3 import blake3

from hvbackup import extents
from hvbackup.capture import sampled
from hvbackup.copying import read_all
from hvbackup.extents import Spans
from hvbackup.hypervisors import Changes, FrozenDisk
from hvbackup.model import SECOND, DiskId, Instant, KiB
from hvbackup.protect.events import TrackerLied
from hvbackup.store.history import History, Moment
from hvbackup.store.store import Store

PIECE_BYTES = 4 * KiB  # read at each cycle: little, so that a cycle stays short
REMEMBERED = 64  # pieces of each disk
COMPARE_EVERY_NS = 60 * SECOND


class Samples:
    """What is known of a few pieces of one machine's disks.  Thread safety: one thread."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self._count, self._rng = count, rng
        self._known: dict[DiskId, dict[int, bytes]] = {}  # offset -> digest
        self._compared: Instant | None = None  # the time of the moment that was compared last

    def due(self, t: Instant) -> bool:
        """Whether it is time to compare with the journal."""
        return bool(self._count) and (self._compared is None or t - self._compared >= COMPARE_EVERY_NS)

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

    def compare(
        self, store: Store, machine_history: History, newest: Moment, disk: FrozenDisk, changes: Changes
    ) -> int:
        """How many blocks of a disk were compared with the journal's newest moment.  Raises TrackerLied."""
        view, block = machine_history.view(newest, disk.disk.id), store.block
        same = _unchanged(changes, block, view.size)
        picked = sampled(same, block, self._count, self._rng).tolist()
        with contextlib.closing(disk.open()) as reader:
            for offset, length in picked:
                now, before = bytearray(length), bytearray(length)
                reader.read_into(offset, memoryview(now))
                view.read_into(offset, memoryview(before))
                if now != before:
                    raise _lie(disk, offset)
        return len(picked)

    def compared(self, t: Instant) -> None:
        """All disks were as the tracker said at this moment."""
        self._compared = t


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
