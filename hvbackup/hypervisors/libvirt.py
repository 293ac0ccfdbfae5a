"""libvirt: every domain of a host, running or off, persistent or transient.

    hypervisor = LibvirtHypervisor(LibvirtUri.parse("qemu:///system"), "1a2b3c4d", scratch_dir=..., runtime=...)
    for machine in hypervisor.machines():
        with hypervisor.snapshot(machine, lease, since, None) as frozen:
            ...

A domain that runs (or is paused) is read through a backup job of libvirt's in pull mode, with a checkpoint (`libvirt_pull`); one
that is off is read from its images (`libvirt_rest`).  Both name the same bitmaps, so that a machine may be off one night and run
the next: what libvirt does not know of a checkpoint, the token in our point does.

    killed after                       left behind                              cleaned by
    1 folder made                      a folder with the lease's name           release
    2 backup begun                     job, scratch, checkpoint                 the watchdog ends both; release
    3 snapshot left                    old and new checkpoint, both recording   release, told what is committed

Thread safety: calls on one machine must not overlap; the frozen disks may be read from any number of threads.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hvbackup.errors import HostUnreachable, HvbackupError, NotFound
from hvbackup.hypervisors import (
    Can,
    libvirt_away,
    libvirt_cycles,
    libvirt_rest,
    libvirt_sidecar,
    libvirt_stream,
    libvirt_xml,
    qemunbd,
)
from hvbackup.hypervisors.libvirt_cycles import LibvirtCycles
from hvbackup.hypervisors.libvirt_events import watching
from hvbackup.hypervisors.libvirt_host import Domain, Host
from hvbackup.hypervisors.libvirt_pull import LibvirtFrozen, Pull, Room
from hvbackup.hypervisors.libvirt_seen import Seen, look
from hvbackup.hypervisors.libvirt_stream import LibvirtStream
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.hypervisors.qemu_freeze import Freezing
from hvbackup.hypervisors.qemu_names import TOKEN_KIND, StoreNames
from hvbackup.model import Consistency, DiskId, LeaseId, Machine, MachineId, MiB, Token

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SCRATCH = Path(
    "/var/lib/libvirt/hvbackup"
)  # where a QEMU that is not root may go, which it may not below our own folders


LOOK_WAIT_SECONDS = 60.0  # for a snapshot of ours that is just beginning, or another look; see Room.locked


@dataclass(frozen=True, slots=True)
class Settings:
    """How long to wait, and how much room to leave."""

    reply_seconds: float = 20.0
    settle_seconds: float = 30.0  # until a job has ended
    scratch_reserve_bytes: int = 256 * MiB  # below this the guest is set free and the snapshot given up
    state: Path = libvirt_sidecar.STATE  # the daemon's own


class LibvirtHypervisor:
    """The machines of one libvirt daemon."""

    platform = "libvirt"

    def __init__(
        self,
        where: LibvirtUri,
        store_id: str,
        *,
        scratch_dir: Path,
        runtime: Path | None = None,
        settings: Settings | None = None,
        freezing: Freezing | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.where = where
        self._names = StoreNames(store_id)
        self._scratch_dir = scratch_dir.absolute()
        self._runtime = (runtime or qemunbd.default_runtime()).absolute()
        self._settings = settings or Settings()
        self._freezing = freezing or Freezing()
        self._clock = clock
        self.host = Host(where.uri, self._settings.reply_seconds)
        self.can = Can(
            changed_extents=True,
            allocated_extents=True,
            freeze=True,
            several_disks_at_once=True,
            readers=2,
            events=True,
            cycles=where.local,  # QEMU's own, which takes sockets and files of this host
            stream=where.local,
        )

    def machines(self) -> Sequence[Machine]:
        found = [(domain, name) for domain in self.host.domains() if (name := _name(domain))]
        if self.where.domains:
            found = [_named(wanted, found, self.where.uri) for wanted in self.where.domains]
        room = self._room()
        seen = [self._machine(room, domain) for domain, _ in sorted(found, key=lambda each: each[1])]
        return [machine for machine in seen if machine is not None]

    def snapshot(
        self,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        consistency: Consistency | None,
        *,
        fine: bool = False,
    ) -> AbstractContextManager[LibvirtFrozen]:
        return _Snapshot(self, machine, lease, since, consistency, fine)

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        room = self._room()
        folders = room.folders(machine.id, lease)
        keeping = {token.value for token in keep if token.kind == TOKEN_KIND}
        try:
            domain = self.domain(machine)
            if domain.active():
                pull = Pull(room, domain, machine)
                pull.end_job(room.prefix(lease))
                self._release_cycles(room, domain, [f for f in folders if room.is_marked(f)], lease, keeping)
                pull.release(folders, keeping)
            else:
                for folder in folders:
                    qemunbd.release(room.base, folder.name)
                libvirt_rest.release(domain, self._names, keeping, look_here=self.where.local)
        except NotFound:
            pass  # with the domain all that was made of it is gone, but for files of ours
        for folder in folders:
            libvirt_away.remove(self.host, folder)
            room.remove(folder)

    def refuse_off(self, machine: Machine) -> None:
        """It runs here; nothing of it can be protected else.  Raises HostUnreachable, NotFound."""
        if not self.domain(machine).active():
            raise _off(machine)

    def cycles(self, machine: Machine, lease: LeaseId) -> LibvirtCycles:
        """A series of snapshots, at little cost each.  Raises HostUnreachable, Busy, NotFound, UsageError."""
        room, domain, seen = self._running(machine)
        return libvirt_cycles.begin(room, domain, seen, lease, self.release)

    def stream(self, machine: Machine, lease: LeaseId) -> LibvirtStream:
        """Each write of the guest goes to us as well, from `arm` on.  Raises HostUnreachable, Busy, NotFound, UsageError."""
        room, domain, seen = self._running(machine)
        return libvirt_stream.begin(room, domain, seen, machine, lease, self.release)

    def _running(self, machine: Machine) -> tuple[Room, Domain, Seen]:
        domain, room = self.domain(machine), self._room()
        seen = self.look(domain)
        if not seen.active:
            raise _off(machine)
        room.refuse_second(machine)
        return room, domain, seen

    def watching(
        self, report: Callable[[str, MachineId, str], None], lost: Callable[[], None] = lambda: None
    ) -> AbstractContextManager[None]:
        """Be told what happens to machines of the host while the context lasts.  Raises HostUnreachable."""
        return watching(self.host, lambda event: report(event.kind, event.machine, event.name), lost)

    def _release_cycles(
        self, room: Room, domain: Domain, folders: Sequence[Path], lease: LeaseId | None, keeping: Collection[str]
    ) -> None:
        if folders:
            libvirt_cycles.release(room, domain, self.look(domain), folders, room.prefix(lease), keeping)

    # --- what others of this package need ------------------------------------------------------------------------------

    def domain(self, machine: Machine) -> Domain:
        """The domain behind a machine.  Raises NotFound."""
        if not _UUID.fullmatch(machine.id):
            raise NotFound(f"Machine {machine.name} ({machine.id}) is not a domain of libvirt at {self.where.uri}")
        domain = Domain(self.host, machine.id)
        try:
            domain.name()
        except NotFound as error:
            raise NotFound(
                f"Machine {machine.name} ({machine.id}) is not on the host of {self.where.uri} any more"
            ) from error
        return domain

    def begin(
        self, machine: Machine, lease: LeaseId, since: Mapping[DiskId, Token], wanted: Consistency | None, fine: bool
    ) -> LibvirtFrozen:
        """The moment, for `_Snapshot`."""
        domain, room = self.domain(machine), self._room()
        seen = self.look(domain)
        room.refuse_second(machine)
        if seen.active:
            record = libvirt_cycles.record if fine and self.where.local else None
            return Pull(room, domain, machine, record).begin(seen, lease, since, wanted)
        return libvirt_rest.begin(room, seen, lease, since, wanted)

    def look(self, domain: Domain) -> Seen:
        """A domain as it is now."""
        return look(domain, self.where, self._settings.state)

    def _room(self) -> Room:
        uid, gid = libvirt_xml.owner(self.host.capabilities())
        return Room(
            self.where,
            self._names,
            self._base(uid),
            self._runtime,
            self._settings,
            self._freezing,
            self._clock,
            uid,
            gid,
        )

    def _base(self, uid: int) -> Path:
        """Where folders of leases go on this host."""
        if self.where.local and self.where.scratch:
            return Path(self.where.scratch)
        foreign = self.where.local and os.geteuid() == 0 and uid != 0
        return _SCRATCH if foreign else self._scratch_dir

    def _machine(self, room: Room, domain: Domain) -> Machine | None:
        """None for a domain that is gone again."""
        try:
            with room.locked(MachineId(domain.uuid), LOOK_WAIT_SECONDS):
                return self.look(domain).machine
        except NotFound:
            return None


class _Snapshot(AbstractContextManager[LibvirtFrozen]):
    """From the moment on until the view is not needed any more.  One that is dropped without leaving cleans up nothing."""

    def __init__(
        self,
        hypervisor: LibvirtHypervisor,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        wanted: Consistency | None,
        fine: bool,
    ) -> None:
        self._begin: Callable[[], LibvirtFrozen] = lambda: hypervisor.begin(machine, lease, since, wanted, fine)
        self._frozen: LibvirtFrozen | None = None

    def __enter__(self) -> LibvirtFrozen:
        self._frozen = self._begin()
        return self._frozen

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        frozen, self._frozen = self._frozen, None
        if frozen is not None:
            frozen.end()


def _name(domain: Domain) -> str:
    try:
        return domain.name()
    except HvbackupError:
        return ""  # gone since the list was made


def _off(machine: Machine) -> HostUnreachable:
    return HostUnreachable(f"Machine {machine.name} is off: nothing of it can be protected until it runs")


def _named(wanted: str, found: Sequence[tuple[Domain, str]], uri: str) -> tuple[Domain, str]:
    for domain, name in found:
        if wanted in (name, domain.uuid):
            return domain, name
    names = [name for _, name in found]
    near = difflib.get_close_matches(wanted, names, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ";"
    raise NotFound(f"No domain {wanted} at {uri}{hint} There are: {', '.join(sorted(names)) or 'none'}")


def machine_id(uuid: str) -> MachineId:
    """A domain's UUID, which survives renames and moves to other hosts."""
    return MachineId(uuid)
