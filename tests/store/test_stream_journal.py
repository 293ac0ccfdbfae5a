"""Single writes in a journal, against an oracle: each is a moment; none that was answered is lost, whatever dies when."""

from __future__ import annotations

import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hvbackup.model import SECOND, Disk, Instant, KiB, Token
from hvbackup.protect import rings as salvaging
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal, logfile, recorder, sealing
from hvbackup.store.journal.history import History
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.store import DESCRIPTOR, Store, init
from hvbackup.target import ring as rings
from hvbackup.target.ring import ROW, Ring, Rows
from tests.crash import Recorder as CrashKernel
from tests.crash import put, wrecks
from tests.store.test_history import MACHINE, SIZE, VDA, commit_empty_point, store, whole

pytestmark = pytest.mark.walk

__all__ = ["store"]
TOKENS = {VDA: Token("fake", "1")}
DISKS = [Disk(VDA, SIZE)]


class Guest:
    """Numbered writes in a ring, and what the disk is after each."""

    def __init__(self, ring: Ring, seed: int = 1) -> None:
        self.ring, self._rng = ring, random.Random(seed)
        self.images = [bytes(SIZE)]
        self.rows: list[tuple[int, int, int, bytes]] = []  # t, offset, kind, data

    def write(self, count: int) -> None:
        for _ in range(count):
            image, n = bytearray(self.images[-1]), len(self.rows)
            length = self._rng.choice([512, 4096, 9000])
            offset = self._rng.randrange(SIZE - length)
            zero = self._rng.random() < 0.2
            data = bytes(length) if zero else self._rng.randbytes(length)
            image[offset : offset + length] = data
            self.rows.append((SECOND + n, offset, rings.ZERO if zero else rings.DATA, data))
            self.images.append(bytes(image))
            put_in(self.ring, self.rows[n:])


def put_in(ring: Ring, rows: list[tuple[int, int, int, bytes]]) -> None:
    """As the target does it."""
    for t, offset, kind, data in rows:
        heads = ring.heads
        row: Rows = np.zeros(1, ROW)
        row["t"], row["offset"], row["length"], row["kind"] = t, offset, len(data), kind
        kept = data if kind == rings.DATA else b""
        start = rings._HEADER_BYTES + heads.rows % ring.rows_max * ROW.itemsize
        ring._map[start : start + ROW.itemsize] = row.tobytes()
        for i, byte_at in enumerate(range(heads.data, heads.data + len(kept))):
            ring._data[byte_at % ring.data_max] = kept[i]
        for i, value in enumerate([heads.rows + 1, heads.data + len(kept), *[0] * 6]):
            ring._words[rings._HEADS + i] = value


def same_ring(path: Path, of: Ring, rows: list[tuple[int, int, int, bytes]], tail: int) -> Ring:
    """The ring as it was when it held so many rows, of which the first ones had been freed."""
    ring = rings.make(path, of.data_max)
    ring.id = of.id
    put_in(ring, rows)
    ring.free(tail, sum(len(data) for _, _, kind, data in rows[:tail] if kind == rings.DATA))
    return ring


def take(rec: Recorder, ring: Ring, at: tuple[int, int], *, each: bool) -> tuple[int, int]:
    for batch in ring.batches(*at, 16 * KiB):
        rec.stream(batch.rows.view(f.FACT), batch.data, each=each)
        at = batch.row_end, batch.data_end
    rec.sync(Instant(SECOND))
    ring.free(*at)
    return at


def test_each_write_is_a_moment_in_a_log_and_in_a_segment(store: Store, tmp_path: Path) -> None:
    commit_empty_point(store, SIZE)
    guest = Guest(rings.make(tmp_path / "ring", 256 * KiB))
    rec = Recorder(store, MACHINE, DISKS)
    rec.begin_stream(guest.ring.id)
    guest.write(10)
    at = take(rec, guest.ring, (0, 0), each=False)
    first = rec.barrier(Instant(2 * SECOND), TOKENS)
    guest.write(40)
    take(rec, guest.ring, at, each=True)
    for _ in range(2):  # open, then sealed
        history = History(store, MACHINE)
        assert history.moments[0].tolist() == list(range(first, first + 41))
        for n in range(41):
            assert whole(history, first + n) == guest.images[10 + n]
        assert history.told.stream
        assert (history.told.stream.ring, history.told.stream.rows) == (guest.ring.id, 10)
        rec.rotate()
        rec.finish()
    mark = rec.barrier(Instant(3 * SECOND), TOKENS, mark={"label": "here"})
    assert whole(History(store, MACHINE), mark) == guest.images[-1]
    told = History(store, MACHINE).told
    assert told.stream
    assert told.stream.rows == 50
    rec.close()
    guest.ring.close()


@pytest.mark.timeout(120)  # who waits for a seal here waits for ever
def test_who_appends_does_not_wait_for_logs_that_wait_to_be_sealed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_empty_point(store, SIZE)
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 16 * KiB)
    monkeypatch.setattr(sealing, "WAITING_MAX_BYTES", 64 * KiB)
    seal, going = sealing.seal, threading.Event()
    monkeypatch.setattr(sealing, "seal", lambda *words: going.wait() and seal(*words))
    guest = Guest(rings.make(tmp_path / "ring", 256 * KiB))
    rec = Recorder(store, MACHINE, DISKS)
    rec.begin_stream(guest.ring.id)
    at = (0, 0)
    for _ in range(7):
        guest.write(8)
        at = take(rec, guest.ring, at, each=True)
    folder = store.ring.machine_name(MACHINE)
    assert len(journal.list_files(store.files, folder)) == 2 + 1, "the last one grows"
    last = rec.last
    assert whole(History(store, MACHINE), last) == guest.images[-1]
    going.set()
    rec.close()
    assert whole(History(store, MACHINE), last) == guest.images[-1]
    assert {n.suffix for n in journal.list_files(store.files, folder)} == {journal.SEGMENT}
    guest.ring.close()


def test_a_reader_that_does_not_know_single_writes_offers_fewer_moments(store: Store, tmp_path: Path) -> None:
    commit_empty_point(store, SIZE)
    guest = Guest(rings.make(tmp_path / "ring", 256 * KiB))
    rec = Recorder(store, MACHINE, DISKS)
    rec.begin_stream(guest.ring.id)
    guest.write(5)
    take(rec, guest.ring, (0, 0), each=True)
    folder = store.ring.machine_name(MACHINE)
    [name] = journal.list_files(store.files, folder)
    for frame in journal.LogReader(store.files, store.ring, folder, name).frames():
        assert frame.barrier or not frame.each
    rec.abandon()
    guest.ring.close()


@pytest.mark.parametrize("freed", [0, 15, 20])
def test_what_a_ring_holds_and_the_journal_lacks_follows_it(store: Store, tmp_path: Path, freed: int) -> None:
    commit_empty_point(store, SIZE)
    guest = Guest(rings.make(tmp_path / "ring", 256 * KiB))
    rec = Recorder(store, MACHINE, DISKS)
    rec.begin_stream(guest.ring.id)
    guest.write(10)
    at = take(rec, guest.ring, (0, 0), each=False)
    rec.barrier(Instant(2 * SECOND), TOKENS)
    guest.write(10)
    take(rec, guest.ring, at, each=True)
    rec.abandon()  # the worker died
    guest.write(12)
    left = same_ring(tmp_path / "left", guest.ring, guest.rows, freed)
    again = Recorder(store, MACHINE, DISKS)
    assert salvaging._append(again, History(store, MACHINE), left)
    history = History(store, MACHINE)
    seqs = history.moments[0].tolist()
    assert len(seqs) == 1 + 10 + 12
    for n, seq in enumerate(seqs):
        assert whole(history, seq) == guest.images[10 + n]
    assert not salvaging._append(again, history, left), "once is enough"
    again.close()
    stranger = rings.make(tmp_path / "stranger", 256 * KiB)
    assert not salvaging._append(again, history, stranger), "of a life whose gap was never closed"


@dataclass
class Answered:
    """The guest was told so many of its writes, of which so many were freed; these moments are durable."""

    rows: int
    freed: int
    durable: int


def test_no_answered_write_is_lost_whatever_dies_when(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash after every single step: killed, with what the ring held; or a power cut, which takes the ring."""
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 60_000)
    monkeypatch.setattr(logfile, "MEMORY_BYTES", 2 * logfile.BLOCK_BYTES)  # so there are frames that nobody has synced
    (ram / "run").mkdir()
    kernel = CrashKernel(ram / "run")
    path = ram / "run" / "store"
    init(path, None, kernel=kernel)
    guest = Guest(rings.make(ram / "ring", 256 * KiB))
    with Store.open(path, ram / "run" / "state", [], kernel=kernel) as opened:
        commit_empty_point(opened, SIZE)
        rec = Recorder(opened, MACHINE, DISKS)
        rec.begin_stream(guest.ring.id)
        guest.write(5)
        at = take(rec, guest.ring, (0, 0), each=False)
        first = rec.barrier(Instant(2 * SECOND), TOKENS)
        kernel.note(Answered(5, 5, 5))
        for turn in range(8):
            guest.write(6)
            kernel.note(Answered(len(guest.rows), at[0], at[0]))
            for batch in guest.ring.batches(*at, 16 * KiB):
                rec.stream(batch.rows.view(f.FACT), batch.data, each=True)
                at = batch.row_end, batch.data_end
            rec.sync(Instant(turn * SECOND))
            kernel.note(Answered(len(guest.rows), guest.ring.tails[0], at[0]))
            guest.ring.free(*at)
            kernel.note(Answered(len(guest.rows), at[0], at[0]))
        rec.finish()
        rec.abandon()
    count = 0
    for wreck in wrecks(kernel.steps, 1):
        noted = [n for n in wreck.notes if isinstance(n, Answered)]
        if not noted:
            continue
        count += 1
        place = ram / f"wreck{count}"
        put(wreck.tree, place)
        check(place, guest, noted[-1], first, killed=wreck.how != "power cut" and "power" not in wreck.how)
        shutil.rmtree(place)
    assert count > 60


def check(place: Path, guest: Guest, noted: Answered, first: int, *, killed: bool) -> None:
    if not (place / "store" / DESCRIPTOR).exists():
        return
    with Store.open(place / "store", place / "state", []) as opened:
        rec = Recorder(opened, MACHINE, DISKS)
        if killed:
            left = same_ring(place / "ring", guest.ring, guest.rows[: noted.rows], noted.freed)
            salvaging._append(rec, History(opened, MACHINE), left)
            left.close()
        history = History(opened, MACHINE)
        seqs = history.moments[0].tolist()
        held = 5 + len(seqs) - 1
        assert seqs[0] == first
        assert held >= (noted.rows if killed else noted.durable), "what the guest was told is gone"
        for n, seq in ((0, seqs[0]), (len(seqs) - 1, seqs[-1]), (len(seqs) // 2, seqs[len(seqs) // 2])):
            assert whole(history, seq) == guest.images[5 + n]
        rec.close()
