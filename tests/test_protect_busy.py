"""A guest that never stops writing: protection begins all the same, in sets as large as they have to be, or says why not."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvbackup import copying
from hvbackup.capture import Options, capture
from hvbackup.errors import HostUnreachable, JournalGap
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import SECOND, DiskId, Instant, KiB, MachineId, MiB
from hvbackup.protect import cycles, taking
from hvbackup.protect.events import Begun, ContinuityLost, Cycle, Event, Rhythm, TooBusy, Trouble
from hvbackup.protect.protection import Protection
from hvbackup.store.journal import recorder
from hvbackup.store.journal.history import History
from hvbackup.store.journal.window import Limits
from hvbackup.store.store import Store, init

MACHINE, BLOCK = MachineId("m1"), 4 * KiB
SIZES = {"vda": 12 * MiB, "vdb": 4 * MiB}


class BusyGuest(FakeHypervisor):
    """Writes 4 KiB here or there for so many bytes that are read of it, as a guest does in the time that takes."""

    def __init__(self) -> None:
        super().__init__([FakeMachine(MACHINE, {d: FakeDisk(n) for d, n in SIZES.items()})])
        self.rng, self.for_each_write, self._written = random.Random(5), 0, 0
        self._writing = threading.Lock()
        for disk in self.disks.values():
            disk.write(0, self.rng.randbytes(disk.size))

    @property
    def disks(self) -> dict[str, FakeDisk]:
        return self.machine(MACHINE).disks

    def write_some(self, count: int) -> None:
        for _ in range(count):
            disk = self.disks[self.rng.choice(sorted(SIZES))]
            disk.write(self.rng.randrange(disk.size // BLOCK) * BLOCK, self.rng.randbytes(BLOCK))

    def reached(self, call: str) -> None:
        super().reached(call)
        if self.for_each_write and call == "read":
            with self._writing:
                due = self.read_bytes // self.for_each_write - self._written
                self._written += due
                self.write_some(due)

    def content(self) -> dict[str, bytes]:
        return {d: bytes(self.disks[d].content) for d in SIZES}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(tmp_path / "store", None)
    with Store.open(tmp_path / "store", tmp_path / "state", [], owner=True) as found:
        yield found


def protecting(store: Store, guest: BusyGuest, events: list[Event] | None = None, **more: object) -> Protection:
    rhythm = replace(Rhythm(SECOND // 50, 3600 * SECOND, sample_blocks=0), **more)  # type: ignore[arg-type]
    report = events.append if events is not None else lambda _: None
    return Protection(store, guest, guest.machines()[0], Options(), rhythm, report)


def held(store: Store, seq: int) -> dict[str, bytes]:
    history, found = History(store, MACHINE), {}
    for disk in SIZES:
        view = history.view(history.by_seq(seq), DiskId(disk))
        out = bytearray(view.size)
        view.read_into(0, memoryview(out))
        found[disk] = bytes(out)
    return found


def run_until(protection: Protection, done: Callable[[], bool], seconds: float = 120) -> None:
    thread = threading.Thread(target=protection.run)
    thread.start()
    try:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "it never came so far"
            time.sleep(0.01)
    finally:
        protection.end()
        thread.join(120)
    assert not thread.is_alive()


def offered(store: Store) -> list[int]:
    return [int(seq) for seq in History(store, MACHINE).moments[0]]


# -- a set larger than a file of the journal ---------------------------------------------------------------------------


@pytest.fixture
def small_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 256 * KiB)
    monkeypatch.setattr(recorder, "LOG_MAX_BYTES", 256 * KiB)
    monkeypatch.setattr(recorder, "FLUSH_BYTES", 64 * KiB)
    monkeypatch.setattr(copying, "PIECE_BYTES", 64 * KiB)


@pytest.mark.usefixtures("small_logs")
def test_a_set_that_is_larger_than_a_log_is_one_moment(store: Store) -> None:
    guest = BusyGuest()
    life = protecting(store, guest).begin("a test")
    images = {life.newest.seq: guest.content()}
    for _ in range(3):
        guest.write_some(500)
        moment = life.cycle().moment
        images[moment.seq] = guest.content()
    assert offered(store) == list(images), "also while the last log is open"
    ends = {run.summary.last_seq for run in History(store, MACHINE).runs}
    inner = sorted(ends - set(images))
    assert len(inner) >= 3 * 6, "2 MB in files of a quarter"
    folded = life.points.fold(life.points.prepare(life)).point
    assert folded.seq == moment.seq
    guest.write_some(500)
    images[life.cycle().moment.seq] = guest.content()
    life.close()
    history = History(store, MACHINE)
    assert offered(store) == list(images)
    assert len(history.runs) < len(inner), "small ones were merged"
    for seq, image in images.items():
        assert held(store, seq) == image
        assert history.at(history.by_seq(seq).t).seq == seq
    before, after = sorted(images)[0], sorted(images)[1]
    for seq in inner[:3]:
        with pytest.raises(JournalGap, match=f"goes on in the next one.* seq:{before} and seq:{after}"):
            history.by_seq(seq)
    t = Instant(history.by_seq(after).t - 1)
    assert history.at(t).seq == before, "a time between two moments is no gap"
    assert history.told.doubts == []


@pytest.mark.usefixtures("small_logs")
@pytest.mark.parametrize("reads", [1, 20, 100, 300])
def test_what_is_left_of_a_set_that_broke_off_does_no_harm(store: Store, reads: int) -> None:
    guest = BusyGuest()
    protection = protecting(store, guest)
    for _ in range(2):
        life = protection.begin("a test")
        last, image = life.newest, guest.content()
        guest.write_some(400)
        guest.at("read", reads, HostUnreachable("the host is gone"))
        with pytest.raises(HostUnreachable):
            life.cycle()
        life.recorder.abandon()  # as if it had died
        assert offered(store)[-1] == last.seq
        assert held(store, last.seq) == image
        newest = History(store, MACHINE).last
        assert newest
        assert newest.seq == last.seq
        guest.write_some(400)
        again = protection.begin("it was killed")
        assert again.how == "resumed", "the tokens of the moment before prove what changed"
        assert held(store, again.newest.seq) == guest.content()
        assert held(store, last.seq) == image
        again.close()
    assert held(store, offered(store)[-1]) == guest.content()


# -- beginning on a busy machine ---------------------------------------------------------------------------------------


def test_sets_shrink_where_points_do_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of 4 KiB for each 16 that are read: a point leaves as much as the one before it, and a set a quarter."""
    monkeypatch.setattr(cycles, "SET_MAX_BYTES", 256 * KiB)
    guest, events = BusyGuest(), list[Event]()
    guest.for_each_write = 4 * BLOCK
    protection = protecting(store, guest, events)
    run_until(protection, lambda: sum(isinstance(e, Cycle) for e in events) >= 6)
    assert not [e for e in events if isinstance(e, Trouble)]
    assert len(list(store.points(MACHINE))) == 1
    sizes = [e.read_bytes for e in events if isinstance(e, Cycle)]
    assert sizes[0] > 2 * MiB
    assert all(later < size for size, later in itertools.pairwise(sizes[:6]))
    assert sizes[-1] < sizes[0] / 100
    guest.for_each_write = 0
    again = protection.begin("")
    assert held(store, again.newest.seq) == guest.content()
    again.close()


def test_a_set_that_takes_long_is_given_up_when_protection_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycles, "SET_MAX_BYTES", 256 * KiB)
    monkeypatch.setattr(cycles, "RENEW_SECONDS", 0.0)
    guest = BusyGuest()
    guest.for_each_write = 4 * BLOCK
    protection = protecting(store, guest)

    def report(event: Event) -> None:
        if isinstance(event, Begun):
            guest.at("read", 300, protection.end)

    protection.setting.report = report
    protection.run()
    assert len(offered(store)) == 1, "the point's"
    assert not guest.open_snapshots
    guest.for_each_write = 0
    again = protecting(store, guest).begin("")
    assert held(store, again.newest.seq) == guest.content()
    again.close()


def test_a_point_made_for_protection_has_fine_checkpoints_and_the_next_backup_reads_no_more(store: Store) -> None:
    guest = BusyGuest()
    protecting(store, guest).begin("a test").close()
    assert {c.grain for disk in guest.disks.values() for c in disk.checkpoints.values()} == {BLOCK}
    before = {d: bytes(disk.content) for d, disk in guest.disks.items()}
    guest.write_some(40)
    size = store.block
    changed = sum(
        before[d][at : at + size] != bytes(disk.content[at : at + size])
        for d, disk in guest.disks.items()
        for at in range(0, disk.size, size)
    )
    outcome = capture(store, guest, guest.machines()[0], Options(sample_blocks=0))
    assert outcome.point
    assert {d.how for d in outcome.point.disks} == {"incremental"}
    assert outcome.figures.read_bytes == changed * size
    kept = {d.token.value for d in outcome.point.disks if d.token}
    assert {guest.disks[d].checkpoints[name].grain for d in SIZES for name in kept} == {64 * KiB}, "a plain backup's"
    for root in outcome.point.disks:
        out = bytearray(root.disk.size)
        store.view(root).read_into(0, memoryview(out))
        assert out == guest.disks[root.disk.id].content


@pytest.mark.walk
def test_a_machine_that_writes_too_much_for_its_budget_is_told_of_and_left_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "SET_MAX_BYTES", 64 * KiB)
    guest, events = BusyGuest(), list[Event]()
    guest.for_each_write = 4 * BLOCK
    protection = protecting(store, guest, events, limits=Limits(0, MiB))

    def too_busy() -> list[Trouble]:
        return [e for e in events if isinstance(e, Trouble) and isinstance(e.error, TooBusy)]

    def quiet() -> bool:
        if too_busy() and guest.for_each_write:
            guest.for_each_write = 0
            protection.mark("now")  # or it would wait
        return any(isinstance(e, Cycle) for e in events)

    run_until(protection, quiet)
    assert len(too_busy()) == 1
    assert "raise --journal-budget" in str(too_busy()[0].error)
    assert too_busy()[0].retry_seconds >= 2
    points = list(store.points(MACHINE))
    assert len(points) <= 5, "each leaves less, by a fifth"
    assert all(p.seq in offered(store) or any(s > (p.seq or 0) for s in offered(store)) for p in points)
    assert [e.how for e in events if isinstance(e, Begun)][-1] in ("captured", "resumed")
    assert held(store, offered(store)[-1]) == guest.content()


def test_another_point_is_made_while_each_leaves_less(store: Store) -> None:
    setting = protecting(store, BusyGuest()).setting
    for total in (1000, 700, 500):
        with pytest.raises(ContinuityLost, match="more than the journal takes at once") as caught:
            taking.refuse(setting, total, 100, behind_point=True)
        assert not isinstance(caught.value, TooBusy)
    with pytest.raises(ContinuityLost, match="more than the journal"):
        taking.refuse(setting, 9999, 100, behind_point=False)  # of a life that had recorded: a point leaves less
    with pytest.raises(TooBusy, match="450 bytes changed while a point was made, and 500 while"):
        taking.refuse(setting, 450, 100, behind_point=True)
    assert taking.limit(10**12, 256, gap=False) == 10**12
    assert taking.limit(10**12, 256, gap=True) == 256, "after a gap a point has it, and only once"
    assert taking.limit(10, 256, gap=False) == 256, "a budget that small is relieved by the next point"
    assert taking.limit(10, 256, gap=True) == 10
