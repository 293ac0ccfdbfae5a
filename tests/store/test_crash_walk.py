"""A crash after every single durable step of real runs; then everything that was promised is still there, and work goes on.

Both kinds of crash (`tests/crash.py`): the process dies, or the power goes.  STATE survives up to the same step, or is gone.
"""

from __future__ import annotations

import copy
import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvbackup.errors import KeyRefused
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine, Order
from hvbackup.leases import LEASE_NS
from hvbackup.model import Machine, PointId
from hvbackup.store.check.check import check
from hvbackup.store.chunks import writer
from hvbackup.store.format import keys
from hvbackup.store.store import DESCRIPTOR, Store
from tests.crash import Fate, Recorder, Wreck, put, wrecks
from tests.world import BLOCK, KEY, MACHINE, OTHER_KEY, Content, World

pytestmark = [
    pytest.mark.walk,
    pytest.mark.timeout(900),
]  # thousands of stores are opened: on a busy machine that takes its time
KINDS = pytest.mark.parametrize(
    ("secret", "order"), [(None, Order.ASKED_AFTER), (KEY, Order.AT_START)], ids=["plain", "encrypted"]
)


@dataclass
class Host:
    """The hypervisor as it was at one step: it does not crash with us."""

    disks: dict[str, FakeDisk]
    open_leases: list[str]


@dataclass
class Acked:
    """A capture returned this point."""

    point: PointId
    content: Content


@dataclass
class KeyIs:
    """A key was added (or removed), and that call returned; None while it is being removed."""

    secret: keys.Secret
    works: bool | None


@dataclass
class Run:
    """One recorded life, and everything its points must hold."""

    world: World
    recorder: Recorder
    oracle: dict[PointId, Content] = field(default_factory=dict)

    def note_host(self) -> None:
        hv = self.world.hv
        self.recorder.note(Host(copy.deepcopy(self.world.disks), [lease for _, lease in hv.open_snapshots]))

    def capture(self, store: Store) -> None:
        outcome = self.world.capture(store)
        assert outcome.point is not None
        self.recorder.note(Acked(outcome.point.id, self.world.oracle[outcome.point.id]))


class _NotingHypervisor(FakeHypervisor):
    """Tells the recorder whenever something on the host has changed."""

    run: Run

    def _freeze(self, *args):  # type: ignore[no-untyped-def]
        try:
            return super()._freeze(*args)
        finally:
            self.run.note_host()

    def _thaw(self, *args):  # type: ignore[no-untyped-def]
        super()._thaw(*args)
        self.run.note_host()

    def release(self, machine, lease, keep):  # type: ignore[no-untyped-def]
        super().release(machine, lease, keep)
        self.run.note_host()


def recorded(path: Path, secret: keys.Secret | None, order: Order) -> Run:
    """A life that is about to begin: no store yet."""
    path.mkdir()
    recorder = Recorder(path)
    world = World(path, secret, order=order, kernel=recorder)
    run = Run(world, recorder)
    world.hv = _NotingHypervisor([FakeMachine(MACHINE, world.disks)], order=order, clock=world.clock)
    world.hv.run = run
    run.note_host()
    return run


def survivor(run: Run, wreck: Wreck, path: Path) -> World:
    """The world after the crash: what is left of the files, the host as it was, and what must be there."""
    put(wreck.tree, path)
    host = [note for note in wreck.notes if isinstance(note, Host)][-1]
    world = World(path, run.world.secret, host.disks and copy.deepcopy(host.disks), order=run.world.order)
    world.clock.now = run.world.clock.now
    machine = Machine(run.world.hv.machine(MACHINE).model().id, MACHINE, "fake")
    for lease in host.open_leases:
        with world.hv._lock:  # what a dead run left open; the tokens are in the disks already
            world.hv._unique = itertools.count(10_000)
            world.hv._freeze(world.hv.machine(machine.id), lease, {})  # type: ignore[arg-type]
            for disk in world.disks.values():
                for name in [n for n in disk.checkpoints if n.endswith("safe-10000")]:
                    del disk.checkpoints[name]
    world.hv._unique = itertools.count(20_000)
    return world


def check_survivor(run: Run, wreck: Wreck, path: Path, *, keep_state: bool) -> None:
    """Everything promised before the crash is there, nothing else is, and the next capture works."""
    world = survivor(run, wreck, path)
    if not keep_state:
        # Who we were is forgotten, so the lease of the dead run only ends by its time.
        shutil.rmtree(world.state_path, ignore_errors=True)
        world.clock.now += 2 * LEASE_NS
    acked = {note.point for note in wreck.notes if isinstance(note, Acked)}
    if not (world.store_path / DESCRIPTOR).exists():
        assert not acked
        world.init()
    with world.opened() as store:
        found = {p.id for p in store.points()}
        assert acked <= found, "a committed point is gone"
        assert found <= set(run.world.oracle), "a point from nowhere"
        world.oracle = {k: v for k, v in run.world.oracle.items() if k in found}
        world.check_all(store)
        assert check(store).problems == []
        newest = store.newest(world.hv.machine(MACHINE).model().id)
        tokens = {f"{MACHINE}/{d.disk.id}/{d.token.value}" for d in newest.disks if d.token} if newest else set()
        assert tokens <= set(world.hv.leftovers()), "the host has forgotten since when a committed point is"
        told = {record.value.get("point") for record in store.runs}
        assert {store.path_of(p) for p in store.points()} <= told, "a point that could vanish unnoticed"
        world.scribble(1)
        world.capture(store)
        world.check_all(store)
        world.check_settled(store)


def check_second_crash(run: Run, wreck: Wreck, path: Path) -> None:
    """The process died, the next run worked, and then the power went: what was promised by either of them is there."""
    world = survivor(run, wreck, path)
    world.kernel = recorder = Recorder(path)
    if not (world.store_path / DESCRIPTOR).exists():
        world.init()
    with world.opened() as store:
        world.oracle = {p.id: run.world.oracle[p.id] for p in store.points()}
        world.capture(store)
    disk = wreck.disk()
    for step in recorder.continuing(run.recorder):
        disk.apply(step)
    again = path / "again"
    put(disk.power_cut(Fate.LOST, random.Random(0)), again)
    world.path = again
    with world.opened(owner=False) as store:
        world.check_all(store)


def walk(run: Run, path: Path, check: Callable[..., None], seeds: int) -> int:
    """Check every wreck of a recorded run; how many there were."""
    count = 0
    for wreck in wrecks(run.recorder.steps, seeds):
        for keep_state in (True, False):
            count += 1
            place = path / f"wreck{count}"
            with told(run, wreck, f"{keep_state=}"):
                check(run, wreck, place, keep_state=keep_state)
            shutil.rmtree(place)
    return count


@contextmanager
def told(run: Run, wreck: Wreck, more: str) -> Iterator[None]:
    """A failure says which crash it was."""
    try:
        yield
    except BaseException as e:
        e.add_note(f"after step {wreck.step} ({run.recorder.steps[wreck.step]!r:.200}), {wreck.how}, {more}")
        raise


def live(run: Run, points: int) -> None:
    """Init, and captures with everything in them: packs sealed half-way, a resize, a leftover that is swept."""
    run.world.init()
    for number in range(points):
        with run.world.opened() as store:
            run.world.scribble(2)
            if number == 1:
                run.world.disks["vda"].resize(4 * BLOCK + 512)
            run.note_host()
            run.capture(store)


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PACK_BYTES", 2 * BLOCK)


@KINDS
def test_a_crash_at_every_step_of_a_life(ram: Path, secret: keys.Secret | None, order: Order) -> None:
    run = recorded(ram / "run", secret, order)
    live(run, 2)
    assert walk(run, ram, check_survivor, seeds=1) > 400


@KINDS
def test_a_killed_run_and_then_a_power_cut(ram: Path, secret: keys.Secret | None, order: Order) -> None:
    run = recorded(ram / "run", secret, order)
    live(run, 2)
    for number, wreck in enumerate(wrecks(run.recorder.steps, 0, power=False)):
        with told(run, wreck, "then the next run, then a power cut"):
            check_second_crash(run, wreck, ram / f"wreck{number}")
        shutil.rmtree(ram / f"wreck{number}")


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("secret", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("order", list(Order), ids=lambda order: order.name.lower())
def test_many_crashes_at_every_step_of_a_longer_life(ram: Path, secret: keys.Secret | None, order: Order) -> None:
    run = recorded(ram / "run", secret, order)
    live(run, 6)
    assert walk(run, ram, check_survivor, seeds=6) > 3000


@pytest.mark.parametrize("first", [KEY, keys.passphrase("correct horse")], ids=["key file", "passphrase"])
def test_a_crash_at_every_step_of_changing_keys(ram: Path, monkeypatch: pytest.MonkeyPatch, first: keys.Secret) -> None:
    monkeypatch.setattr(keys, "KDF", {**keys.KDF, "memory_kib": 64, "iterations": 1})
    run = recorded(ram / "run", first, Order.AT_START)
    live(run, 1)
    with run.world.opened() as store:
        run.recorder.note(KeyIs(first, works=True))
        old = keys.list_wrappings(store.files)[0]["id"]
        keys.add_wrapping(store.files, store.ring, OTHER_KEY, "another")
        run.recorder.note(KeyIs(OTHER_KEY, works=True))
        run.recorder.note(KeyIs(first, works=None))
        keys.remove_wrapping(store.files, old)
        run.recorder.note(KeyIs(first, works=False))
    assert walk(run, ram, check_keys, seeds=2) > 100


def check_keys(run: Run, wreck: Wreck, path: Path, *, keep_state: bool) -> None:
    """The keys that were said to work do, and those that were said to be gone do not."""
    latest = {note.secret: note.works for note in wreck.notes if isinstance(note, KeyIs)}
    world = survivor(run, wreck, path)
    if not keep_state:
        shutil.rmtree(world.state_path, ignore_errors=True)
    for secret, works in latest.items():
        world.secret = secret
        if works is False:
            with pytest.raises(KeyRefused):
                world.open()
        elif works:
            with world.opened() as store:
                world.oracle = dict(run.world.oracle)
                world.check_all(store)
