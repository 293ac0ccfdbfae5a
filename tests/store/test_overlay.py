"""Pieces laid over each other, against a bytearray."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.store.journal import overlay
from hvbackup.store.journal.overlay import PIECE, Pieces, Table, laid

SIZE = 64
ranges = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE), st.booleans()),
    max_size=12,
)


def made(drawn: list[tuple[int, int, bool]]) -> Pieces:
    """Pieces in which every byte of the source is unique, so that a wrong position shows."""
    rows = [
        (start, min(SIZE, start + length), -1 if zero else 1000 * (i + 1), i)
        for i, (start, length, zero) in enumerate(drawn)
    ]
    return np.array(rows, PIECE)


def painted(pieces: Pieces) -> list[object]:
    image: list[object] = [None] * SIZE
    for start, end, pos, source in pieces.tolist():
        for at in range(start, end):
            image[at] = (0, source) if pos < 0 else (pos + at - start, source)
    return image


@given(ranges)
def test_the_latest_range_wins_everywhere(drawn: list[tuple[int, int, bool]]) -> None:
    pieces = made(drawn)
    out = laid(pieces)
    assert painted(out) == painted(pieces)
    assert (out["end"] > out["start"]).all()
    assert (out["start"][1:] >= out["end"][:-1]).all()


@given(ranges, ranges)
def test_laying_in_two_steps_is_laying_at_once(a: list[tuple[int, int, bool]], b: list[tuple[int, int, bool]]) -> None:
    first, second = made(a), made(b)
    together = laid(np.concatenate([laid(first), laid(second)]))
    assert painted(together) == painted(np.concatenate([first, second]))


@given(ranges, st.integers(0, SIZE), st.integers(0, SIZE))
def test_within_finds_all_that_touches(drawn: list[tuple[int, int, bool]], start: int, length: int) -> None:
    pieces = laid(made(drawn))
    wanted = [p for p in pieces.tolist() if p[0] < start + length and p[1] > start]
    found = Table.of(pieces).within(start, start + length)
    assert pieces[found.start : found.stop].tolist() == wanted


def test_wide_ranges_are_laid_a_part_at_a_time(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(overlay, "CELLS_AT_ONCE", 3)
    drawn = [(i, 40, False) for i in range(0, 20, 3)] + [(5, 1, True), (0, SIZE, False), (7, 3, False)]
    assert painted(laid(made(drawn))) == painted(made(drawn))
