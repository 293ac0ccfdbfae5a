"""Sets of byte ranges, as arrays: pure, and fast enough for millions of ranges.

`Spans` is an int64 array of shape (n, 2): start and length in bytes, sorted by start, disjoint, not touching, none empty.
Every function returns such an array; `spans()` makes one from anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.int64]

EMPTY: Spans = np.zeros((0, 2), np.int64)
EMPTY.setflags(write=False)


def spans(ranges: Iterable[tuple[int, int]] | Spans) -> Spans:
    """The union of (start, length) ranges in any order, overlapping or not."""
    rows = np.asarray(ranges if isinstance(ranges, np.ndarray) else list(ranges), np.int64).reshape(-1, 2)
    rows = rows[rows[:, 1] > 0]
    if len(rows) == 0:
        return EMPTY
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return _from_bounds(rows[:, 0], np.maximum.accumulate(rows.sum(axis=1)))


def _from_bounds(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Spans:
    """Join ranges that touch or overlap; `ends` is the running maximum."""
    new = np.flatnonzero(np.r_[True, starts[1:] > ends[:-1]])
    last = np.r_[new[1:], len(starts)] - 1
    return np.column_stack([starts[new], ends[last] - starts[new]])


def whole(size: int) -> Spans:
    """The set of all bytes of a disk."""
    return spans([(0, size)])


def total(a: Spans) -> int:
    """How many bytes the set has."""
    return int(a[:, 1].sum())


def union(a: Spans, b: Spans) -> Spans:
    """Bytes in either set."""
    return spans(np.concatenate([a, b]))


def complement(a: Spans, size: int) -> Spans:
    """Bytes of [0, size) not in the set."""
    ends = np.r_[np.int64(0), a.sum(axis=1)]
    starts = np.r_[a[:, 0], np.int64(size)]
    rows = np.column_stack([ends, starts - ends])
    return rows[rows[:, 1] > 0]


def subtract(a: Spans, b: Spans) -> Spans:
    """Bytes in `a` and not in `b`."""
    if len(a) == 0 or len(b) == 0:
        return a
    size = int(max(a[-1].sum(), b[-1].sum()))
    return intersect(a, complement(b, size))


def intersect(a: Spans, b: Spans) -> Spans:
    """Bytes in both sets."""
    if len(a) == 0 or len(b) == 0:
        return EMPTY
    # Between two neighbouring bounds nothing begins or ends, so membership is decided once for each piece.
    bounds = np.sort(np.concatenate([a[:, 0], a.sum(axis=1), b[:, 0], b.sum(axis=1)]))
    bounds = bounds[np.r_[True, bounds[1:] != bounds[:-1]]]  # np.unique, which would load numpy.ma
    inside = _covers(a, bounds[:-1]) & _covers(b, bounds[:-1])
    rows = np.column_stack([bounds[:-1], np.diff(bounds)])[inside]
    return spans(rows)


def _covers(a: Spans, points: NDArray[np.int64]) -> NDArray[np.bool_]:
    at = np.searchsorted(a[:, 0], points, side="right") - 1
    inside: NDArray[np.bool_] = (at >= 0) & (points < a[at].sum(axis=1))
    return inside


def clip(a: Spans, start: int, end: int) -> Spans:
    """Bytes of the set within [start, end)."""
    lo = np.maximum(a[:, 0], start)
    hi = np.minimum(a.sum(axis=1), end)
    rows = np.column_stack([lo, hi - lo])
    return rows[rows[:, 1] > 0]


def align(a: Spans, grain: int, size: int) -> Spans:
    """The set grown to whole blocks of `grain` bytes; the last block of a disk ends at `size`."""
    starts = a[:, 0] // grain * grain
    ends = np.minimum(-(-a.sum(axis=1) // grain) * grain, size)
    return spans(np.column_stack([starts, ends - starts]))


def shrink(a: Spans, grain: int, size: int) -> Spans:
    """The whole blocks of `grain` bytes that lie inside the set; a short last block counts when it is covered."""
    starts = -(-a[:, 0] // grain) * grain
    ends = a.sum(axis=1)
    ends = np.where(ends >= size, size, ends // grain * grain)
    rows = np.column_stack([starts, ends - starts])
    return rows[rows[:, 1] > 0]


def pieces(a: Spans, grain: int) -> Iterator[tuple[int, int]]:
    """The set cut at every multiple of `grain`, in order: (start, length) with length <= grain."""
    for start, length in a.tolist():
        end = start + length
        while start < end:
            stop = min(end, (start // grain + 1) * grain)
            yield start, stop - start
            start = stop
