"""Capture when things go wrong: trackers that lie, hosts that vanish, disks that run full, runs that die half-way."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from hvbackup import capture as capture_module
from hvbackup.capture import capture
from hvbackup.errors import Busy, HostUnreachable, HvbackupError, NotFound, ReadFailed, SpaceExhausted, UsageError
from hvbackup.hypervisors.fake import FakeDisk, FakeMachine, Killed, Order, Tracking
from hvbackup.leases import LEASE_NS, Leases
from hvbackup.model import SECOND, Consistency, LeaseId, Machine, MachineId, Status
from hvbackup.store.store import Store
from tests.faults import DyingHypervisor, FaultyKernel, full_from, once
from tests.world import BLOCK, KEY, MACHINE, World

pytestmark = pytest.mark.walk

BOTH_ORDERS = pytest.mark.parametrize("order", list(Order), ids=lambda order: order.name.lower())
CALLS = ("snapshot", "changes", "open", "read", "verify", "release")


def prepared(path: Path, order: Order = Order.AT_START, **more: object) -> World:
    """A world with one point, and something new to capture."""
    world = World(path, order=order, **more).init()  # type: ignore[arg-type]
    with world.opened() as store:
        world.scribble()
        world.capture(store)
    world.scribble()
    return world


def machine_of(world: World) -> Machine:
    return world.hv.machine(MACHINE).model()


def attempt(world: World, store: Store) -> BaseException | None:
    """A capture that may fail; its point, if there is one, is in the oracle."""
    expected = world.content()
    known = {p.id for p in store.points()}
    try:
        capture(store, world.hv, machine_of(world), world.options())
        failure = None
    except (HvbackupError, Killed, KeyboardInterrupt) as e:
        failure = e
    for point in store.points():
        if point.id not in known:
            world.oracle[point.id] = expected
    return failure


def recovers(world: World) -> None:
    """After whatever happened: every point reads, the next run works, and leaves nothing behind."""
    world.hv._plans.clear()  # what was planned and not reached
    with world.opened() as store:
        world.check_all(store)
        world.scribble(1)
        world.capture(store)
        world.check_all(store)
        world.check_settled(store)


# --- the host ------------------------------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_dying_at_every_call_of_the_hypervisor(ram: Path, order: Order) -> None:
    deaths = 0
    for nth in range(1000):
        world = prepared(ram / f"death{nth}", order)
        hv = DyingHypervisor([FakeMachine(MACHINE, world.disks)], order=order, clock=world.clock)
        world.hv = hv
        world.kernel = kernel = FaultyKernel()
        with world.opened() as store:
            hv.die_at = nth
            kernel.arm(lambda call, number, hv=hv: once(number, Killed())(call, number) if hv.dead else None)
            failure = attempt(world, store)
        kernel.disarm()
        hv.revive()
        recovers(world)
        if failure is None:
            break
        assert isinstance(failure, Killed)
        deaths += 1
    assert deaths > len(CALLS)


@BOTH_ORDERS
@pytest.mark.parametrize("call", CALLS)
def test_the_host_fails_at_every_call(ram: Path, order: Order, call: str) -> None:
    for nth in range(1, 1000):
        world = prepared(ram / f"failure{nth}", order)
        before = set(world.oracle)
        error = ReadFailed("no") if call == "read" else HostUnreachable("gone")
        with world.opened() as store:
            world.hv.at(call, nth, error)
            failure = attempt(world, store)
            if call == "release":
                assert failure is None
            elif failure:
                assert failure is error
                assert {p.id for p in store.points()} == before
                assert store.files.names("tmp") == []
        recovers(world)
        if failure is None and nth > 2:
            break


def test_a_host_that_is_gone_when_we_clean_up_is_cleaned_by_the_next_run(tmp_path: Path) -> None:
    world = prepared(tmp_path)
    with world.opened() as store:
        world.hv.at("release", 1, HostUnreachable("The host is gone"))
        outcome = world.capture(store)
        assert outcome.status is Status.DEGRADED
        assert "The host is gone" in outcome.notes[0]
        assert len(store.files.names("leases")) == 1
        assert world.capture(store).notes[0].startswith("Cleaned up after run")
        world.check_settled(store)


def test_a_host_that_stays_away_is_noted_and_tried_again(tmp_path: Path) -> None:
    world = prepared(tmp_path)
    with world.opened() as store:
        Leases(store, world.clock).take(MachineId(MACHINE), "fake:")
        world.hv.at("release", 1, HostUnreachable("The host is gone"))
        outcome = world.capture(store)
        assert outcome.notes[0].startswith("Could not clean up after run")
        assert len(store.files.names("leases")) == 1
        world.capture(store)
        world.check_settled(store)


def test_a_view_that_did_not_hold_makes_no_point(tmp_path: Path) -> None:
    world = prepared(tmp_path)
    with world.opened() as store:
        world.hv.at("verify", 1, lambda: [setattr(s, "broken", "full") for s in world.hv.open_snapshots.values()])
        assert isinstance(attempt(world, store), ReadFailed)
    recovers(world)


def test_a_view_that_may_be_of_two_moments_is_noted(tmp_path: Path) -> None:
    world = prepared(tmp_path)
    with world.opened() as store:
        world.hv.at("verify", 1, lambda: [s.doubts.append("Somebody wrote") for s in world.hv.open_snapshots.values()])
        outcome = world.capture(store)
        assert (outcome.status, outcome.notes) == (Status.DEGRADED, ["Somebody wrote"])
        point = outcome.point
        assert point is not None
        assert point.notes == ("Somebody wrote",)


def test_what_can_not_be_done_leaves_nothing_behind(tmp_path: Path) -> None:
    world = prepared(tmp_path)
    with world.opened() as store:
        for error, options, machine in (
            (UsageError, world.options(consistency=Consistency.APPLICATION), machine_of(world)),
            (NotFound, world.options(), Machine(MachineId("m2"), "other", "fake")),
        ):
            with pytest.raises(error):
                capture(store, world.hv, machine, options)
            assert store.files.names("leases") == []
        world.hv._freeze(world.hv.machine(MACHINE), LeaseId("somebody else's"), {})
        with pytest.raises(Busy):
            capture(store, world.hv, machine_of(world), world.options())
        world.check_all(store)


@BOTH_ORDERS
def test_a_guest_that_writes_all_the_time_is_captured_at_one_moment(tmp_path: Path, order: Order) -> None:
    world = prepared(tmp_path, order)
    disk = world.disks["vda"]
    with world.opened() as store:
        for _ in range(3):
            for call in ("changes", "open", "read", "verify", "release"):
                world.hv.at(call, 1, lambda: disk.write(world.rng.randrange(disk.size - 5), b"later"))
            world.capture(store)
        world.check_all(store)
        world.capture(store)
        world.check_all(store)
        world.check_settled(store)


# --- tracking ------------------------------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_a_lying_tracker_is_found_out_and_the_disk_compared_whole(tmp_path: Path, order: Order) -> None:
    world = World(tmp_path, disks={"vda": FakeDisk(10 * BLOCK)}, order=order).init()
    disk = world.disks["vda"]
    with world.opened() as store:
        disk.write(0, world.rng.randbytes(disk.size))
        world.capture(store)
        disk.tracking = Tracking.LIES
        disk.write(70_000, world.rng.randbytes(300_000))
        outcome = world.capture(store)
        assert outcome.status is Status.DEGRADED
        assert "vda" in outcome.notes[0]
        assert len(outcome.notes) == 1
        world.check_all(store)


@BOTH_ORDERS
@pytest.mark.parametrize("trouble", [FakeDisk.lose_tracking, FakeDisk.break_tracking], ids=["lost", "inconsistent"])
def test_lost_tracking_costs_reading_and_no_space(
    tmp_path: Path, order: Order, trouble: Callable[[FakeDisk], None]
) -> None:
    world = prepared(tmp_path, order)
    with world.opened() as store:
        world.capture(store)
        trouble(world.disks["vda"])
        outcome = world.capture(store)
        assert outcome.status is Status.DEGRADED
        assert len(outcome.notes) == 1
        assert outcome.notes[0].startswith("Disk vda: ")
        assert [d.how for d in outcome.point.disks] == ["compared", "incremental"]  # type: ignore[union-attr]
        assert outcome.figures.changed_bytes == outcome.figures.new_bytes == 0
        world.scribble(1)
        assert world.capture(store).status is Status.OK
        world.check_all(store)
        world.check_settled(store)


def test_a_disk_that_can_not_be_tracked_is_compared_each_time_and_that_is_no_trouble(tmp_path: Path) -> None:
    world = World(tmp_path, disks={"vda": FakeDisk(3 * BLOCK, tracking=Tracking.ABSENT)}).init()
    with world.opened() as store:
        for how in ("full", "compared", "compared"):
            world.scribble(1)
            outcome = world.capture(store)
            assert outcome.status is Status.OK
            assert [d.how for d in outcome.point.disks] == [how]  # type: ignore[union-attr]
        world.check_all(store)


def test_a_full_capture_reads_everything_and_stores_nothing_twice(tmp_path: Path) -> None:
    world = prepared(tmp_path)
    with world.opened() as store:
        world.capture(store)
        outcome = world.capture(store, full=True)
        assert outcome.status is Status.OK
        assert [d.how for d in outcome.point.disks] == ["compared", "compared"]  # type: ignore[union-attr]
        assert outcome.figures.new_bytes == 0
        assert world.capture(store).status is Status.OK
        world.check_all(store)


# --- disks ---------------------------------------------------------------------------------------------------------------


@BOTH_ORDERS
@pytest.mark.parametrize("sector", [512, 4096])
def test_disks_come_go_grow_and_shrink(tmp_path: Path, order: Order, sector: int) -> None:
    world = World(tmp_path, KEY, disks={"vda": FakeDisk(3 * BLOCK, sector)}, order=order).init()
    sizes = [3 * BLOCK + sector, 5 * BLOCK, 5 * BLOCK - sector, sector, 300 * BLOCK + sector, 2 * BLOCK, 2 * BLOCK + 1]
    with world.opened() as store:
        for number, size in enumerate(sizes):
            world.scribble(3)
            world.capture(store)
            world.disks["vda"].resize(size)
            if number == 2:
                world.disks["vdb"] = FakeDisk(BLOCK + 512, sector)
            if number == 5:
                del world.disks["vdb"]
            world.capture(store)
        world.check_all(store)
        world.check_settled(store)
        newest = store.newest(MachineId(MACHINE))
        assert newest is not None
        assert [(d.disk.size, d.disk.sector) for d in newest.disks] == [(2 * BLOCK + 1, sector)]


def test_zeroes_and_discards_cost_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, disks={"vda": FakeDisk(8 * BLOCK)}).init()
    disk = world.disks["vda"]
    with world.opened() as store:
        disk.write(0, bytes(3 * BLOCK))
        outcome = world.capture(store)
        assert outcome.figures.new_bytes == 0
        assert outcome.figures.zero_blocks == 8
        disk.write(0, world.rng.randbytes(4 * BLOCK))
        world.capture(store)
        disk.discard(0, 2 * BLOCK)
        disk.write(2 * BLOCK, bytes(BLOCK))
        read = world.hv.read_bytes
        outcome = world.capture(store, sample_blocks=0)
        assert outcome.figures.new_bytes == 0
        assert world.hv.read_bytes - read == 2 * BLOCK, "what was zeroed, and the last block with data"
        world.check_all(store)


def test_a_clock_that_goes_back_does_not_change_which_point_is_the_newest(tmp_path: Path) -> None:
    world = prepared(tmp_path)
    with world.opened() as store:
        world.clock.now -= 3600 * SECOND
        outcome = world.capture(store)
        assert outcome.status is Status.DEGRADED
        assert "clock went back 3" in outcome.notes[0]
        world.scribble()
        last = world.capture(store)
        assert [d.how for d in last.point.disks] == ["incremental", "incremental"]  # type: ignore[union-attr]
        assert [p.id for p in store.points()] == list(world.oracle)
        assert store.newest(MachineId(MACHINE)) == last.point
        world.check_all(store)
        world.check_settled(store)


# --- the store -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_at_every_write_makes_no_point_and_the_next_run_works(ram: Path) -> None:
    failures = 0
    for nth in range(1000):
        world = prepared(ram / f"full{nth}", secret=KEY)
        before = set(world.oracle)
        world.kernel = kernel = FaultyKernel()
        with world.opened() as store:
            kernel.arm(full_from(nth))
            failure = attempt(world, store)
            calls = kernel.calls
            kernel.disarm()
            if failure:
                failures += 1
                assert isinstance(failure, SpaceExhausted)
                assert "free some space" in str(failure)
                assert {p.id for p in store.points()} == before
                assert store.files.names("tmp") == []
            world.capture(store)  # the same process goes on, as a service does
            world.check_all(store)
        recovers(world)
        if nth > calls:
            break
    assert failures > 12


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=["ctrl-C", "EIO"]
)
def test_an_error_at_every_step_of_writing(ram: Path, error: BaseException) -> None:
    failures = 0
    for nth in range(1000):
        world = prepared(ram / f"error{nth}")
        world.kernel = kernel = FaultyKernel()
        with world.opened() as store:
            kernel.arm(once(nth, error))
            failure = attempt(world, store)
            calls = kernel.calls
            kernel.disarm()
        assert failure is None or isinstance(failure, KeyboardInterrupt | HvbackupError)
        failures += failure is not None
        recovers(world)
        if nth > calls:
            break
    assert failures > 25


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_at_every_call_of_the_hypervisor(ram: Path, call: str) -> None:
    for nth in range(1, 1000):
        world = prepared(ram / f"interrupt{nth}")
        with world.opened() as store:
            world.hv.at(call, nth, KeyboardInterrupt())
            failure = attempt(world, store)
        recovers(world)
        if failure is None:
            break
        assert isinstance(failure, KeyboardInterrupt)


def test_a_lost_map_page_makes_the_disk_be_read_whole_and_nothing_is_missing(
    ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "BATCH_BYTES", 2 * BLOCK)
    world = World(ram, disks={"vda": FakeDisk(600 * BLOCK)}).init()
    disk = world.disks["vda"]
    with world.opened() as store:
        for block in range(0, 600, 5):
            disk.write(block * BLOCK, world.rng.randbytes(100))
        point = world.capture(store).point
        assert point is not None
        leaves = [page for page, level in store.view(point.disks[0]).map.pages() if level == 0]
        lost = leaves[1]
    for path in (ram / "store" / "packs").rglob("*.pack"):
        data = path.read_bytes()
        for row in _rows(store, path.stem):
            if row["id"].tobytes() == lost:
                at = int(row["offset"]) + 100
                data = data[:at] + bytes(40) + data[at + 40 :]
        path.write_bytes(data)
    with world.opened() as store:
        # The first batch needs the lost page; those behind it do not, and are under way when it fails.
        disk.write(510 * BLOCK, world.rng.randbytes(90 * BLOCK))
        outcome = world.capture(store, sample_blocks=0)
        assert outcome.status is Status.DEGRADED
        assert lost.hex() in outcome.notes[0]
        world.check_point(store, outcome.point)  # type: ignore[arg-type]


def _rows(store: Store, name: str) -> object:
    from hvbackup.store.format import pack

    return pack.read_footer(store.files, name)


def test_what_a_check_found_lost_is_read_and_stored_again(ram: Path) -> None:
    world = prepared(ram)
    with world.opened() as store:
        point = world.capture(store).point
        assert point is not None
        store.set_damaged_disks([(store.path_of(point), point.disks[0].disk.id)])
        outcome = world.capture(store)
        assert outcome.notes == ["Disk vda: its newest point has lost chunks; it was read whole"]
        assert world.capture(store).status is Status.OK
        world.check_all(store)


# --- leases --------------------------------------------------------------------------------------------------------------


def test_a_long_run_renews_its_lease_now_and_then(tmp_path: Path) -> None:
    world = World(tmp_path).init()
    with world.opened() as store:
        leases = Leases(store, world.clock)
        lease = leases.take(MachineId(MACHINE), "fake:")
        assert leases.renew(lease) is lease
        world.clock.now += LEASE_NS * 6 // 10
        renewed = leases.renew(lease)
        assert renewed.expires > lease.expires + LEASE_NS // 2
        assert leases.renew(lease) is renewed
        assert leases.all() == [renewed]


def test_the_lease_of_another_writer_is_left_alone_until_it_ends(tmp_path: Path) -> None:
    world = World(tmp_path).init()
    with world.opened() as store:
        lease = Leases(store, world.clock).take(MachineId(MACHINE), "fake:")
        other = Leases(store, world.clock).take(MachineId("m2"), "fake:")
    (tmp_path / "state" / store.id.hex() / "head.json").unlink()
    with world.opened() as store:
        leases = Leases(store, world.clock)
        assert leases.stale(MachineId(MACHINE)) == []
        world.clock.now += LEASE_NS + 1
        assert leases.stale(MachineId(MACHINE)) == [lease]
        assert leases.settle(world.hv, machine_of(world)) == [f"Cleaned up after run {lease.id}, which did not end"]
        assert leases.all() == [other]
