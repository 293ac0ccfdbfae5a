"""The vocabulary: what every other module talks about, as frozen values.

Offsets and lengths are bytes, moments are nanoseconds of UTC since 1970.  Nothing here does input or output.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NewType

MachineId = NewType("MachineId", str)  # the platform's stable identity: a UUID, or a canonical path
DiskId = NewType("DiskId", str)  # stable within its machine: "vda", a qdev id, a node name
PointId = NewType("PointId", str)  # 16 hexadecimal digits, unique in a store
LeaseId = NewType("LeaseId", str)  # names what one run makes on a hypervisor
ChunkId = NewType("ChunkId", bytes)  # 32 bytes: keyed BLAKE3 of the plain content
Instant = NewType("Instant", int)  # nanoseconds since 1970, UTC

KiB, MiB, GiB = 1024, 1024**2, 1024**3
SECOND = 1_000_000_000  # nanoseconds

ZERO_CHUNK = ChunkId(bytes(32))  # the reserved id of an all-zero block or page; stored nowhere


class Consistency(enum.StrEnum):
    """How much the guest knew of the moment; each level includes those before it."""

    CRASH = "crash"  # as if the power had failed
    FILESYSTEM = "filesystem"  # file systems were frozen
    APPLICATION = "application"  # applications were told as well


class Continuity(enum.StrEnum):
    """What a hypervisor can prove about the blocks that changed since a checkpoint."""

    INCREMENTAL = "incremental"  # the changed extents are complete
    UNKNOWN = "unknown"  # no proof: read everything and compare


class Status(enum.IntEnum):
    """How a run ended; the worst of its parts."""

    OK = 0
    DEGRADED = 1  # complete, but not as planned: something had to be read whole, or was left out on purpose
    FAILED = 2


@dataclass(frozen=True, slots=True)
class Disk:
    """One block device of a machine at one moment; `size` may be no multiple of `sector`."""

    id: DiskId
    size: int
    sector: int = 512
    path: str = ""  # where it lives on its host: for people, never an identity


@dataclass(frozen=True, slots=True)
class Token:
    """A hypervisor's checkpoint on one disk: opaque to everyone but the adapter that made it."""

    kind: str  # "qemu-bitmap", "changeId", ...
    value: str
    life: str = ""  # the life of the machine or disk it belongs to, where the platform has such a thing


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What is needed to define the machine again: the platform's own words, and the portable part of them."""

    kind: str = ""  # "qemu-argv", "libvirt-xml", ... or "" when there is none
    native: str = ""
    portable: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is protected; `id` survives renames, `name` is what people see."""

    id: MachineId
    name: str
    platform: str
    disks: tuple[Disk, ...] = ()
    tags: tuple[str, ...] = ()  # what its platform's administrators call it; of now, kept in no point


@dataclass(frozen=True, slots=True)
class DiskRoot:
    """One disk inside a recovery point: a complete block map, by reference."""

    disk: Disk
    root: ChunkId  # topmost page of the block map, or ZERO_CHUNK
    token: Token | None = None  # "changes since this point" for the next capture
    how: str = "full"  # full | incremental | compared: how much was read, never what is stored


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a copied point comes from: the original's file can be compared for as long as it is there."""

    store: str  # id of the store that has the original
    path: str  # its name in that store
    verify_key: str  # of that store
    digest: str  # what is signed of the original's file
    signature: str  # by that store's key


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """Every disk of one machine at one moment, complete by reference: it needs no other point."""

    id: PointId
    machine: Machine
    t: Instant
    consistency: Consistency
    disks: tuple[DiskRoot, ...]
    config: MachineConfig = MachineConfig()
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seq: int | None = None  # of the journal: the point holds every fact up to this one and none after it
    tags: tuple[str, ...] = ()  # what a user calls it
    origin: Origin | None = None  # of a copied point

    def disk(self, disk_id: str) -> DiskRoot | None:
        """The disk with this id, or None."""
        return next((d for d in self.disks if d.disk.id == disk_id), None)

    def age_seconds(self, now: Instant) -> float:
        """How long ago its moment was; 0 for one that is yet to come, by our clock."""
        return max(0.0, (now - self.t) / SECOND)


@dataclass(slots=True)
class Figures:
    """What a run cost.  Sums of several disks are plain additions."""

    read_bytes: int = 0  # asked of the hypervisor
    changed_bytes: int = 0  # blocks whose content differs from the parent point
    new_bytes: int = 0  # plain bytes of blocks the store did not have
    stored_bytes: int = 0  # added to the store, everything included
    reused_blocks: int = 0
    zero_blocks: int = 0
    freezing_seconds: float = 0.0  # the guest ran its hooks, flushed, and stopped one file system after the other
    frozen_seconds: float = 0.0  # from then on all of them stood still
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(slots=True)
class Outcome:
    """How a run ended: expected trouble lands in `notes` and makes it DEGRADED, never an exception."""

    status: Status = Status.OK
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # good to know, and no trouble
    figures: Figures = field(default_factory=Figures)
    point: RecoveryPoint | None = None
    distrusted: bool = False  # the tracker called blocks unchanged that had changed

    def degrade(self, note: str) -> None:
        """Record expected trouble."""
        self.notes.append(note)
        self.status = max(self.status, Status.DEGRADED)
