"""Pieces: what a run of facts leaves behind on one disk, as sorted ranges that do not overlap.  Pure.

The latest fact wins.  Pieces of a later run can be laid over those of an earlier one: the result is what both leave behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvbackup.store.format.columns import Numbers

PIECE = np.dtype(
    [
        ("start", "<i8"),  # bytes on the disk
        ("end", "<i8"),
        ("pos", "<i8"),  # where the bytes of `start` are in the source; -1: zeroes
        ("source", "<i4"),  # number of the segment that holds them
    ]
)
Pieces = NDArray[np.void]
COLUMNS = ("start", "end", "pos", "source")
NOTHING: Pieces = np.zeros(0, PIECE)
CELLS_AT_ONCE = 4_000_000  # bounds memory where a few large ranges cover many small ones


def laid(pieces: Pieces) -> Pieces:
    """What `pieces`, which may overlap, leave behind when each is laid over those before it."""
    pieces = pieces[pieces["end"] > pieces["start"]]
    if len(pieces) == 0:
        return NOTHING
    bounds = np.unique(np.concatenate([pieces["start"], pieces["end"]]))
    first = np.searchsorted(bounds, pieces["start"])
    count = np.searchsorted(bounds, pieces["end"]) - first
    owner = _owners(first, count, len(bounds) - 1)
    # Neighbouring cells of one owner are one piece again.
    new = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    ends = np.r_[new[1:], len(owner)]
    some = owner[new] >= 0
    new, ends = new[some], ends[some]
    out = pieces[owner[new]].copy()
    start = bounds[new]
    out["pos"] = np.where(out["pos"] < 0, -1, out["pos"] + (start - out["start"]))
    out["start"], out["end"] = start, bounds[ends]
    return out


def _owners(first: NDArray[np.int64], count: NDArray[np.int64], cells: int) -> NDArray[np.int64]:
    """For each cell the last range [first, first + count) that covers it, or -1."""
    owner = np.full(cells, -1, np.int64)
    numbers = np.arange(len(first))
    alone = count == 1
    np.maximum.at(owner, first[alone], numbers[alone])
    wide = numbers[~alone]
    ends = np.cumsum(count[wide])
    at = 0
    while at < len(wide):
        until = max(at + 1, int(np.searchsorted(ends, (ends[at - 1] if at else 0) + CELLS_AT_ONCE, side="right")))
        part = wide[at:until]
        n = count[part]
        offsets = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
        np.maximum.at(owner, np.repeat(first[part], n) + offsets, np.repeat(part, n))
        at = until
    return owner


@dataclass(frozen=True, slots=True)
class Table:
    """Pieces, a column at a time: what is searched lies together, so a table in a file is mapped and barely touched."""

    start: Numbers
    end: Numbers
    pos: Numbers
    source: Numbers

    @classmethod
    def of(cls, pieces: Pieces) -> Table:
        """The same pieces."""
        return cls(*(np.ascontiguousarray(pieces[name]) for name in COLUMNS))

    def __len__(self) -> int:
        return len(self.start)

    def pieces(self) -> Pieces:
        """The same pieces, as rows."""
        out = np.zeros(len(self), PIECE)
        for name in COLUMNS:
            out[name] = getattr(self, name)[:]
        return out

    def within(self, start: int, end: int) -> range:
        """The numbers of the pieces that have bytes in [start, end)."""
        return range(int(self.end.searchsorted(start, side="right")), int(self.start.searchsorted(end, side="left")))
