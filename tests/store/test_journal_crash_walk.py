"""A crash after every durable step of protected lives: every moment that was offered is there, bit for bit, and no other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvbackup.leases import LEASE_NS
from hvbackup.model import DiskId
from hvbackup.protect.cycles import CycleLife
from hvbackup.protect.events import Rhythm
from hvbackup.protect.points import Points
from hvbackup.protect.protection import Protection
from hvbackup.store.format import keys
from hvbackup.store.journal import journal, logfile, merging, recorder
from hvbackup.store.journal.history import History
from hvbackup.store.journal.window import Limits
from hvbackup.store.store import DESCRIPTOR, Store
from tests.crash import Wreck, wrecks
from tests.store.test_crash_walk import KINDS, Order, Run, recorded, survivor
from tests.world import MACHINE, Content, World

pytestmark = [
    pytest.mark.walk,
    pytest.mark.timeout(900),
]  # thousands of stores are opened: on a busy machine that takes its time


@dataclass
class Offered:
    """A barrier returned: this moment is promised from now on."""

    seq: int


@dataclass
class Trimmed:
    """The window of what came before has passed: it is not promised any more."""

    before: int


Moments = dict[int, Content]


def protection_of(world: World, store: Store, window: int = 0) -> Protection:
    machine = world.hv.machine(MACHINE).model()
    return Protection(store, world.hv, machine, world.options(), Rhythm(1, 1, Limits(window_ns=window)))


def begun(world: World, store: Store, moments: Moments) -> CycleLife:
    """A life, whose first moment is the machine as it is now."""
    expected = world.content()
    life = protection_of(world, store).begin("a test")
    moments[life.newest.seq] = expected
    return life


def one_cycle(world: World, life: CycleLife, moments: Moments) -> int:
    world.scribble(2, 9000)
    expected = world.content()
    seq = life.cycle().moment.seq
    moments[seq] = expected
    return seq


def live(run: Run, moments: Moments) -> None:
    """A life that ends well, one that is resumed and dies, one that begins with a point because its tracking was lost."""
    world = run.world
    world.init()
    for number in range(3):
        with world.opened() as store:
            world.scribble(2)
            if number == 2:
                for disk in world.disks.values():
                    disk.lose_tracking()
            run.note_host()
            life = begun(world, store, moments)
            run.recorder.note(Offered(life.newest.seq))
            for turn in range(2):
                run.note_host()
                run.recorder.note(Offered(one_cycle(world, life, moments)))
                if turn == 0:
                    life.points.fold(life.points.prepare(life))
            if number != 1:
                life.close()
            else:
                life.recorder.finish()
    with world.opened() as store:
        first = History(store, world.hv.machine(MACHINE).model().id).last
        assert first is not None
        run.recorder.note(Trimmed(first.seq))
        life = begun(world, store, moments)
        Points(protection_of(world, store, window=1).setting, life.newest.t).fold(life.points.prepare(life))
        life.recorder.close()


def check_offered(store: Store, moments: Moments, promised: set[int]) -> None:
    """All that was promised is offered, and whatever is offered is what the disks held."""
    machine = next((p.machine.id for p in store.points()), None)
    if machine is None:
        assert not promised
        return
    history = History(store, machine)
    offered = set(history.moments[0].tolist())
    assert promised <= offered, "a moment is gone"
    assert offered <= set(moments), "a moment from nowhere"
    for seq in sorted(offered):
        for disk, expected in moments[seq].items():
            view = history.view(history.by_seq(seq), DiskId(disk))
            found = bytearray(view.size)
            view.read_into(0, memoryview(found))
            assert bytes(found) == expected, f"{disk} at seq:{seq}"


def check_survivor(run: Run, moments: Moments, wreck: Wreck, path: Path, *, keep_state: bool) -> None:
    world = survivor(run, wreck, path)
    if not keep_state:
        shutil.rmtree(world.state_path, ignore_errors=True)
        world.clock.now += 2 * LEASE_NS
    trimmed = max((note.before for note in wreck.notes if isinstance(note, Trimmed)), default=0)
    promised = {note.seq for note in wreck.notes if isinstance(note, Offered) and note.seq > trimmed}
    if not (world.store_path / DESCRIPTOR).exists():
        assert not promised
        return
    with world.opened(owner=False) as store:
        check_offered(store, moments, promised)
    after: Moments = dict(moments)
    with world.opened() as store:
        life = begun(world, store, after)
        promised |= {life.newest.seq, one_cycle(world, life, after)}
        check_offered(store, after, promised)
        life.close()
        merging.merge(store, world.hv.machine(MACHINE).model().id)
        check_offered(store, after, promised)


def live_and_merge(run: Run, moments: Moments) -> int:
    """Small segments between three points are merged, their parts removed, and at last all of it, its window having passed.

    The step at which the first merging begins.
    """
    since = 0
    world = run.world
    world.init()
    with world.opened() as store:
        run.note_host()
        life = begun(world, store, moments)
        run.recorder.note(Offered(life.newest.seq))
        machine = world.hv.machine(MACHINE).model().id
        for turn in range(4):
            run.note_host()
            run.recorder.note(Offered(one_cycle(world, life, moments)))
            life.recorder.rotate()
            since = since or len(run.recorder.steps) * (turn == 1)
            if turn in (1, 3):
                life.points.fold(life.points.prepare(life))  # which merges, and removes the parts of the time before
        life.recorder.finish()
        assert merging.merge(store, machine) == 0, "nothing is merged twice"
        folder = store.ring.machine_name(machine)
        files = journal.all_files(store.files, folder)
        assert sum(n.last is not None for n in files) == 2 == len(files), files
        check_offered(store, moments, set(moments))
        run.recorder.note(Offered(one_cycle(world, life, moments)))
        run.recorder.note(Trimmed(life.newest.seq - 1))
        Points(protection_of(world, store, window=1).setting, life.newest.t).fold(life.points.prepare(life))
        life.close()
    return since


@KINDS
def test_a_crash_at_every_step_of_merging(
    ram: Path, secret: keys.Secret | None, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "READERS_SECONDS", 0)
    run, moments = recorded(ram / "run", secret, order), Moments()
    since = live_and_merge(run, moments)
    check_all(run, moments, ram, 40, since)


@KINDS
def test_a_crash_at_every_step_of_protected_lives(
    ram: Path, secret: keys.Secret | None, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SEGMENT_MAX_BYTES", 30_000)
    monkeypatch.setattr(logfile, "MEMORY_BYTES", 2 * logfile.BLOCK_BYTES)  # so there are sets that are not whole
    run, moments = recorded(ram / "run", secret, order), Moments()
    live(run, moments)
    check_all(run, moments, ram, 150)


def check_all(run: Run, moments: Moments, ram: Path, at_least: int, since: int = 0) -> None:
    assert any(isinstance(step.note, Trimmed) for step in run.recorder.steps)
    count = 0
    for number, wreck in enumerate(wrecks(run.recorder.steps, 1)):
        if wreck.step < since or (wreck.how != "killed" and number % 7):
            continue  # each death, and every seventh power cut
        count += 1
        place = ram / f"wreck{count}"
        try:
            check_survivor(run, moments, wreck, place, keep_state=bool(count % 2))
        except BaseException as e:
            e.add_note(f"after step {wreck.step} ({run.recorder.steps[wreck.step]!r:.200}), {wreck.how}, {count}")
            raise
        shutil.rmtree(place)
    assert count > at_least
