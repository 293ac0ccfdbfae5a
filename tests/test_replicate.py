"""Copies of points: equal to their originals bit for bit, cheap where the target has things already, whole or not at all."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from hvbackup import replicate
from hvbackup.errors import StoreDamage, UsageError
from hvbackup.files import Kernel
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.leases import LEASE_NS
from hvbackup.model import Instant, MachineId, PointId, RecoveryPoint
from hvbackup.replicate import Copied, Copier
from hvbackup.store.check.check import check
from hvbackup.store.chunks import translation, writer
from hvbackup.store.format import keys
from hvbackup.store.index.index import NOWHERE
from hvbackup.store.keep.forget import alone, empty, forget
from hvbackup.store.shelves.settings import HOUR_NS, Settings
from hvbackup.store.store import Store, init
from tests.crash import Recorder, put, wrecks
from tests.store.conftest import ram
from tests.world import BLOCK, KEY, MACHINE, OTHER_KEY, CarelessKernel, World, contents

pytestmark = pytest.mark.walk

__all__ = ["ram"]

KINDS = ("family", "encrypted", "plain", "to plain", "to encrypted")
kinds = pytest.mark.parametrize("kind", KINDS)


@dataclass
class Pair:
    """A store with points, and where they are copied to."""

    world: World
    path: Path
    secret: keys.Secret | None
    kernel: Kernel

    def target(self, *, owner: bool = False) -> Store:
        secrets = [self.secret] if self.secret else []
        return Store.open(self.path / "target", self.path / "state", secrets, owner=owner, kernel=self.kernel)

    def make(self, *, family: bool) -> Pair:
        with self.world.opened(owner=False) as source:
            init(self.path / "target", self.secret, self.world.block, self.kernel, source.ring if family else None)
        return self

    def copy(self, *points: RecoveryPoint, target: Store | None = None) -> list[Copied]:
        """Copy all points, or these."""
        with self.world.opened(owner=False) as source:
            opened = target or self.target()
            try:
                copier = Copier(source, opened, self.world.clock, random.Random(1))
                return list(copier.copy(points or list(source.points()), lambda *_: None))
            finally:
                if target is None:
                    opened.close()

    def check_all(self, expected: int | None = None) -> None:
        """Every point of the target is the original, bit for bit, and nothing is wrong with the target."""
        with self.target() as target:
            found = list(target.points())
            assert expected is None or len(found) == expected
            for point in found:
                assert contents(target, point) == self.world.oracle[point.id]
            assert check(target, deep=True).problems == []
            assert target.runs.problems() == []


def pair(path: Path, kind: str, points: int = 3) -> Pair:
    world = World(path / "source", None if kind in ("plain", "to encrypted") else KEY)
    (path / "source").mkdir()
    world.life(points)
    secret = None if kind in ("plain", "to plain") else OTHER_KEY
    return Pair(world, path, secret, CarelessKernel()).make(family=kind == "family")


@kinds
def test_a_copied_point_equals_the_original(ram: Path, kind: str) -> None:
    both = pair(ram, kind)
    done = both.copy()
    assert [(r.error, r.was_there) for r in done] == [(None, False)] * 3
    both.check_all(3)
    for result in done:
        point = result.point
        assert point is not None
        assert (point.id, point.t, point.machine, point.config) == (
            result.source.id,
            result.source.t,
            result.source.machine,
            result.source.config,
        )
    assert all(r.was_there for r in both.copy())
    both.check_all(3)


@kinds
def test_only_what_the_target_lacks_is_read(ram: Path, kind: str) -> None:
    both = pair(ram, kind, 1)
    disk = both.world.disks["vda"] = FakeDisk(300 * BLOCK)
    disk.write(0, both.world.rng.randbytes(200 * BLOCK))
    with both.world.opened() as source:
        for write in range(3):
            disk.write(write * 30 * BLOCK, both.world.rng.randbytes(5000))
            both.world.capture(source)
    reads = [r.figures.read_bytes for r in both.copy()]
    assert reads[1] == 200 * BLOCK
    assert reads[2:] == [BLOCK, BLOCK]
    both.check_all(4)


@pytest.mark.parametrize("kind", ["family", "encrypted"])
def test_a_clone_is_not_read_again(ram: Path, kind: str) -> None:
    """Another machine with the same blocks: in a family ids are enough; elsewhere what was learnt of ids is."""
    both = pair(ram, kind, 1)
    both.world.disks["vdc"] = FakeDisk(both.world.disks["vda"].size)
    both.world.disks["vdc"].write(0, bytes(both.world.disks["vda"].content))
    first = both.copy()
    with both.world.opened() as source:
        both.world.capture(source)
    [_, second] = both.copy()
    assert first[0].figures.read_bytes > 0
    assert second.figures.read_bytes == 0
    assert second.figures.new_bytes == 0
    both.check_all(2)


@kinds
def test_points_are_copied_in_any_order(ram: Path, kind: str) -> None:
    both = pair(ram, kind, 4)
    with both.world.opened(owner=False) as source:
        points = list(source.points())
    for i in (2, 0, 3, 1):
        both.copy(points[i])
    both.check_all(4)


class Killed(BaseException):
    """The process is no more."""


class DyingKernel(CarelessKernel):
    """Dies when the nth pack is to get its name, and does nothing from then on."""

    def __init__(self, left: int) -> None:
        self.left = left

    def rename(self, old: str, new: str) -> None:
        self.left -= "/packs/" in new
        self._alive()
        super().rename(old, new)

    def unlink(self, path: str) -> None:
        self._alive()
        super().unlink(path)

    def _alive(self) -> None:
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("kind", ["family", "encrypted"])
def test_a_copy_that_was_killed_goes_on(ram: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PACK_BYTES", 20 * BLOCK)
    monkeypatch.setattr(replicate, "SAVE_PAIRS", 16)
    both = pair(ram, kind, 1)
    both.world.disks["vda"] = FakeDisk(300 * BLOCK)
    both.world.disks["vda"].write(0, both.world.rng.randbytes(200 * BLOCK))
    with both.world.opened() as source:
        both.world.capture(source)
    both.copy(next(iter(points_of(both))))
    both.kernel = DyingKernel(5)
    with pytest.raises(Killed):
        both.copy()
    both.kernel = CarelessKernel()
    [_, done] = both.copy()
    assert done.figures.new_bytes < 130 * BLOCK
    assert done.figures.read_bytes < 150 * BLOCK, "what was there already was read again"
    both.check_all(2)


def points_of(both: Pair) -> list[RecoveryPoint]:
    with both.world.opened(owner=False) as source:
        return list(source.points())


@pytest.mark.parametrize("kind", ["family", "encrypted"])
@pytest.mark.timeout(900)
def test_a_crash_at_every_step_of_a_copy(ram: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each durable step, killed or without power: what was copied is whole, is told of, and the copy goes on."""
    monkeypatch.setattr(writer, "PACK_BYTES", 2 * BLOCK)
    both = pair(ram, kind, 3)
    recorder, begun = recorded_copy(ram / "run", both, family=kind == "family")
    count = 0
    for wreck in wrecks(recorder.steps, 0):
        if wreck.step < begun:
            continue
        count += 1
        place, keep_state = ram / f"wreck{count}", count % 3 > 0
        put(wreck.tree, place)
        if not keep_state:
            shutil.rmtree(place / "state", ignore_errors=True)
            both.world.clock.now += 2 * LEASE_NS
        try:
            check_survivor(Pair(both.world, place, both.secret, CarelessKernel()), set(wreck.notes))
        except BaseException as e:
            e.add_note(f"after step {wreck.step} ({recorder.steps[wreck.step]!r:.200}), {wreck.how}, {keep_state=}")
            raise
        shutil.rmtree(place)
    assert count > 100


def recorded_copy(place: Path, both: Pair, *, family: bool) -> tuple[Recorder, int]:
    """(every step of making a store and copying three points into it, how many of them made the store)."""
    place.mkdir()
    recorder = Recorder(place)
    with both.world.opened(owner=False) as source:
        init(place / "target", both.secret, BLOCK, recorder, source.ring if family else None)
        begun, points = len(recorder.steps), list(source.points())
        with Pair(both.world, place, both.secret, recorder).target() as target:
            copier = Copier(source, target, both.world.clock, random.Random(1))
            # The middle one last: a crash must not leave it untold although another one is newer.
            for point in (points[0], points[2], points[1]):
                [done] = copier.copy([point], lambda *_: None)
                assert done.point is not None
                recorder.note(done.point.id)
    return recorder, begun


def check_survivor(survivor: Pair, copied: set[object]) -> None:
    with survivor.target(owner=True) as target:
        found = {p.id for p in target.points()}
        assert copied <= found
        told = {record.value.get("point") for record in target.runs}
        assert {target.path_of(p) for p in target.points()} <= told, "a point that could vanish unnoticed"
        assert check(target).problems == []
        for point in target.points():
            assert contents(target, point) == survivor.world.oracle[point.id]
    assert [r.error for r in survivor.copy()] == [None] * 3
    survivor.check_all(3)
    with survivor.target(owner=True) as target:
        assert target.files.names("leases") == []
        assert target.files.names("tmp") == []


@kinds
def test_a_damaged_source_chunk_is_named_and_other_points_are_copied(ram: Path, kind: str) -> None:
    both = pair(ram, kind, 3)
    points = points_of(both)
    with both.world.opened(owner=False) as source:
        # A block that only the second point has.
        needed = [set(map(bytes, source.view(p.disks[0]).map.ids(0, 4))) for p in points]
        own = next(iter(needed[1] - needed[0] - needed[2] - {bytes(32)}))
        [(name, offset, *_)] = source.index.everywhere(own)
        path = both.world.store_path / "packs" / name[:2] / f"{name}.pack"
    data = bytearray(path.read_bytes())
    data[offset + 70] ^= 1
    path.write_bytes(data)
    done = both.copy()
    assert [r.point is not None for r in done] == [True, False, True]
    assert isinstance(done[1].error, StoreDamage)
    assert done[1].error.exit_code == 20
    assert f"Point {points[1].id} of {MACHINE} was not copied: Chunk {own.hex()} is lost" in str(done[1].error)
    both.check_all(2)


def test_what_was_kept_of_ids_and_is_wrong_is_found_out(ram: Path) -> None:
    both = pair(ram, "encrypted", 1)
    both.world.disks["vdc"] = FakeDisk(both.world.disks["vda"].size)
    both.world.disks["vdc"].write(0, bytes(both.world.disks["vda"].content))
    both.copy()
    with both.world.opened() as source, both.target() as target:
        both.world.capture(source)
        known = translation.Translation(target.state, source.id)
        rows = [row for _, part in known._parts for row in part.tolist()]
        known.forget()
        swapped = [here for _, here in rows[1:] + rows[:1]]
        for (there, _), here in zip(rows, swapped, strict=True):
            known.add(bytes(there), bytes(here))
        known.save()
    [_, done] = both.copy()
    assert "is forgotten" in done.notes[0]
    both.check_all(2)


def test_damaged_files_of_what_was_kept_cost_reading_only(ram: Path) -> None:
    both = pair(ram, "encrypted", 1)
    both.copy()
    with both.world.opened() as source:
        both.world.scribble()
        both.world.capture(source)
    rng = random.Random(3)
    for number, path in enumerate((ram / "state").glob("*/translations/*/*")):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.choice([20, len(data)])] if number % 2 else data)
    assert [r.error for r in both.copy()] == [None, None]
    both.check_all(2)


def test_many_files_of_what_was_kept_become_one(ram: Path) -> None:
    with World(ram).init().opened() as store:
        for i in range(20):
            known = translation.Translation(store.state, b"x" * 16)
            known.add(bytes([i]) * 32, bytes([i + 1]) * 32)
            known.save()
            assert len(store.state.names(f"translations/{(b'x' * 16).hex()}")) <= translation.FILES_MAX + 1
        ids = np.array([[i] * 32 for i in range(21)], np.uint8)
        found, mask = translation.Translation(store.state, b"x" * 16).find(ids)
        assert mask.tolist() == [True] * 20 + [False]
        assert [row[0] for row in found[:20].tolist()] == list(range(1, 21))


def test_the_copy_names_its_origin_and_the_origin_can_be_proved(ram: Path) -> None:
    both = pair(ram, "encrypted", 1)
    [done] = both.copy()
    assert done.point is not None
    origin = done.point.origin
    assert origin is not None
    with both.world.opened(owner=False) as source:
        assert origin.store == source.id.hex()
        assert origin.path == source.path_of(done.source)
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(source.descriptor.verify_key))
        key.verify(bytes.fromhex(origin.signature), bytes.fromhex(origin.digest))
        with both.target() as target:
            assert target.load_point(target.path_of(done.point)).origin == origin
            assert target.ring.sign != source.ring.sign
            assert target.ring.master != source.ring.master


@kinds
def test_ids_are_shared_in_a_family_and_nowhere_else(ram: Path, kind: str) -> None:
    both = pair(ram, kind, 1)
    both.copy()
    with both.world.opened(owner=False) as source, both.target() as target:
        point = next(source.points())
        ids = source.view(point.disks[0]).map.ids(0, 3)
        there = target.index.lookup(ids[ids.any(axis=1)].view("V32").ravel())["pack"] != NOWHERE
        assert there.all() if kind == "family" else not there.any()


def test_a_capture_into_the_target_goes_on_from_a_copy(ram: Path) -> None:
    both = pair(ram, "encrypted", 2)
    both.copy()
    both.world.scribble()
    with both.target(owner=True) as target:
        outcome = both.world.capture(target)
        assert outcome.point is not None
        assert {d.how for d in outcome.point.disks} == {"compared"}
        assert target.files.names("leases") == []
    both.check_all(3)


def test_stores_that_do_not_fit_are_refused_by_name(ram: Path) -> None:
    both = pair(ram, "plain", 1)
    with both.world.opened(owner=False) as source:
        with pytest.raises(UsageError, match="is the store that is copied from"):
            Copier(source, source, both.world.clock)
        init(ram / "large", None, 4 * BLOCK)
        with Store.open(ram / "large", ram / "state") as target, pytest.raises(UsageError, match=r"--block 64K"):
            Copier(source, target, both.world.clock)
        with pytest.raises(UsageError, match="all encrypted or all not"):
            init(ram / "mixed", KEY, family=source.ring)
        assert not (ram / "mixed").exists()


def test_disks_that_grow_shrink_come_and_go(ram: Path) -> None:
    both = pair(ram, "encrypted", 1)
    disks = both.world.disks
    with both.world.opened() as source:
        for size in (300 * BLOCK + 512, 2 * BLOCK, 5 * BLOCK + 512, 512):
            disks["vda"].resize(size)
            both.world.scribble()
            both.world.capture(source)
        del disks["vdb"]
        disks["vdc"] = FakeDisk(BLOCK)
        both.world.capture(source)
    both.copy()
    both.check_all(6)


def test_a_dead_copys_lease_goes_with_the_next_copy(ram: Path) -> None:
    both = pair(ram, "plain", 1)
    both.kernel = DyingKernel(0)
    with pytest.raises(Killed):
        both.copy()
    both.kernel = CarelessKernel()
    with both.target() as target:
        assert len(target.files.names("leases")) == 1
    both.copy()
    with both.target() as target:
        assert target.files.names("leases") == []
        assert target.newest(MachineId(MACHINE)) is not None


def test_what_was_forgotten_in_the_target_stays_forgotten(ram: Path) -> None:
    """Until its trash is emptied it is had back out of there; then it may be copied again."""
    both = pair(ram, "family", 2)
    first = both.copy()[0].source
    with both.target(owner=True) as target, alone(target):
        forget(target, [target.path_of(first)], Settings(), both.world.clock(), why="test", by="somebody")
    [done, _] = both.copy()
    assert f"forget --undo {first.id}" in str(done.error)
    both.check_all(1)
    with both.target(owner=True) as target, alone(target):
        empty(target, Instant(both.world.clock() + 48 * HOUR_NS))
    assert [r.error for r in both.copy()] == [None, None]
    both.check_all(2)
    with both.target() as target:
        path = target.path_of(first)
        target.files.remove(path)  # by mistake: that it was forgotten once says nothing about now
        assert any(path in problem.what for problem in check(target).problems)


def test_points_of_two_stores_are_kept_apart(ram: Path) -> None:
    """A machine that is captured to the target as well: what the two have in common is found, and nothing is mixed up."""
    both = pair(ram, "encrypted", 1)
    both.copy()
    for _ in range(2):
        both.world.scribble()
        with both.target(owner=True) as target:
            both.world.capture(target)
        both.world.scribble()
        with both.world.opened() as source:
            both.world.capture(source)
    assert [r.error for r in both.copy()] == [None] * 3
    both.check_all(5)


def test_neither_checkpoints_nor_places_in_a_journal_are_copied(ram: Path) -> None:
    both = pair(ram, "family", 1)
    with both.world.opened() as source:
        newest = next(source.points())
        assert any(d.token for d in newest.disks)
        folded = replace(newest, id=PointId("00000000000000aa"), t=both.world.clock(), seq=7)
        source.commit(folded, source.writer())
        both.world.oracle[folded.id] = both.world.oracle[newest.id]
    for result in both.copy():
        assert result.point is not None
        assert result.point.seq is None
        assert [d.token for d in result.point.disks] == [None, None]
    both.check_all(2)
