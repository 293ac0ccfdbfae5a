"""Logs that have ended: their index says what reading all of them says, and nothing rests on it alone."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from hvbackup.errors import ChunkDamaged, JournalGap, StoreDamage
from hvbackup.files import Opened
from hvbackup.model import SECOND, Instant, KiB
from hvbackup.store.check.check import Level, Wanted, check
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal
from hvbackup.store.journal.history import History
from hvbackup.store.journal.journal import LOG, SEGMENT, LogReader, LogWriter
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.store import Store
from tests.store.test_history import MACHINE, SIZE, VDA, commit_empty_point, life, store, whole
from tests.store.test_sealing import DISKS, suffixes, unsealed

__all__ = ["store"]


def ended_logs(store: Store) -> list[LogReader]:
    folder = store.ring.machine_name(MACHINE)
    names = [n for n in journal.list_files(store.files, folder) if n.suffix == LOG]
    return [log for n in names if (log := LogReader(store.files, store.ring, folder, n)).mark() is not None]


def forget_tables(store: Store) -> None:
    for name in store.state.names(f"journal/{store.ring.machine_name(MACHINE)}"):
        store.state.remove(f"journal/{store.ring.machine_name(MACHINE)}/{name}")


def change(store: Store, log: LogReader, at: int) -> None:
    path = store.files.path(log.path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_an_index_says_what_the_frames_say(store: Store, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        images = life(seed, store, 12)
    logs = ended_logs(store)
    assert logs
    for log in logs:
        index = log.index()
        joining = journal.Joining()
        for frame in journal.up_to_last_barrier(log.frames()):
            joining.add(frame)
        assert index
        assert index.facts.tobytes() == joining.facts.tobytes()
        assert log.mark() == LogReader(store.files, store.ring, log.path.split("/")[1], name_of(log)).mark()
    assert len({log.mark() for log in logs}) == len(logs)
    for _ in range(2):  # the second time from the tables that the first one has made
        history = History(store, MACHINE)
        assert {seq: whole(history, seq) for seq in history.moments[0].tolist()} == images


def name_of(log: LogReader) -> journal.Name:
    name = journal.parse_name(log.path.rsplit("/", 1)[1])
    assert name
    return name


@pytest.mark.parametrize("where", ["end", "place", "head", "rows", "tag"])
def test_a_damaged_index_costs_nothing_but_time(store: Store, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        images = life(2, store, 12)
    assert ended_logs(store)
    for log in ended_logs(store):
        size = store.files.size(log.path)
        at = int.from_bytes(store.files.read(log.path)[-8:], "little")
        change(
            store, log, {"end": size - 16, "place": size - 8, "head": at + 9, "rows": at + 70, "tag": at + 62}[where]
        )
    for _ in range(2):
        history = History(store, MACHINE)
        assert {seq: whole(history, seq) for seq in history.moments[0].tolist()} == images
    Recorder(store, MACHINE, DISKS).close()
    assert set(suffixes(store)) == {SEGMENT}
    history = History(store, MACHINE)
    assert {seq: whole(history, seq) for seq in history.moments[0].tolist()} == images


def stream(store: Store, logs: int, writes: int = 50) -> list[int]:
    """As many logs of single writes of 4 KiB, each of which is of one byte; the numbers of the moments."""
    rec, seqs = Recorder(store, MACHINE, DISKS), []
    rec.begin_stream("ring")
    row = np.zeros(1, f.FACT)
    row["length"], row["kind"] = 4096, f.FACT_DATA
    for n in range(logs):
        for k in range(writes):
            row["t"], row["offset"] = (n * writes + k + 1) * SECOND, (n * writes + k) % 60 * 4096
            seqs.append(rec.stream(row, bytes([(n * writes + k) % 251 + 1]) * 4096, each=True))
        rec.flush()
        rec.rotate()
    rec.abandon()
    return seqs


def test_a_damaged_frame_takes_the_moments_that_need_it_and_no_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sealed up to the damage, the log would have lost what comes behind it; without a word, too."""
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        seqs = stream(store, 3)
    log = ended_logs(store)[1]
    index = log.index()
    assert index
    change(store, log, int(index.frames["at"][11]) + 500)  # the eleventh write of the second log
    assert [p.kind for p in check(store, Wanted(Level.AUTHENTICATE)).problems] == ["segment"]
    Recorder(store, MACHINE, DISKS).close()
    assert suffixes(store) == [SEGMENT, LOG, SEGMENT]
    [problem] = check(store, Wanted(Level.AUTHENTICATE)).problems
    assert problem.lost
    assert log.path in problem.what

    history = History(store, MACHINE)
    assert history.moments[0].tolist() == seqs
    lost = seqs[60]
    overwritten = seqs[120]
    for number, seq in enumerate(seqs):
        if lost <= seq < overwritten:
            with pytest.raises(ChunkDamaged, match=r"\.log"):
                whole(history, seq)
        elif number % 7 == 0 or seq == overwritten:
            assert whole(history, seq)[number % 60 * 4096] == number % 251 + 1


@pytest.mark.parametrize("where", ["first frame", "first write", "last frame and index"])
def test_a_damaged_log_stays_whatever_of_it_is_damaged(
    store: Store, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        seqs = stream(store, 3)
    log = ended_logs(store)[1]
    index = log.index()
    assert index
    places = index.frames["at"].tolist()
    at = int.from_bytes(store.files.read(log.path)[-8:], "little")
    for place in {"first frame": [places[0]], "first write": [places[1]], "last frame and index": [at - 9, at]}[where]:
        change(store, log, place + 70 if place != at - 9 else place)
    for _ in range(2):
        history = History(store, MACHINE)
        offered = history.moments[0].tolist()
        assert set(offered) >= set(seqs[:50])
        assert offered == (seqs[:99] if where == "last frame and index" else seqs)
        assert whole(history, seqs[49])[49 * 4096] == 50
        if where == "first frame":
            assert whole(history, seqs[98])[38 * 4096] == 99, "it holds nothing that the index does not"
        else:
            with pytest.raises((StoreDamage, JournalGap), match=log.path):
                whole(history, seqs[109])
        Recorder(store, MACHINE, DISKS).close()
        assert suffixes(store) == [SEGMENT, LOG, SEGMENT]
    assert [p.lost for p in check(store, Wanted(Level.AUTHENTICATE)).problems] == [True]


def test_of_a_log_that_has_ended_only_the_index_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        stream(store, 3, writes=500)
    read: list[int] = []
    read_at = Opened.read_at

    def counted(opened: Opened, offset: int, length: int) -> bytes:
        data = read_at(opened, offset, length)
        read.append(len(data))
        return data

    monkeypatch.setattr(Opened, "read_at", counted)
    History(store, MACHINE)
    first = sum(read)
    read.clear()
    History(store, MACHINE)
    logs = sum(store.files.size(log.path) for log in ended_logs(store))
    assert first < logs / 20
    assert sum(read) < 3 * KiB, "and not even that once it was"


def test_no_index_speaks_of_what_is_not_durable(store: Store) -> None:
    folder = store.ring.machine_name(MACHINE)
    for synced in (True, False):
        log = LogWriter(store.files, store.ring, folder, 1, 1 + 100 * synced)
        log.note(Instant(1), {"disks": []}, barrier=True)
        log.sync()
        log.note(Instant(2), {}, barrier=True)
        if synced:
            log.sync()
        log.close()
    assert [name_of(log).first for log in ended_logs(store)] == [101]


def test_what_has_more_facts_than_an_index_may_has_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_empty_point(store, SIZE)
    monkeypatch.setattr(journal, "INDEX_MAX_BYTES", 40 * f.FACT.itemsize)
    with monkeypatch.context() as patch:
        unsealed(patch)
        seqs = stream(store, 2, writes=60)
    assert not ended_logs(store)
    assert History(store, MACHINE).moments[0].tolist() == seqs


def open_logs(store: Store) -> int:
    """How many descriptors of the store's logs this process has; others come and go with what collects garbage."""
    folder = str(store.files.path("journal"))
    targets = [str(fd.resolve()) for fd in Path("/proc/self/fd").iterdir()]
    return sum(target.startswith(folder) and target.endswith(LOG) for target in targets)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_no_room_for_an_index_is_no_harm(store: Store, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, "planted")

    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        rec = Recorder(store, MACHINE, DISKS)
        rec.write(VDA, Instant(1), [(0, 3)], b"abc")
        seq = rec.barrier(Instant(1), {})
        patch.setattr(store.files.kernel, "write_at", fails)
        assert open_logs(store) == 1
        rec.rotate()
        assert open_logs(store) == 0
    assert not ended_logs(store)
    assert whole(History(store, MACHINE), seq)[:3] == b"abc"
    rec.write(VDA, Instant(2), [(0, 3)], b"new")
    seq = rec.barrier(Instant(2), {})
    rec.close()
    assert whole(History(store, MACHINE), seq)[:3] == b"new"


def test_a_log_of_an_older_version_has_no_index_and_is_read_to_its_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_empty_point(store, SIZE)
    with monkeypatch.context() as patch:
        unsealed(patch)
        seqs = stream(store, 2)
    for log in ended_logs(store):
        path = store.files.path(log.path)
        data = path.read_bytes()
        path.write_bytes(data[: int.from_bytes(data[-8:], "little")])
    assert not ended_logs(store)
    assert History(store, MACHINE).moments[0].tolist() == seqs
