"""The life of two stores: captures, copies, restores, forgetting, reclaim, damage, losses of STATE, against byte arrays."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from hvbackup.errors import StoreDamage
from hvbackup.files import PARTIAL
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.model import Instant, RecoveryPoint
from hvbackup.recover.restore import Mode, Restored, check_target, to_file
from hvbackup.replicate import Copier
from hvbackup.store.check.check import check
from hvbackup.store.keep.forget import alone, empty, forget, trash, undo
from hvbackup.store.reclaim.reclaim import Options, reclaim
from hvbackup.store.shelves.settings import HOUR_NS, Settings
from hvbackup.store.store import Store, init
from tests.capture.test_lives import MEMORY, SIZES
from tests.world import BLOCK, KEY, OTHER_KEY, CarelessKernel, Content, World, contents

pytestmark = pytest.mark.walk

RULES = Settings(trash_ns=HOUR_NS)


class Life(RuleBasedStateMachine):
    """A machine, the store it is captured to, and another store that its points are copied to."""

    @initialize(
        mine=st.sampled_from([None, KEY]),
        theirs=st.sampled_from([None, OTHER_KEY]),
        family=st.booleans(),
        sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=2),
    )
    def begin(self, mine: object, theirs: object, family: bool, sizes: list[int]) -> None:
        self.folder = TemporaryDirectory(dir=MEMORY)
        path = Path(self.folder.name)
        self.world = World(path, mine, {f"vd{i}": FakeDisk(n) for i, n in enumerate(sizes)}).init()  # type: ignore[arg-type]
        self.secrets = [theirs] if theirs else []
        self.target_path, self.state = path / "target", path / "state2"
        self.store = self.world.open()
        shared = self.store.ring if family and bool(mine) == bool(theirs) else None
        init(self.target_path, theirs, BLOCK, CarelessKernel(), shared)  # type: ignore[arg-type]
        self.target = self.open_target()
        self.every: dict[str, Content] = {}  # what each point held that was ever made
        self.copied: set[str] = set()
        self.forgotten: set[str] = set()  # in the target

    def open_target(self) -> Store:
        return Store.open(self.target_path, self.state, self.secrets, owner=True, kernel=CarelessKernel())  # type: ignore[arg-type]

    def teardown(self) -> None:
        if hasattr(self, "target"):
            self.target.close()
            self.store.close()
            self.folder.cleanup()

    # --- life ---------------------------------------------------------------------------------------------------------

    @rule(writes=st.integers(1, 6), sample=st.sampled_from([0, 8]))
    def capture(self, writes: int, sample: int) -> None:
        self.world.scribble(writes)
        self.world.capture(self.store, sample_blocks=sample)
        self.every.update(self.world.oracle)

    @rule(data=st.data(), size=st.sampled_from(SIZES))
    def a_disk_is_resized(self, data: st.DataObject, size: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.disks)))
        self.world.disks[name].resize(size)
        self.world.disks[name].lose_tracking()

    @precondition(lambda self: self.world.oracle)
    @rule(data=st.data(), everything=st.booleans())
    def copy(self, data: st.DataObject, everything: bool) -> None:
        points = list(self.store.points())
        if not everything:
            points = data.draw(st.lists(st.sampled_from(points), min_size=1, max_size=3, unique_by=lambda p: p.id))
        for done in Copier(self.store, self.target, self.world.clock, random.Random(1)).copy(points, lambda *_: None):
            if done.source.id in self.forgotten:
                assert "--undo" in str(done.error)
            else:
                assert done.error is None, done.error
                assert done.point is not None
                assert contents(self.target, done.point) == self.every[done.source.id]
                self.copied.add(done.source.id)

    @precondition(lambda self: self.copied)
    @rule(data=st.data(), back=st.sampled_from(["no", "undo", "emptied"]))
    def a_copy_is_forgotten(self, data: st.DataObject, back: str) -> None:
        point = data.draw(st.sampled_from(self.in_target()))
        now = self.world.clock()
        with alone(self.target):
            forget(self.target, [self.target.path_of(point)], RULES, now, why="test", by="somebody")
            self.copied.remove(point.id)
            self.forgotten.add(point.id)
            if back == "undo":
                undo(self.target, next(t for t in trash(self.target) if t.id == point.id), now, by="somebody")
                self.copied.add(point.id)
                self.forgotten.remove(point.id)
            elif back == "emptied":
                empty(self.target, Instant(now + 2 * HOUR_NS))
                self.forgotten.clear()

    @precondition(lambda self: len(self.world.oracle) > 1)
    @rule(data=st.data())
    def an_original_is_forgotten_for_good(self, data: st.DataObject) -> None:
        """Its copy does not need it."""
        point = data.draw(st.sampled_from(sorted(self.store.points(), key=lambda p: (p.t, p.id))))
        with alone(self.store):
            at_once = Settings(trash_ns=0)
            forget(self.store, [self.store.path_of(point)], at_once, self.world.clock(), why="test", by="somebody")
        del self.world.oracle[point.id]

    @rule(whose=st.sampled_from(["source", "target"]))
    def space_is_reclaimed(self, whose: str) -> None:
        store = self.store if whose == "source" else self.target
        reclaim(store, Options(grace_ns=0, garbage_share=0.0, clock=self.world.clock))
        self.everything_is_there()

    def in_target(self) -> list[RecoveryPoint]:
        return sorted(self.target.points(), key=lambda p: (p.t, p.id))

    @precondition(lambda self: self.world.oracle)
    @rule(
        data=st.data(),
        mode=st.sampled_from(Mode),
        before=st.sampled_from(["nothing", "noise", "another point", "itself"]),
    )
    def restore(self, data: st.DataObject, mode: Mode, before: str) -> None:
        store = data.draw(st.sampled_from([self.store, self.target] if self.copied else [self.store]))
        points = sorted(store.points(), key=lambda p: (p.t, p.id))
        point, other = data.draw(st.sampled_from(points)), data.draw(st.sampled_from(points))
        root = data.draw(st.sampled_from(point.disks))
        expected = self.every[point.id][root.disk.id]
        held = {
            "nothing": None,
            "noise": random.Random(len(expected)).randbytes(min(len(expected), 5 * BLOCK)),
            "another point": self.every[other.id].get(root.disk.id, b""),
            "itself": expected,
        }[before]
        path = Path(self.folder.name) / "restored.raw"
        partial = path.with_name(path.name + PARTIAL)
        if held is not None and mode is not Mode.NEW:
            (partial if mode is Mode.RESUME else path).write_bytes(held)
        check_target(path, mode, "raw")
        done: Restored = to_file(store.view(root), path, store.ring.block_key, lambda *_: None, mode)
        assert path.read_bytes() == expected
        assert not partial.exists()
        if before == "itself" and mode.compares:
            assert done.written_bytes == 0
        path.unlink()

    @precondition(lambda self: self.copied)
    @rule(whose=st.sampled_from(["source", "target"]), where=st.integers(0, 10**6))
    def a_byte_of_a_pack_is_flipped_for_a_while(self, whose: str, where: int) -> None:
        """Whatever needs it is refused, never wrong; nothing wrong is copied on; and what is mended is as before."""
        store, rng = (self.store if whose == "source" else self.target), random.Random(where)
        path = rng.choice(sorted((store.files.root / "packs").glob("*/*.pack"), key=lambda p: p.stat().st_mtime_ns))
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        secrets = self.secrets if whose == "target" else [self.world.secret] if self.world.secret else []
        aside = Path(self.folder.name) / "aside"
        with Store.open(store.files.root, aside / "state", secrets) as fresh:  # type: ignore[arg-type]
            for point in fresh.points():
                try:
                    assert contents(fresh, point) == self.every[point.id]
                except StoreDamage:
                    assert any(p.lost for p in check(fresh, deep=True).problems), path
            self.copy_what_is_damaged(fresh, aside)
        path.write_bytes(whole)
        shutil.rmtree(aside)

    def copy_what_is_damaged(self, fresh: Store, aside: Path) -> None:
        init(aside / "store", KEY, BLOCK, CarelessKernel(), fresh.ring if fresh.ring.encrypted else None)
        with Store.open(aside / "store", aside / "state", [KEY], kernel=CarelessKernel()) as third:
            points = list(fresh.points())
            done = list(Copier(fresh, third, self.world.clock).copy(points, lambda *_: None))
            assert len(done) == len(points)
            for result in done:
                assert (result.point is None) == (result.error is not None)
            for point in third.points():
                assert contents(third, point) == self.every[point.id]
            assert check(third, deep=True).problems == []

    @rule(keep_state=st.booleans())
    def everything_starts_again(self, keep_state: bool) -> None:
        self.store.close()
        self.target.close()
        if not keep_state:
            shutil.rmtree(self.world.state_path, ignore_errors=True)
            shutil.rmtree(self.state, ignore_errors=True)
        self.store, self.target = self.world.open(), self.open_target()
        self.everything_is_there()

    @rule()
    def everything_is_there(self) -> None:
        self.world.check_all(self.store)
        found = self.in_target()
        assert {p.id for p in found} == self.copied
        for point in found:
            assert contents(self.target, point) == self.every[point.id]
        for store in (self.store, self.target):
            assert check(store, deep=True).problems == []
            assert store.files.names("leases") == []
            assert store.files.names("tmp") == []


TestStoreLife = Life.TestCase
TestStoreLife.settings = settings(
    stateful_step_count=16, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
