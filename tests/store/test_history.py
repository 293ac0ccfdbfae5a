"""A journal's moments, against an oracle: every moment of a life of writes reads back, before and after sealing."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import NoReturn

import pytest

from hvbackup.errors import Busy, ChunkDamaged, JournalGap, NotFound, StoreDamage
from hvbackup.files import Opened
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import SECOND, Disk, DiskId, Instant, KiB, MachineId, Token
from hvbackup.store.format import keys
from hvbackup.store.format import layout as f
from hvbackup.store.journal import history as history_
from hvbackup.store.journal import journal, recorder, tables
from hvbackup.store.journal.history import History
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.runs import OpenRun
from hvbackup.store.journal.segment import Segment
from hvbackup.store.store import Store, init
from tests.store.mortal import Dies
from tests.world import CarelessKernel

MACHINE, VDA = MachineId("m1"), DiskId("vda")
SIZE = 300 * KiB + 512


@pytest.fixture(params=["encrypted", "plain"])
def store(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    secret = keys.parse_key_text(keys.new_key_text(), "test") if request.param == "encrypted" else None
    init(tmp_path / "store", secret)
    with Store.open(tmp_path / "store", tmp_path / "state", [secret] if secret else [], owner=True) as opened:
        yield opened


def commit_empty_point(store: Store, size: int) -> None:
    """A point of an all-zero disk with the sequence number 0, as a capture before the first fact makes it."""
    from dataclasses import replace

    from hvbackup.capture import Options, capture
    from hvbackup.store.format import point as points

    hv = FakeHypervisor([FakeMachine(str(MACHINE), {"vda": FakeDisk(size)})])
    outcome = capture(store, hv, hv.machines()[0], Options())
    assert outcome.point
    based = replace(outcome.point, id=points.new_id(), seq=0)
    store.commit(based, store.writer())


def life(seed: int, store: Store, sets: int, before: bytes = bytes(SIZE)) -> dict[int, bytes]:
    """Random sets of writes and zeroes through a recorder that seals often; moment -> image."""
    rng = random.Random(seed)
    image = bytearray(before)
    images: dict[int, bytes] = {}
    rec = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    for n in range(sets):
        t = Instant((n + 1) * SECOND)
        for _ in range(rng.randrange(1, 6)):
            start = rng.randrange(SIZE - 1)
            length = min(SIZE - start, rng.choice([1, 512, 4096, 70_000]))
            if rng.random() < 0.3:
                image[start : start + length] = bytes(length)
                rec.zero(VDA, t, [(start, length)])
            else:
                data = rng.randbytes(length)
                image[start : start + length] = data
                rec.write(VDA, t, [(start, length)], data)
        images[rec.barrier(t, {VDA: Token("fake", str(n))})] = bytes(image)
        if rng.random() < 0.3:
            rec.rotate()
    if rng.random() < 0.5:
        rec.close()
    else:
        rec.finish()
    return images


def whole(history: History, seq: int) -> bytes:
    out = bytearray(SIZE)
    history.view(history.by_seq(seq), VDA).read_into(0, memoryview(out))
    return bytes(out)


@pytest.mark.parametrize("seed", range(4))
def test_every_moment_reads_back(store: Store, seed: int) -> None:
    commit_empty_point(store, SIZE)
    images = life(seed, store, 12)
    history = History(store, MACHINE)
    assert list(images) == history.moments[0].tolist()
    for seq, image in images.items():
        assert whole(history, seq) == image
        view = history.view(history.by_seq(seq), VDA)
        restored = bytearray(SIZE)
        for first, ids in view.leaves():
            for offset, data in view.contents(first, ids):
                restored[offset : offset + len(data)] = data
        assert restored == image
        at = 0
        for length, data_there in view.runs(0, SIZE):
            assert data_there or not any(image[at : at + length])
            at += length
        assert at == SIZE


def test_a_takeover_drops_what_no_barrier_closed_and_keeps_every_moment(store: Store) -> None:
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    rec.write(VDA, Instant(SECOND), [(0, 4)], b"good")
    first = rec.barrier(Instant(SECOND), {})
    rec.write(VDA, Instant(2 * SECOND), [(0, 4)], b"lost")
    again = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    assert again.epoch == rec.epoch + 1
    again.write(VDA, Instant(9 * SECOND), [(4, 3)], b"new")
    second = again.barrier(Instant(9 * SECOND), {}, gap={"from": SECOND, "why": "the worker died"})
    again.close()
    history = History(store, MACHINE)
    assert history.moments[0].tolist() == [first, second]
    assert whole(history, first)[:8] == b"good\0\0\0\0"
    assert whole(history, second)[:8] == b"goodnew\0"
    with pytest.raises(JournalGap, match=f"seq:{first} and seq:{second}"):
        history.at(Instant(5 * SECOND))
    assert history.at(Instant(9 * SECOND)).seq == second
    with pytest.raises(NotFound):
        history.by_seq(first + 1)


def keep_in_the_dark(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No writer learns that it was replaced."""
    monkeypatch.setattr(Recorder, "_refuse_replaced", lambda _: None)
    monkeypatch.setattr(store.files.kernel, "links", lambda _: 1)


def test_a_fenced_writer_is_ignored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_in_the_dark(store, monkeypatch)
    commit_empty_point(store, SIZE)
    old = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    old.write(VDA, Instant(SECOND), [(0, 3)], b"old")
    kept = old.barrier(Instant(SECOND), {})
    new = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    new.write(VDA, Instant(2 * SECOND), [(0, 3)], b"new")
    newest = new.barrier(Instant(2 * SECOND), {})
    new.close()
    old._log = None  # its file was settled away; it goes on in a new one, not knowing
    old._next += 100
    old.write(VDA, Instant(3 * SECOND), [(0, 3)], b"bad")
    old.barrier(Instant(3 * SECOND), {})
    history = History(store, MACHINE)
    assert history.moments[0].tolist() == [kept, newest]


@pytest.mark.parametrize("learns", [True, False], ids=["learns it", "never learns it"])
def test_a_fenced_writer_that_was_between_two_logs_is_ignored(
    store: Store, monkeypatch: pytest.MonkeyPatch, learns: bool
) -> None:
    if not learns:
        keep_in_the_dark(store, monkeypatch)
    commit_empty_point(store, SIZE)
    old = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    old.write(VDA, Instant(SECOND), [(0, 3)], b"old")
    moments = [old.barrier(Instant(SECOND), {})]
    old.rotate()
    old.finish()
    for turn in range(2, 4):
        new = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
        new.write(VDA, Instant(turn * SECOND), [(0, 3)], b"new")
        moments.append(new.barrier(Instant(turn * SECOND), {}))
        with pytest.raises(Busy, match="taken over") if learns else contextlib.nullcontext():
            old.write(VDA, Instant(turn * SECOND), [(0, 3)], b"bad")
            old.barrier(Instant(turn * SECOND), {})
        assert History(store, MACHINE).moments[0].tolist() == moments
        assert whole(History(store, MACHINE), moments[-1])[:3] == b"new"
        new.close()
        assert History(store, MACHINE).moments[0].tolist() == moments
    old.abandon()


def test_a_writer_learns_that_its_log_was_taken_over(store: Store) -> None:
    commit_empty_point(store, SIZE)
    old = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    old.write(VDA, Instant(SECOND), [(0, 3)], b"old")
    kept = old.barrier(Instant(SECOND), {})
    Recorder(store, MACHINE, [Disk(VDA, SIZE)]).close()
    old.write(VDA, Instant(2 * SECOND), [(0, 3)], b"bad")
    with pytest.raises(Busy, match=r"taken over.*from one only"):
        old.barrier(Instant(2 * SECOND), {})
    old.abandon()
    assert History(store, MACHINE).moments[0].tolist() == [kept]


def test_logs_are_sealed_by_size_and_by_age(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 10_000)
    commit_empty_point(store, SIZE)
    rec = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
    rec.write(VDA, Instant(1), [(0, 20_000)], bytes(range(250)) * 80)
    rec.barrier(Instant(1), {})
    rec.finish()
    folder = f"journals/{store.ring.machine_name(MACHINE)}"
    assert [n[-4:] for n in store.files.names(folder)] == [".seg"]
    rec.write(VDA, Instant(2), [(0, 1)], b"x")
    rec.barrier(Instant(2 + 61 * SECOND), {})
    rec.finish()
    assert [n[-4:] for n in store.files.names(folder)] == [".seg", ".seg"] or len(store.files.names(folder)) == 2
    rec.close()
    assert all(n.endswith(".seg") for n in store.files.names(folder))


def test_a_file_of_a_journal_under_another_name_is_refused(tmp_path: Path) -> None:
    """An attacker who can write to the store, but has no key, can't move facts to another place of the sequence."""
    secret = keys.parse_key_text(keys.new_key_text(), "test")
    init(tmp_path / "store", secret)
    with Store.open(tmp_path / "store", tmp_path / "state", [secret], owner=True) as store:
        rec = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
        rec.write(VDA, Instant(SECOND), [(0, 4)], b"abcd")
        rec.barrier(Instant(SECOND), {})
        log = next(store.files.root.glob("journals/*/*.log"))
        moved = log.with_name(log.name.replace("00000001-", "00000002-", 1))
        moved.write_bytes(log.read_bytes())
        name = journal.parse_name(moved.name)
        assert name
        with pytest.raises(StoreDamage, match="not what was written there"):
            list(journal.LogReader(store.files, store.ring, log.parent.name, name).frames())
        moved.unlink()
        rec.close()
        segment = next(store.files.root.glob("journals/*/*.seg"))
        segment.rename(segment.with_name(segment.name.replace("00000001-", "00000002-", 1)))
        history = History(store, MACHINE, whole=True)
        assert not len(history.moments[0])
        assert "does not decode" in history.lost[0][1]


def test_a_segment_whose_footer_forgets_a_piece_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f, "SEGMENT_PIECE_BYTES", 1024)
    init(tmp_path / "store", None)
    with Store.open(tmp_path / "store", tmp_path / "state", [], owner=True) as store:
        rec = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
        rec.write(VDA, Instant(SECOND), [(0, 4096)], random.Random(1).randbytes(4096))
        rec.barrier(Instant(SECOND), {})
        rec.close()
        (run,) = History(store, MACHINE, whole=True).runs
        assert isinstance(run, Segment)
        run._stream = run._stream[1:]
        with pytest.raises(ChunkDamaged, match="belongs there"):
            run.read(0, 10)


@pytest.mark.parametrize("seed", range(3))
def test_merged_tables_say_the_same_as_their_segments(store: Store, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small merges of merges, a stretch of the disk at a time; from the caches of the first look as from scratch."""
    monkeypatch.setattr(history_, "FANOUT", 2)
    monkeypatch.setattr(history_, "LEVELS", (4, 2))
    monkeypatch.setattr(tables, "MERGED_AT_ONCE", 3)
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 1)
    monkeypatch.setattr(recorder, "LOG_MAX_BYTES", 1)
    commit_empty_point(store, SIZE)
    images = life(seed, store, 13)
    for _ in range(2):
        history = History(store, MACHINE)
        for seq, image in images.items():
            assert whole(history, seq) == image
    kept = store.state.names(f"journal/{store.ring.machine_name(MACHINE)}")
    assert sum("+4." in n for n in kept) >= 3
    assert sum("+2." in n for n in kept) >= 6


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_damaged_tables_are_made_again(store: Store, harm: str) -> None:
    commit_empty_point(store, SIZE)
    images = life(1, store, 8)
    History(store, MACHINE).warm()
    folder = store.state.path(f"journal/{store.ring.machine_name(MACHINE)}")
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        if harm == "remove":
            path.unlink()
        else:
            path.write_bytes(data if harm == "flip" else data[:-9])
    history = History(store, MACHINE)
    for seq, image in images.items():
        assert whole(history, seq) == image


def test_a_table_whose_numbers_were_changed_is_never_believed(store: Store) -> None:
    commit_empty_point(store, SIZE)
    images = life(2, store, 6)
    History(store, MACHINE).warm()
    folder = store.state.path(f"journal/{store.ring.machine_name(MACHINE)}")
    harmed = 0
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)
        harmed += 1
    refused = 0
    for _ in range(3 * harmed):
        try:
            history = History(store, MACHINE)
            for seq, image in images.items():
                assert whole(history, seq) == image
        except StoreDamage as e:
            assert "run this again" in str(e)  # noqa: PT017
            refused += 1
    assert 0 < refused <= harmed


class Unsure(CarelessKernel):
    """The power goes before an fsync has returned."""

    cut = False

    def fsync(self, fd: int) -> None:
        if self.cut:
            raise Dies


def test_what_a_reader_shows_is_durable_although_a_block_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens the log, and then the writer puts another barrier into the block that the reader has not come to yet."""
    kernel = Unsure()
    init(tmp_path / "store", None)
    synced: list[list[int]] = []
    with Store.open(tmp_path / "store", tmp_path / "state", [], owner=True, kernel=kernel) as store:
        commit_empty_point(store, SIZE)
        rec = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
        rec.barrier(Instant(2 * SECOND), {VDA: Token("fake", "1")})
        read, sync = OpenRun._read, Opened.sync

        def late(run: OpenRun) -> journal.Index:
            kernel.cut = True
            with pytest.raises(Dies):
                rec.barrier(Instant(3 * SECOND), {VDA: Token("fake", "2")})
            found = read(run)
            seen.append(len(found.facts))
            return found

        def watched(opened: Opened) -> None:
            synced.append(list(seen))
            sync(opened)

        seen: list[int] = []
        monkeypatch.setattr(OpenRun, "_read", late)
        monkeypatch.setattr(Opened, "sync", watched)
        offered = len(History(store, MACHINE).moments[0])
    assert offered == 2, "the second barrier is in the file"
    assert synced == [seen], "and was made durable by who read it, afterwards"


@pytest.mark.parametrize("sealed", [False, True])
def test_an_append_that_fails_leaves_nothing_that_hides_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    secret = keys.parse_key_text(keys.new_key_text(), "test")
    init(tmp_path / "store", secret)
    with Store.open(tmp_path / "store", tmp_path / "state", [secret], owner=True) as store:
        commit_empty_point(store, SIZE)
        rec = Recorder(store, MACHINE, [Disk(VDA, SIZE)])
        rec.write(VDA, Instant(SECOND), [(0, 4)], b"abcd")
        rec.barrier(Instant(SECOND), {})

        def fails(*_: object) -> NoReturn:
            raise MemoryError

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(journal.LogWriter, "_joined", fails)
            rec.write(VDA, Instant(2 * SECOND), [(0, 4)], b"lost")
        last = rec.barrier(Instant(3 * SECOND), {})
        if sealed:
            rec.close()
        assert History(store, MACHINE).moments[0].tolist()[-1] == last
        rec.close()
