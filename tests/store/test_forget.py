"""Forgetting: any point in any order, back out of the trash, never what must stay, and right after every crash."""

from __future__ import annotations

import errno
import itertools
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvbackup.errors import Busy, HvbackupError, NotFound, StoreDamage
from hvbackup.model import SECOND, Instant, RecoveryPoint
from hvbackup.store.check.check import check
from hvbackup.store.keep import forget as forgetting
from hvbackup.store.keep import must
from hvbackup.store.keep.forget import Forgotten, alone, empty, forget, settle, trash, undo
from hvbackup.store.shelves import holds, pins, settings
from hvbackup.store.shelves.settings import HOUR_NS, Settings
from hvbackup.store.shelves.tombstones import TOMBSTONES
from hvbackup.store.store import Store
from tests.crash import Recorder, Wreck, put, wrecks
from tests.world import KEY, World

pytestmark = pytest.mark.walk

FREE = Settings(trash_ns=HOUR_NS)


def gone(store: Store, points: list[RecoveryPoint], now: Instant, rules: Settings = FREE) -> Forgotten:
    with alone(store):
        return forget(store, [store.path_of(p) for p in points], rules, now, why="test", by="somebody")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_point_may_be_forgotten_in_any_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    world = World(tmp_path, KEY).life(3)
    with world.opened() as store:
        points = list(store.points())
        for i in order:
            gone(store, [points[i]], world.clock())
            del world.oracle[points[i].id]
            world.check_all(store)
            assert check(store).problems == []


def test_a_point_comes_back_out_of_the_trash_whole(tmp_path: Path) -> None:
    world = World(tmp_path, KEY).life(3)
    with world.opened() as store:
        points = list(store.points())
        done = gone(store, points[:2], world.clock())
        assert sorted(done.points) == sorted(store.path_of(p) for p in points[:2])
        assert {t.id for t in trash(store)} == {p.id for p in points[:2]}
        for _ in range(2):  # forgotten and had back, twice
            [there] = [t for t in trash(store) if t.id == points[0].id]
            with alone(store):
                undo(store, there, world.clock(), by="somebody")
            with pytest.raises(NotFound):
                undo(store, there, world.clock(), by="somebody")
            assert check(store).problems == []
            gone(store, [points[0]], world.clock())
        with alone(store):
            for there in trash(store):
                undo(store, there, world.clock(), by="somebody")
        world.check_all(store)
        assert store.files.names("tombstones") == []
        assert trash(store) == []
        store.files.remove(store.path_of(points[0]))
        assert "no record says that it was meant to be" in check(store).problems[0].what


def test_the_trash_is_emptied_when_its_time_has_passed(tmp_path: Path) -> None:
    world = World(tmp_path).life(2)
    with world.opened() as store:
        points, now = list(store.points()), world.clock()
        gone(store, points[:1], now)
        with alone(store):
            assert empty(store, Instant(now + HOUR_NS - 1)) == []
            assert len(trash(store)) == 1
            assert empty(store, Instant(now + HOUR_NS)) == [store.path_of(points[0])]
        assert trash(store) == []
        assert store.files.names("tombstones") == []
        assert forgetting.trash_paths(store) == []
        assert check(store).problems == []


def test_a_point_that_can_not_be_read_is_named_for_it_can_not_be_had_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path).life(3)
    with world.opened() as store:
        points, read = list(store.points())[:2], store.files.read
        sick = store.path_of(points[0])

        def failing(path: str) -> bytes:
            if path == sick:
                raise HvbackupError(f"{path}: Input/output error")
            return read(path)

        monkeypatch.setattr(store.files, "read", failing)
        with alone(store):
            done = forget(store, [store.path_of(p) for p in points], FREE, world.clock(), why="a test", by="somebody")
        assert list(done.lost) == [sick]
        assert {t.id for t in trash(store)} == {points[1].id}


def test_a_claim_that_can_not_be_renewed_is_told_of_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path).life(1)
    shelf, full = pins.PINS, threading.Event()

    def failing(*arguments: Any) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        shelf.put(*arguments)

    def until(done: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end
            time.sleep(0.01)

    monkeypatch.setattr(pins, "RENEW_SECONDS", 0.01)
    with world.opened() as store, pins.pinned(store, list(store.points()), "a test") as notes:
        monkeypatch.setattr(pins, "PINS", SimpleNamespace(put=failing, remove=shelf.remove))
        full.set()
        until(lambda: bool(notes))
        assert "could not be renewed, and it could be forgotten meanwhile: " in notes[0]
        full.clear()
        until(lambda: not notes)


def test_what_must_stay_stays(tmp_path: Path) -> None:
    world = World(tmp_path).life(4)
    with world.opened() as store:
        points, now = list(store.points()), world.clock()
        held = holds.hold(store, store.path_of(points[0]), now, until=Instant(now + HOUR_NS), why="audit", by="me")
        with pins.pinned(store, [points[1]], "a test") as notes:
            assert notes == []
            done = gone(store, points[:3], now)
            assert list(done.points) == [store.path_of(points[2])]
            assert done.kept[store.path_of(points[0])][0].endswith(": audit")
            assert "a test (process" in done.kept[store.path_of(points[1])][0]
        assert store.files.names("pins") == []
        assert gone(store, [points[1]], now).points
        assert not gone(store, [points[0]], now).points
        assert gone(store, [points[0]], Instant(now + HOUR_NS)).points, "the hold has ended"
        assert not gone(store, [points[3]], now, replace(FREE, min_age_ns=HOUR_NS)).points
        holds.release(store, held, now, by="me")
        assert check(store).problems == []
        assert store.files.names("tombstones") != []


def test_a_hold_on_what_is_being_forgotten_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path).life(2)
    with world.opened() as store:
        [first, _], now = list(store.points()), world.clock()
        gone(store, [first], now)
        with pytest.raises(Busy, match="in the trash"):
            holds.hold(store, store.path_of(first), now, until=None, why="", by="me")
        with pytest.raises(NotFound, match="forgotten just now"):
            pins.take(store, [first], "test", now)
        assert store.files.names("holds") == store.files.names("pins") == []


def test_a_hold_that_comes_between_the_tombstone_and_the_second_look_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path).life(2)
    with world.opened() as store:
        [first, _], now = list(store.points()), world.clock()
        path = store.path_of(first)

        def late(_seconds: float) -> None:  # as on another host, which began before our tombstone was there
            made = holds.Hold("0" * 16, path, now, None, "late", "them")
            holds.HOLDS.put(store.files, store.ring, made.id, made)

        monkeypatch.setattr("hvbackup.store.keep.forget.time.sleep", late)
        assert gone(store, [first], now).kept == {path: ["held: late"]}
        assert store.files.names("tombstones") == []
        world.check_all(store)


@pytest.mark.parametrize("folder", ["holds", "pins", "settings", "tombstones"])
def test_what_cannot_be_read_forbids_everything(tmp_path: Path, folder: str) -> None:
    world = World(tmp_path).life(2)
    with world.opened() as store:
        [first, _], now = list(store.points()), world.clock()
        name = "00000000" if folder == "settings" else "0123456789abcdef"
        store.files.replace(f"{folder}/{name}", b"garbage")
        with pytest.raises(StoreDamage, match=f"{folder}/{name}"), alone(store):
            settle(store, now)
            forget(store, [store.path_of(first)], settings.load(store), now, why="", by="")
        world.check_all(store)


def test_a_pin_of_a_dead_reader_expires_and_a_lasting_one_does_not(tmp_path: Path) -> None:
    world = World(tmp_path).life(3)
    with world.opened() as store:
        points, now = list(store.points()), world.clock()
        pins.take(store, [points[0]], "dead", now)
        lasting = pins.take(store, [points[1]], "boot", now, lasting=True)
        assert not gone(store, points[:2], now).points
        later = Instant(now + int((pins.PIN_SECONDS + pins.LATE_SECONDS + 1) * SECOND))
        assert list(gone(store, points[:2], later).points) == [store.path_of(points[0])]
        pins.remove_expired(store, later)
        assert store.files.names("pins") == [lasting.id]
        pins.drop(store, lasting.id)
        assert gone(store, [points[1]], later).points


def test_a_store_that_cannot_be_written_is_read_without_a_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvbackup.errors import SpaceExhausted

    world = World(tmp_path).life(1)
    with world.opened() as store:

        def full(*_: object) -> None:
            raise SpaceExhausted("No room")

        monkeypatch.setattr(store.files, "replace", full)
        with pins.pinned(store, list(store.points()), "a test") as notes:
            assert "No room" in notes[0]


def test_the_newest_good_point_of_each_machine_is_known(tmp_path: Path) -> None:
    world = World(tmp_path).life(3)
    with world.opened() as store:
        points = list(store.points())
        folder = store.path_of(points[0]).split("/")[1]
        assert must.newest(store, folder) == {store.path_of(points[2]): ["the newest point"]}
        store.set_damaged_disks([(store.path_of(points[2]), points[2].disks[0].disk.id)])
        assert must.newest(store, folder) == {
            store.path_of(points[2]): ["the newest point"],
            store.path_of(points[1]): ["the newest good point"],
        }


# -- crashes ---------------------------------------------------------------------------------------------------------------


def life_of_forgetting(world: World, recorder: Recorder) -> None:
    """Three points; two are forgotten, one of those comes back, and the trash is emptied.  Notes say what holds from when on."""
    now = world.clock()
    with world.opened() as store:
        points = [store.path_of(p) for p in store.points()]
        with alone(store):
            recorder.note(("maybe", set(points[:2])))
            forget(store, points[:2], FREE, now, why="test", by="me")
            recorder.note(("gone", set(points[:2])))
            [back] = [t for t in trash(store) if t.path == points[0]]
            recorder.note(("maybe", {points[0]}))
            undo(store, back, now, by="me")
            recorder.note(("there", {points[0]}))
            recorder.note(("emptied", {points[1]}))
            empty(store, Instant(now + HOUR_NS))


def expected(wreck: Wreck) -> tuple[set[str], set[str]]:
    """(points that must be there, points that may be)."""
    there: set[str] = set()
    maybe: set[str] = set()
    for what, paths in wreck.notes:
        if what == "emptied":
            continue
        there, maybe = there - paths, maybe - paths
        there |= paths if what == "there" else set()
        maybe |= paths if what == "maybe" else set()
    return there, maybe


def check_wreck(world: World, wreck: Wreck, path: Path, now: Instant) -> None:
    put(wreck.tree, path)
    after = World(path, world.secret)
    after.clock.now = world.clock.now
    there, maybe = expected(wreck)
    with after.opened() as store:
        assert check(store).problems == [], "right after the crash"
        for _ in range(2):  # settling twice changes nothing
            with alone(store):
                settle(store, now)
            found = {store.path_of(p) for p in store.points()}
            assert there <= found <= there | maybe
            trashed = {t.path for t in trash(store)}
            assert not trashed & found, "in both places"
            lost = {p for what, paths in wreck.notes for p in paths} - found - trashed
            assert not lost or "emptied" in {what for what, _ in wreck.notes}, "gone before its time"
            assert check(store).problems == []
        for point in store.points():
            world.check_point(store, point)
        assert set(forgetting.trash_paths(store)) == trashed
        told = {p for r in store.runs for p in r.value.get("forgotten", ())}
        assert not {p for p in maybe if p not in found} - told, "gone without a record"
        later = Instant(now + 2 * HOUR_NS)
        with alone(store):
            settle(store, later)
            empty(store, later)
        assert (trash(store), TOMBSTONES.names(store.files), forgetting.trash_paths(store)) == ([], [], [])
        assert check(store).problems == []
        assert {store.path_of(p) for p in store.points()} == found, "an old tombstone did something"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("secret", [None, KEY], ids=["plain", "encrypted"])
def test_a_crash_at_every_step_of_forgetting_and_having_back(ram: Path, secret: object) -> None:
    (ram / "run").mkdir()
    recorder = Recorder(ram / "run")
    world = World(ram / "run", secret, kernel=recorder).life(3)  # type: ignore[arg-type]
    with world.opened(owner=False) as store:
        recorder.note(("there", {store.path_of(p) for p in store.points()}))
    begin = len(recorder.steps)
    life_of_forgetting(world, recorder)
    count = 0
    for wreck in wrecks(recorder.steps, seeds=1):
        if wreck.step >= begin:
            count += 1
            try:
                check_wreck(world, wreck, ram / f"wreck{count}", world.clock())
            except BaseException as e:
                e.add_note(f"after step {wreck.step} ({recorder.steps[wreck.step]!r:.200}), {wreck.how}")
                raise
            shutil.rmtree(ram / f"wreck{count}")
    assert count > 100


def test_a_booted_machine_pins_its_point_until_it_is_discarded(tmp_path: Path) -> None:
    from hvbackup.config import Places
    from hvbackup.service import bootpin

    world = World(tmp_path).life(2)
    places = Places(world.store_path, world.state_path, tmp_path / "conf", tmp_path / "run")
    with world.opened() as store:
        [first, _], now = list(store.points()), world.clock()
        with bootpin.BootPin(places, store, first, now) as pin:
            pin.take("vm-1")
        with pytest.raises(RuntimeError), bootpin.BootPin(places, store, first, now) as failed:
            failed.take("vm-2")
            raise RuntimeError
        [there] = pins.every(store, Instant(now + 10**6 * HOUR_NS))
        assert there.what.startswith("boot vm-1 on ")
        assert not gone(store, [first], Instant(now + 10**6 * HOUR_NS)).points, "however long it runs, and who owns it"
    bootpin.drop(places, "vm-1")  # without a key
    with world.opened() as store:
        assert gone(store, [first], world.clock()).points
