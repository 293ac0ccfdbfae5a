"""Cycles of a libvirt machine at little cost each: QEMU's own, through the QMP that libvirt hands on.

A backup job of libvirt's takes half a second to begin and to end, most of it for scratch images and metadata; QEMU itself takes a
few milliseconds.  So a machine under protection is asked directly (`qemu_cycles`), by a monitor of our own (`libvirt_monitor`).
Disks and tokens have the same names either way, so that points and moments follow one another.

    killed after                   left behind                                  cleaned by
    1 folder, monitor              a folder; the monitor ends by itself         release
    2 a cycle has begun            node, job, export, bitmaps, NBD server       the watchdog ends the job; release the rest
    3 close                        the checkpoints that are kept, which libvirt is told of

The marker in the folder tells `release` that it has to look into QEMU as well.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hvbackup.errors import HostUnreachable, HvbackupError, UsageError
from hvbackup.hypervisors import (
    FrozenDisk,
    Seat,
    libvirt_freeze,
    libvirt_lineage,
    libvirt_xml,
    qemu_fleece,
    qemu_server,
    qemu_stop,
    qemu_stream,
)
from hvbackup.hypervisors.libvirt_host import Domain
from hvbackup.hypervisors.libvirt_lineage import Lineage
from hvbackup.hypervisors.libvirt_pull import LibvirtFrozen
from hvbackup.hypervisors.libvirt_room import Room
from hvbackup.hypervisors.libvirt_seen import Seen
from hvbackup.hypervisors.qemu import attached_devices, bitmap_doubt
from hvbackup.hypervisors.qemu_config import CommandLine
from hvbackup.hypervisors.qemu_cycles import QemuCycles, Setting
from hvbackup.hypervisors.qemu_graph import BlockGraph, Drive
from hvbackup.hypervisors.qemu_names import TOKEN_KIND
from hvbackup.hypervisors.qemu_seats import seats_of
from hvbackup.hypervisors.qmp import CommandRefused, Peer, Qmp
from hvbackup.model import Disk, DiskId, LeaseId, Machine, Token

_START_SECONDS = 20.0
_REPLY_SECONDS = 30.0


class Monitor:
    """A process that hands a machine's QMP through; it outlives us as long as a watchdog needs it."""

    def __init__(self, domain: Domain, name: str) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"{name}-qmp"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        self.path = self._folder / "qmp.sock"
        command = [sys.executable, "-m", "hvbackup.hypervisors.libvirt_monitor", domain.host.uri, domain.uuid]
        self._process = subprocess.Popen(
            [*command, str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it outlives us, and whoever reads what we say must not wait for it
            start_new_session=True,
            cwd="/",
        )
        self.peer = qemu_of(domain)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise HostUnreachable(f"The monitor of machine {domain.uuid} did not start")

    def connect(self) -> Qmp:
        """A connection; whose peer is QEMU, not the process in between."""
        qmp = Qmp(self.path, timeout_seconds=_REPLY_SECONDS)
        qmp.peer = self.peer
        return qmp

    def close(self) -> None:
        """The process and its socket are gone; idempotent."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(b"q")
                self._process.stdin.close()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.stdout:
                self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def qemu_of(domain: Domain) -> Peer:
    """The process of a machine on this host.  Raises HostUnreachable."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            if b"-uuid" in words and domain.uuid.encode() in words and b"qemu" in words[0]:
                status = os.stat(entry.path)
                return Peer(int(entry.name), status.st_uid, status.st_gid)
    raise HostUnreachable(f"The QEMU of machine {domain.uuid} is not among the processes of this host")


@dataclass(slots=True)
class LibvirtCycles:
    """See the module.  Thread safety: one thread."""

    inner: QemuCycles
    monitor: Monitor
    seen: Seen
    tell: Callable[[], None]  # libvirt of the checkpoints that are kept
    keeping: Collection[Token] = ()

    def snapshot(
        self, since: Mapping[DiskId, Token], *, freeze: bool = False, seat: Seat | None = None
    ) -> AbstractContextManager[LibvirtFrozen]:
        """Freeze all disks at one moment."""
        return self._frozen(since, freeze, seat)

    @contextmanager
    def _frozen(self, since: Mapping[DiskId, Token], freeze: bool, seat: Seat | None) -> Iterator[LibvirtFrozen]:
        with self.inner.snapshot(since, freeze=freeze, seat=seat) as frozen:
            beside, notes = self.seen.read_sidecars()
            disks: list[FrozenDisk] = [*frozen.disks, *beside]
            yield LibvirtFrozen(
                frozen.machine,
                frozen.t,
                frozen.config,
                [*frozen.notes, *notes],
                disks,
                frozen.consistency,
                frozen.standstill,
                frozen.verify,
                lambda: None,
            )

    def keep(self, tokens: Collection[Token]) -> None:
        """Every other checkpoint of our store may go."""
        self.keeping = list(tokens)
        self.inner.keep(tokens)

    def close(self) -> None:
        """Nothing but the checkpoints that are kept is left on the host, and libvirt knows them.

        Where that fails the monitor stays for the watchdog, and ends some time after us.
        """
        self.inner.close()
        try:
            self.tell()
        finally:
            self.monitor.close()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is made once for all that a lease does."""

    setting: Setting
    monitor: Monitor
    drives: Sequence[Drive]
    server: qemu_server.Server
    lineages: Mapping[str, Lineage]


def begin(
    room: Room,
    domain: Domain,
    seen: Seen,
    lease: LeaseId,
    release: Callable[[Machine, LeaseId, Collection[Token]], None],
) -> LibvirtCycles:
    """A series of snapshots.  Raises HostUnreachable, Busy."""
    p = prepare(room, domain, seen, lease, release)
    made = LibvirtCycles(QemuCycles(p.setting, p.monitor.peer, p.drives, p.server), p.monitor, seen, lambda: None)
    made.tell = lambda: tell(domain, seen, p.lineages, made.keeping)
    return made


def prepare(
    room: Room,
    domain: Domain,
    seen: Seen,
    lease: LeaseId,
    release: Callable[[Machine, LeaseId, Collection[Token]], None],
) -> Prepared:
    """A monitor of our own, and a server of QEMU's in the folder of the lease.  Raises HostUnreachable, Busy, UsageError."""
    names = room.names.of(lease)
    folder, lineages = room.folder(seen.machine, names), seen.lineages()
    if raw := [d.target for d in seen.disks if not lineages[d.target].tracked]:
        raise UsageError(
            f"Disks of machine {seen.machine.name} can't record what changes: {', '.join(raw)}; only qcow2 (version 3) can. "
            "Convert them, or protect the others with --disk"
        )
    room.make(folder)
    room.mark(folder)
    monitor = Monitor(domain, names.folder(seen.machine.id))
    try:
        with monitor.connect() as qmp:
            blocks = qmp.command("query-block")
            drives = drives_of(qmp, seen)
            seats = seats_of(blocks, {d.node for d in drives})
            qemu_fleece.refuse_leftovers(qmp, room.names)
            server = qemu_server.start(qmp, folder, CommandLine(), room.names)
    except BaseException:
        monitor.close()
        raise

    def doubt(drive: Drive, token: Token | None) -> str:
        return libvirt_lineage.doubt(token, drive.disk.id, lineages[drive.disk.id]) or bitmap_doubt(drive, token)

    def sweep() -> None:
        with monitor.connect() as qmp:
            qemu_fleece.sweep(qmp, names.prefix, room.limits.settle_seconds)
            qemu_fleece.remove_bitmaps(qmp, drives_of(qmp, seen), lambda name: name == names.merged)

    setting = Setting(
        monitor.path, seen.machine, seen.config(), names, folder, _REPLY_SECONDS, room.limits.settle_seconds,
        room.limits.scratch_reserve_bytes, room.clock, "query-block", seats, doubt, sweep,
        lambda keep: release(seen.machine, lease, keep),
        lambda: libvirt_freeze.plan(domain, seen, None, room.freezing),
        lambda disk: lineages[disk.id].life(disk.size),
    )  # fmt: skip
    return Prepared(setting, monitor, drives, server, lineages)


def record(room: Room, domain: Domain, seen: Seen, folder: Path, checkpoint: str, targets: Collection[str]) -> bool:
    """Whether a fine checkpoint of these disks records from here on; libvirt knows nothing of it until it is told."""
    room.mark(folder)
    monitor = Monitor(domain, f"{folder.name}-fine")
    try:
        with monitor.connect() as qmp:
            drives = [drive for drive in drives_of(qmp, seen) if drive.disk.id in targets]
            qmp.command("transaction", actions=qemu_fleece.recording(drives, checkpoint))
    except CommandRefused:
        return False  # libvirt's own is better than none
    finally:
        monitor.close()
    return True


def drives_of(qmp: Qmp, seen: Seen) -> Sequence[Drive]:
    """The captured disks, each in its node, under the names libvirt gives them.

    Raises HostUnreachable when one has just been unplugged: no NotFound, which is for a machine that is gone with all of them.
    """
    graph = BlockGraph.parse(
        qmp.command("query-named-block-nodes", flat=True), qmp.command("x-debug-query-block-graph")
    )
    targets = {d.alias: d.target for d in seen.disks}
    found = []
    for device in attached_devices(qmp, {}):
        if device.id in targets:
            drive = graph.drive(device)
            disk = Disk(DiskId(targets[device.id]), drive.disk.size, drive.disk.sector, drive.disk.path)
            found.append(replace(drive, disk=disk))
    missing = {d.target for d in seen.disks} - {d.disk.id for d in found}
    if missing:
        raise HostUnreachable(f"Disks of machine {seen.machine.name} are not in its QEMU: {', '.join(sorted(missing))}")
    order = [d.target for d in seen.disks]
    return sorted(found, key=lambda drive: order.index(drive.disk.id))


def tell(domain: Domain, seen: Seen, lineages: Mapping[str, Lineage], keeping: Collection[Token]) -> None:
    """libvirt knows the checkpoints that are kept, and so can delete them one day; what it does not take is only a bitmap."""
    known = domain.checkpoints()
    tracked = [d.target for d in seen.disks if lineages[d.target].tracked]
    for name in {t.value for t in keeping if t.kind == TOKEN_KIND} - set(known):
        with contextlib.suppress(HvbackupError):
            domain.redefine(libvirt_xml.checkpoint(name, tracked, made=1))


def release(
    room: Room, domain: Domain, seen: Seen, folders: Sequence[Path], prefix: str, keeping: Collection[str]
) -> None:
    """What cycles left inside QEMU is gone, but for the bitmaps to keep.  Raises HostUnreachable."""
    names = room.names

    def folder_of(of_lease: str) -> Path:
        return room.folder(seen.machine, names.found(of_lease))

    monitor = Monitor(domain, f"{names.prefix}{domain.uuid[:8]}-{os.getpid()}")
    try:
        qemu_stream.end_left(monitor.connect, monitor.path, folder_of, prefix, room.limits.settle_seconds)
        with monitor.connect() as qmp:
            try:
                qemu_fleece.sweep(qmp, prefix, room.limits.settle_seconds)
            finally:
                for folder in filter(qemu_stop.left_over, folders):
                    qemu_stop.go_on(qmp, folder)
            qemu_fleece.remove_bitmaps(
                qmp,
                drives_of(qmp, seen),
                lambda name: names.is_merged(name) or (names.is_checkpoint(name) and name not in keeping),
            )
            qemu_fleece.remove_folders(qmp, folders)
    finally:
        monitor.close()
