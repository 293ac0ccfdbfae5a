"""The adapter contract: how a hypervisor shows us a machine at one moment.

    machines()                      what is there
    snapshot(machine, lease, ...)   every disk frozen at one moment; a context manager, released on leaving
    release(lease, ...)             the same after a crash: undo what a lease made, keep what is committed

Two orders exist among platforms.  QEMU, libvirt and Proxmox VE must be told "changes since what" when the snapshot
begins; vSphere, Xen and Hyper-V are asked afterwards.  So the tokens go to `snapshot(since=...)`, and `changes()` is
asked later: an adapter binds them at whichever time its platform wants.  Where the platform begins the session itself
(Proxmox's backup provider), it hands us the ready `Frozen` and there is no call to `snapshot`: capture takes a `Frozen`
and never cares who made it.

Rules every adapter obeys, checked by one conformance suite (`tests/hypervisors/conformance.py`):

1. Never guess.  If continuity can't be proved for a disk, it says UNKNOWN with a reason, and is read and compared.
2. Nothing that records changes is disabled or removed before its successor is named by a committed point: `release`
   is told which tokens are committed (`keep`), and removes only what our own store made.
3. A lease is written before anything is made, and everything made carries its name.  `release` is idempotent.
4. Every remote call has a timeout and raises HostUnreachable naming the host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvbackup.extents import Spans
from hvbackup.model import (
    Consistency,
    Continuity,
    Disk,
    DiskId,
    Instant,
    LeaseId,
    Machine,
    MachineConfig,
    MachineId,
    Token,
)


@dataclass(frozen=True, slots=True)
class Can:
    """What an adapter is able to do, as data."""

    changed_extents: bool = False  # knows what changed since a token
    allocated_extents: bool = False  # knows what is allocated
    freeze: bool = False  # can quiesce file systems in the guest
    several_disks_at_once: bool = False  # all disks of a machine at one moment
    pushed_session: bool = False  # the platform begins the session
    readers: int = 1  # how many readers of one disk make sense in parallel
    cycles: bool = False  # has `cycles`: many snapshots, one after the other, at little cost each
    events: bool = False  # has `watching`: says what happens to its machines
    stream: bool = False  # has `stream`: each write of the guest is sent to us as well


@dataclass(frozen=True, slots=True)
class Changes:
    """What became of one disk since a token.  Bytes in neither set are unchanged.

    With `Continuity.UNKNOWN` the two sets describe the whole disk: `data` is what is allocated, `zero` all the rest.
    """

    continuity: Continuity
    data: Spans  # must be read
    zero: Spans  # known to read as zeroes
    reason: str = ""  # why continuity is unknown, for the user


class Reader(Protocol):
    """One connection to a frozen disk.  Thread safety: used by one thread at a time."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.  Raises ReadFailed, HostUnreachable."""

    def close(self) -> None:
        """Give the connection back; idempotent."""


class FrozenDisk(Protocol):
    """One disk at the moment of the snapshot."""

    disk: Disk
    token: Token | None  # "changes since this moment"; durable only once a point that names it is committed

    def changes(self, since: Token | None) -> Changes:
        """What changed since `since` (None: everything).  Raises HostUnreachable."""

    def open(self) -> Reader:
        """A new connection.  Raises HostUnreachable."""


@dataclass(frozen=True, slots=True)
class Standstill:
    """How a guest stood still for the moment: not at all, unless its file systems were frozen."""

    filesystems: int = 0
    freezing_seconds: float = 0.0  # until the last of them stood: hooks in the guest and flushing included
    frozen_seconds: float = 0.0  # from then until they were let go
    remark: str = ""  # why the guest knew no more of the moment, where that is nothing to be alarmed about


LEFT_ALONE = Standstill()


class Frozen(Protocol):
    """A machine at one moment, all disks together."""

    machine: Machine
    t: Instant
    consistency: Consistency
    standstill: Standstill
    config: MachineConfig
    notes: Sequence[str]  # expected trouble, for the outcome

    @property
    def disks(self) -> Sequence[FrozenDisk]:
        """The disks that are captured, in the machine's order."""

    def verify(self) -> Sequence[str]:
        """Prove that the view held to its end: called once, after the last read and before the commit.

        Returns notes for the outcome when the bytes are complete but may be of more than one moment (somebody wrote to
        the image meanwhile).  Raises ReadFailed when what was read can't be trusted at all: the copy-before-write job
        broke off, the scratch ran full, the disk shrank; then there must be no point.
        """


class Seat(Protocol):
    """A machine's place among several that stand still at one moment.  Each call waits for the others, for a bounded time;
    False means that they go on without this machine."""

    def ready(self) -> bool:
        """This machine is about to stop."""

    def standing(self) -> bool:
        """It has stopped: nothing of it is in flight to any disk."""

    def switched(self, t: Instant) -> bool:
        """Its moment is taken; it may go on when this returns."""

    def leave(self, why: str) -> None:
        """It takes no part; the others need not wait.  Nothing happens after `switched`."""


class Cycles(Protocol):
    """Snapshots of one machine, one after the other, under one lease; what all of them need is made once.

    Thread safety: one thread.
    """

    def snapshot(
        self, since: Mapping[DiskId, Token], *, freeze: bool = False, seat: Seat | None = None
    ) -> AbstractContextManager[Frozen]:
        """Freeze all disks of the machine at one moment, as `Hypervisor.snapshot` does.

        `freeze`: with the guest's file systems standing still, where that works; the moment says whether it did.  `seat`: at
        the same moment as other machines, where the machine can be stopped for it.
        """

    def keep(self, tokens: Collection[Token]) -> None:
        """Every other checkpoint of our store may go: a durable barrier or point names these."""

    def close(self) -> None:
        """Nothing but the checkpoints that are kept is left on the host.  Raises HostUnreachable."""


class Stream(Protocol):
    """The writes of one machine, sent to a target of ours as they happen, under one lease.

    The target listens at `socket` before `arm`, with an export for each disk that is called as the disk.  The guest waits for
    every answer of it: so the platform watches the target, and frees the guest when it hangs or we die.
    Thread safety: one thread.
    """

    disks: Sequence[Disk]
    socket: Path

    @property
    def reason(self) -> str:
        """Why the stream was broken off from outside; empty while it was not."""

    def arm(self, target: int, ring: Path, arrived: Callable[[DiskId], int]) -> None:
        """Every write that begins from here on is answered by the target before it is to the guest.

        `target` is its process, `ring` says whether it lives, `arrived` how many bytes of a disk it was sent.
        Raises Busy, HostUnreachable.
        """

    def changed(self, since: Mapping[DiskId, Token]) -> AbstractContextManager[Sequence[FrozenDisk]]:
        """The disks as they are now and go on to be, with what changed until now; checkpoints record what follows.

        What is read of them may be newer than the stream: `settle` says when it is not any more.
        """

    def settle(self) -> Mapping[DiskId, Token]:
        """Every write that was on a disk before is at the target when this returns; new checkpoints record what follows."""

    def check(self, arrived: Callable[[DiskId], int]) -> None:
        """Nothing went past the target.  Raises StreamBroken, StreamBypassed, HostUnreachable."""

    def keep(self, tokens: Collection[Token]) -> None:
        """Every other checkpoint of our store may go: a durable barrier or point names these."""

    def close(self, *, healthy: bool) -> None:
        """The guest's writes are its own again; nothing but the checkpoints that are kept is left.  Raises HostUnreachable.

        `healthy`: the target still answers.
        """


class Hypervisor(Protocol):
    """One connection to a platform."""

    platform: str
    can: Can

    def machines(self) -> Sequence[Machine]:
        """Every machine this source can see.  Raises HostUnreachable."""

    def snapshot(
        self,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        consistency: Consistency | None,
        *,
        fine: bool = False,
    ) -> AbstractContextManager[Frozen]:
        """Freeze all disks of the machine at one moment.

        Leaving the context ends the frozen view; checkpoints stay until `release`.  CRASH leaves the guest alone, FILESYSTEM
        and APPLICATION are the least wanted, None is the best that works: where a guest can't be frozen the point says so in
        a note.  A frozen guest goes on before this returns.  `fine`: checkpoints are to tell writes of a few KiB apart, where the
        platform can; a plain backup, which reads whole blocks of a store anyway, needs no such.

        Raises HostUnreachable, Busy, NotFound, UsageError.
        """

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        """End what `lease` has open (None: every lease of our store) and remove our checkpoints that are not in `keep`.

        `keep` names every token that a committed point or barrier of this store still needs, whichever run made it.
        Callable from another process after a crash, and twice.  Raises HostUnreachable.
        """


class Watching(Hypervisor, Protocol):
    """A platform with `can.events`."""

    def watching(
        self, report: Callable[[str, MachineId, str], None], lost: Callable[[], None] = lambda: None
    ) -> AbstractContextManager[None]:
        """Be told what happens, to which machine, and its name, while the context lasts; `lost` once, when no more can come.

        An event is a reason to look, never a fact to rely on.  Raises HostUnreachable.
        """


class Cycling(Hypervisor, Protocol):
    """A platform with `can.cycles`."""

    def refuse_off(self, machine: Machine) -> None:
        """It runs here; nothing of it can be protected else.  Raises HostUnreachable, NotFound."""

    def cycles(self, machine: Machine, lease: LeaseId) -> Cycles:
        """Begin a series of snapshots.  Raises HostUnreachable, Busy, NotFound."""


class Streaming(Hypervisor, Protocol):
    """A platform with `can.stream`."""

    def stream(self, machine: Machine, lease: LeaseId) -> Stream:
        """Prepare a stream; nothing is sent before `arm`.  Raises HostUnreachable, Busy, NotFound."""
