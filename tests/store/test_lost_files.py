"""A file of a journal that can't be read: its moments are not offered, those that need it are refused, and all else goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from hvbackup.capture import Options
from hvbackup.errors import HvbackupError, JournalGap, NotFound, StoreDamage
from hvbackup.fold import fold
from hvbackup.model import SECOND, Disk, Instant, Token
from hvbackup.service.moment import choose
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal, window
from hvbackup.store.journal.history import History, newest_tokens
from hvbackup.store.journal.recorder import FACTS_MAX, Recorder
from hvbackup.store.journal.told import Moment
from hvbackup.store.journal.window import Limits, trim
from hvbackup.store.store import Store
from tests.store.test_history import MACHINE, SIZE, VDA, commit_empty_point, store, whole
from tests.store.test_runs import forget_tables
from tests.store.test_stream_journal import DISKS

__all__ = ["store"]


def segments(store: Store, count: int = 4) -> tuple[list[int], list[Path]]:
    """As many, of one moment each: the byte at n * 5000 is n from the moment n on."""
    commit_empty_point(store, SIZE)
    rec, seqs = Recorder(store, MACHINE, [Disk(VDA, SIZE)]), []
    for n in range(1, count + 1):
        rec.write(VDA, Instant(n * SECOND), [(n * 5000, 4)], bytes([n]) * 4)
        seqs.append(rec.barrier(Instant(n * SECOND), {VDA: Token("fake", str(n))}))
        rec.rotate()
    rec.close()
    folder = store.ring.machine_name(MACHINE)
    return seqs, [store.files.path(f"journals/{folder}/{n}") for n in journal.list_files(store.files, folder)]


def spoil(store: Store, path: Path) -> bytes:
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(len(data) - 100))
    forget_tables(store)
    return data


@pytest.mark.parametrize("number", range(4))
def test_its_moments_are_not_offered_and_those_that_need_it_are_refused(store: Store, number: int) -> None:
    seqs, paths = segments(store)
    data = spoil(store, paths[number])
    history = History(store, MACHINE)
    assert history.moments[0].tolist() == seqs[:number]
    assert [name.first for name, _ in history.lost] == [int(paths[number].stem.split("-")[1])]
    for n in range(number):
        assert whole(history, seqs[n])[(n + 1) * 5000] == n + 1
    if 0 < number < 3:
        assert [(g.start, g.end) for g in history.told.gaps] == [(number * SECOND, 4 * SECOND + 1)]
        with pytest.raises(JournalGap, match=rf"{paths[number].name}.*seq:{seqs[number - 1]}"):
            history.at(Instant((number + 1) * SECOND))
        with pytest.raises(JournalGap, match=paths[number].name):
            history.by_seq(seqs[3])
    paths[number].write_bytes(data)  # somebody has had a copy
    assert whole(History(store, MACHINE), seqs[3])[20000] == 4


def test_a_point_behind_it_begins_what_is_offered_again(store: Store) -> None:
    seqs, paths = segments(store, 6)
    fold(store, MACHINE, History(store, MACHINE).by_seq(seqs[3]), Options())
    spoil(store, paths[1])
    history = History(store, MACHINE)
    assert history.moments[0].tolist() == [seqs[0], *seqs[3:]]
    assert [(g.start, g.end) for g in history.told.gaps] == [(SECOND, 4 * SECOND)]
    with pytest.raises(JournalGap, match=rf"seq:{seqs[0]} and seq:{seqs[3]}"):
        history.at(Instant(3 * SECOND))
    assert whole(history, seqs[5])[5000::5000][:6] == bytes([1, 2, 3, 4, 5, 6])
    assert history.last
    assert history.last.seq == seqs[5]


def test_a_life_behind_it_takes_none_of_its_numbers(store: Store) -> None:
    seqs, paths = segments(store)
    data = spoil(store, paths[3])
    assert newest_tokens(store, MACHINE)[VDA]["value"] == "3"
    rec = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    rec.write(VDA, Instant(9 * SECOND), [(0, 4)], b"nine")
    new = rec.barrier(Instant(9 * SECOND), {})
    rec.close()
    assert new > seqs[3] + FACTS_MAX
    history = History(store, MACHINE)
    assert history.moments[0].tolist() == seqs[:3]
    with pytest.raises(JournalGap, match=paths[3].name):
        whole(history, new)
    paths[3].write_bytes(data)
    assert whole(History(store, MACHINE), seqs[3])[20000] == 4


def test_it_goes_with_its_neighbours(store: Store) -> None:
    seqs, paths = segments(store, 5)
    for n in (1, 3):
        fold(store, MACHINE, History(store, MACHINE).by_seq(seqs[n]), Options())
    spoil(store, paths[0])
    data = spoil(store, paths[2])
    assert trim(store, MACHINE, Limits(SECOND // 2, 0), by_age=True) > 0
    assert [path.exists() for path in paths] == [False, False, False, False, True]
    assert len(data) > 0
    history = History(store, MACHINE)
    assert history.moments[0].tolist() == seqs[4:]
    assert whole(history, seqs[4])[25000] == 5


def test_points_around_it_are_kept_and_offered(store: Store) -> None:
    """It may say that nothing older may be laid under what follows; and what follows can be laid over the next one alone."""
    seqs, paths = segments(store, 6)
    for n in (1, 3):
        fold(store, MACHINE, History(store, MACHINE).by_seq(seqs[n]), Options())
    assert not {seqs[1], seqs[3]} & {p.seq for p in window.all_needed(store, MACHINE)}
    spoil(store, paths[2])
    assert {seqs[1], seqs[3]} <= {p.seq for p in window.all_needed(store, MACHINE)}
    spoil(store, paths[3])
    history = History(store, MACHINE)
    assert history.moments[0].tolist() == [*seqs[:2], *seqs[4:]]
    assert whole(history, seqs[5])[5000::5000][:6] == bytes([1, 2, 3, 4, 5, 6])
    for point in store.points(MACHINE):
        assert choose(store, str(MACHINE), point.id, Instant(9 * SECOND)).point == point, "it holds all that it needs"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_point_one_fact_before_its_end_is_nothing_to_lay_later_facts_over(store: Store, lost: int) -> None:
    """An epoch leaves a number out before its first fact, and no other file does."""
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    rec.begin_stream("ring")
    row, seqs = np.zeros(1, f.FACT), []
    row["length"], row["kind"] = 4096, f.FACT_DATA
    for n in range(9):
        row["t"], row["offset"] = (n + 1) * SECOND, n * 4096
        seqs.append(rec.stream(row, bytes([n + 1]) * 4096, each=True))
        rec.flush()
        if n % 3 == 2:
            rec.rotate()
    rec.close()
    point = fold(store, MACHINE, History(store, MACHINE).by_seq(seqs[3 * lost + 1]), Options()).point
    assert point
    paths = sorted(store.files.root.glob("journals/*/*.seg"))
    spoil(store, paths[lost])
    history = History(store, MACHINE)
    assert not [s for s in history.moments[0].tolist() if s > point.seq]
    with pytest.raises((NotFound, StoreDamage)):
        fold(store, MACHINE, Moment(seqs[8], Instant(9 * SECOND)), Options())


def test_marks_that_need_it_are_none(store: Store) -> None:
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    for n in range(1, 5):
        rec.write(VDA, Instant(n * SECOND), [(n * 5000, 4)], bytes([n]) * 4)
        rec.barrier(Instant(n * SECOND), {}, mark={"label": f"m{n}"})
        rec.rotate()
    rec.close()
    spoil(store, sorted(store.files.root.glob("journals/*/*.seg"))[1])
    assert [m.label for m in History(store, MACHINE).told.marks] == ["m1"]


def test_a_disk_that_can_not_be_read_is_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that meets it says so, as it does of bytes that were changed; and afterwards all is as it was."""
    seqs, paths = segments(store)
    pread = os.pread

    def fails(fd: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(paths[2]):
            raise OSError(number, os.strerror(number))
        return pread(fd, length, offset)

    with monkeypatch.context() as patch:
        number = errno.EIO
        patch.setattr(os, "pread", fails)
        with pytest.raises(StoreDamage, match="Input/output error"):
            fold(store, MACHINE, Moment(seqs[3], Instant(4 * SECOND)), Options())
        forget_tables(store)
        assert History(store, MACHINE).moments[0].tolist() == seqs[:2]
        number = errno.ENOMEM
        with pytest.raises(HvbackupError, match="Cannot allocate memory"):
            History(store, MACHINE)
    assert History(store, MACHINE).moments[0].tolist() == seqs


def test_a_budget_counts_it_and_makes_it_go(store: Store) -> None:
    seqs, paths = segments(store, 6)
    fold(store, MACHINE, History(store, MACHINE).by_seq(seqs[4]), Options())
    spoil(store, paths[4])
    used = window.journal_bytes(store, MACHINE)
    assert trim(store, MACHINE, Limits(0, used // 3), by_age=True) > 0
    assert [path.exists() for path in paths] == [False] * 5 + [True]
    assert whole(History(store, MACHINE), seqs[5])[5000::5000][:6] == bytes([1, 2, 3, 4, 5, 6])
