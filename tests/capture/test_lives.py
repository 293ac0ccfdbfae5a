"""Random lives of a machine: whatever happens to it, every point reads back as what its disks held, whole and in parts."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from hvbackup.errors import UsageError
from hvbackup.hypervisors.fake import FakeDisk, Order, Tracking
from hvbackup.model import DiskRoot, Status
from hvbackup.store.check.check import check
from hvbackup.store.store import Store
from tests.world import BLOCK, KEY, World

pytestmark = pytest.mark.walk

SIZES = [512, BLOCK - 512, BLOCK, BLOCK + 512, 3 * BLOCK, 3 * BLOCK + 1536, 258 * BLOCK + 512]
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


class Life(RuleBasedStateMachine):
    """One machine, one store, any order of writes, discards, resizes, captures and losses of everything but the store."""

    @initialize(
        encrypted=st.booleans(),
        order=st.sampled_from(Order),
        sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=3),
        sector=st.sampled_from([512, 4096]),
        grain=st.sampled_from([4096, BLOCK, 3 * BLOCK]),
        block=st.sampled_from([BLOCK, BLOCK, 4 * BLOCK]),
    )
    def begin(self, encrypted: bool, order: Order, sizes: list[int], sector: int, grain: int, block: int) -> None:
        self.folder = TemporaryDirectory(dir=MEMORY)
        disks = {f"vd{i}": FakeDisk(size, sector, grain) for i, size in enumerate(sizes)}
        self.world = World(Path(self.folder.name), KEY if encrypted else None, disks, order, block=block).init()
        self.store = self.world.open()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    def _disk(self, data: st.DataObject) -> FakeDisk:
        return self.world.disks[data.draw(st.sampled_from(sorted(self.world.disks)))]

    @rule(data=st.data(), kind=st.sampled_from(["noise", "zeroes", "the same", "block"]))
    def the_guest_writes(self, data: st.DataObject, kind: str) -> None:
        disk = self._disk(data)
        offset = data.draw(st.integers(0, disk.size - 1))
        length = min(data.draw(st.sampled_from([1, 512, 4096, BLOCK, 2 * BLOCK + 7])), disk.size - offset)
        content = {
            "noise": random.Random(data.draw(st.integers(0, 1000))).randbytes(length),
            "zeroes": bytes(length),
            "the same": bytes(disk.content[offset : offset + length]),
            "block": b"\x42" * length,
        }[kind]
        disk.write(offset, content)

    @rule(writes=st.integers(1, 12))
    def the_guest_is_busy(self, writes: int) -> None:
        self.world.scribble(writes)

    @rule(data=st.data())
    def the_guest_discards(self, data: st.DataObject) -> None:
        disk = self._disk(data)
        offset = data.draw(st.integers(0, disk.size - 1))
        disk.discard(offset, min(data.draw(st.sampled_from([512, BLOCK, 70_000, disk.size])), disk.size - offset))

    @rule(data=st.data(), size=st.sampled_from(SIZES))
    def a_disk_is_resized(self, data: st.DataObject, size: int) -> None:
        self._disk(data).resize(size)  # shrunk and grown back between two captures, too: trackers say nothing of that

    @rule(size=st.sampled_from(SIZES))
    def a_disk_is_added_or_taken_away(self, size: int) -> None:
        if len(self.world.disks) < 3:
            self.world.disks[f"new{len(self.world.oracle)}"] = FakeDisk(size)
        else:
            del self.world.disks[sorted(self.world.disks)[-1]]

    @rule(data=st.data(), trouble=st.sampled_from([FakeDisk.lose_tracking, FakeDisk.break_tracking]))
    def tracking_is_lost(self, data: st.DataObject, trouble: object) -> None:
        trouble(self._disk(data))  # type: ignore[operator]

    @rule(data=st.data(), tracking=st.sampled_from([Tracking.HONEST, Tracking.ABSENT]))
    def tracking_changes(self, data: st.DataObject, tracking: Tracking) -> None:
        disk = self._disk(data)
        if disk.tracking is not tracking:
            disk.lose_tracking()
            disk.tracking = tracking

    @rule(full=st.booleans(), sample=st.sampled_from([0, 1, 32]), writes=st.integers(0, 5))
    def capture(self, full: bool, sample: int, writes: int) -> None:
        self.world.scribble(writes)
        outcome = self.world.capture(self.store, full=full, sample_blocks=sample)
        assert outcome.status is not Status.FAILED
        assert outcome.point is not None
        self.world.check_point(self.store, outcome.point)
        self.world.check_settled(self.store)
        for root in outcome.point.disks:
            self.read_around(root, self.world.oracle[outcome.point.id][root.disk.id])

    def read_around(self, root: DiskRoot, expected: bytes) -> None:
        """Reads of any place and length, at borders of blocks and at both ends more often than elsewhere."""
        rng, size = self.world.rng, root.disk.size
        for _ in range(8):
            near = rng.choice([0, size, size // BLOCK * BLOCK, rng.randrange(size + 1) // BLOCK * BLOCK])
            first = min(max(near + rng.choice([0, 0, -1, 1, -513, 70_000]), 0), size)
            length = rng.choice([0, 1, 513, BLOCK, 3 * BLOCK + 5, size])
            check_range(self.store, root, expected, first, min(length, size - first))

    @rule(keep_state=st.booleans())
    def everything_starts_again(self, keep_state: bool) -> None:
        self.store.close()
        if not keep_state:
            shutil.rmtree(self.world.state_path)
        self.store = self.world.open()
        self.world.check_all(self.store)

    @precondition(lambda self: self.world.oracle)
    @rule(data=st.data())
    def somebody_reads(self, data: st.DataObject) -> None:
        points = sorted(self.store.points(), key=lambda p: p.t)
        point = data.draw(st.sampled_from(points))
        root = data.draw(st.sampled_from(point.disks))
        self.read_around(root, self.world.oracle[point.id][root.disk.id])

    @precondition(lambda self: self.world.oracle)
    @rule(data=st.data())
    def two_points_are_compared(self, data: st.DataObject) -> None:
        points = data.draw(
            st.lists(st.sampled_from(sorted(self.store.points(), key=lambda p: p.t)), min_size=2, max_size=2)
        )
        for root in points[0].disks:
            other = points[1].disk(root.disk.id)
            if other:
                a, b = (self.world.oracle[p.id][root.disk.id] for p in points)
                found = self.store.view(root).map.diff(self.store.view(other).map).tolist()
                assert found == naive_diff(a, b, self.world.block)

    @precondition(lambda self: self.world.oracle)
    @rule(deep=st.booleans())
    def the_store_is_checked(self, deep: bool) -> None:
        assert check(self.store, deep=deep).problems == []


def check_range(store: Store, root: DiskRoot, expected: bytes, first: int, length: int) -> None:
    """One read, and what `runs` says of the same range: data or zeroes, all of it, and nothing of the other kind."""
    view = store.view(root)
    buffer = bytearray(b"\xee" * length)
    view.read_into(first, memoryview(buffer))
    assert buffer == expected[first : first + length]
    at = first
    for run, is_data in view.runs(first, length):
        assert run > 0
        assert is_data or not any(expected[at : at + run])
        at += run
    assert at == first + length
    with pytest.raises(UsageError):
        view.read_into(first, memoryview(bytearray(root.disk.size - first + 1)))


def naive_diff(a: bytes, b: bytes, block: int) -> list[int]:
    """The blocks whose content differs; beyond the end of a disk all is zero."""
    size = max(len(a), len(b))
    a, b = a.ljust(size, b"\0"), b.ljust(size, b"\0")
    return [i // block for i in range(0, size, block) if a[i : i + block] != b[i : i + block]]


TestLife = Life.TestCase
TestLife.settings = settings(
    stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
