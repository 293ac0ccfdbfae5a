"""What every adapter must do, whoever is behind it.  A test module subclasses `Conformance` and gives a `rig` fixture.

The rig is the machine seen from the other side: it plays the guest and the administrator, and says what is left over.
Disks are named by the adapter; the suite only asks for `rig.disks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvbackup import extents
from hvbackup.errors import Busy, NotFound, UsageError
from hvbackup.hypervisors import Frozen, FrozenDisk, Hypervisor
from hvbackup.model import Consistency, Continuity, DiskId, KiB, LeaseId, Machine, MachineId, Token

BLOCK = 64 * KiB


class Rig(Protocol):
    """The machine under test, from behind."""

    disks: Sequence[str]

    def hypervisor(self) -> Hypervisor:
        """A new adapter on the same machine, as another process would have it."""

    def write(self, disk: str, offset: int, data: bytes) -> None:
        """The guest writes."""

    def zero(self, disk: str, offset: int, length: int) -> None:
        """The guest zeroes or discards."""

    def content(self, disk: str) -> bytes:
        """What the guest sees now."""

    def resize(self, disk: str, size: int) -> None:
        """The administrator grows a disk."""

    def new_life(self) -> None:
        """The machine dies and is started again; what it tracked is lost."""

    def add_foreign(self, disk: str) -> Callable[[], bool]:
        """Somebody else's checkpoint on a disk; the answer tells whether it is still there and records."""

    def leftovers(self) -> Sequence[str]:
        """Everything of ours that exists, checkpoints of committed points included."""


class Cycle:
    """A store in small: images of the last committed moment, and the tokens that go with them."""

    def __init__(self, rig: Rig, *, explained: bool = True) -> None:
        self.rig = rig
        self.explained = explained  # whether comparing is an exception, which has a reason
        self.images: dict[DiskId, bytearray] = {}
        self.tokens: dict[DiskId, Token] = {}
        self.how: dict[DiskId, Continuity] = {}
        self.read: dict[DiskId, int] = {}
        self.count = 0

    def lease(self) -> LeaseId:
        self.count += 1
        return LeaseId(f"lease-{self.count}")

    def machine(self) -> Machine:
        [machine] = self.rig.hypervisor().machines()
        return machine

    def capture(self, during: Callable[[Frozen], object] = lambda frozen: None, *, fine: bool = False) -> None:
        """One whole capture, committed; `fine`: as for a protection."""
        hypervisor, machine, lease = self.rig.hypervisor(), self.machine(), self.lease()
        with hypervisor.snapshot(machine, lease, self.tokens, None, fine=fine) as frozen:
            during(frozen)
            images = {disk.disk.id: self.fold(disk) for disk in frozen.disks}
            tokens = {disk.disk.id: disk.token for disk in frozen.disks if disk.token is not None}
            assert not frozen.verify()
        self.images, self.tokens = images, tokens
        hypervisor.release(machine, lease, list(tokens.values()))

    def fold(self, disk: FrozenDisk) -> bytearray:
        """The last image with what changed since; exactly what capture makes of it."""
        since = self.tokens.get(disk.disk.id)
        changes = disk.changes(since)
        assert len(extents.intersect(changes.data, changes.zero)) == 0
        self.how[disk.disk.id], self.read[disk.disk.id] = changes.continuity, extents.total(changes.data)
        image = bytearray(disk.disk.size)
        if changes.continuity is Continuity.INCREMENTAL:
            old = self.images[disk.disk.id][: disk.disk.size]
            image[: len(old)] = old
        else:
            assert changes.reason or not self.explained
            covered = extents.union(changes.data, changes.zero)
            assert np.array_equal(covered, extents.whole(disk.disk.size))
        for start, length in changes.zero.tolist():
            image[start : start + length] = bytes(length)
        copy(disk, changes.data, image)
        return image

    def equal(self) -> bool:
        """Whether the committed images are what the guest sees now."""
        return all(bytes(self.images[DiskId(d)]) == self.rig.content(d) for d in self.rig.disks)


def copy(disk: FrozenDisk, wanted: extents.Spans, image: bytearray) -> None:
    """Read these ranges of a frozen disk into an image."""
    reader = disk.open()
    try:
        with memoryview(image) as view:
            for start, length in wanted.tolist():
                reader.read_into(start, view[start : start + length])
    finally:
        reader.close()


def whole(disk: FrozenDisk) -> bytes:
    """Every byte of a frozen disk."""
    image = bytearray(disk.disk.size)
    copy(disk, extents.whole(disk.disk.size), image)
    return bytes(image)


def writes(sizes: Sequence[int]) -> st.SearchStrategy[list[tuple[int, int, int, int]]]:
    """(disk, offset, length, byte); byte 0 zeroes.  Odd ends and odd places, crossing blocks."""

    def on_disk(index: int) -> st.SearchStrategy[tuple[int, int, int, int]]:
        size = sizes[index]
        offset = st.one_of(st.integers(0, size - 1), st.integers(0, (size - 1) // BLOCK).map(lambda b: b * BLOCK))
        byte = st.one_of(st.just(0), st.integers(1, 255))  # zeroes often: they have a way of their own
        return st.tuples(st.just(index), offset, st.integers(1, 3 * BLOCK), byte)

    return st.lists(st.integers(0, len(sizes) - 1).flatmap(on_disk), max_size=12)


class Conformance:
    """The suite."""

    SECTOR_STEP = 1  # the guest writes in multiples of this
    EXAMPLES = 20

    # --- inventory ---------------------------------------------------------------------------------------------------

    def test_a_machine_keeps_its_identity(self, rig: Rig) -> None:
        [first], [second] = rig.hypervisor().machines(), rig.hypervisor().machines()
        assert first == second
        assert [d.id for d in first.disks] == list(rig.disks)
        assert all(d.size == len(rig.content(d.id)) for d in first.disks)

    def test_a_machine_that_is_not_there_is_not_found(self, rig: Rig) -> None:
        gone = Machine(MachineId("no-such-machine"), "gone", "test")
        with (
            pytest.raises(NotFound, match="gone"),
            rig.hypervisor().snapshot(gone, LeaseId("l"), {}, None),
        ):
            pytest.fail("A snapshot of nothing began")

    # --- one moment --------------------------------------------------------------------------------------------------

    def test_writes_during_a_snapshot_are_not_in_it(self, rig: Rig) -> None:
        cycle = Cycle(rig)
        for disk in rig.disks:
            rig.write(disk, 0, b"before" * BLOCK)
        before = {disk: rig.content(disk) for disk in rig.disks}

        def overwrite(frozen: Frozen) -> None:
            for disk in rig.disks:
                rig.write(disk, 0, b"during" * BLOCK)
                rig.zero(disk, 2 * BLOCK, BLOCK)

        cycle.capture(overwrite)
        assert {str(k): bytes(v) for k, v in cycle.images.items()} == before
        assert not cycle.equal()
        cycle.capture()
        assert cycle.equal()

    def test_reading_twice_gives_the_same(self, rig: Rig) -> None:
        rig.write(rig.disks[0], BLOCK, b"x" * BLOCK)

        def twice(frozen: Frozen) -> None:
            first = [whole(disk) for disk in frozen.disks]
            rig.write(rig.disks[0], 0, b"y" * 3 * BLOCK)
            assert [whole(disk) for disk in frozen.disks] == first

        Cycle(rig).capture(twice)

    def test_several_readers_read_the_same_disk(self, rig: Rig) -> None:
        rig.write(rig.disks[0], 0, b"r" * BLOCK)

        def together(frozen: Frozen) -> None:
            readers = [frozen.disks[0].open() for _ in range(rig.hypervisor().can.readers)]
            for reader in readers:
                buffer = bytearray(BLOCK)
                reader.read_into(0, memoryview(buffer))
                assert buffer == b"r" * BLOCK
            for reader in readers:
                reader.close()
                reader.close()

        Cycle(rig).capture(together)

    # --- changes -----------------------------------------------------------------------------------------------------

    def test_every_write_is_in_the_changes(self, rig: Rig) -> None:
        cycle = Cycle(rig)
        sizes = [len(rig.content(disk)) for disk in rig.disks]

        @settings(max_examples=self.EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None)
        @given(before=writes(sizes), during=writes(sizes))
        def one_more(before: Any, during: Any) -> None:
            self.play(rig, before, sizes)
            moment = {disk: rig.content(disk) for disk in rig.disks}
            cycle.capture(lambda frozen: self.play(rig, during, sizes))
            assert {str(k): bytes(v) for k, v in cycle.images.items()} == moment
            if cycle.count > 1:
                assert set(cycle.how.values()) == {Continuity.INCREMENTAL}

        one_more()

    def play(self, rig: Rig, plan: Sequence[tuple[int, int, int, int]], sizes: Sequence[int]) -> None:
        """The guest does what was drawn, in its own units."""
        step = self.SECTOR_STEP
        for index, offset, length, byte in plan:
            start = offset // step * step
            count = min(-(-length // step) * step, sizes[index] - start)
            if byte:
                rig.write(rig.disks[index], start, bytes([byte]) * count)
            else:
                rig.zero(rig.disks[index], start, count)

    def test_nothing_changed_reads_nothing(self, rig: Rig) -> None:
        cycle = Cycle(rig)
        rig.write(rig.disks[0], 0, b"once" * BLOCK)
        cycle.capture()
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        assert set(cycle.read.values()) == {0}

    def test_zeroed_blocks_need_no_reading(self, rig: Rig) -> None:
        cycle = Cycle(rig)
        rig.write(rig.disks[0], 0, b"data" * BLOCK)
        cycle.capture()
        rig.zero(rig.disks[0], 0, 2 * BLOCK)
        cycle.capture()
        assert cycle.equal()
        assert cycle.read[DiskId(rig.disks[0])] == 0

    def test_a_grown_tail_counts_as_changed(self, rig: Rig) -> None:
        cycle, disk = Cycle(rig), rig.disks[0]
        rig.write(disk, 0, b"data" * BLOCK)
        cycle.capture()
        old = len(rig.content(disk))
        rig.resize(disk, old + 3 * BLOCK)
        machine, lease = cycle.machine(), cycle.lease()
        with rig.hypervisor().snapshot(machine, lease, cycle.tokens, None) as frozen:
            changes = frozen.disks[0].changes(cycle.tokens[DiskId(disk)])
            assert np.array_equal(extents.union(changes.data, changes.zero), extents.spans([(old, 3 * BLOCK)]))
        rig.hypervisor().release(machine, lease, list(cycle.tokens.values()))
        rig.write(disk, old + BLOCK, b"tail" * 100)
        cycle.capture()
        assert cycle.equal()
        assert cycle.how[DiskId(disk)] is Continuity.INCREMENTAL

    # --- never guess -------------------------------------------------------------------------------------------------

    def test_a_token_nobody_knows_is_compared(self, rig: Rig) -> None:
        cycle, disk = Cycle(rig), DiskId(rig.disks[0])
        cycle.capture()
        known = cycle.tokens[disk]
        for wrong in (Token(known.kind, "hvb-00c0ffee-safe-none", known.life), Token("changeId", known.value)):
            cycle.tokens[disk] = wrong
            cycle.capture()
            assert cycle.how[disk] is Continuity.UNKNOWN
            assert all(how is Continuity.INCREMENTAL for name, how in cycle.how.items() if name != disk)

    def test_a_new_life_is_compared(self, rig: Rig) -> None:
        cycle = Cycle(rig)
        rig.write(rig.disks[0], 0, b"first life" * BLOCK)
        cycle.capture()
        rig.new_life()
        rig.write(rig.disks[0], 0, b"next life " * BLOCK)
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.UNKNOWN}
        assert cycle.equal()
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}

    def test_more_consistency_than_there_is_is_refused(self, rig: Rig) -> None:
        with (
            pytest.raises(UsageError, match="crash"),
            rig.hypervisor().snapshot(Cycle(rig).machine(), LeaseId("l"), {}, Consistency.APPLICATION),
        ):
            pytest.fail("An application-consistent snapshot began")
        assert not rig.leftovers()

    @pytest.mark.parametrize("wanted", [None, *Consistency])
    def test_a_machine_is_no_less_consistent_than_was_asked_for(self, rig: Rig, wanted: Consistency | None) -> None:
        hypervisor, machine = rig.hypervisor(), Cycle(rig).machine()
        levels = list(Consistency)
        try:
            with hypervisor.snapshot(machine, LeaseId("l"), {}, wanted) as frozen:
                said, stood = frozen.consistency, frozen.standstill
        except UsageError:
            assert wanted not in (None, Consistency.CRASH)
        else:
            assert levels.index(said) >= levels.index(wanted or Consistency.CRASH)
            assert hypervisor.can.freeze or said is Consistency.CRASH
            assert (stood.frozen_seconds > 0) == (said is not Consistency.CRASH)
            assert wanted is not Consistency.CRASH or stood.frozen_seconds == 0
        hypervisor.release(machine, LeaseId("l"), [])
        assert not rig.leftovers()

    # --- crashes and leases ------------------------------------------------------------------------------------------

    def test_a_lost_run_costs_nothing(self, rig: Rig) -> None:
        """A run that was not committed leaves the last checkpoint recording: the next run is incremental and right."""
        cycle, disk = Cycle(rig), rig.disks[0]
        rig.write(disk, 0, b"committed" * BLOCK)
        cycle.capture()
        rig.write(disk, BLOCK, b"between" * 100)
        machine, lease = cycle.machine(), cycle.lease()
        abandon(rig.hypervisor(), machine, lease, cycle.tokens)
        rig.write(disk, 5 * BLOCK, b"after the crash" * 100)
        rig.hypervisor().release(machine, lease, list(cycle.tokens.values()))
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        assert cycle.equal()

    def test_an_abandoned_snapshot_keeps_others_out_until_it_is_released(self, rig: Rig) -> None:
        machine = Cycle(rig).machine()
        abandon(rig.hypervisor(), machine, LeaseId("dead"), {})
        with pytest.raises(Busy), rig.hypervisor().snapshot(machine, LeaseId("next"), {}, None):
            pytest.fail("A second snapshot began")
        rig.hypervisor().release(machine, LeaseId("dead"), [])
        assert not rig.leftovers()
        Cycle(rig).capture()

    @pytest.mark.parametrize("lease", [LeaseId("dead"), None])
    def test_release_leaves_nothing_and_can_be_repeated(self, rig: Rig, lease: LeaseId | None) -> None:
        machine = Cycle(rig).machine()
        abandon(rig.hypervisor(), machine, LeaseId("dead"), {})
        assert rig.leftovers()
        for _ in range(2):
            rig.hypervisor().release(machine, lease, [])
            assert not rig.leftovers()

    def test_release_keeps_what_is_committed_and_what_is_foreign(self, rig: Rig) -> None:
        untouched = rig.add_foreign(rig.disks[0])
        cycle = Cycle(rig)
        cycle.capture()
        cycle.capture()
        rig.hypervisor().release(cycle.machine(), None, list(cycle.tokens.values()))
        assert len(rig.leftovers()) == len(rig.disks)
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        rig.hypervisor().release(cycle.machine(), None, [])
        assert not rig.leftovers()
        assert untouched()

    def test_leaving_with_an_error_leaves_only_checkpoints(self, rig: Rig) -> None:
        cycle = Cycle(rig)
        machine = cycle.machine()
        with pytest.raises(ZeroDivisionError), rig.hypervisor().snapshot(machine, LeaseId("l"), {}, None):
            raise ZeroDivisionError
        rig.hypervisor().release(machine, LeaseId("l"), [])
        assert not rig.leftovers()


def abandon(hypervisor: Hypervisor, machine: Machine, lease: LeaseId, since: dict[DiskId, Token]) -> None:
    """Begin a snapshot and die: nothing is left of our process, everything is left on the platform."""
    frozen = hypervisor.snapshot(machine, lease, since, None).__enter__()
    assert whole(frozen.disks[0])
