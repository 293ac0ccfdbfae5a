"""The write stream of a storage daemon: every moment is an exact prefix of what the guest was told, and nothing told is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from hvbackup.capture import Options
from hvbackup.errors import HostUnreachable, SpaceExhausted, StreamBroken, StreamBypassed
from hvbackup.model import SECOND, DiskId, Instant, KiB, MiB
from hvbackup.processes import may_idle
from hvbackup.protect import looks, rings, streaming
from hvbackup.protect.events import Event, Rhythm, Streamed, Trouble
from hvbackup.protect.protection import Protection
from hvbackup.protect.streaming import StreamLife
from hvbackup.store.format import layout as f
from hvbackup.store.journal import recorder
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.told import Told
from hvbackup.store.store import Store, init
from hvbackup.target.ring import Ring
from tests.hypervisors.daemon import Daemon, make_image, node, only
from tests.protecting import in_memory
from tests.scribe import Scribe

pytestmark = pytest.mark.real
SIZES = {"vda": 8 * MiB, "vdb": 4 * MiB}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Two raw disks: what a guest was told is written survives the death of the daemon."""
    nodes = [node(name, make_image(tmp_path / f"{name}.raw", size, "raw"), "raw") for name, size in SIZES.items()]
    made = Daemon(tmp_path, nodes).start()
    yield made
    made.kill()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(tmp_path / "store", None)
    with in_memory(tmp_path / "rings"), Store.open(tmp_path / "store", tmp_path / "state", []) as found:
        yield found


def rhythm(tmp_path: Path, **more: int) -> Rhythm:
    return Rhythm(SECOND // 10, 3600 * SECOND, stream=True, rings=(tmp_path / "rings").resolve(), **more)  # type: ignore[arg-type]


def protection_of(store: Store, daemon: Daemon, wanted: Rhythm, events: list[Event] | None = None) -> Protection:
    hypervisor = daemon.hypervisor()
    report = events.append if events is not None else lambda _: None
    return Protection(store, hypervisor, only(hypervisor), Options(), wanted, report)


def begun(protection: Protection) -> StreamLife:
    life = protection.begin("a test")
    assert isinstance(life, StreamLife)
    return life


def images(history: History, moment: Moment) -> dict[str, bytearray]:
    found = {}
    for disk, size in SIZES.items():
        found[disk] = bytearray(size)
        history.view(moment, DiskId(disk)).read_into(0, memoryview(found[disk]))
    return found


def every_moment(history: History) -> list[Moment]:
    seqs, times = history.moments
    return [Moment(int(s), Instant(int(t))) for s, t in zip(seqs, times, strict=True)]


def on_disk(folder: Path) -> dict[str, bytes]:
    return {disk: (folder / f"{disk}.raw").read_bytes() for disk in SIZES}


def remarks(history: History) -> set[int]:
    """Sequence numbers of facts that are no writes: a moment there holds what the one before holds."""
    found = [run.name.first + np.flatnonzero(run.facts["kind"] == f.FACT_META) for run in history.runs]
    return {int(seq) for seqs in found for seq in seqs}


def look_often(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    """A look at QEMU begins ten times a second, and what it has found is acted upon at once; with other limits of a stream."""
    monkeypatch.setattr(looks, "LOOK_SECONDS", 0.1)
    for name, value in {"KEEP_UP_SECONDS": 0.0, **limits}.items():
        monkeypatch.setattr(streaming, name, value)


def test_an_idle_guest_has_moments_of_looks_that_found_it_there(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has moved writes somewhere else: that nothing arrives does not say that nothing was written."""
    look_often(monkeypatch, IDLE_SECONDS=1.0)
    life = begun(protection_of(store, daemon, rhythm(tmp_path)))

    def unknown(_: object) -> None:
        raise HostUnreachable("planted: somebody else holds the monitor")

    with monkeypatch.context() as patch:
        patch.setattr(life.stream, "check", unknown)
        closed, end = life.newest, time.monotonic() + 2.5
        while time.monotonic() < end:
            time.sleep(life.step())
        assert life.newest == closed
    asked, end = time.time_ns(), time.monotonic() + 30
    while life.newest == closed and time.monotonic() < end:
        time.sleep(life.step())
    assert asked <= life.newest.t <= time.time_ns()
    life.close()


def refuses(error: Exception) -> Callable[[object], None]:
    """A look that ends like this."""

    def look(_: object) -> None:
        raise error

    return look


@pytest.mark.parametrize("breaks", [True, False], ids=["broken off", "ended"])
@pytest.mark.parametrize("long", [True, False], ids=["long", "short"])
def test_what_nobody_could_look_at_for_long_is_told_and_not_offered(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool, breaks: bool
) -> None:
    """Somebody who keeps the monitor can do with it what no stream shows; a QEMU that is gone can't be asked any more."""
    look_often(monkeypatch, UNSEEN_SECONDS=0.0 if long else 600.0)
    events: list[Event] = []
    protection = protection_of(store, daemon, rhythm(tmp_path), events)
    life = begun(protection)
    good = life.newest
    monkeypatch.setattr(life.stream, "check", refuses(HostUnreachable("planted: somebody else holds the monitor")))
    with daemon.guest("vda") as guest:
        guest.write(0, b"x" * 4096)
    end = time.monotonic() + 60
    while time.monotonic() < end and (life.newest == good or not (events if long else life._looks)):
        time.sleep(life.step())
    if long:
        while not (told := [e.error for e in events if isinstance(e, Trouble)]):
            assert time.monotonic() < end
            time.sleep(life.step())
        assert len(told) == 1
        assert "somebody else holds the monitor" in str(told[0])
    life.recorder.rotate()  # the next file repeats the tokens
    with daemon.guest("vdb") as guest:
        guest.write(0, b"y" * 4096)
    before = life.newest
    while life.newest == before and time.monotonic() < end:
        time.sleep(life.step())
    written = life.newest
    assert written != good
    if breaks:
        assert life.target
        os.kill(life.target.pid, signal.SIGKILL)
        with pytest.raises(StreamBroken):
            while time.monotonic() < end:
                time.sleep(life.step())
    life.close()
    history = History(store, protection.setting.machine.id)
    assert [d.after for d in history.told.doubts] == [good.seq] * long
    assert history.last
    assert history.last.seq == (good.seq if long else history.moments[0][-1])
    assert long or history.last.seq >= written.seq
    again = begun(protection)
    again.close()
    assert again.how == "resumed", "bitmaps are as good as they were"
    history = History(store, protection.setting.machine.id)
    assert history.last
    assert images(history, history.last)["vda"] == on_disk(tmp_path)["vda"]


def test_where_nobody_has_tried_to_look_nothing_is_in_doubt(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A life that had to make room first, or to wait for a disk, did not look meanwhile; QEMU was there."""
    monkeypatch.setattr(looks, "LOOK_SECONDS", 600.0)
    monkeypatch.setattr(streaming, "UNSEEN_SECONDS", 0.0)
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    with daemon.guest("vda") as guest:
        guest.write(0, b"x" * 4096)
    assert life.target
    os.kill(life.target.pid, signal.SIGKILL)
    with pytest.raises(StreamBroken):
        while True:
            time.sleep(life.step())
    life.close()
    history = History(store, protection.setting.machine.id)
    assert not history.told.doubts
    assert history.last
    assert images(history, history.last)["vda"][:4096] == b"x" * 4096


def test_a_bypass_that_a_look_had_found_counts_although_the_stream_broke_off_then(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "LOOK_SECONDS", 0.05)
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    good = life.newest
    monkeypatch.setattr(life.stream, "check", refuses(StreamBypassed("planted: a write went past us")))
    with daemon.guest("vda") as guest:
        guest.write(0, b"x" * 4096)
    end = time.monotonic() + 60
    assert life._looks
    assert life.target
    while not life._looks._found and time.monotonic() < end:
        time.sleep(0.05)
        if not life._looks._thread:
            life.step()
    life._looks.join()
    os.kill(life.target.pid, signal.SIGKILL)
    while not life._broke_off():
        time.sleep(0.01)
    life.close()
    [doubt] = History(store, protection.setting.machine.id).told.doubts
    assert doubt.after == good.seq


def test_a_bypass_that_was_found_before_the_journal_failed_is_what_the_next_life_begins_with(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "LOOK_SECONDS", 0.05)
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    with monkeypatch.context() as patch:
        patch.setattr(life.stream, "check", refuses(StreamBypassed("planted: a write went past us")))
        patch.setattr(Recorder, "flush", refuses(SpaceExhausted("planted: the store is full")))
        assert life._looks
        time.sleep(0.1)
        life._looks.poll(life.newest)
        life._looks.join()
        with daemon.guest("vda") as guest:
            guest.write(0, b"x" * 4096)
        with pytest.raises(SpaceExhausted):
            life.step()
        life.close()
    assert protection.setting.untold
    again = begun(protection)
    again.close()
    assert again.how == "captured", "no token is believed"
    [doubt] = History(store, protection.setting.machine.id).told.doubts
    assert "went past us" in doubt.why


def test_every_point_of_a_stream_has_tokens(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """Also where checkpoints are older than its moment: whoever begins at the point reads what changed since them."""
    life = begun(protection_of(store, daemon, rhythm(tmp_path)))
    for number in range(2):
        with daemon.guest("vda") as guest:
            guest.write(0, bytes([number + 1]) * 4096)
        before = life.newest
        while life.newest == before:
            time.sleep(life.step())
        point = life.points.fold(life.points.prepare(life)).point
        assert [d.token for d in point.disks] == [life.tokens[d.disk.id] for d in point.disks]
    life.close()


def test_a_doubt_that_could_not_be_written_down_is_what_the_next_life_begins_with(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "LOOK_SECONDS", 0.05)
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    good, barrier = life.newest, Recorder.barrier
    with daemon.guest("vda") as guest:
        guest.write(0, b"x" * 4096)
    while life.newest == good:
        time.sleep(life.step())

    def full(self: Recorder, *words: Any, **more: Any) -> int:
        if "doubt" in more:
            raise SpaceExhausted("planted: the store is full")
        return barrier(self, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "barrier", full)
        patch.setattr(life.stream, "check", refuses(StreamBypassed("planted: a write went past us")))
        with pytest.raises(SpaceExhausted):
            while True:
                time.sleep(life.step())
        life.close()
    assert not History(store, protection.setting.machine.id).told.doubts
    again = begun(protection)
    again.close()
    assert again.how == "captured", "no token is believed"
    [doubt] = History(store, protection.setting.machine.id).told.doubts
    assert doubt.after < good.seq + 1 <= doubt.until
    assert protection.setting.untold is None


def test_a_ring_is_not_what_the_journal_lacks_where_somebody_has_gone_on() -> None:
    """With another stream, or with cycles, on another host perhaps: what is left in it is older than what they recorded."""
    told, ring = Told(), cast(Ring, SimpleNamespace(id="ours"))
    assert not rings._is_newest(told, ring)
    told.tell(5, 5, {"tokens": {"vda": {"value": "one"}}, "stream": {"ring": "ours", "rows": 0}})
    told.tell(9, 9, {"disks": [], "tokens": {"vda": {"value": "one"}}, "stream": {"ring": "ours", "rows": 3}})
    assert rings._is_newest(told, ring)
    told.tell(12, 12, {"tokens": {"vda": {"value": "a cycle's"}}})
    assert not rings._is_newest(told, ring)
    told.tell(15, 15, {"tokens": {"vda": {"value": "two"}}, "stream": {"ring": "theirs", "rows": 0}})
    assert not rings._is_newest(told, ring)


def test_a_ring_that_fills_during_the_last_look_is_no_bypass(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What QEMU counts since did not arrive; what had arrived before is a prefix of it, for all disks."""
    events: list[Event] = []
    protection = protection_of(store, daemon, rhythm(tmp_path, ring_bytes=1 * MiB), events)
    life = begun(protection)

    def look(_: object) -> None:
        with daemon.guest("vda") as guest:
            for n in range(512):
                guest.write(n * 4 * KiB, bytes([n % 255 + 1]) * 4 * KiB)
        raise StreamBypassed("planted: more was written than has arrived")

    monkeypatch.setattr(life.stream, "check", look)
    life.close()
    assert not [e for e in events if isinstance(e, Trouble)]
    history = History(store, protection.setting.machine.id)
    assert not history.told.doubts
    assert history.last is not None
    found = images(history, history.last)["vda"]
    kept = next(n for n in range(512) if not found[n * 4 * KiB])
    assert 0 < kept <= 256
    assert bytes(found) == on_disk(tmp_path)["vda"][: kept * 4 * KiB] + bytes(SIZES["vda"] - kept * 4 * KiB)
    again = begun(protection)
    again.close()
    assert again.how == "resumed"
    history = History(store, protection.setting.machine.id)
    assert history.last
    assert images(history, history.last)["vda"] == on_disk(tmp_path)["vda"]


OTHER_CLOCK = """
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t)
{
    static int (*real)(clockid_t, struct timespec *);
    static volatile long long *seconds;
    if (!real) {
        real = dlsym(RTLD_NEXT, "clock_gettime");
        seconds = mmap(0, sizeof *seconds, PROT_READ, MAP_SHARED, open(getenv("SECONDS_ADDED"), O_RDONLY), 0);
    }
    int result = real(id, t);
    t->tv_sec += id == CLOCK_REALTIME ? *seconds : 0;
    return result;
}
"""


def test_a_clock_that_is_set_is_told_and_followed(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back as well as forward, by a guest that writes and by one that does not."""
    added, library, source = tmp_path / "added", tmp_path / "clock.so", tmp_path / "clock.c"
    added.write_bytes(bytes(8))
    source.write_text(OTHER_CLOCK)
    subprocess.run(["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def clock() -> Instant:
        return Instant(time.time_ns() + int.from_bytes(added.read_bytes(), "little", signed=True) * SECOND)

    def lived(moments: int) -> Moment:
        """So many writes later."""
        for n in range(moments):
            with daemon.guest("vda") as guest:
                guest.write(n * 4 * KiB, os.urandom(4 * KiB))
            before, end = life.newest, time.monotonic() + 30
            while life.newest == before and time.monotonic() < end:
                time.sleep(life.step())
        return life.newest

    def set_by(minutes: int) -> None:
        with added.open("r+b") as file:  # in its place: the target looks at it there
            was = int.from_bytes(file.read(8), "little", signed=True)
            file.seek(0)
            file.write((was + minutes * 60).to_bytes(8, "little", signed=True))

    look_often(monkeypatch, IDLE_SECONDS=1.0)
    events: list[Event] = []
    protection = protection_of(store, daemon, rhythm(tmp_path), events)
    protection.setting.options = replace(protection.setting.options, clock=clock)
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("SECONDS_ADDED", str(added))
        life = begun(protection)
    for minutes in (10, -20):
        lived(2)
        set_by(minutes)
        for _ in range(3):
            asked = clock()
            assert asked <= lived(1).t <= clock(), "a write has the time of the clock as it is"
            assert life.setting.steps.any, "which is told with it"
    set_by(-30)
    idle, end = life.newest, time.monotonic() + 30
    while life.newest == idle and time.monotonic() < end:
        time.sleep(life.step())
    assert clock() - 30 * SECOND < life.newest.t <= clock(), "a quiet guest has moments"
    assert all(e.lag_seconds < 60 for e in events if isinstance(e, Streamed))
    life.close()
    history = History(store, protection.setting.machine.id)
    steps = [round(step.step_ns / SECOND / 60) for step in history.told.clocks]
    assert steps == [10, -20, -30]
    assert images(history, history.last)["vda"] == on_disk(tmp_path)["vda"]


@pytest.mark.parametrize("doubt", [True, False], ids=["in doubt", "good"])
def test_what_a_ring_holds_behind_a_doubt_is_no_moment(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubt: bool
) -> None:
    """It would be laid over moments that lack what went past the stream."""
    monkeypatch.setattr(looks, "LOOK_SECONDS", 0.1)
    with Scribe(daemon, SIZES, 500) as scribe:
        setting = (protection := protection_of(store, daemon, rhythm(tmp_path))).setting
        life = begun(protection)

        def passed(_: object) -> None:
            raise StreamBypassed("planted: a write went past us")

        if doubt:
            monkeypatch.setattr(life.stream, "check", passed)
            with pytest.raises(StreamBypassed):
                for _ in range(200):
                    time.sleep(life.step())
        else:
            life.step()
        scribe.wait(scribe.acked + 50)
        life.recorder.abandon()  # as one that was killed
        history = History(store, setting.machine.id)
        recorder = Recorder(store, setting.machine.id, setting.machine.disks)
        assert rings.salvage(setting, recorder, history) is not doubt
        recorder.close()
        life.stream.close(healthy=False)


def test_every_write_of_two_disks_is_a_moment(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    rng, known = random.Random(3), {}
    with Scribe(daemon, SIZES, 2000) as scribe:
        protection = protection_of(store, daemon, rhythm(tmp_path))
        life = begun(protection)
        first = scribe.acked
        for turn in range(15):
            scribe.wait(scribe.acked + rng.randrange(20, 60))
            before = scribe.acked
            life.step()
            known[life.newest.seq] = (before, scribe.acked)
            if turn == 7:
                protection.setting.report(life.points.fold(life.points.prepare(life)))
        last = scribe.acked
        life.close()
        scribe.stop()
        history = History(store, protection.setting.machine.id)
        offered, told = every_moment(history), remarks(history)
        assert len(offered) >= last - first >= 15 * 20
        for seq, (low, high) in known.items():
            assert low <= scribe.verify(images(history, history.by_seq(seq))) <= high + 1
        seqs = {m.seq for m in offered}
        pairs = [m for m in offered if m.seq + 1 in seqs]
        before_remarks = [m for m in pairs if m.seq + 1 in told]
        assert before_remarks, "the fold has named its tokens"
        for moment in [*rng.sample(pairs, 200), *before_remarks]:
            reached = scribe.verify(images(history, moment))
            following = scribe.verify(images(history, history.by_seq(moment.seq + 1)))
            assert following == reached + (moment.seq + 1 not in told), "each write is a moment of its own"
    assert not daemon.leftovers()


def test_a_burst_is_taken_with_what_nobody_wants_and_nothing_else_is(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs end, points are made and alarms are set meanwhile: a thread that begins in the idle class would stay in it."""
    monkeypatch.setattr(recorder, "BURST_BYTES", 1)
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 256 * KiB)
    monkeypatch.setattr(streaming, "CALLED_SECONDS", 0.0)  # who is called, on a busy machine, stands back again
    taking, beginning, start = set(), [], threading.Thread.start
    stream = recorder.Recorder.stream

    def watched(*words: Any, **more: Any) -> int:
        taking.add((more["each"], os.sched_getscheduler(0)))
        return stream(*words, **more)

    def starting(thread: threading.Thread) -> None:
        beginning.append((thread.name, os.sched_getscheduler(0)))
        start(thread)

    with Scribe(daemon, SIZES, 2000) as scribe:
        protection = protection_of(store, daemon, rhythm(tmp_path))
        life = begun(protection)
        monkeypatch.setattr(recorder.Recorder, "stream", watched)
        monkeypatch.setattr(threading.Thread, "start", starting)
        for turn in range(20):
            scribe.wait(scribe.acked + 100)
            life.step()
            if turn == 9:
                protection.setting.report(life.points.fold(life.points.prepare(life)))
        monkeypatch.undo()
        life.close()
        scribe.stop()
        history = History(store, protection.setting.machine.id)
        scribe.verify(images(history, every_moment(history)[-1]))
    assert may_idle(), "these tests may change what class a thread is of"
    assert (True, os.SCHED_IDLE) in taking
    assert any("hvbackup-seal" in name for name, _ in beginning)
    assert os.SCHED_IDLE not in {policy for _, policy in beginning}
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


def test_lives_that_end_while_the_guest_writes_end_at_a_prefix(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """The mirrors of two disks end one after the other, and QEMU survives it."""
    with Scribe(daemon, SIZES, 3000) as scribe:
        protection = protection_of(store, daemon, rhythm(tmp_path))
        for _ in range(8):
            life = begun(protection)
            time.sleep(0.05)
            life.step()
            life.close()
            history = History(store, protection.setting.machine.id)
            scribe.verify(images(history, every_moment(history)[-1]))
    assert not daemon.leftovers()
