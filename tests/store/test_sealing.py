"""Logs that wait to be sealed: while a guest writes as much as it can, after a death, and in whatever order they are."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hvbackup.errors import SpaceExhausted
from hvbackup.model import SECOND, Instant, KiB
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal, recorder, sealing
from hvbackup.store.journal.history import History, OpenRun
from hvbackup.store.journal.journal import LOG, SEGMENT, Name
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.sealing import Sealing
from hvbackup.store.store import Store
from tests.store.test_history import MACHINE, SIZE, VDA, commit_empty_point, life, store, whole
from tests.store.test_stream_journal import DISKS

__all__ = ["store"]


def suffixes(store: Store) -> list[str]:
    return [n.suffix for n in journal.list_files(store.files, store.ring.machine_name(MACHINE))]


class Gate:
    """Sealing that waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self._seal = threading.Event(), sealing.seal
        monkeypatch.setattr(sealing, "seal", self._wait)

    def _wait(self, store: Store, machine: object, name: Name) -> None:
        assert self.open.wait(60)
        self._seal(store, MACHINE, name)


# -- resting -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed() -> list[Name]:
    return []


@pytest.fixture
def resting(sealed: list[Name]) -> Iterator[Sealing]:
    queue = Sealing(sealed.append)
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
    assert resting.waiting == 5
    resting.rest(0)
    assert eventually(lambda: len(sealed) == 5)
    assert sealed == [log(n) for n in range(5)]


def test_a_rest_ends_by_itself(resting: Sealing, sealed: list[Name]) -> None:
    resting.rest(0.2)
    resting.add(log(1), 1)
    time.sleep(0.05)
    assert not sealed
    assert eventually(lambda: bool(sealed))


def test_what_is_too_much_is_sealed_all_the_same(
    resting: Sealing, sealed: list[Name], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "WAITING_MAX_BYTES", 100)
    resting.rest(60)
    for n in range(5):
        resting.add(log(n), 30)
    assert eventually(lambda: len(sealed) == 2)
    time.sleep(0.1)
    assert len(sealed) == 2, "90 bytes wait, and may"
    resting.wait_for_room()
    resting.finish()
    assert len(sealed) == 5


def test_what_was_abandoned_is_not_sealed(resting: Sealing, sealed: list[Name]) -> None:
    resting.rest(60)
    resting.add(log(1), 1)
    resting.abandon()
    assert not sealed
    resting.rest(0)
    resting.add(log(2), 1)
    resting.finish()
    assert sealed == [log(2)]


def test_what_goes_wrong_is_told_once_and_the_next_logs_are_sealed() -> None:
    sealed: list[Name] = []

    def work(name: Name) -> None:
        if name.first == 1:
            raise SpaceExhausted("full")
        sealed.append(name)

    queue = Sealing(work)
    for n in (1, 2):
        queue.add(log(n), 1)
    with pytest.raises(SpaceExhausted):
        queue.finish()
    assert sealed == [log(2)]
    queue.add(log(3), 1)
    queue.finish()


@pytest.mark.parametrize("busy", [True, False])
def test_sealing_rests_while_a_guest_writes_as_much_as_it_can(
    store: Store, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 64 * KiB)
    monkeypatch.setattr(recorder, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(recorder, "CALM_SECONDS", 1.0)
    monkeypatch.setattr(recorder, "BURST_BYTES", 100 * KiB if busy else 100 * 1024 * KiB)
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    rec.begin_stream("a ring")
    rec.barrier(Instant(SECOND), {})
    rows = np.zeros(8, f.FACT)
    rows["offset"], rows["pos"] = np.arange(8) * 4096, np.arange(8) * 4096
    rows["length"], rows["kind"] = 4096, f.FACT_DATA
    end = time.monotonic() + 0.5
    for n in itertools.count(1):
        rows["t"] = SECOND + 10 * n + np.arange(8)
        rec.stream(rows, bytes([n % 256]) * 8 * 4096, each=True)
        rec.sync(Instant(SECOND))
        time.sleep(0.01)
        if time.monotonic() > end:
            break
    waiting = suffixes(store).count(LOG)
    assert waiting > 4 if busy else waiting <= 4
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
    for n in (1, 2):
        rec.write(VDA, Instant(n), [(0, 5000)], bytes([n]) * 5000)
        newest = rec.barrier(Instant(n), {})
        if n == 1:
            rec.rotate()
    with pytest.raises(SpaceExhausted):
        rec.close()
    assert suffixes(store) == [LOG, SEGMENT]
    assert whole(History(store, MACHINE), newest)[:5000] == b"\2" * 5000


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
            patch.setattr(Sealing, "_next", lambda _: None)  # nothing is sealed before this life is over
            patch.setattr(Sealing, "_join", lambda _: None)
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


def test_a_log_that_points_cover_and_was_trimmed_needs_no_segment(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    rec.write(VDA, Instant(1), [(0, 3)], b"abc")
    rec.barrier(Instant(1), {})
    rec.rotate()
    folder = f"journals/{store.ring.machine_name(MACHINE)}"
    [name] = store.files.names(folder)
    store.files.remove(f"{folder}/{name}")
    gate.open.set()
    rec.close()
    assert store.files.names(folder) == []


def test_a_log_whose_header_is_gone_stays_and_another_life_begins(store: Store) -> None:
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, DISKS)
    rec.write(VDA, Instant(1), [(0, 3)], b"abc")
    rec.barrier(Instant(1), {})
    rec.abandon()
    folder = store.ring.machine_name(MACHINE)
    [path] = Path(store.files.path(f"journals/{folder}")).iterdir()
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    again = Recorder(store, MACHINE, DISKS)
    again.write(VDA, Instant(2), [(0, 3)], b"new")
    again.barrier(Instant(2), {})
    again.close()
    assert path.exists()
    assert suffixes(store) == [LOG, SEGMENT]
