"""Any NBD export as a machine with one disk.

The export has to stand still while it is read: that is up to whoever serves it (a snapshot, a read-only qemu-nbd).  What
changed can be told by a dirty bitmap that the server shows (`?bitmap=NAME`, after `qemu-nbd -B NAME`) or by a list of the
user's; both are claims about the time since the newest point, which the capture samples.

Thread safety: one thread makes a snapshot and leaves it; its disk may be read from any number of threads meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvbackup.errors import HostUnreachable, NotFound, ReadFailed, UsageError
from hvbackup.hypervisors import LEFT_ALONE, Can, Changes, Reader, Standstill, changedlist
from hvbackup.hypervisors.nbddisk import ALLOCATION, BITMAP, NbdDisk
from hvbackup.model import Consistency, Disk, DiskId, Instant, LeaseId, Machine, MachineConfig, MachineId, Token
from hvbackup.nbd.client import NbdClient, Settings
from hvbackup.nbd.uri import NbdUri

DISK_ID = DiskId("disk")


@dataclass(frozen=True, slots=True)
class NbdSpec:
    """One export as the user named it."""

    uri: NbdUri
    bitmap: str = ""  # a dirty bitmap that the server shows
    changed: Path | None = None  # a list of what changed since the newest point


class NbdSource:
    """One export of one server.  Construction touches nothing."""

    platform = "nbd"

    def __init__(
        self,
        spec: NbdSpec,
        *,
        name: str = "",
        settings: Settings | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._spec = spec
        self._name = name
        self._settings = settings
        self._clock = clock
        known = bool(spec.bitmap or spec.changed)
        self.can = Can(changed_extents=known, allocated_extents=True, several_disks_at_once=True, readers=2)

    def machines(self) -> Sequence[Machine]:
        with self._connect() as client:
            return [self._machine(client.size)]

    @contextmanager
    def snapshot(
        self,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        consistency: Consistency | None,
        *,
        fine: bool = False,
    ) -> Generator[NbdFrozen]:
        if consistency not in (None, Consistency.CRASH):
            raise UsageError(
                f"Machine {machine.name} is only an NBD export, which can't be made {consistency}-consistent; "
                "ask for crash consistency"
            )
        if machine.id != str(self._spec.uri):
            raise NotFound(f"Machine {machine.name} ({machine.id}) is not the one at {self._spec.uri}")
        with self._connect() as client:
            found = self._machine(client.size)
            token = changedlist.mark(lease, client.size)
            disk = NbdFrozenDisk(found.disks[0], token, NbdDisk(client, self._settings), self._spec, since.get(DISK_ID))
            config = MachineConfig(portable={"disks": [{"id": DISK_ID, "path": str(self._spec.uri), "format": "raw"}]})
            yield NbdFrozen(found, Instant(self._clock()), config, [], [disk])

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        """Nothing is ever made on the server."""

    def _connect(self) -> NbdClient:
        contexts = [ALLOCATION, *([BITMAP + self._spec.bitmap] if self._spec.bitmap else [])]
        return NbdClient.open(self._spec.uri, contexts=contexts, settings=self._settings)

    def _machine(self, size: int) -> Machine:
        uri = self._spec.uri
        name = self._name or uri.export or Path(uri.socket).stem or uri.host
        return Machine(MachineId(str(uri)), name, self.platform, (Disk(DISK_ID, size, path=str(uri)),))


@dataclass(slots=True)
class NbdFrozen:
    """An export, taken to stand still."""

    machine: Machine
    t: Instant
    config: MachineConfig
    notes: Sequence[str]
    disks: Sequence[NbdFrozenDisk]
    consistency: Consistency = Consistency.CRASH
    standstill: Standstill = LEFT_ALONE

    def verify(self) -> Sequence[str]:
        """The server is there to the end.  Raises ReadFailed when not; whether its disk stood still can't be seen."""
        for disk in self.disks:
            try:
                disk.served.client.read_into(0, memoryview(bytearray(min(disk.disk.size, 1))))
            except HostUnreachable as error:
                raise ReadFailed(f"{disk.disk.path} went away before the point was made: {error}") from error
        return []


@dataclass(slots=True)
class NbdFrozenDisk:
    """The disk of an export."""

    disk: Disk
    token: Token | None
    served: NbdDisk
    spec: NbdSpec
    since: Token | None  # what the snapshot was told

    def changes(self, since: Token | None) -> Changes:
        """What the list or the bitmap says; everything where there is neither."""
        size, bitmap = self.disk.size, self.spec.bitmap
        changed, reason = None, ""
        if self.spec.changed:
            changed = changedlist.read(self.spec.changed, size)
        elif bitmap and self.served.has_bitmap(bitmap):
            changed = self.served.dirty(bitmap)
        elif bitmap:
            reason = f"The server of {self.spec.uri} does not show the bitmap {bitmap} (qemu-nbd: add -B {bitmap})"
        return changedlist.changes(changed, since, self.served.allocated(), size, reason)

    def open(self) -> Reader:
        """A reader: a connection of its own where the server allows it."""
        return self.served.open()
