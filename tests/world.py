"""A small world for tests: a store, a hypervisor in memory, and what every recovery point must hold, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hvbackup.capture import Options, capture
from hvbackup.files import Kernel
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine, Order
from hvbackup.model import SECOND, Instant, KiB, Outcome, PointId, RecoveryPoint
from hvbackup.store.format import keys
from hvbackup.store.store import Store, init

BLOCK = 64 * KiB
MACHINE = "m1"
KEY = keys.parse_key_text(keys.new_key_text(), "the test's key file")
OTHER_KEY = keys.parse_key_text(keys.new_key_text(), "another key file")


class CarelessKernel(Kernel):
    """Does not wait for the disk: for tests in which nothing crashes."""

    def fsync(self, fd: int) -> None:
        pass

    def sync_dir(self, path: str) -> None:
        pass


class Clock:
    """A clock that a test sets; each look at it takes a millisecond."""

    def __init__(self, start: int = 1_700_000_000 * SECOND) -> None:
        self.now = start

    def __call__(self) -> Instant:
        self.now += SECOND // 1000
        return Instant(self.now)


Content = dict[str, bytes]  # disk -> its bytes


@dataclass
class World:
    """One store with one machine; `oracle` has what each point must hold."""

    path: Path
    secret: keys.Secret | None = None
    disks: dict[str, FakeDisk] = field(default_factory=dict)
    order: Order = Order.AT_START
    kernel: Kernel = field(default_factory=CarelessKernel)
    seed: int = 1
    block: int = BLOCK
    oracle: dict[PointId, Content] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.clock = Clock()
        self.disks = self.disks or {"vda": FakeDisk(3 * BLOCK + 1536), "vdb": FakeDisk(2 * BLOCK)}
        self.hv = FakeHypervisor([FakeMachine(MACHINE, self.disks)], order=self.order, clock=self.clock)
        self.on_commit: Callable[[RecoveryPoint], None] = lambda _: None

    @property
    def store_path(self) -> Path:
        return self.path / "store"

    @property
    def state_path(self) -> Path:
        return self.path / "state"

    def init(self) -> World:
        init(self.store_path, self.secret, self.block, self.kernel)
        return self

    def open(self, *, owner: bool = True) -> Store:
        secrets = [self.secret] if self.secret else []
        return Store.open(self.store_path, self.state_path, secrets, owner=owner, kernel=self.kernel)

    @contextmanager
    def opened(self, *, owner: bool = True) -> Iterator[Store]:
        with self.open(owner=owner) as store:
            yield store

    # --- the guest ---------------------------------------------------------------------------------------------------

    def scribble(self, writes: int = 4, largest: int = 2 * BLOCK) -> None:
        """The guest writes here and there: mostly noise, sometimes zeroes, sometimes a discard."""
        for disk in self.disks.values():
            for _ in range(writes):
                offset = self.rng.randrange(disk.size)
                length = min(self.rng.randrange(1, largest), disk.size - offset)
                kind = self.rng.random()
                if kind < 0.7:
                    disk.write(offset, self.rng.randbytes(length))
                elif kind < 0.85:
                    disk.write(offset, bytes(length))
                else:
                    disk.discard(offset, length)

    def content(self) -> Content:
        return {name: bytes(disk.content) for name, disk in self.disks.items()}

    # --- capture and compare -----------------------------------------------------------------------------------------

    def options(self, **changes: Any) -> Options:
        return replace(Options(source="fake:", clock=self.clock, rng=random.Random(self.rng.random())), **changes)

    def capture(self, store: Store, **options: Any) -> Outcome:
        """A capture; the guest does not write meanwhile, so the oracle is what its disks hold now."""
        expected = self.content()
        outcome = capture(store, self.hv, self.hv.machine(MACHINE).model(), self.options(**options))
        assert outcome.point is not None
        self.oracle[outcome.point.id] = expected
        return outcome

    def life(self, points: int = 3) -> World:
        """A store with some points in it, closed again."""
        self.init()
        with self.opened() as store:
            for _ in range(points):
                self.scribble()
                self.capture(store)
        return self

    def check_point(self, store: Store, point: RecoveryPoint) -> None:
        """The point holds what the oracle says, on all disks."""
        assert point.id in self.oracle, f"{point.id} was never committed"
        assert contents(store, point) == self.oracle[point.id]

    def check_all(self, store: Store) -> None:
        """Exactly the points of the oracle are there, and hold what it says."""
        found = list(store.points())
        assert {p.id for p in found} == set(self.oracle)
        for point in found:
            self.check_point(store, point)

    def check_settled(self, store: Store) -> None:
        """Nothing is left over: no unfinished file, no lease, and on the host only what the newest point names."""
        newest = store.newest(self.hv.machine(MACHINE).model().id)
        named = {f"{MACHINE}/{d.disk.id}/{d.token.value}" for d in newest.disks if d.token} if newest else set()
        assert set(self.hv.leftovers()) == named
        assert store.files.names("tmp") == []
        assert store.files.names("leases") == []
        assert store.runs.problems() == []


def contents(store: Store, point: RecoveryPoint) -> Content:
    """What a point holds, read whole."""
    return {d.disk.id: read_whole(store, d) for d in point.disks}


def read_whole(store: Store, root: Any) -> bytes:
    """One disk of a point."""
    buffer = bytearray(root.disk.size)
    store.view(root).read_into(0, memoryview(buffer))
    return bytes(buffer)


def tree(root: Path) -> Mapping[str, bytes]:
    """Every file below a directory, and its bytes."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
