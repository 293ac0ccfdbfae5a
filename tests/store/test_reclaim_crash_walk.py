"""A crash after every durable step of lives with forgetting and reclaim in them; then nothing that was promised is gone.

Like `test_crash_walk.py`: the process dies or the power goes after each step, STATE survives up to it or is lost.  Then every
point that must be there equals the oracle, reclaim goes on where it was, and in the end nothing is left that nobody needs.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hvbackup.leases import LEASE_NS
from hvbackup.model import Instant
from hvbackup.store.check.check import check
from hvbackup.store.chunks.condemned import CONDEMNED
from hvbackup.store.format import keys
from hvbackup.store.keep import forget
from hvbackup.store.reclaim import reclaim
from hvbackup.store.reclaim.mark import mark
from hvbackup.store.reclaim.reclaim import Options
from hvbackup.store.shelves.settings import HOUR_NS, Settings
from hvbackup.store.store import Store
from tests.crash import Op, Wreck, wrecks
from tests.store.test_crash_walk import KINDS, Order, Run, recorded, survivor
from tests.world import BLOCK, Content, World

pytestmark = [pytest.mark.walk, pytest.mark.timeout(900)]


@dataclass
class There:
    """From here on these points must be there, with this content."""

    points: dict[str, Content]


@dataclass
class Doomed:
    """From here on these points may be gone."""

    points: set[str]


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("chunks.writer", "reclaim.repack"):
        monkeypatch.setattr(f"hvbackup.store.{module}.PACK_BYTES", 2 * BLOCK)


def options(world: World, **changes: object) -> Options:
    hours = [0.0]

    def sleep(_seconds: float) -> None:
        hours[0] += 600
        world.clock.now += 600 * 10**9

    made = Options(grace_ns=0, garbage_share=0.0, wait=True, clock=world.clock, sleep=sleep, steady=lambda: hours[0])
    return replace(made, **changes)  # type: ignore[arg-type]


def captured(run: Run, store: Store) -> str:
    run.world.scribble(3, 3 * BLOCK)
    run.note_host()
    outcome = run.world.capture(store)
    assert outcome.point is not None
    path = store.path_of(outcome.point)
    run.recorder.note(There({path: run.world.content()}))
    return path


def forgotten(run: Run, store: Store, paths: list[str], trash_ns: int) -> None:
    run.recorder.note(Doomed(set(paths)))
    with forget.alone(store):
        forget.forget(store, paths, Settings(trash_ns=trash_ns), run.world.clock(), why="test", by="me")


def live(run: Run, rounds: int) -> None:
    """Points come and go; space is reclaimed in between; content that was forgotten comes back."""
    run.world.init()
    first: Content = {}
    paths: list[str] = []
    for number in range(rounds):
        with run.world.opened() as store:
            for _ in range(3):
                paths.append(captured(run, store))
                first = first or run.world.content()
            forgotten(run, store, [paths.pop(0), paths.pop(0)], 0 if number % 2 == 0 else HOUR_NS)
            reclaim.reclaim(store, options(run.world))
            for name, disk in run.world.disks.items():
                disk.write(0, first[name])
            paths.append(captured(run, store))
            with forget.alone(store):
                forget.empty(store, Instant(run.world.clock() + 2 * HOUR_NS))
            reclaim.reclaim(store, options(run.world, grace_ns=HOUR_NS, wait=False))


def check_survivor(run: Run, wreck: Wreck, path: Path, *, keep_state: bool) -> None:
    """What must be there is, and is whole; reclaim ends what was begun; a capture works; nothing is left over."""
    world = survivor(run, wreck, path)
    if not keep_state:
        shutil.rmtree(world.state_path, ignore_errors=True)
        world.clock.now += 2 * LEASE_NS
    there: dict[str, Content] = {}
    doomed: set[str] = set()
    for note in wreck.notes:
        if isinstance(note, There):
            there.update(note.points)
        elif isinstance(note, Doomed):
            doomed |= note.points
    must = there.keys() - doomed
    with world.opened() as store:
        check_points(run, store, must)
        assert [p.what for p in check(store).problems] == []
        with forget.alone(store):
            forget.settle(store, world.clock())
        found = check_points(run, store, must)
        reclaim.reclaim(store, options(world))
    with world.opened() as store:
        assert check_points(run, store, must) == found
        assert [p.what for p in check(store).problems] == []
        world.oracle = {p.id: run.world.oracle[p.id] for p in store.points()}
        world.scribble(1)
        world.capture(store)
        with forget.alone(store):
            forget.empty(store, Instant(world.clock() + 10 * HOUR_NS))
        reclaim.reclaim(store, options(world))
    with world.opened() as store:
        world.check_all(store)
        world.check_settled(store)
        assert not keep_state or store.files.names("writers") == [], "without STATE nobody knows that they are dead"
        assert CONDEMNED.names(store.files) == []
        assert all(s.live == s.total for s in mark(store, world.clock()).shares().values()), "garbage is left"


def check_points(run: Run, store: Store, must: set[str]) -> set[str]:
    found = {store.path_of(p): p for p in store.points()}
    assert must <= found.keys(), "a point is gone"
    for point in found.values():
        run.world.check_point(store, point)
    return set(found)


def walk(run: Run, ram: Path, seeds: int, *, both: bool) -> int:
    """Check every wreck of a recorded run from the first forgetting on, with STATE and without (or in turns); how many."""
    count = 0
    begin = next(i for i, s in enumerate(run.recorder.steps) if isinstance(s.note, Doomed))
    for number, wreck in enumerate(w for w in wrecks(run.recorder.steps, seeds) if w.step >= begin):
        for keep_state in (True, False) if both else (number % 2 == 0,):
            count += 1
            place = ram / f"wreck{count}"
            try:
                check_survivor(run, wreck, place, keep_state=keep_state)
            except BaseException as e:
                e.add_note(
                    f"after step {wreck.step} ({run.recorder.steps[wreck.step]!r:.200}), {wreck.how}, {keep_state=}"
                )
                raise
            shutil.rmtree(place)
    return count


@KINDS
def test_a_crash_at_every_step_of_prune_reclaim_and_capture(
    ram: Path, secret: keys.Secret | None, order: Order
) -> None:
    run = recorded(ram / "run", secret, order)
    live(run, 1)
    steps = run.recorder.steps
    assert sum(s.op is Op.UNLINK and s.path.startswith("store/packs/") for s in steps) > 6, "nothing was reclaimed"
    assert walk(run, ram, seeds=0, both=False) > 150


@pytest.mark.soak
@pytest.mark.timeout(7200)
@KINDS
def test_many_crashes_of_longer_lives(ram: Path, secret: keys.Secret | None, order: Order) -> None:
    run = recorded(ram / "run", secret, order)
    live(run, 3)
    assert walk(run, ram, seeds=2, both=True) > 1500
