"""The write stream of a libvirt machine: a QEMU's own, through the QMP that libvirt hands on (`libvirt_cycles`).

Whatever a stream makes of QEMU, and who frees the guest when it hangs, is in `qemu_stream`.  There is no second monitor here: a
target that hangs is killed by the watchdog, and its connection with it; commands come through libvirt's one monitor.

    killed after         left behind                          cleaned by
    1 armed              mirrors, bitmaps, NBD server         the watchdog ends the mirrors; release the rest
    2 close              the checkpoints that are kept, which libvirt is told of
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from hvbackup.errors import UsageError
from hvbackup.hypervisors import libvirt_cycles
from hvbackup.hypervisors.libvirt_cycles import Monitor, Prepared
from hvbackup.hypervisors.libvirt_host import Domain
from hvbackup.hypervisors.libvirt_room import Room
from hvbackup.hypervisors.libvirt_seen import Seen
from hvbackup.hypervisors.qemu_config import CommandLine
from hvbackup.hypervisors.qemu_stream import QemuStream
from hvbackup.model import LeaseId, Machine, Token


class LibvirtStream(QemuStream):
    """See the module.  Thread safety: one thread."""

    def __init__(self, prepared: Prepared, machine: Machine, domain: Domain, seen: Seen) -> None:
        wanted = {disk.id for disk in machine.disks}
        drives = [d for d in prepared.drives if d.disk.id in wanted]
        aliases = {d.alias: d.target for d in seen.disks}
        super().__init__(prepared.setting, prepared.monitor.peer, drives, prepared.server, CommandLine(), aliases)
        self._monitor: Monitor = prepared.monitor
        self._kept: Collection[Token] = ()

        def tell() -> None:
            libvirt_cycles.tell(domain, seen, prepared.lineages, self._kept)

        self._tell: Callable[[], None] = tell

    def keep(self, tokens: Collection[Token]) -> None:
        """What `settle`, and `close`, do not remove."""
        self._kept = list(tokens)
        super().keep(tokens)

    def close(self, *, healthy: bool) -> None:
        """The guest's writes are its own again, and libvirt knows the checkpoints that are kept.

        Where that fails the monitor stays for the watchdog, and ends some time after us.
        """
        super().close(healthy=healthy)
        try:
            self._tell()
        finally:
            self._monitor.close()


def begin(
    room: Room,
    domain: Domain,
    seen: Seen,
    machine: Machine,
    lease: LeaseId,
    release: Callable[[Machine, LeaseId, Collection[Token]], None],
) -> LibvirtStream:
    """Prepare a stream.  Raises HostUnreachable, Busy, UsageError."""
    beside = {s.id for s in seen.sidecars} & {disk.id for disk in machine.disks}
    if beside:
        raise UsageError(
            f"No stream sends the writes of {', '.join(sorted(beside))} of machine {machine.name}: "
            "QEMU keeps it beside its disks. Name the others with --disk, or protect the machine without --stream"
        )
    prepared = libvirt_cycles.prepare(room, domain, seen, lease, release)
    return LibvirtStream(prepared, machine, domain, seen)
