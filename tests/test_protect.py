"""Protection by micro-snapshots, against an oracle: every moment of every life reads back."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from hvbackup.capture import Options
from hvbackup.errors import HostUnreachable, JournalGap, NotFound, SpaceExhausted, StoreDamage
from hvbackup.fold import fold
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine, Tracking
from hvbackup.leases import Leases
from hvbackup.model import SECOND, DiskId, Instant, KiB, MachineId, Outcome
from hvbackup.moments import rfc3339
from hvbackup.protect import beginning, journaling, points
from hvbackup.protect.cycles import OneByOne
from hvbackup.protect.events import ContinuityLost, Cycle, Event, Folded, JournalStalled, Rhythm, TrackerLied, Trouble
from hvbackup.protect.journaling import Journaling
from hvbackup.protect.protection import Protection
from hvbackup.protect.samples import Samples
from hvbackup.service.moment import choose
from hvbackup.service.protection import Worker
from hvbackup.store.format import keys
from hvbackup.store.journal import journal, recorder
from hvbackup.store.journal.history import Doubt, History, Moment
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.runs import open_run
from hvbackup.store.journal.segment import PieceCache
from hvbackup.store.journal.told import Told
from hvbackup.store.journal.window import Limits, journal_bytes, trim
from hvbackup.store.store import Store, init

FAULTS = [("read", 1), ("read", 2), ("open", 2), ("changes", 2), ("snapshot", 1), ("verify", 1)]
SIZES = {"vda": 500 * KiB + 512, "vdb": 200 * KiB}


class World:
    """A store, a machine with two disks, and what the disks held at each moment."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.hv = FakeHypervisor([FakeMachine("m1", {d: FakeDisk(n) for d, n in SIZES.items()})])
        self.machine = self.hv.machines()[0]
        self.protection = Protection(store, self.hv, self.machine, Options(), Rhythm(1 * SECOND))
        self.rng = random.Random(7)
        self.images: dict[int, dict[str, bytes]] = {}

    def guest_writes(self, count: int = 20) -> None:
        for _ in range(count):
            disk = self.rng.choice(sorted(SIZES))
            length = self.rng.choice([512, 4096, 40_000])
            start = self.rng.randrange(SIZES[disk] - length)
            data = bytes(length) if self.rng.random() < 0.3 else self.rng.randbytes(length)
            with self.hv._lock:  # no freeze between the bytes and the mark that they have changed
                self.hv.machine("m1").disks[disk].write(start, data)

    def content(self) -> dict[str, bytes]:
        return {d: bytes(self.hv.machine("m1").disks[d].content) for d in SIZES}

    def check(self) -> None:
        history = History(self.store, self.machine.id)
        for seq, image in self.images.items():
            for disk, wanted in image.items():
                view = history.view(history.by_seq(seq), DiskId(disk))
                out = bytearray(view.size)
                view.read_into(0, memoryview(out))
                assert bytes(out) == wanted, (seq, disk)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    secret = keys.parse_key_text(keys.new_key_text(), "test")
    init(tmp_path / "store", secret)
    with Store.open(tmp_path / "store", tmp_path / "state", [secret], owner=True) as store:
        yield World(store)


def test_every_moment_of_two_lives_reads_back_before_and_after_folding(world: World) -> None:
    for _ in range(2):
        world.guest_writes()
        life = world.protection.begin("a test")
        for n in range(6):
            world.guest_writes()
            cycle = life.cycle()
            world.images[cycle.moment.seq] = world.content()
            if n == 2:
                life.points.fold(cycle.moment)
        life.recorder.close()
        world.check()
    folded = [p for p in world.store.points(world.machine.id) if p.seq in world.images]
    assert len(folded) == 2
    for point in folded:
        for root in point.disks:
            out = bytearray(root.disk.size)
            world.store.view(root).read_into(0, memoryview(out))
            assert bytes(out) == world.images[point.seq or 0][root.disk.id]


def test_only_the_newest_barrier_and_point_keep_anything_on_the_host(world: World) -> None:
    life = world.protection.begin("a test")
    for _ in range(4):
        world.guest_writes(3)
        life.cycle()
    named = {t.value for t in life.tokens.values()} | {d.token.value for d in life.point.disks if d.token}
    assert {n for d in world.hv.machine("m1").disks.values() for n in d.checkpoints} == named
    assert not world.hv.open_snapshots
    life.recorder.close()


def test_a_cycle_that_failed_half_way_spoils_no_moment(world: World) -> None:
    life = world.protection.begin("a test")
    for n in range(1, 9):
        world.guest_writes()
        world.hv.at(*FAULTS[n % len(FAULTS)], HostUnreachable("the host is gone"))
        with pytest.raises(HostUnreachable):
            life.cycle()
        world.guest_writes()
        life = world.protection.begin("the host was gone")
        world.guest_writes()
        cycle = life.cycle()
        world.images[cycle.moment.seq] = world.content()
        world.check()
    life.recorder.close()


def test_lost_tracking_ends_a_life_and_the_gap_is_told(world: World) -> None:
    life = world.protection.begin("a test")
    world.guest_writes()
    before = life.cycle()
    world.images[before.moment.seq] = world.content()
    world.hv.machine("m1").disks["vda"].lose_tracking()
    world.guest_writes()
    with pytest.raises(ContinuityLost):
        life.cycle()
    life.recorder.close()
    life = world.protection.begin("the bitmap was lost")
    world.guest_writes()
    after = life.cycle()
    world.images[after.moment.seq] = world.content()
    life.recorder.close()
    world.check()
    with pytest.raises(JournalGap, match="the bitmap was lost"):
        History(world.store, world.machine.id).at(Instant(before.moment.t + 1))


def run_until(world: World, limits: Limits, enough: Callable[[list[Event]], bool]) -> list[Event]:
    """Let protection run by itself, with a guest that writes, until enough has happened."""
    events: list[Event] = []
    rhythm = Rhythm(SECOND // 50, 3600 * SECOND, limits)
    protection = Protection(world.store, world.hv, world.machine, Options(), rhythm, events.append)
    thread = threading.Thread(target=protection.run)
    thread.start()
    end = time.monotonic() + 120
    while not enough(list(events)) and time.monotonic() < end:
        world.guest_writes(3)
        time.sleep(0.01)
    protection.end()
    thread.join(120)
    assert not thread.is_alive()
    return events


def test_a_budget_makes_points_early_and_is_kept(world: World) -> None:
    def removed(events: list[Event]) -> bool:
        return sum(e.removed_bytes > 0 for e in events if isinstance(e, Folded)) >= 2

    events = run_until(world, Limits(0, 4000 * KiB), removed)
    assert removed(events)
    cycles = sum(isinstance(e, Cycle) for e in events)
    assert sum(isinstance(e, Folded) for e in events) <= max(3, cycles // 2)
    assert journal_bytes(world.store, world.machine.id) <= 5000 * KiB  # a set or two may come before room is made
    history = History(world.store, world.machine.id)
    assert history.last
    view = history.view(history.last, DiskId("vda"))
    out = bytearray(view.size)
    view.read_into(0, memoryview(out))


def test_a_budget_smaller_than_a_cycle_is_relieved_by_points(world: World) -> None:
    """Each cycle is held by a point: only the newest ones are over the budget, and nothing is refused."""

    def removed(events: list[Event]) -> bool:
        return sum(e.removed_bytes > 0 for e in events if isinstance(e, Folded)) >= 3

    events = run_until(world, Limits(0, 30 * KiB), removed)
    assert removed(events)
    assert not [e for e in events if isinstance(e, Trouble)]
    assert journal_bytes(world.store, world.machine.id) <= 2000 * KiB  # the newest cycles


def test_a_budget_that_no_point_relieves_opens_a_gap_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(events: list[Event]) -> bool:
        return any(isinstance(e, Trouble) and "journal-budget" in str(e.error) for e in events)

    def full(*_: object) -> Outcome:
        raise SpaceExhausted("No room for a point")

    monkeypatch.setattr(points, "fold", full)
    assert refused(run_until(world, Limits(0, 30 * KiB), refused))


def test_a_life_goes_on_from_its_newest_barrier_and_reads_only_what_changed(world: World) -> None:
    world.protection.setting.rhythm = replace(world.protection.setting.rhythm, sample_blocks=0)
    life = world.protection.begin("a test")
    world.guest_writes()
    last = life.cycle()
    life.recorder.abandon()  # as if it had died
    world.guest_writes(1)
    read = world.hv.read_bytes
    again = world.protection.begin("the worker was killed")
    assert again.how == "resumed"
    assert world.hv.read_bytes - read < 150 * KiB  # what one write changed, not 700 KiB
    assert len(list(world.store.points(world.machine.id))) == 1
    world.images[again.newest.seq] = world.content()
    world.check()
    history = History(world.store, world.machine.id)
    with pytest.raises(JournalGap, match="the worker was killed"):
        history.at(Instant(last.moment.t + 1))
    again.close()


def test_a_first_point_that_takes_long_is_given_up_when_protection_ends(world: World) -> None:
    world.guest_writes()
    world.hv.at("read", 1, world.protection.end)
    world.protection.run()
    assert list(world.store.points(world.machine.id)) == []
    assert not world.hv.open_snapshots


def test_a_mark_names_the_next_moment_at_once(world: World) -> None:
    slow = Protection(world.store, world.hv, world.machine, Options(), Rhythm(3600 * SECOND, 3600 * SECOND))
    thread = threading.Thread(target=slow.run)
    thread.start()
    expected = world.content()
    moment = slow.mark("before upgrade").wait(120)
    slow.end()
    thread.join(120)
    assert moment is not None
    world.images[moment.seq] = expected
    world.check()
    [mark] = History(world.store, world.machine.id).told.marks
    assert (mark.label, mark.seq) == ("before upgrade", moment.seq)


def test_a_step_of_the_clock_is_told_and_stops_expiry(world: World) -> None:
    now = [Instant(1_700_000_000 * SECOND)]
    world.hv._clock = lambda: now[0]
    world.protection.setting.options = replace(world.protection.setting.options, clock=lambda: now[0])
    life = world.protection.begin("a test")
    now[0] = Instant(now[0] + SECOND)
    life.cycle()
    now[0] = Instant(now[0] + 3600 * SECOND)
    life.cycle()
    life.close()
    world.protection.begin("a test").close()
    assert world.protection.setting.steps.any, "also in the next life"
    [step] = History(world.store, world.machine.id).told.clocks
    assert abs(step.step_ns - 3600 * SECOND) < 30 * SECOND


def test_what_takes_long_is_no_step_of_the_clock(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment is recorded when all of it has been read, which takes hours for the first point of a large machine."""
    passed, reading = [0], iter((7200, 1, 300, 1))

    def wall() -> Instant:
        return Instant(1_700_000_000 * SECOND + passed[0])

    def snapshot() -> Instant:
        t = wall()
        passed[0] += next(reading) * SECOND
        return t

    world.hv._clock = snapshot
    world.protection.setting.options = replace(world.protection.setting.options, clock=wall)
    clocks = SimpleNamespace(monotonic_ns=lambda: passed[0], monotonic=time.monotonic)
    monkeypatch.setattr(recorder, "time", clocks)
    life = world.protection.begin("a test")
    for _ in range(3):
        world.guest_writes()
        life.cycle()
    life._doubt("planted", life.newest)
    life.close()
    assert not world.protection.setting.steps.any
    assert not History(world.store, world.machine.id).told.clocks


def test_a_clock_that_is_set_back_keeps_no_point_from_being_made(world: World) -> None:
    now = [Instant(1_700_000_000 * SECOND)]
    world.hv._clock = lambda: now[0]
    world.protection.setting.options = replace(world.protection.setting.options, clock=lambda: now[0])
    events: list[Event] = []
    world.protection.setting.report = events.append
    life = world.protection.begin("a test")
    for step, due in ((SECOND, 0), (-7200 * SECOND, 1), (SECOND, 1), (3600 * SECOND, 2)):
        now[0] = Instant(now[0] + step)
        life.step()
        life.points.join()
        assert sum(isinstance(e, Folded) for e in events) == due
    life.points._try_again(life.newest)
    now[0] = Instant(now[0] + SECOND)
    life.step()
    now[0] = Instant(now[0] - 7200 * SECOND)
    life.step()
    life.points.join()
    assert sum(isinstance(e, Folded) for e in events) == 3, "nobody waits two hours to try again"
    life.close()
    made = list(world.store.points(world.machine.id))
    assert [p.seq for p in sorted(made, key=lambda p: p.t)] == sorted(p.seq or 0 for p in made), (
        "the newest is the latest"
    )
    history = History(world.store, world.machine.id)
    assert history.last
    assert history.told_at(history.last) == now[0] < history.last.t, "it is as old as it is"


def test_samples_are_compared_whatever_is_done_to_the_clock() -> None:
    samples = Samples(8, random.Random(1))
    for t, due in ((1000, True), (1030, False), (1060, True), (500, True), (560, True)):
        at = Instant(t * SECOND)
        assert samples.due(at) is due
        if due:
            samples.compared(at)


def lie(world: World) -> None:
    for disk in world.hv.machine("m1").disks.values():
        disk.tracking = Tracking.LIES
        disk.write(0, random.Random(1).randbytes(disk.size))


def be_honest(world: World) -> None:
    for disk in world.hv.machine("m1").disks.values():
        disk.tracking = Tracking.HONEST


def test_after_a_lie_no_moment_since_the_last_good_sample_is_offered(world: World) -> None:
    now = [Instant(1_700_000_000 * SECOND)]
    world.hv._clock = lambda: now[0]
    world.protection.setting.options = replace(world.protection.setting.options, clock=lambda: now[0])
    life = world.protection.begin("a test")
    good = 0
    for n in range(4):
        now[0] = Instant(now[0] + 40 * SECOND)  # so every second cycle is compared with the journal
        world.guest_writes()
        moment = life.cycle().moment
        if n < 3:
            world.images[moment.seq] = world.content()
            good = moment.seq
    doubted = [moment]
    life.samples = Samples(0, random.Random(1))  # nobody looks
    lie(world)
    now[0] = Instant(now[0] + SECOND)
    world.protection.mark("a trap")
    doubted.append(life.cycle().moment)
    point = life.points.fold(life.points.prepare(life)).point
    life.samples = Samples(8, random.Random(1))
    now[0] = Instant(now[0] + SECOND)
    with pytest.raises(TrackerLied, match="called unchanged"):
        life.cycle()
    life.recorder.abandon()
    for begun in (False, True):
        if begun:
            be_honest(world)
            again = world.protection.begin("the tracker lied")
            assert again.how == "captured"
            world.images[again.newest.seq] = world.content()
            again.close()
        history = History(world.store, world.machine.id)
        for m in doubted:
            with pytest.raises(JournalGap, match=f"seq:{m.seq} may lack changes .* seq:{good}"):
                history.by_seq(m.seq)
            with pytest.raises(JournalGap, match=f"seq:{good}"):
                history.at(m.t)
            assert m.seq not in history.moments[0]
        refused = [f"seq:{doubted[0].seq}", point.id, "tag:a trap", rfc3339(doubted[1].t)]
        for at in refused:
            with pytest.raises(NotFound):
                choose(world.store, "m1", at, Instant(now[0] + SECOND))
        latest = choose(world.store, "m1", "latest", Instant(now[0] + SECOND)).point.seq
        assert latest == (again.newest.seq if begun else good)
        world.check()


def test_a_lie_that_a_later_worker_finds_costs_the_same(world: World) -> None:
    """Killed between the lie and the next sample: the next life samples at once, and knows the last good one."""
    lied: list[int] = []
    for _ in range(2):
        life = world.protection.begin("a test")
        world.guest_writes()
        first = life.cycle().moment
        if life.how == "captured":  # it is compared with the journal; else the one that closed the gap was
            world.images[first.seq] = world.content()
        life.samples = Samples(0, random.Random(1))
        lie(world)
        lied.append(life.cycle().moment.seq)
        life.recorder.abandon()
        be_honest(world)
        again = world.protection.begin("the worker was killed")
        assert again.how == "captured"
        world.images[again.newest.seq] = world.content()
        again.points.prepare(again)  # what follows is in the next file
        world.guest_writes()
        last = again.cycle().moment
        world.images[last.seq] = world.content()
        assert heads_doubts(world) == History(world.store, world.machine.id).told.doubts, "each file repeats them"
        again.close()
        world.check()
        assert_doubted(world, lied)
    third = world.protection.begin("a test")
    point = third.points.fold(third.points.prepare(third)).point
    third.cycle()
    third.close()
    trim(world.store, world.machine.id, Limits(0, 1), by_age=False)
    for p in world.store.points(world.machine.id):
        if p.seq != point.seq:
            world.store.files.remove(world.store.path_of(p))
    world.protection.begin("a test").close()
    assert not heads_doubts(world), "nothing is left that they are about"


def test_a_file_that_repeats_other_doubts_takes_none_away() -> None:
    told, head = Told(), {"disks": [], "doubts": [{"after": 1, "until": 5, "start": 1, "end": 5, "why": "one"}]}
    told.tell(6, 6, head)
    told.tell(9, 9, {"doubt": {"after": 6, "start": 6, "why": "another"}})
    told.tell(10, 10, head)
    assert [(d.after, d.until) for d in told.doubts] == [(1, 5), (6, 9)]


def assert_doubted(world: World, seqs: list[int]) -> None:
    history = History(world.store, world.machine.id)
    for seq in seqs:
        with pytest.raises(JournalGap, match="may lack changes"):
            history.by_seq(seq)


def heads_doubts(world: World) -> list[Doubt]:
    """What the head of the newest file says."""
    machine = world.store.ring.machine_name(world.machine.id)
    newest = open_run(world.store, machine, journal.list_files(world.store.files, machine)[-1], PieceCache())
    return [Doubt(**d) for d in json.loads(next(newest.meta())[1]).get("doubts", ())]


def test_a_lie_found_where_no_sample_is_known_leaves_no_moment_good() -> None:
    first, last = Moment(70, Instant(7)), Moment(90, Instant(9))
    assert beginning._doubt(Told(), first, last) == {
        "after": 0, "until": 90, "start": 7, "end": 9, "why": "the tracker called blocks unchanged that had changed"
    }  # fmt: skip
    assert beginning._doubt(Told(good=Moment(80, Instant(8))), first, last)["after"] == 80
    assert not beginning._doubt(Told(good=last), first, last)
    assert not beginning._doubt(Told(), None, None)


def full_disk(*_: object) -> NoReturn:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("full", [False, True], ids=["a pipe", "both"])
def test_who_can_not_be_told_keeps_nobody_from_protecting(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """The other end of a pipe is gone, or the disk of a log full: that protection ended would be told to nobody either."""
    if full:
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=full_disk, flush=full_disk))
    told = 0

    def nobody(_: Event) -> None:
        nonlocal told
        told += 1
        if told == 5:
            protection.end()
        raise BrokenPipeError("nobody reads")

    protection = Protection(world.store, world.hv, world.machine, Options(), Rhythm(SECOND // 100), nobody)
    protection.run()
    assert len(History(world.store, world.machine.id).moments[0]) >= 3
    assert capsys.readouterr().err.count("BrokenPipeError: nobody reads") == (not full)


def test_a_worker_that_ends_says_why_whatever_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Protection) -> NoReturn:
        raise ValueError("planted")

    monkeypatch.setattr(Protection, "run", broken)
    worker = Worker(world.machine, world.protection)
    worker.start()
    assert worker.thread
    worker.thread.join(60)
    assert "ValueError: planted" in str(worker.error)


def test_a_point_that_failed_for_whatever_reason_is_told_of_and_made_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [Instant(1_700_000_000 * SECOND)]
    world.hv._clock = lambda: now[0]
    events: list[Event] = []
    setting = world.protection.setting
    setting.options, setting.report = replace(setting.options, clock=lambda: now[0]), events.append
    life = world.protection.begin("a test")

    def broken(*_: object) -> NoReturn:
        raise ValueError("planted")

    for passed, failing, made in ((7200, True, 0), (30, False, 0), (31, False, 1)):
        now[0] = Instant(now[0] + passed * SECOND)
        with monkeypatch.context() as patch:
            if failing:
                patch.setattr(points, "fold", broken)
            life.step()
            life.points.join()
        assert sum(isinstance(e, Folded) for e in events) == made
    [trouble] = [e for e in events if isinstance(e, Trouble)]
    assert "ValueError: planted" in str(trouble.error)
    life.close()


def test_a_host_that_stood_still_is_no_stalled_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has answered, and we run again before the thread that is to hear it."""
    passed, heard = [0.0], threading.Event()
    monkeypatch.setattr(
        journaling, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0], sleep=time.sleep)
    )
    work = Journaling(SimpleNamespace(must_wait=False))  # type: ignore[arg-type]
    wait, waits = work._changed.wait, 0

    def stands_still(seconds: float | None = None) -> bool:
        nonlocal waits
        if threading.current_thread() is threading.main_thread():
            waits += 1
            if waits == 1:
                passed[0] += 3600
                return False
            heard.set()
            return wait(60)
        return wait(seconds)

    monkeypatch.setattr(work._changed, "wait", stands_still)
    assert work.call(lambda: heard.wait(60)) is True
    work.close()


def test_without_its_own_point_a_life_is_refused_rather_than_laid_over_an_older_one(world: World) -> None:
    life = world.protection.begin("a test")
    world.guest_writes()
    first = life.cycle()
    world.images[first.moment.seq] = world.content()
    life.close()
    world.hv.machine("m1").disks["vda"].lose_tracking()
    world.guest_writes()
    again = world.protection.begin("the bitmap was lost")
    world.guest_writes()
    second = again.cycle()
    again.close()
    world.store.files.remove(world.store.path_of(again.point))
    world.check()
    with pytest.raises(NotFound, match="No recovery point is left"):
        History(world.store, world.machine.id).view(second.moment, DiskId("vda"))


def test_a_disk_that_grows_begins_a_new_life(world: World) -> None:
    life = world.protection.begin("a test")
    world.guest_writes()
    before = life.cycle()
    world.images[before.moment.seq] = world.content()
    world.hv.machine("m1").disks["vdb"].resize(300 * KiB)
    with pytest.raises(ContinuityLost):
        life.cycle()
    life.recorder.close()
    again = world.protection.begin("a disk was resized")
    assert again.how == "captured"
    world.guest_writes()
    after = again.cycle()
    world.images[after.moment.seq] = world.content()
    again.close()
    world.check()


def test_a_journal_disk_that_takes_too_long_opens_a_gap(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    life = world.protection.begin("a test")
    world.guest_writes()
    last = life.cycle().moment
    world.images[last.seq] = world.content()
    for call in ("write_at", "fsync"):
        answers = threading.Event()
        original = getattr(world.store.files.kernel, call)

        def slow(*args: object, original: Any = original, answers: threading.Event = answers) -> None:
            answers.wait(120)
            original(*args)

        world.guest_writes()
        expected = world.content()
        began = time.monotonic()
        with monkeypatch.context() as patch, pytest.raises(JournalStalled):
            patch.setattr("hvbackup.protect.journaling.STALL_SECONDS", 0.3)  # only here: our own disk may be slow, too
            patch.setattr(world.store.files.kernel, call, slow)
            life.cycle()
        assert time.monotonic() - began < 60, "not only when the disk answers, after 120"
        assert not world.hv.open_snapshots, "the machine is let go at once"
        answers.set()
        life.close()
        world.guest_writes(1)
        life = world.protection.begin("the journal's disk was slow")
        assert life.how == "resumed", "nothing is read but what changed"
        world.images[life.newest.seq] = world.content()
        offered = History(world.store, world.machine.id).moments[0].tolist()
        late = [seq for seq in offered if seq not in world.images and seq > last.seq]
        world.images.update(dict.fromkeys(late, expected))  # it was durable after all
        last = life.newest
        world.check()
    life.close()
    gaps = History(world.store, world.machine.id).told.gaps
    assert sum(g.why == "the journal's disk was slow" for g in gaps) == 2


def test_a_disk_that_is_slow_but_answers_is_only_slow(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    original = world.store.files.kernel.fsync
    life = world.protection.begin("a test")

    def slow(fd: int) -> None:
        time.sleep(0.2)
        original(fd)

    monkeypatch.setattr(world.store.files.kernel, "fsync", slow)
    world.guest_writes()
    world.images[life.cycle().moment.seq] = world.content()
    life.close()
    world.check()


def test_a_block_that_was_overwritten_many_times_is_read_and_hashed_once(world: World) -> None:
    life = world.protection.begin("a test")
    disk = world.hv.machine("m1").disks["vda"]
    for n in range(30):
        disk.write(64 * KiB, bytes([n]) * 3000)
        disk.write(256 * KiB, bytes([n]) * 64 * KiB)
        moment = life.cycle().moment
    life.points.prepare(life)
    read = world.hv.read_bytes
    figures = fold(world.store, world.machine.id, moment, Options()).figures
    assert figures.read_bytes == figures.changed_bytes == 2 * 64 * KiB
    assert figures.new_bytes == 2 * 64 * KiB
    assert world.hv.read_bytes == read, "the hypervisor is not asked"
    life.close()


def test_a_damaged_point_or_cache_is_told_and_recording_goes_on(world: World) -> None:
    for disk in world.hv.machine("m1").disks.values():
        disk.write(0, random.Random(1).randbytes(disk.size))
    life = world.protection.begin("a test")
    world.guest_writes(1)
    life.cycle()
    life.samples = Samples(8, random.Random(1))  # which compares with the journal at once
    for pack in world.store.files.root.glob("packs/*/*.pack"):
        pack.write_bytes(pack.read_bytes()[:100])
    world.store.chunks._cache.clear()
    world.guest_writes(1)
    done = life.cycle()
    assert "could not be compared" in done.notes[0]
    assert life.cycle().notes == [], "once a minute is enough"
    life.recorder.abandon()


def test_a_lease_is_known_as_ours_although_nothing_had_been_written_before_it(tmp_path: Path) -> None:
    """A worker with a new STATE that is killed before its first point: the next one cleans up after it at once."""
    init(tmp_path / "store", None)
    with Store.open(tmp_path / "store", tmp_path / "state", []) as store:
        lease = Leases(store, lambda: Instant(SECOND)).take(MachineId("m1"), "fake:")
    with Store.open(tmp_path / "store", tmp_path / "state", []) as store:
        assert [v.id for v in Leases(store, lambda: Instant(SECOND)).stale(MachineId("m1"))] == [lease.id]


class Kept:
    """Cycles that note what they were told before they were closed."""

    def __init__(self, inner: OneByOne) -> None:
        self.inner, self.told = inner, list[str]()

    def snapshot(self, *words: Any, **more: Any) -> Any:
        return self.inner.snapshot(*words, **more)

    def keep(self, tokens: Any) -> None:
        self.told.append("keep")
        self.inner.keep(tokens)

    def close(self) -> None:
        self.told.append("close")


def test_a_life_whose_first_moment_fails_says_what_to_keep_before_it_lets_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an adapter that holds things between snapshots would leave them, and their lease would be gone."""
    made: list[Kept] = []

    def cycles(*words: Any) -> Kept:
        made.append(Kept(OneByOne(*words)))
        return made[-1]

    world.protection.begin("").close()  # there is a barrier to go on from
    monkeypatch.setattr(beginning, "cycles_of", cycles)
    world.guest_writes()
    world.hv.at("read", 1, HostUnreachable("the host is gone"))
    with pytest.raises(HostUnreachable):
        world.protection.begin("")
    assert made[-1].told[-2:] == ["keep", "close"]
    assert not Leases(world.store, Options().clock).all()


def test_what_is_left_of_a_life_is_sealed_while_the_host_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> NoReturn:
        raise HostUnreachable("gone")

    begun, lost = threading.Event(), threading.Event()
    told = {Cycle: begun, Trouble: lost}
    protection = Protection(
        world.store, world.hv, world.machine, Options(), Rhythm(SECOND // 5), lambda e: told.get(type(e), begun).set()
    )
    thread = threading.Thread(target=protection.run)
    thread.start()
    assert begun.wait(20)
    monkeypatch.setattr(world.hv, "machines", gone)
    world.hv.at("snapshot", 1, HostUnreachable("gone"))
    assert lost.wait(20)
    folder = world.store.ring.machine_name(world.machine.id)
    end = time.monotonic() + 20
    while not sealed(world, folder) and time.monotonic() < end:
        time.sleep(0.02)
    assert sealed(world, folder)
    protection.end()
    thread.join()


def sealed(world: World, folder: str) -> bool:
    return {n.suffix for n in journal.list_files(world.store.files, folder)} == {journal.SEGMENT}


def test_a_life_behind_lost_facts_begins_with_a_point(world: World) -> None:
    """Over nothing that is there could its facts be laid, and so nothing could ever be folded of them."""
    life = world.protection.begin("a test")
    for _ in range(3):
        world.guest_writes()
        last = life.cycle().moment
        life.recorder.rotate()
    life.close()
    folder = world.store.ring.machine_name(world.machine.id)
    files = journal.list_files(world.store.files, folder)
    world.store.files.remove(f"journals/{folder}/{files[1]}")
    history = History(world.store, world.machine.id)
    with pytest.raises(StoreDamage, match="has lost its facts"):
        history.view(history.by_seq(last.seq), DiskId("vda"))
    world.guest_writes()
    life = world.protection.begin("a test")
    assert life.how == "captured"
    world.images[life.newest.seq] = world.content()
    world.guest_writes()
    moment = life.cycle().moment
    world.images[moment.seq] = world.content()
    life.points.fold(moment)
    life.close()
    world.check()


def test_numbers_are_not_left_out_within_a_life(world: World) -> None:
    """A log that is there and can't be read has numbers that nobody knows: no life goes on behind it."""
    life = world.protection.begin("a test")
    life.close()
    recorder = Recorder(world.store, world.machine.id, life.recorder.disks)
    recorder.barrier(Instant(SECOND), {})
    recorder.abandon()
    folder = world.store.ring.machine_name(world.machine.id)
    path = world.store.files.path(f"journals/{folder}/{journal.list_files(world.store.files, folder)[-1]}")
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    life = world.protection.begin("a test")
    assert life.how == "captured"
    world.guest_writes()
    world.images[life.cycle().moment.seq] = world.content()
    life.close()
    world.check()
