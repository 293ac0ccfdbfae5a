"""What happens to a machine under continuous protection, and the rhythm in which it should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvbackup.errors import HvbackupError
from hvbackup.model import SECOND, MiB, RecoveryPoint
from hvbackup.store.journal.history import Moment
from hvbackup.store.journal.window import Limits
from hvbackup.store.shelves.pauses import Pause


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often moments and points are made, and how long moments are kept."""

    every_ns: int = 5 * SECOND
    fold_every_ns: int = 3600 * SECOND
    limits: Limits = field(default_factory=Limits)
    freeze_every_ns: int = 0  # between two marks with the guest's file systems frozen; 0: none
    sample_blocks: int = 8  # of each disk and cycle: read again although the tracker says that nothing changed
    stream: bool = False  # every write is a moment; `every_ns` is then the time between two fsyncs
    ring_bytes: int = 128 * MiB  # of a stream: so much of a guest's writes waits for a slow disk, and no more
    rings: Path | None = None  # where rings of streams are


@dataclass(slots=True)
class Cycle:
    """What one cycle did."""

    moment: Moment
    read_bytes: int
    seconds: float
    lag_seconds: float  # from the moment to its durability: what would have been lost
    marks: Sequence[str] = ()
    common: Mapping[str, object] = field(default_factory=dict)  # of a moment that several machines have in common
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a stream has recorded since it was told last."""

    moment: Moment
    writes: int
    bytes: int
    seconds: float  # the longest time between taking writes and their being durable
    lag_seconds: float  # the oldest write that was not durable yet: what would have been lost by a power cut
    marks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Folded:
    """A point was made of a moment."""

    point: RecoveryPoint
    seconds: float
    removed_bytes: int  # of the journal, because its window has passed or its budget was used up


@dataclass(frozen=True, slots=True)
class Trouble:
    """A life ended or could not begin; it is tried again."""

    error: HvbackupError
    retry_seconds: float


@dataclass(frozen=True, slots=True)
class Begun:
    """A life has begun."""

    moment: Moment
    point: RecoveryPoint
    gap: Mapping[str, object] | None
    how: str  # "resumed" from the newest barrier, or "captured"
    seconds: float


@dataclass(frozen=True, slots=True)
class Paused:
    """The machine is left alone; nothing of ours is in its way."""

    pause: Pause


Event = Cycle | Streamed | Folded | Trouble | Begun | Paused


class ContinuityLost(HvbackupError):
    """The hypervisor can't say any more what changed since the last barrier; a new life compares the disks."""


class TooBusy(ContinuityLost):
    """The machine writes more while a point is made than its journal has room for, and another point leaves no less."""


class JournalStalled(HvbackupError):
    """The journal's disk does not answer in time: a machine is never kept waiting for it, so nothing is recorded."""


class TrackerLied(ContinuityLost):
    """What the hypervisor called unchanged had changed; moments since the last good sample may lack changes."""
