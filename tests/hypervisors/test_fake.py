"""The fake passes what every adapter must pass, in both orders, and does what its tests plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from hvbackup.errors import ReadFailed
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine, Killed, Order, Tracking
from hvbackup.model import Continuity, KiB, LeaseId
from tests.hypervisors.conformance import BLOCK, Conformance, Cycle, abandon, whole

SIZES = {"vda": 16 * BLOCK, "vdb": 9 * BLOCK + 512}


class FakeRig:
    """The fake from behind; its adapter object stands for the platform, so every process shares it."""

    def __init__(self, order: Order) -> None:
        self.machine = FakeMachine("m1", {name: FakeDisk(size) for name, size in SIZES.items()})
        self.fake = FakeHypervisor([self.machine], order=order)
        self.disks: Sequence[str] = list(SIZES)

    def hypervisor(self) -> FakeHypervisor:
        return self.fake

    def write(self, disk: str, offset: int, data: bytes) -> None:
        self.machine.disks[disk].write(offset, data)

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.machine.disks[disk].discard(offset, length)

    def content(self, disk: str) -> bytes:
        return bytes(self.machine.disks[disk].content)

    def resize(self, disk: str, size: int) -> None:
        self.machine.disks[disk].resize(size)

    def new_life(self) -> None:
        for disk in self.machine.disks.values():
            disk.lose_tracking()

    def add_foreign(self, disk: str) -> Callable[[], bool]:
        self.machine.disks[disk].begin_checkpoint("libvirt-1")
        return lambda: "libvirt-1" in self.machine.disks[disk].checkpoints

    def leftovers(self) -> Sequence[str]:
        return self.fake.leftovers()


class TestFake(Conformance):
    @pytest.fixture(params=list(Order), ids=lambda order: order.name.lower())
    def rig(self, request: pytest.FixtureRequest) -> FakeRig:
        return FakeRig(request.param)


@pytest.fixture
def rig() -> FakeRig:
    return FakeRig(Order.AT_START)


def test_since_what_is_bound_at_the_start(rig: FakeRig) -> None:
    cycle = Cycle(rig)
    cycle.capture()
    with rig.fake.snapshot(cycle.machine(), LeaseId("l"), {}, None) as frozen:
        changes = frozen.disks[0].changes(next(iter(cycle.tokens.values())))
    assert changes.continuity is Continuity.UNKNOWN
    assert "not asked" in changes.reason


def test_since_what_may_be_asked_afterwards() -> None:
    cycle = Cycle(FakeRig(Order.ASKED_AFTER))
    cycle.capture()
    with cycle.rig.hypervisor().snapshot(cycle.machine(), LeaseId("l"), {}, None) as frozen:
        changes = frozen.disks[0].changes(next(iter(cycle.tokens.values())))
    assert changes.continuity is Continuity.INCREMENTAL


def test_a_planned_fault_comes_at_its_call_and_only_there(rig: FakeRig) -> None:
    with rig.fake.snapshot(Cycle(rig).machine(), LeaseId("l"), {}, None) as frozen:
        reader, buffer = frozen.disks[0].open(), memoryview(bytearray(KiB))
        rig.fake.at("read", 2, ReadFailed("planned"))
        reader.read_into(0, buffer)
        with pytest.raises(ReadFailed, match="planned"):
            reader.read_into(0, buffer)
        reader.read_into(0, buffer)
    assert rig.fake.calls("read") == 3


def test_something_may_happen_in_the_middle_of_a_call(rig: FakeRig) -> None:
    cycle = Cycle(rig)
    rig.fake.at("read", 1, lambda: rig.write("vda", 0, b"while reading"))
    cycle.capture(lambda frozen: whole(frozen.disks[0]))
    assert not cycle.equal()
    cycle.capture()
    assert cycle.equal()


def test_killed_leaves_the_snapshot_open(rig: FakeRig) -> None:
    machine = Cycle(rig).machine()
    with pytest.raises(Killed), rig.fake.snapshot(machine, LeaseId("l"), {}, None):
        raise Killed
    assert any("/l" in left for left in rig.leftovers())


def test_inconsistent_tracking_says_so(rig: FakeRig) -> None:
    cycle = Cycle(rig)
    cycle.capture()
    rig.machine.disks["vdb"].break_tracking()
    cycle.capture()
    assert [cycle.how[d] for d in cycle.images] == [Continuity.INCREMENTAL, Continuity.UNKNOWN]


def test_a_lying_tracker_is_a_lie(rig: FakeRig) -> None:
    """The suite's own oracle notices: what follows from a lie is not what the guest sees."""
    cycle = Cycle(rig)
    cycle.capture()
    rig.machine.disks["vda"].tracking = Tracking.LIES
    rig.write("vda", 0, b"unseen")
    cycle.capture()
    assert not cycle.equal()


def test_a_disk_that_can_not_be_tracked_has_no_token(rig: FakeRig) -> None:
    rig.machine.disks["vda"].tracking = Tracking.ABSENT
    cycle = Cycle(rig)
    cycle.capture()
    assert list(cycle.tokens) == ["vdb"]


def test_a_broken_view_is_not_verified(rig: FakeRig) -> None:
    with rig.fake.snapshot(Cycle(rig).machine(), LeaseId("l"), {}, None) as frozen:
        frozen.broken = "the scratch ran full"
        with pytest.raises(ReadFailed, match="ran full"):
            frozen.verify()


def test_reading_an_ended_snapshot_fails(rig: FakeRig) -> None:
    machine = Cycle(rig).machine()
    with rig.fake.snapshot(machine, LeaseId("l"), {}, None) as frozen:
        reader = frozen.disks[0].open()
    with pytest.raises(ReadFailed, match="over"):
        reader.read_into(0, memoryview(bytearray(1)))
    abandon(rig.fake, machine, LeaseId("dead"), {})
