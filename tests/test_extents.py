"""Sets of byte ranges against plain Python sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvbackup import extents
from hvbackup.extents import Spans

SIZE = 200
ranges = st.lists(st.tuples(st.integers(0, SIZE), st.integers(-3, 40)), max_size=12)
grains = st.sampled_from([1, 2, 7, 16, 64, 256])


def members(a: Spans) -> set[int]:
    return {i for start, length in a.tolist() for i in range(start, start + length)}


def naive(pairs: list[tuple[int, int]]) -> set[int]:
    return {i for start, length in pairs for i in range(start, start + length)}


def canonical(a: Spans) -> bool:
    """Sorted, disjoint, not touching, none empty, of the right type."""
    ends, starts = a[:-1].sum(axis=1), a[1:, 0]
    return a.dtype == np.int64 and a.ndim == 2 and bool((a[:, 1] > 0).all()) and bool((starts > ends).all())


@given(ranges)
def test_spans_is_the_union(pairs: list[tuple[int, int]]) -> None:
    a = extents.spans(pairs)
    assert canonical(a)
    assert members(a) == naive(pairs)
    assert extents.total(a) == len(naive(pairs))
    assert np.array_equal(extents.spans(a), a)


@given(ranges, ranges)
def test_union_intersection_and_difference(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b = extents.spans(one), extents.spans(other)
    for found, expected in (
        (extents.union(a, b), naive(one) | naive(other)),
        (extents.intersect(a, b), naive(one) & naive(other)),
        (extents.subtract(a, b), naive(one) - naive(other)),
    ):
        assert canonical(found)
        assert members(found) == expected


@given(ranges, st.integers(0, SIZE + 50), st.integers(0, SIZE + 50))
def test_complement_and_clip(pairs: list[tuple[int, int]], start: int, end: int) -> None:
    inside = extents.clip(extents.spans(pairs), start, end)
    assert canonical(inside)
    assert members(inside) == {i for i in naive(pairs) if start <= i < end}
    rest = extents.complement(extents.clip(extents.spans(pairs), 0, end), end)
    assert canonical(rest)
    assert members(rest) == set(range(end)) - naive(pairs)


@given(ranges, grains, st.integers(1, SIZE + 50))
def test_align_grows_and_shrink_shrinks_to_whole_blocks(pairs: list[tuple[int, int]], grain: int, size: int) -> None:
    a = extents.clip(extents.spans(pairs), 0, size)
    blocks = [set(range(i, min(i + grain, size))) for i in range(0, size, grain)]
    grown, shrunk = extents.align(a, grain, size), extents.shrink(a, grain, size)
    assert canonical(grown)
    assert members(grown) == {i for b in blocks if b & members(a) for i in b}
    assert members(shrunk) == {i for b in blocks if b <= members(a) for i in b}


@given(ranges, grains)
def test_pieces_cover_the_set_in_order_and_cross_no_border(pairs: list[tuple[int, int]], grain: int) -> None:
    a = extents.spans(pairs)
    cut = list(extents.pieces(a, grain))
    assert naive(cut) == members(a)
    assert cut == sorted(cut)
    assert all(length > 0 and start // grain == (start + length - 1) // grain for start, length in cut)


def test_the_empty_set_and_the_whole() -> None:
    assert members(extents.whole(5)) == set(range(5))
    assert len(extents.whole(0)) == 0
    assert extents.total(extents.EMPTY) == 0
    assert members(extents.complement(extents.EMPTY, 3)) == {0, 1, 2}


@given(st.lists(st.tuples(st.integers(0, 1 << 46), st.integers(1, 1 << 40)), min_size=1, max_size=20))
def test_disks_of_64_tib_fit(pairs: list[tuple[int, int]]) -> None:
    size = 64 << 40
    a = extents.clip(extents.spans(pairs), 0, size)
    assert extents.total(a) + extents.total(extents.complement(a, size)) == size
    assert extents.total(extents.subtract(extents.whole(size), a)) == size - extents.total(a)
