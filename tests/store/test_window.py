"""How long a journal is kept: never what no point covers, never what somebody reads, and always something to build upon."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.capture import Options
from hvbackup.errors import SpaceExhausted
from hvbackup.fold import fold
from hvbackup.model import SECOND, Disk, Instant, KiB
from hvbackup.store.journal import readers
from hvbackup.store.journal.history import History
from hvbackup.store.journal.journal import SEGMENT, Name
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.window import Limits, Piece, check_budget, journal_bytes, removable, trim
from hvbackup.store.store import Store, init
from tests.store.test_history import MACHINE, SIZE, VDA, commit_empty_point, whole


def pieces(*seqs: int) -> list[Piece]:
    """Files that begin at these sequence numbers, one a minute, of 100 bytes each."""
    ends = [*seqs[1:], seqs[-1] + 10]
    return [
        Piece(Name(1, first, SEGMENT), 100, end - 1, Instant(60 * SECOND * i))
        for i, (first, end) in enumerate(zip(seqs, ends, strict=True), 1)
    ]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.sets(st.integers(0, 80), max_size=6),
    st.integers(0, 12),
    st.integers(0, 1200),
)
def test_what_stays_has_a_point_to_build_upon(lengths: list[int], points: set[int], minutes: int, budget: int) -> None:
    starts = [1 + sum(lengths[:i]) for i in range(len(lengths))]
    all_ = pieces(*starts)
    gone = removable(all_, points, Limits(minutes * 60 * SECOND, budget))
    assert gone == all_[: len(gone)]
    assert len(gone) < len(all_)
    if gone:
        assert any(gone[-1].last_seq <= p < all_[len(gone)].name.first for p in points)


def test_old_pieces_go_and_room_is_made_oldest_first() -> None:
    all_ = pieces(1, 11, 21, 31)
    assert removable(all_, {10, 20}, Limits(60 * SECOND, 0)) == all_[:2]
    assert removable(all_, {10, 20}, Limits(0, 350)) == all_[:1]
    assert removable(all_, {20}, Limits(0, 350)) == all_[:2]  # one alone would leave the next without a point
    assert removable(all_, {10, 20}, Limits(0, 100)) == all_[:2]  # the rest is in no point
    assert removable(all_, set(), Limits(1, 1)) == []


@pytest.fixture
def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    init(tmp_path / "store", None)
    with Store.open(tmp_path / "store", tmp_path / "state", [], owner=True) as opened:
        yield opened


def recorded(store: Store, minutes: int) -> tuple[list[int], dict[int, bytes]]:
    """A segment a minute; their moments and what the disk held."""
    commit_empty_point(store, SIZE)
    rec, image, images = Recorder(store, MACHINE, [Disk(VDA, SIZE)]), bytearray(SIZE), {}
    for n in range(1, minutes + 1):
        t, data = Instant(n * 60 * SECOND), os.urandom(20 * KiB)
        rec.write(VDA, t, [(n * 4096, len(data))], data)
        image[n * 4096 : n * 4096 + len(data)] = data
        images[rec.barrier(t, {})] = bytes(image)
        rec.rotate()
    rec.close()
    return list(images), images


def test_a_window_passes_and_everything_left_reads_back(store: Store) -> None:
    seqs, images = recorded(store, 8)
    assert trim(store, MACHINE, Limits(60 * SECOND), by_age=True) == 0  # the only point is at the beginning
    fold(store, MACHINE, History(store, MACHINE).by_seq(seqs[4]), Options())
    with readers.pinned(store, MACHINE, 0, os.getpid()):
        assert trim(store, MACHINE, Limits(60 * SECOND), by_age=True) == 0  # somebody reads from the first point on
    assert trim(store, MACHINE, Limits(60 * SECOND), by_age=False) == 0  # the clock jumped: ages mean nothing
    assert trim(store, MACHINE, Limits(60 * SECOND), by_age=True) > 0
    history = History(store, MACHINE)
    assert history.moments[0].tolist() == seqs[5:]
    for seq in seqs[5:]:
        assert whole(history, seq) == images[seq]
    tables = store.state.names(f"journal/{store.ring.machine_name(MACHINE)}")
    assert len([n for n in tables if "+" not in n]) <= 3


def test_a_budget_is_kept_by_removing_what_points_cover_or_refused(store: Store) -> None:
    seqs, _ = recorded(store, 6)
    budget = Limits(0, journal_bytes(store, MACHINE) // 2)
    with pytest.raises(SpaceExhausted, match="no point covers"):
        check_budget(store, MACHINE, budget)
    fold(store, MACHINE, History(store, MACHINE).by_seq(seqs[4]), replace(Options()))
    check_budget(store, MACHINE, budget)
    assert journal_bytes(store, MACHINE) <= budget.budget_bytes
    assert History(store, MACHINE).last is not None


def test_a_reader_that_died_holds_nothing(store: Store) -> None:
    with readers.pinned(store, MACHINE, 3, 2**22 + 1):  # no process has that number
        assert readers.pinned_from(store, MACHINE) is None


def test_a_lost_segment_is_noticed_and_named(store: Store) -> None:
    from hvbackup.errors import StoreDamage

    seqs, images = recorded(store, 4)
    folder = f"journals/{store.ring.machine_name(MACHINE)}"
    store.files.remove(f"{folder}/{store.files.names(folder)[1]}")
    history = History(store, MACHINE)
    assert whole(history, seqs[0]) == images[seqs[0]]
    with pytest.raises(StoreDamage, match="has lost its facts"):
        history.view(history.by_seq(seqs[3]), VDA)
