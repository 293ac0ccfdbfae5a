"""Whole lives of a store, drawn at random, against an oracle: two hosts capture, forget, hold, read, reclaim, die at any call.

After every deed each point that must be there holds what the oracle says, no other one is there, and in the end nothing is left
that nobody needs.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvbackup.errors import HvbackupError
from hvbackup.hypervisors.fake import Killed
from hvbackup.model import Instant, RecoveryPoint
from hvbackup.store.check.check import check
from hvbackup.store.chunks.condemned import CONDEMNED
from hvbackup.store.keep import forget
from hvbackup.store.reclaim import reclaim
from hvbackup.store.reclaim.mark import mark
from hvbackup.store.reclaim.reclaim import Options
from hvbackup.store.shelves import holds, pins
from hvbackup.store.shelves.settings import HOUR_NS, Settings
from hvbackup.store.store import Store
from tests.faults import FaultyKernel, once
from tests.world import BLOCK, Content, World, contents

pytestmark = [pytest.mark.walk, pytest.mark.timeout(900)]
MEMORY = Path("/dev/shm")

HOSTS = st.sampled_from(["near", "far"])
DEEDS = st.one_of(
    st.tuples(st.just("capture"), HOSTS, st.sampled_from(["new", "old", "same"])),
    st.tuples(st.just("forget"), HOSTS, st.integers(0, 5), st.booleans()),
    st.tuples(st.just("undo"), HOSTS, st.integers(0, 5)),
    st.tuples(st.just("hold"), HOSTS, st.integers(0, 5)),
    st.tuples(st.just("release"), HOSTS),
    st.tuples(st.just("pin"), HOSTS, st.integers(0, 5)),
    st.tuples(st.just("unpin"), HOSTS),
    st.tuples(st.just("reclaim"), HOSTS, st.booleans()),
    st.tuples(st.just("time"), HOSTS),
    st.tuples(st.just("lose state"), HOSTS),
)
LIFE = st.lists(st.tuples(DEEDS, st.one_of(st.none(), st.integers(0, 60))), min_size=3, max_size=14)


@pytest.fixture(autouse=True, scope="module")
def small_packs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("chunks.writer", "reclaim.repack"):
            patch.setattr(f"hvbackup.store.{module}.PACK_BYTES", 2 * BLOCK)
        yield


class Life:
    """A store, two hosts, and what must be there."""

    def __init__(self, path: Path) -> None:
        self.kernel = FaultyKernel()
        self.world = World(path, kernel=self.kernel).init()
        self.clock = self.world.clock
        self.states = {"near": path / "near", "far": path / "far"}
        self.oracle: dict[str, Content] = {}  # path -> content
        self.pinned: dict[str, tuple[str, RecoveryPoint, Content]] = {}
        self.first: Content | None = None
        self.rng = random.Random(1)

    @contextmanager
    def opened(self, host: str) -> Iterator[Store]:
        with Store.open(self.world.store_path, self.states[host], kernel=self.kernel) as store:
            yield store

    def do(self, deed: tuple[object, ...], die_at: int | None) -> None:
        """One deed, during which we may be killed; then everything is looked at."""
        what, host, *rest = deed
        before = dict(self.oracle)
        self.after = dict(before)  # what must be there if it ends well
        if die_at is not None:
            self.kernel.arm(once(die_at, Killed()))
        died = False
        try:
            with self.opened(str(host)) as store, store.writing:
                getattr(self, f"_{str(what).replace(' ', '_')}")(store, *rest)
        except Killed:
            died = True
        finally:
            self.kernel.disarm()
        if str(what) == "lose state":
            shutil.rmtree(self.states[str(host)], ignore_errors=True)
        self.look(before, died)

    def look(self, before: dict[str, Content], died: bool) -> None:
        with self.opened("near") as store, store.writing:
            with forget.alone(store):
                forget.settle(store, Instant(self.clock()))
            found = {store.path_of(p): p for p in store.points()}
            sure = before.keys() & self.after.keys() if died else self.after.keys()
            maybe = before.keys() | self.after.keys() if died else self.after.keys()
            assert sure <= found.keys() <= maybe
            known = before | self.after
            for path, point in found.items():
                assert contents(store, point) == known[path]
            self.oracle = {path: known[path] for path in found}
            for _, point, content in self.pinned.values():
                assert contents(store, point) == content, "what is pinned can't be read"
            assert [p.what for p in check(store).problems] == []

    def pick(self, store: Store, n: int) -> RecoveryPoint | None:
        points = list(store.points())
        return points[n % len(points)] if points else None

    # -- deeds ---------------------------------------------------------------------------------------------------------

    def _capture(self, store: Store, what: str) -> None:
        if what == "old" and self.first:
            for name, disk in self.world.disks.items():
                disk.write(0, self.first[name])
        elif what != "same":
            self.world.scribble(2)
        self.first = self.first or self.world.content()
        content = self.world.content()
        before = {store.path_of(p) for p in store.points()}
        try:
            self.world.capture(store, full=True)
        finally:
            self.kernel.disarm()
            with suppress(HvbackupError):
                for point in store.points():
                    if store.path_of(point) not in before:
                        self.after[store.path_of(point)] = content

    def _forget(self, store: Store, n: int, trash: bool) -> None:
        point = self.pick(store, n)
        if point is None:
            return
        path = store.path_of(point)
        held = path in holds.active(store, self.clock()) or path in pins.active(store, self.clock())
        if not held:
            del self.after[path]
        with forget.alone(store):
            done = forget.forget(store, [path], Settings(trash_ns=HOUR_NS if trash else 0), self.clock(), why="", by="")
        assert bool(done.points) != held

    def _undo(self, store: Store, n: int) -> None:
        with forget.alone(store):
            forget.settle(store, self.clock())
            there = forget.trash(store)
            if there:
                chosen = there[n % len(there)]
                self.after[chosen.path] = contents(store, forget.load_trashed(store, chosen.path))
                forget.undo(store, chosen, self.clock(), by="")

    def _hold(self, store: Store, n: int) -> None:
        point = self.pick(store, n)
        if point:
            holds.hold(store, store.path_of(point), self.clock(), until=None, why="", by="")

    def _release(self, store: Store) -> None:
        for one in list(holds.HOLDS.all(store.files, store.ring))[:1]:
            holds.release(store, one, self.clock(), by="")

    def _pin(self, store: Store, n: int) -> None:
        point = self.pick(store, n)
        if point:
            content = contents(store, point)
            pin = pins.take(store, [point], "life", self.clock(), lasting=True)
            self.pinned[pin.id] = (store.path_of(point), point, content)

    def _unpin(self, store: Store) -> None:
        for pin_id in list(self.pinned)[:1]:
            del self.pinned[pin_id]
            pins.drop(store, pin_id)

    def _reclaim(self, store: Store, wait: bool) -> None:
        reclaim.reclaim(store, self.options(wait=wait))

    def options(self, **changes: object) -> Options:
        hours = [0.0]

        def sleep(_seconds: float) -> None:
            hours[0] += 600

        made = Options(
            grace_ns=0,
            garbage_share=0.0,
            counts_age_ns=4 * HOUR_NS,  # at the end a mark chooses, so that nothing is left
            clock=self.clock,
            sleep=sleep,
            steady=lambda: hours[0],
        )
        return replace(made, **changes)  # type: ignore[arg-type]

    def _time(self, store: Store) -> None:
        self.clock.now += 2 * HOUR_NS
        with forget.alone(store):
            forget.settle(store, self.clock())
            forget.empty(store, self.clock())

    def _lose_state(self, store: Store) -> None:
        """Done when the store is closed again."""

    def end(self) -> None:
        """Everything that nobody needs goes, and nothing else."""
        for one in list(self.pinned):
            with self.opened("near") as store:
                pins.drop(store, one)
                del self.pinned[one]
        self.clock.now += 20 * HOUR_NS
        with self.opened("near") as store, store.writing:
            for pin in pins.every(store, self.clock()):
                pins.drop(store, pin.id)
            with forget.alone(store):
                forget.settle(store, self.clock())
                forget.empty(store, self.clock())
            reclaim.reclaim(store, self.options(wait=True))
        self.after = dict(self.oracle)
        self.look(dict(self.oracle), died=False)
        with self.opened("far") as store:
            assert all(s.live == s.total for s in mark(store, self.clock()).shares().values())
            assert CONDEMNED.names(store.files) == []


@given(LIFE)
@example([(("capture", "near", "new"), None), (("capture", "far", "new"), None), (("forget", "near", 0, False), None),
          (("reclaim", "near", True), 30), (("capture", "far", "old"), None), (("reclaim", "far", True), None)])  # fmt: skip
@example([(("capture", "near", "new"), None), (("pin", "far", 0), None), (("capture", "near", "new"), None),
          (("forget", "near", 1, True), 9), (("undo", "far", 0), 3), (("reclaim", "near", False), None)])  # fmt: skip
def test_any_life(life: list[tuple[tuple[object, ...], int | None]]) -> None:
    with tempfile.TemporaryDirectory(prefix="hvbackup-", dir=MEMORY if MEMORY.is_dir() else None) as path:
        one = Life(Path(path))
        for deed, die_at in life:
            one.do(deed, die_at)
        one.end()
