"""Logs that wait to be sealed: while a guest writes as much as it can, after a death, and in whatever order they are."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvbackup.capture import Options
from hvbackup.errors import Busy, NotFound, SpaceExhausted, StoreDamage
from hvbackup.fold import fold
from hvbackup.model import SECOND, Instant, KiB
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal, recorder, sealing, window
from hvbackup.store.journal.history import History
from hvbackup.store.journal.journal import LOG, SEGMENT, Name
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.runs import OpenRun
from hvbackup.store.journal.sealing import Sealing
from hvbackup.store.store import Store
from tests.store.test_history import MACHINE, SIZE, VDA, commit_empty_point, keep_in_the_dark, life, store, whole
from tests.store.test_stream_journal import DISKS

__all__ = ["store"]


def suffixes(store: Store) -> list[str]:
    return [n.suffix for n in journal.list_files(store.files, store.ring.machine_name(MACHINE))]


def unsealed(patch: pytest.MonkeyPatch) -> None:
    """Nothing is sealed before this life is over."""
    patch.setattr(Sealing, "add", lambda *_: None)


def damage(path: Path, place: int) -> None:
    """`place` from the beginning, or from the end of what was appended: zeroes fill up the last block."""
    data = bytearray(path.read_bytes())
    data[place if place >= 0 else len(data.rstrip(b"\0")) + place] ^= 1
    path.write_bytes(data)


class Gate:
    """Sealing that waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self._seal = threading.Event(), sealing.seal
        monkeypatch.setattr(sealing, "seal", self._wait)

    def _wait(self, store: Store, machine: object, name: Name) -> None:
        assert self.open.wait(60)
        self._seal(store, MACHINE, name)


# -- resting -----------------------------------------------------------------------------------------------------------


Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def sealed() -> list[Name]:
    return []


@pytest.fixture
def resting(store: Store, sealed: list[Name], monkeypatch: pytest.MonkeyPatch) -> Iterator[Sealing]:
    monkeypatch.setattr(sealing, "seal", lambda store, machine, name: sealed.append(name))
    queue = Sealing(store, MACHINE)
    yield queue
    queue.abandon()


def log(number: int) -> Name:
    return Name(1, number, LOG)


def eventually(true: object, seconds: float = 10) -> bool:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


def test_nothing_is_sealed_while_it_rests_and_all_of_it_in_order_afterwards(
    resting: Sealing, sealed: list[Name]
) -> None:
    resting.rest(60)
    for n in range(5):
        resting.add(log(n), 1)
    time.sleep(0.1)
    assert not sealed
    resting.rest(0)
    assert eventually(lambda: len(sealed) == 5)
    assert sealed == [log(n) for n in range(5)]


def test_a_rest_ends_by_itself(resting: Sealing, sealed: list[Name]) -> None:
    resting.rest(60)
    resting.add(log(1), 1)
    time.sleep(0.05)
    assert not sealed
    resting.rest(0.2)
    assert eventually(lambda: bool(sealed))


@pytest.mark.parametrize(("most", "budget", "free"), [(100, 0, 10**9), (1000, 800, 10**9), (1000, 0, 400)])
def test_what_is_too_much_is_sealed_all_the_same(
    store: Store, sealed: list[Name], most: int, budget: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "seal", lambda store, machine, name: sealed.append(name))
    monkeypatch.setattr(sealing, "WAITING_MAX_BYTES", most)
    monkeypatch.setattr(sealing.shutil, "disk_usage", lambda _: Usage(10**10, 10**10 - free, free))
    queue = Sealing(store, MACHINE, budget)
    queue.rest(60)
    for n in range(5):
        queue.add(log(n), 30)
    assert eventually(lambda: len(sealed) == 2)
    time.sleep(0.1)
    assert len(sealed) == 2, "90 bytes wait, and may"
    queue.wait_for_room(30)
    queue.finish()
    assert len(sealed) == 5


def test_sealing_does_not_rest_before_what_somebody_waits_for(resting: Sealing, sealed: list[Name]) -> None:
    resting.rest(60)
    for n in (1, 11, 21):
        resting.add(log(n), 1)
    resting.reach(15)
    assert sealed == [log(1), log(11)]
    resting.rest(60)
    resting.reach(15)
    assert len(sealed) == 2
    resting.finish()


def test_what_was_abandoned_is_not_sealed(resting: Sealing, sealed: list[Name]) -> None:
    resting.rest(60)
    resting.add(log(1), 1)
    resting.abandon()
    assert not sealed
    resting.rest(0)
    resting.add(log(2), 1)
    resting.finish()
    assert sealed == [log(2)]


def test_what_goes_wrong_is_told_once_and_the_next_logs_are_sealed(
    store: Store, sealed: list[Name], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(store: Store, machine: object, name: Name) -> None:
        if name.first == 1:
            raise SpaceExhausted("full")
        sealed.append(name)

    monkeypatch.setattr(sealing, "seal", work)
    queue = Sealing(store, MACHINE)
    for n in (1, 2):
        queue.add(log(n), 1)
    with pytest.raises(SpaceExhausted):
        queue.finish()
    assert sealed == [log(2)]
    queue.add(log(3), 1)
    queue.finish()


def test_a_thread_that_can_not_be_started_is_told_of_and_nobody_waits_for_it(
    resting: Sealing, sealed: list[Name], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start new thread"))
        )
        with pytest.raises(RuntimeError):
            resting.add(log(1), 1)
    resting.finish()
    resting.add(log(2), 1)
    resting.finish()
    assert sealed == [log(2)]


@pytest.mark.parametrize("busy", [True, False])
def test_sealing_rests_while_a_guest_writes_as_much_as_it_can(
    store: Store, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 64 * KiB)
    monkeypatch.setattr(recorder, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(recorder, "CALM_SECONDS", 1.0)
    monkeypatch.setattr(recorder, "BURST_BYTES", 100 * KiB if busy else 100 * 1024 * KiB)
    ways: list[bool] = []
    monkeypatch.setattr(store.files.kernel, "set_direct", lambda fd, on: ways.append(on))
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    rec.begin_stream("a ring")
    rec.barrier(Instant(SECOND), {})
    rows = np.zeros(8, f.FACT)
    rows["offset"], rows["pos"] = np.arange(8) * 4096, np.arange(8) * 4096
    rows["length"], rows["kind"] = 4096, f.FACT_DATA
    began = time.monotonic()
    for n in itertools.count(1):
        rows["t"] = SECOND + 10 * n + np.arange(8)
        rec.stream(rows, bytes([n % 256]) * 8 * 4096, each=True)
        rec.sync(Instant(SECOND))
        time.sleep(0.01)
        took, waiting = time.monotonic() - began, suffixes(store).count(LOG)
        if took > 0.5 and (not busy or min(waiting, ways.count(True)) > 4):
            break
        assert took < 60, "sealing does not rest, or logs of a burst are not written past the page cache"
    assert busy or not ways
    assert (rec._sealing._rests_until > 0) is busy
    image = bytes([n % 256]) * 8 * 4096
    assert whole(History(store, MACHINE), rec.last)[: len(image)] == image
    assert eventually(lambda: suffixes(store).count(LOG) <= 1), "it is calm"
    rec.close()
    assert set(suffixes(store)) == {SEGMENT}
    assert whole(History(store, MACHINE), rec.last)[: len(image)] == image


# -- what is read meanwhile --------------------------------------------------------------------------------------------


def test_a_log_is_read_as_its_segment_is_also_when_it_has_lost_its_name(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    images = {}
    for n in range(1, 6):
        rec.write(VDA, Instant(n), [(n * 5000, 5000), (n * 100, 50)], bytes([n]) * 5050)
        images[rec.barrier(Instant(n), {})] = n
        rec.rotate()
    before = History(store, MACHINE)
    assert [type(run) for run in before.runs] == [OpenRun] * 5
    seen = {seq: whole(before, seq) for seq in images}
    gate.open.set()
    rec.close()
    assert set(suffixes(store)) == {SEGMENT}
    assert {seq: whole(before, seq) for seq in images} == seen
    assert {seq: whole(History(store, MACHINE), seq) for seq in images} == seen


def test_a_log_before_a_segment_lies_below_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one could not be sealed, the other could."""
    seal, seen = sealing.seal, []

    def fails_first(store: Store, machine: object, name: Name) -> None:
        seen.append(name)
        if len(seen) == 1:
            raise SpaceExhausted("full")
        seal(store, MACHINE, name)

    monkeypatch.setattr(sealing, "seal", fails_first)
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    rec._sealing.rest(60)
    for n in (1, 2):
        rec.write(VDA, Instant(n), [(0, 5000)], bytes([n]) * 5000)
        newest = rec.barrier(Instant(n), {})
        if n == 1:
            rec.rotate()
    with pytest.raises(SpaceExhausted):
        rec.close()
    rec._sealing.finish()
    assert suffixes(store) == [LOG, SEGMENT]
    assert set(whole(History(store, MACHINE), newest)[:5000]) == {2}


# -- after a death -----------------------------------------------------------------------------------------------------


def test_whoever_takes_over_waits_for_the_newest_log_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        rec = Recorder(store, MACHINE, DISKS)
        for n in range(1, 5):
            rec.write(VDA, Instant(n), [(0, 5000)], bytes([n]) * 5000)
            newest = rec.barrier(Instant(n), {})
            if n < 4:
                rec.rotate()
        rec.write(VDA, Instant(5), [(0, 5000)], b"x" * 5000)  # of a set that nobody closed
        rec._sealing._waiting.clear()
        gate.open.set()
        rec.abandon()
    assert suffixes(store).count(LOG) >= 3
    seal, gate = sealing.seal, threading.Event()
    sealed: list[Name] = []

    def newest_first(store: Store, machine: object, name: Name) -> None:
        assert not sealed or gate.wait(60)
        sealed.append(name)
        seal(store, MACHINE, name)

    monkeypatch.setattr(sealing, "seal", newest_first)
    again = Recorder(store, MACHINE, DISKS)
    assert len(sealed) == 1
    assert suffixes(store)[-1] == SEGMENT
    assert whole(History(store, MACHINE), newest)[:5000] == b"\4" * 5000
    again.write(VDA, Instant(6), [(100, 1)], b"y")
    last = again.barrier(Instant(6), {})
    assert whole(History(store, MACHINE), last)[:5000] == b"\4" * 100 + b"y" + b"\4" * 4899
    gate.set()
    again.close()
    assert set(suffixes(store)) == {SEGMENT}
    assert sealed[1:] == sorted(sealed[1:], key=lambda n: (n.epoch, n.first))
    assert whole(History(store, MACHINE), last)[:5000] == b"\4" * 100 + b"y" + b"\4" * 4899


@pytest.mark.parametrize("seed", range(4))
def test_lives_that_end_before_their_logs_are_sealed_keep_every_moment(
    store: Store, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_empty_point(store, SIZE)
    images: dict[int, bytes] = {}
    base = bytes(SIZE)
    for turn in range(3):
        with monkeypatch.context() as patch:
            unsealed(patch)
            images |= life(10 * seed + turn, store, 9, base)
        base = images[max(images)]
        history = History(store, MACHINE)
        assert history.moments[0].tolist() == sorted(images)
        for seq, image in images.items():
            assert whole(history, seq) == image
    rec = Recorder(store, MACHINE, DISKS)
    rec.close()
    assert set(suffixes(store)) == {SEGMENT}
    history = History(store, MACHINE)
    for seq, image in images.items():
        assert whole(history, seq) == image


def record(rec: Recorder, count: int, *, rotate: bool = False) -> int:
    """So many sets, each of which fills the front of the disk with its number."""
    for n in range(1, count + 1):
        rec.write(VDA, Instant(n * SECOND), [(0, 5000)], bytes([n]) * 5000)
        last = rec.barrier(Instant(n * SECOND), {})
        if rotate:
            rec.rotate()
    return last


@pytest.mark.parametrize("when", ["it is sealed while the journal is cut", "the journal is cut while it is sealed"])
def test_a_log_that_points_cover_goes_or_stays_but_does_not_come_back(
    store: Store, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_empty_point(store, SIZE)
    reached, go = threading.Event(), threading.Event()
    write, covered = sealing.write_segment, window._covered

    def slow_write(*words: Any) -> None:
        *most, frames = words
        read = list(frames)
        reached.set()
        assert go.wait(30)
        write(*most, read)

    def slow_covered(*words: Any) -> set[int]:
        go.set()
        time.sleep(0.3)  # as long as sealing would need
        return covered(*words)

    monkeypatch.setattr(sealing, "write_segment", slow_write)
    rec = Recorder(store, MACHINE, DISKS)
    rec._sealing.rest(60)
    record(rec, 3, rotate=True)
    last = History(store, MACHINE).last
    assert last
    fold(store, MACHINE, last, Options())
    rec.write(VDA, Instant(100 * SECOND), [(0, 5000)], b"z" * 5000)
    rec.barrier(Instant(100 * SECOND), {})
    if when.startswith("it"):
        monkeypatch.setattr(window, "_covered", slow_covered)
        rec._sealing.rest(0)
        window.trim(store, MACHINE, window.Limits(10 * SECOND), by_age=True)
    else:
        rec._sealing.rest(0)
        assert reached.wait(30)
        cut = threading.Thread(
            target=window.trim, args=(store, MACHINE, window.Limits(10 * SECOND)), kwargs={"by_age": True}
        )
        cut.start()
        time.sleep(0.3)
        go.set()
        cut.join()
    rec.close()
    history = History(store, MACHINE)
    assert history.last
    seqs = history.moments[0].tolist()
    assert len(seqs) in (1, 4), "all of it or none"
    assert whole(history, history.last.seq)[:5000] == b"z" * 5000
    if len(seqs) == 1:
        with pytest.raises(NotFound):
            history.at(Instant(3 * SECOND))


def test_a_folder_that_is_gone_is_no_log_that_was_trimmed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(source: str, target: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", target)

    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    record(rec, 1)
    monkeypatch.setattr(store.files.kernel, "rename", rename)
    with pytest.raises(FileNotFoundError):
        rec.close()
    assert suffixes(store) == [LOG]


@pytest.mark.parametrize("place", [5, 16000], ids=["header", "middle"])
def test_no_number_that_a_point_covers_is_used_again(store: Store, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that waited, and was damaged before it was sealed."""
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        rec = Recorder(store, MACHINE, DISKS)
        record(rec, 29)
        rec.rotate()
        last = History(store, MACHINE).last
        assert last
        fold(store, MACHINE, last, Options())
        rec.abandon()
    [path] = Path(store.files.path("journals")).glob("*/*.log")
    damage(path, place)
    again = Recorder(store, MACHINE, DISKS)
    assert again.last >= last.seq
    if place == 5:
        assert again.last > last.seq + recorder.FACTS_MAX // 2, "nobody knows how many it had"
        return
    for n in range(40, 80):
        extent = (0, 5000) if n < 50 else (6000, 5000)
        again.write(VDA, Instant(n * SECOND), [extent], bytes([n]) * 5000)
        newest = again.barrier(Instant(n * SECOND), {})
    again.close()
    assert whole(History(store, MACHINE), newest)[:5000] == bytes([49]) * 5000


def test_a_lost_write_is_missed_even_if_it_is_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last frame of a log that waited was damaged, and it held one fact; an index it had none."""
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        rec = Recorder(store, MACHINE, DISKS)
        rec.begin_stream("ring")
        rec.barrier(Instant(SECOND), {})
        row = np.zeros(1, f.FACT)
        row["length"], row["kind"] = 4096, f.FACT_DATA
        for n in (2, 3, 4):
            row["t"] = n * SECOND
            last = rec.stream(row, bytes([n]) * 4096, each=True)
            rec.sync(Instant(n * SECOND))
            if n == 3:
                rec.rotate()
                row["offset"] = 8192
        rec.rotate()
        rec.abandon()
    path = min(Path(store.files.path("journals")).glob("*/*.log"))
    path.write_bytes(path.read_bytes()[: int.from_bytes(path.read_bytes()[-8:], "little")])
    damage(path, -10)
    Recorder(store, MACHINE, DISKS).close()
    with pytest.raises(StoreDamage, match="has lost its facts"):
        whole(History(store, MACHINE), last)


def test_a_log_that_waits_is_never_taken_for_a_later_one(store: Store) -> None:
    """A life that left no moment is sealed by and by, that is removed; its name must not be somebody's who writes."""
    commit_empty_point(store, SIZE)
    queue = Sealing(store, MACHINE)
    first = Recorder(store, MACHINE, DISKS, queue)
    record(first, 1)
    first.close()
    queue.rest(60)
    broken = Recorder(store, MACHINE, DISKS, queue)
    broken.write(VDA, Instant(SECOND), [(0, 3)], b"old")
    broken.close(seal=False)
    again = Recorder(store, MACHINE, DISKS, queue)
    assert again.epoch > broken.epoch
    again.write(VDA, Instant(2 * SECOND), [(0, 3)], b"new")
    again.barrier(Instant(2 * SECOND), {})
    queue.finish()
    again.write(VDA, Instant(3 * SECOND), [(1, 1)], b"o")
    newest = again.barrier(Instant(3 * SECOND), {})
    assert whole(History(store, MACHINE), newest)[:3] == b"now"
    again.close()
    assert whole(History(store, MACHINE), newest)[:3] == b"now"


def test_a_log_larger_than_what_may_wait_is_waited_for_by_nobody(
    store: Store, sealed: list[Name], monkeypatch: pytest.MonkeyPatch
) -> None:
    let = threading.Event()

    def work(store: Store, machine: object, name: Name) -> None:
        let.wait(20)
        sealed.append(name)

    monkeypatch.setattr(sealing, "seal", work)
    queue = Sealing(store, MACHINE, 800)
    queue.add(log(1), 1000)
    queue.wait_for_room(1000)
    assert not sealed
    let.set()
    queue.finish()


def test_nobody_waits_for_all_that_is_too_much_when_the_disk_is_filled_by_others(
    store: Store, sealed: list[Name], monkeypatch: pytest.MonkeyPatch
) -> None:
    let = threading.Semaphore(0)

    def work(store: Store, machine: object, name: Name) -> None:
        let.acquire()
        sealed.append(name)

    monkeypatch.setattr(sealing, "seal", work)
    queue = Sealing(store, MACHINE)
    queue.rest(60)
    for n in range(10):
        queue.add(log(n), 30)
    monkeypatch.setattr(sealing.shutil, "disk_usage", lambda _: Usage(1000, 1000, 0))
    queue.add(log(10), 30)
    waiter = threading.Thread(target=queue.wait_for_room, args=(60,))
    waiter.start()
    assert eventually(lambda: len(queue._changed._waiters) == 1), "what is sealed before it waits is not for it"
    let.release()
    assert eventually(lambda: queue._sealed_bytes == 30)
    waiter.join(0.3)
    assert waiter.is_alive(), "as much as was written since has to be sealed"
    let.release()
    waiter.join(20)
    assert not waiter.is_alive()
    assert len(sealed) == 2
    let.release(20)
    queue.finish()


@pytest.mark.parametrize("learns", [True, False], ids=["learns it", "never learns it"])
def test_a_writer_that_does_not_know_it_was_replaced_has_no_say_any_more(
    store: Store, monkeypatch: pytest.MonkeyPatch, learns: bool
) -> None:
    """It has just ended its log when that is sealed for it."""
    if not learns:
        keep_in_the_dark(store, monkeypatch)
    commit_empty_point(store, SIZE)
    old = Recorder(store, MACHINE, DISKS)
    record(old, 1)
    seal = sealing.seal

    def rotated(*words: Any) -> None:
        monkeypatch.setattr(sealing, "seal", seal)
        old.rotate()
        old.write(VDA, Instant(2 * SECOND), [(0, 3)], b"2nd")
        old.barrier(Instant(2 * SECOND), {})
        seal(*words)

    monkeypatch.setattr(sealing, "seal", rotated)
    new = Recorder(store, MACHINE, DISKS)
    new.write(VDA, Instant(3 * SECOND), [(0, 3)], b"new")
    newest = new.barrier(Instant(3 * SECOND), {})
    with pytest.raises(Busy, match="taken over") if learns else contextlib.nullcontext():
        old.write(VDA, Instant(4 * SECOND), [(0, 3)], b"bad")
        old.barrier(Instant(4 * SECOND), {})
    history = History(store, MACHINE)
    assert history.last
    assert history.last.seq == newest
    assert whole(history, newest)[:3] == b"new"
    old.abandon()
    new.close()
    assert whole(History(store, MACHINE), newest)[:3] == b"new"


def test_a_log_whose_header_is_gone_stays_and_another_life_begins(store: Store) -> None:
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    rec.write(VDA, Instant(1), [(0, 3)], b"abc")
    rec.barrier(Instant(1), {})
    rec.abandon()
    folder = store.ring.machine_name(MACHINE)
    [path] = Path(store.files.path(f"journals/{folder}")).iterdir()
    damage(path, 5)
    again = Recorder(store, MACHINE, DISKS)
    again.write(VDA, Instant(2), [(0, 3)], b"new")
    again.barrier(Instant(2), {})
    again.close()
    assert suffixes(store) == [LOG, SEGMENT]
    assert not len(History(store, MACHINE).moments[0]), "nobody can tell what it holds, and no point is behind it"
    damage(path, 5)
    assert whole(History(store, MACHINE), 3)[:3] == b"abc", "and now it can be read"
