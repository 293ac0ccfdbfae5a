"""A hypervisor in memory, for tests: guests write at any moment, tracking fails in every known way, faults are planned.

    hv = FakeHypervisor([FakeMachine("m1", {"vda": FakeDisk(8 * MiB)})], order=Order.AT_START)
    hv.machine("m1").disks["vda"].write(4096, b"guest")     # the guest writes, also while a snapshot is open
    hv.at("read", 3, ReadFailed("..."))                     # the 3rd read from now fails
    hv.at("read", 5, Killed())                              # we die there: nothing is cleaned up
    hv.at("open", 1, lambda: disk.write(0, b"x"))           # or something happens at that moment

Both orders of platforms are here: `AT_START` binds "since what" when the snapshot begins, `ASKED_AFTER` later.
Thread safety: everything takes one lock, so readers on several threads are fine.
"""

from __future__ import annotations

import enum
import itertools
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hvbackup import extents
from hvbackup.errors import Busy, HostUnreachable, NotFound, ReadFailed, UsageError
from hvbackup.extents import Spans
from hvbackup.hypervisors import Can, Changes, Standstill
from hvbackup.model import (
    Consistency,
    Continuity,
    Disk,
    DiskId,
    Instant,
    KiB,
    LeaseId,
    Machine,
    MachineConfig,
    MachineId,
    Token,
)

TOKEN_KIND = "fake-checkpoint"
FINE = 4 * KiB  # grain of a fine checkpoint

Action = BaseException | Callable[[], object]


class Killed(BaseException):
    """Stands for SIGKILL of our process: leaving a snapshot with it cleans up nothing."""


class Order(enum.Enum):
    """When the platform wants to hear "since what"."""

    AT_START = "at start"  # QEMU, libvirt, Proxmox VE
    ASKED_AFTER = "asked after"  # vSphere, Xen, Hyper-V


class Tracking(enum.Enum):
    """How well a disk records its changes."""

    HONEST = "honest"
    LIES = "lies"  # writes are not recorded, and nothing says so
    ABSENT = "absent"  # the platform can't track this disk


@dataclass(slots=True)
class _Checkpoint:
    size: int
    grain: int
    dirty: NDArray[np.bool_]
    inconsistent: bool = False


@dataclass(slots=True)
class FakeDisk:
    """One disk: its bytes, and what has been written since each checkpoint."""

    size: int
    sector: int = 512
    grain: int = 64 * KiB
    tracking: Tracking = Tracking.HONEST
    content: bytearray = field(init=False)
    checkpoints: dict[str, _Checkpoint] = field(init=False, default_factory=dict)
    _allocated: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.content = bytearray(self.size)
        self._allocated = np.zeros(self._grains(), np.bool_)

    def write(self, offset: int, data: bytes) -> None:
        """The guest writes."""
        if offset + len(data) > self.size:
            raise ValueError(f"Write past the end of a disk of {self.size} bytes")
        self.content[offset : offset + len(data)] = data
        self._mark(offset, len(data))
        self._allocated[_cells(offset, len(data), self.grain)] = True

    def discard(self, offset: int, length: int) -> None:
        """The guest discards: the bytes read as zero, and whole grains are no longer allocated."""
        self.content[offset : offset + length] = bytes(length)
        self._mark(offset, length)
        for start, count in extents.shrink(extents.spans([(offset, length)]), self.grain, self.size).tolist():
            self._allocated[_cells(start, count, self.grain)] = False

    def resize(self, size: int) -> None:
        """The administrator resizes; trackers do not record the new tail as changed, as real ones don't."""
        self.content = self.content[:size] + bytearray(max(0, size - self.size))
        self.size = size
        self._allocated = _resized(self._allocated, self._grains())
        for checkpoint in self.checkpoints.values():
            checkpoint.dirty = _resized(checkpoint.dirty, -(-size // checkpoint.grain))

    def lose_tracking(self) -> None:
        """A new life that remembers no checkpoint."""
        self.checkpoints.clear()

    def break_tracking(self) -> None:
        """Checkpoints are still listed and can't be trusted, as after a crash of the hypervisor."""
        for checkpoint in self.checkpoints.values():
            checkpoint.inconsistent = True

    def begin_checkpoint(self, name: str, grain: int | None = None) -> None:
        """Record changes under this name from now on, in grains of so many bytes."""
        grain = grain or self.grain
        self.checkpoints[name] = _Checkpoint(self.size, grain, np.zeros(-(-self.size // grain), np.bool_))

    def allocated(self) -> Spans:
        """What has ever been written and not discarded, in whole grains."""
        return _spans_of(self._allocated, self.grain, self.size)

    def _mark(self, offset: int, length: int) -> None:
        if self.tracking is not Tracking.HONEST:
            return
        for checkpoint in self.checkpoints.values():
            checkpoint.dirty[_cells(offset, length, checkpoint.grain)] = True

    def _grains(self) -> int:
        return -(-self.size // self.grain)


@dataclass(slots=True)
class FakeMachine:
    """One machine; `consistency` is the best it can offer, unless its guest can't be frozen because of `agent_trouble`."""

    id: str
    disks: dict[str, FakeDisk]
    name: str = ""
    config: MachineConfig = field(default_factory=MachineConfig)
    consistency: Consistency = Consistency.CRASH
    agent_trouble: str = ""

    def model(self) -> Machine:
        """What the product sees of it now."""
        disks = tuple(Disk(DiskId(i), d.size, d.sector, f"fake:{self.id}/{i}") for i, d in self.disks.items())
        return Machine(MachineId(self.id), self.name or self.id, "fake", disks)


class FakeHypervisor:
    """Machines in memory behind the adapter contract."""

    platform = "fake"

    def __init__(
        self,
        machines: Iterable[FakeMachine] = (),
        *,
        order: Order = Order.AT_START,
        store_id: str = "00c0ffee",
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.order = order
        self.can = Can(changed_extents=True, allocated_extents=True, freeze=True, several_disks_at_once=True, readers=2)
        self.open_snapshots: dict[tuple[str, LeaseId], FakeFrozen] = {}
        self.read_bytes = 0
        self._prefix = f"hvb-{store_id}-"
        self._clock = clock
        self._machines = {m.id: m for m in machines}
        self._unique = itertools.count(1)
        self._lock = threading.RLock()
        self._calls: dict[str, int] = {}
        self._plans: dict[tuple[str, int], Action] = {}

    # --- for the tests ---------------------------------------------------------------------------------------------

    def machine(self, machine_id: str) -> FakeMachine:
        """The machine behind the curtain, to write to."""
        return self._machines[machine_id]

    def at(self, call: str, nth: int, action: Action) -> None:
        """At the nth call from now of machines, snapshot, changes, open, read, verify or release: raise or run it."""
        with self._lock:
            self._plans[call, self._calls.get(call, 0) + nth] = action

    def calls(self, call: str) -> int:
        """How often this call was made."""
        return self._calls.get(call, 0)

    def leftovers(self) -> list[str]:
        """Everything of ours that still exists: checkpoints and open snapshots."""
        return [f"{m.id}/{i}/{name}" for m in self._machines.values() for i, d in m.disks.items()
                for name in d.checkpoints if name.startswith(self._prefix)] + [
            f"{machine}/{lease}" for machine, lease in self.open_snapshots
        ]  # fmt: skip

    def reached(self, call: str) -> None:
        """Count a call and do what was planned for it."""
        with self._lock:
            self._calls[call] = self._calls.get(call, 0) + 1
            action = self._plans.pop((call, self._calls[call]), None)
        if isinstance(action, BaseException):
            raise action
        if action is not None:
            action()

    # --- the contract ----------------------------------------------------------------------------------------------

    def machines(self) -> list[Machine]:
        self.reached("machines")
        return [m.model() for m in self._machines.values()]

    @contextmanager
    def snapshot(
        self,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        consistency: Consistency | None,
        *,
        fine: bool = False,
    ) -> Generator[FakeFrozen]:
        found = self._wanted(machine, consistency)
        self.reached("snapshot")
        with self._lock:
            frozen = self._freeze(found, lease, since, consistency, FINE if fine else None)
        try:
            yield frozen
        except (Killed, GeneratorExit):  # dead, or dropped without leaving
            raise
        except BaseException:
            self._thaw(found.id, lease)
            raise
        self._thaw(found.id, lease)

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        self.reached("release")
        names = {token.value for token in keep}
        with self._lock:
            for key in [k for k in self.open_snapshots if k[0] == machine.id and lease in (None, k[1])]:
                self._thaw(*key)
            disks = self._machines[machine.id].disks if machine.id in self._machines else {}
            for disk in disks.values():
                for name in [n for n in disk.checkpoints if n.startswith(self._prefix) and n not in names]:
                    del disk.checkpoints[name]

    def _wanted(self, machine: Machine, consistency: Consistency | None) -> FakeMachine:
        found = self._machines.get(machine.id)
        if found is None:
            raise NotFound(f"Machine {machine.name} does not exist on this hypervisor; look for its new name or place")
        levels = list(Consistency)
        if consistency is not None and levels.index(consistency) > levels.index(found.consistency):
            raise UsageError(f"Machine {machine.name} can only be captured {found.consistency}-consistent")
        if consistency not in (None, Consistency.CRASH) and found.agent_trouble:
            raise HostUnreachable(f"The guest agent of machine {machine.name} {found.agent_trouble}")
        if any(key[0] == machine.id for key in self.open_snapshots):
            raise Busy(f"Machine {machine.name} has an open snapshot; release its lease or wait for it")
        return found

    def _freeze(
        self,
        found: FakeMachine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        wanted: Consistency | None = None,
        grain: int | None = None,
    ) -> FakeFrozen:
        name = f"{self._prefix}safe-{next(self._unique)}"
        asked = since if self.order is Order.AT_START else None
        frozen = FakeFrozen(self, found, Instant(self._clock()), wanted)
        frozen.disks = [FakeFrozenDisk(frozen, DiskId(i), disk, name, asked, grain) for i, disk in found.disks.items()]
        self.open_snapshots[found.id, lease] = frozen
        return frozen

    def _thaw(self, machine_id: str, lease: LeaseId) -> None:
        frozen = self.open_snapshots.pop((machine_id, lease), None)
        if frozen is not None:
            frozen.over = True


class FakeFrozen:
    """A machine at one moment.  A test sets `broken` (the scratch ran full) or `doubts` (somebody wrote meanwhile)."""

    def __init__(
        self, hypervisor: FakeHypervisor, found: FakeMachine, t: Instant, wanted: Consistency | None = None
    ) -> None:
        self.hypervisor = hypervisor
        self.machine = found.model()
        self.t = t
        quiet = wanted is Consistency.CRASH or found.consistency is Consistency.CRASH or bool(found.agent_trouble)
        self.consistency = Consistency.CRASH if quiet else found.consistency
        self.standstill = Standstill(remark="The guest was left alone") if quiet else Standstill(1, 0.02, 0.03)
        self.config = found.config
        self.notes: list[str] = [found.agent_trouble] if found.agent_trouble and wanted is None else []
        self.disks: list[FakeFrozenDisk] = []
        self.broken = ""
        self.doubts: list[str] = []
        self.over = False

    def verify(self) -> list[str]:
        self.hypervisor.reached("verify")
        if self.broken or self.over:
            reason = self.broken or "it is over"
            raise ReadFailed(f"Snapshot of machine {self.machine.name} broke off: {reason}; run the capture again")
        return self.doubts


class FakeFrozenDisk:
    """One disk at the moment of the snapshot: a copy of everything that matters."""

    def __init__(
        self,
        frozen: FakeFrozen,
        disk_id: DiskId,
        live: FakeDisk,
        name: str,
        asked: Mapping[DiskId, Token] | None,
        grain: int | None = None,
    ) -> None:
        self.frozen = frozen
        self.disk = Disk(disk_id, live.size, live.sector, f"fake:{frozen.machine.id}/{disk_id}")
        self.token: Token | None = None
        self._content = bytes(live.content)
        self._allocated = live.allocated()
        self._bound = asked is not None
        self._asked = asked.get(disk_id) if asked is not None else None
        self._past = {
            n: (c.size, _spans_of(c.dirty, c.grain, live.size), c.inconsistent) for n, c in live.checkpoints.items()
        }
        if live.tracking is not Tracking.ABSENT:
            live.begin_checkpoint(name, grain)
            self.token = Token(TOKEN_KIND, name, f"size={live.size}")

    def changes(self, since: Token | None) -> Changes:
        self.frozen.hypervisor.reached("changes")
        reason = self._doubt(since)
        if since is None or reason:
            zero = extents.complement(self._allocated, self.disk.size)
            return Changes(Continuity.UNKNOWN, self._allocated, zero, reason or "No earlier checkpoint was given")
        old_size, dirty, _ = self._past[since.value]
        dirty = extents.union(dirty, extents.spans([(old_size, max(0, self.disk.size - old_size))]))
        data = extents.intersect(dirty, self._allocated)
        return Changes(Continuity.INCREMENTAL, data, extents.subtract(dirty, data))

    def open(self) -> FakeReader:
        self.frozen.hypervisor.reached("open")
        return FakeReader(self)

    def content(self) -> bytes:
        """For tests: what every reader must see."""
        return self._content

    def _doubt(self, since: Token | None) -> str:
        if since is None:
            return ""
        if self._bound and since != self._asked:
            return f"Checkpoint {since.value} was not asked for when the snapshot began"
        if since.kind != TOKEN_KIND or since.value not in self._past:
            return f"Checkpoint {since.value} does not exist any more"
        return f"Checkpoint {since.value} is inconsistent" if self._past[since.value][2] else ""


class FakeReader:
    """One connection to a frozen disk."""

    def __init__(self, disk: FakeFrozenDisk) -> None:
        self._disk = disk
        self._closed = False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        hypervisor = self._disk.frozen.hypervisor
        with hypervisor._lock:  # several read at the same time
            hypervisor.read_bytes += len(buffer)
        hypervisor.reached("read")
        name = f"disk {self._disk.disk.id} of machine {self._disk.frozen.machine.name}"
        if self._closed or self._disk.frozen.over:
            raise ReadFailed(f"The snapshot of {name} is over; begin a new one")
        if offset < 0 or offset + len(buffer) > self._disk.disk.size:
            raise ReadFailed(f"Bytes {offset} to {offset + len(buffer)} are outside {name}")
        buffer[:] = self._disk.content()[offset : offset + len(buffer)]

    def close(self) -> None:
        self._closed = True


def _cells(offset: int, length: int, grain: int) -> slice:
    return slice(offset // grain, -(-(offset + length) // grain) if length else offset // grain)


def _spans_of(cells: NDArray[np.bool_], grain: int, size: int) -> Spans:
    """The set of bytes whose cell is true."""
    starts = np.flatnonzero(cells).astype(np.int64) * grain
    return extents.clip(extents.spans(np.column_stack([starts, np.full_like(starts, grain)])), 0, size)


def _resized(cells: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    grown = np.zeros(count, np.bool_)
    grown[: min(count, len(cells))] = cells[:count]
    return grown
