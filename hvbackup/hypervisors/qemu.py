"""Any running QEMU, or qemu-storage-daemon, by the path of its QMP socket.

    hypervisor = QemuHypervisor("/run/vm/qmp.sock", "1a2b3c4d", scratch_dir=Path("/var/lib/hvbackup/scratch"))
    [machine] = hypervisor.machines()
    with hypervisor.snapshot(machine, lease, since, None) as frozen:
        ...

QEMU serves a monitor to one client at a time, so no connection is kept: each call opens one and lets it go.  Only the
names of what was made carry over, which is why `release` works from any process.

Thread safety: calls on one machine must not overlap; the frozen disks may be read from any number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hvbackup.errors import HostUnreachable, NotFound, ReadFailed
from hvbackup.hypervisors import (
    Can,
    Standstill,
    qemu_config,
    qemu_fleece,
    qemu_fleeced,
    qemu_freeze,
    qemu_server,
    qemu_stop,
)
from hvbackup.hypervisors.qemu_config import CommandLine, Facts
from hvbackup.hypervisors.qemu_cycles import QemuCycles, Setting
from hvbackup.hypervisors.qemu_fleeced import FleecedDisk, has_size, is_elsewhere
from hvbackup.hypervisors.qemu_freeze import Freezing
from hvbackup.hypervisors.qemu_graph import (
    Bitmap,
    BlockGraph,
    Device,
    Drive,
    daemon_devices,
    device_id,
    qom_path,
    why_skipped,
)
from hvbackup.hypervisors.qemu_names import TOKEN_KIND, LeaseNames, StoreNames
from hvbackup.hypervisors.qemu_seats import seats_of
from hvbackup.hypervisors.qemu_stream import QemuStream, end_left
from hvbackup.hypervisors.qemu_watch import Watch
from hvbackup.hypervisors.qmp import CommandRefused, Peer, Qmp
from hvbackup.model import (
    Consistency,
    DiskId,
    Instant,
    LeaseId,
    Machine,
    MachineConfig,
    MachineId,
    MiB,
    Token,
)

_NO_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Settings:
    """How long to wait, and how much room to leave."""

    reply_seconds: float = 20.0  # one QMP command
    settle_seconds: float = 30.0  # until QEMU let go of an export, a job, a node
    scratch_reserve_bytes: int = 256 * MiB  # below this the guest is set free and the snapshot given up


class QemuHypervisor:
    """The machine behind one QMP socket."""

    platform = "qemu"
    can = Can(
        changed_extents=True,
        allocated_extents=True,
        freeze=True,
        several_disks_at_once=True,
        readers=2,
        cycles=True,
        stream=True,
    )

    def __init__(
        self,
        socket_path: str | Path,
        store_id: str,
        *,
        scratch_dir: Path,
        machine_file: Path | None = None,
        settings: Settings | None = None,
        freezing: Freezing | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.path = Path(socket_path)
        self._names = StoreNames(store_id)
        self._scratch_dir = scratch_dir.absolute()
        self._machine_file = machine_file
        self._settings = settings or Settings()
        self._freezing = freezing or Freezing()
        self._clock = clock

    def machines(self) -> Sequence[Machine]:
        with self._connect() as qmp:
            return [self._look(qmp).machine]

    def snapshot(
        self,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        consistency: Consistency | None,
        *,
        fine: bool = False,
    ) -> AbstractContextManager[QemuFrozen]:
        return _Snapshot(
            lambda: self._begin(machine, lease, since, consistency, fine),
            lambda f: self._end(f.names, f.folder, f.watch),
        )

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        folders = self._folders(machine, lease)
        prefix = self._names.prefix if lease is None else self._names.of(lease).prefix
        keeping = {token.value for token in keep if token.kind == TOKEN_KIND}
        try:
            self._end_mirrors(machine, prefix)
            with self._connect() as qmp:
                try:
                    qemu_fleece.sweep(qmp, prefix, self._settings.settle_seconds)
                finally:
                    self._thaw(qmp, folders)
                self._remove_bitmaps(qmp, keeping)
                qemu_fleece.remove_folders(qmp, folders)
        except HostUnreachable:
            self._remove_dead(folders)
            raise

    def refuse_off(self, machine: Machine) -> None:
        """It runs here: `machines` has none that is in another QEMU, and without one that runs there is nobody to ask."""

    def cycles(self, machine: Machine, lease: LeaseId) -> QemuCycles:
        """A series of snapshots, at little cost each.  Raises HostUnreachable, Busy, NotFound."""
        setting, peer, seen, server = self._prepared(machine, lease)
        return QemuCycles(setting, peer, seen.drives, server)

    def stream(self, machine: Machine, lease: LeaseId) -> QemuStream:
        """Each write of the guest goes to us as well, from `arm` on.  Raises HostUnreachable, Busy, NotFound."""
        setting, peer, seen, server = self._prepared(machine, lease)
        wanted = {disk.id for disk in machine.disks}
        return QemuStream(setting, peer, [d for d in seen.drives if d.disk.id in wanted], server, seen.line)

    def _prepared(self, machine: Machine, lease: LeaseId) -> tuple[Setting, Peer, _Seen, qemu_server.Server]:
        """What is made once for all that a lease does: its folder, and a server of QEMU's in it."""
        names, s = self._names.of(lease), self._settings
        folder = self._scratch_dir / names.folder(machine.id)
        with self._connect() as qmp:
            ask = "query-block-exports" if _optional(qmp, "query-uuid") is None else "query-block"
            blocks = qmp.command(ask)
            seen = self._look(qmp)
            seats = seats_of(blocks, {d.node for d in seen.drives})
            if seen.machine.id != machine.id:
                raise NotFound(
                    f"QEMU at {self.path} is not machine {machine.name} ({machine.id}) but {seen.machine.id}"
                )
            qemu_fleece.refuse_leftovers(qmp, self._names)
            qemu_server.make_folder(folder, qmp.peer)
            server = qemu_server.start(qmp, folder, seen.line, self._names)

        def sweep() -> None:
            with self._connect() as qmp:
                qemu_fleece.sweep(qmp, names.prefix, s.settle_seconds)
                qemu_fleece.remove_bitmaps(qmp, self._look(qmp).drives, lambda name: name == names.merged)

        def plan() -> qemu_freeze.Plan:
            with self._connect() as qmp:
                return qemu_freeze.plan(qmp, seen.line.cwd, machine.name, None, self._freezing)

        setting = Setting(
            self.path, seen.machine, seen.config, names, folder, s.reply_seconds, s.settle_seconds,
            s.scratch_reserve_bytes, self._clock, ask, seats, bitmap_doubt, sweep,
            lambda keep: self.release(machine, lease, keep), plan,
        )  # fmt: skip
        return setting, qmp.peer, seen, server

    # --- a snapshot begins and ends ---------------------------------------------------------------------------------

    def _begin(
        self, machine: Machine, lease: LeaseId, since: Mapping[DiskId, Token], wanted: Consistency | None, fine: bool
    ) -> QemuFrozen:
        names = self._names.of(lease)
        folder = self._scratch_dir / names.folder(machine.id)
        with self._connect() as qmp:
            seen = self._look(qmp)
            if seen.machine.id != machine.id:
                raise NotFound(
                    f"QEMU at {self.path} is not machine {machine.name} ({machine.id}) but {seen.machine.id}"
                )
            qemu_fleece.refuse_leftovers(qmp, self._names)
            plan = qemu_freeze.plan(qmp, seen.line.cwd, machine.name, wanted, self._freezing)
            qemu_server.make_folder(folder, qmp.peer)
        watch = Watch(self.path, names.prefix, folder, self._settings.scratch_reserve_bytes)
        try:
            with self._connect() as qmp:
                return self._freeze(qmp, names, folder, seen, since, watch, plan, fine)
        except BaseException:
            self._end(names, folder, watch)
            raise

    def _freeze(
        self,
        qmp: Qmp,
        names: LeaseNames,
        folder: Path,
        seen: _Seen,
        since: Mapping[DiskId, Token],
        watch: Watch,
        plan: qemu_freeze.Plan,
        fine: bool,
    ) -> QemuFrozen:
        qemu_fleece.refuse_full(folder, self._settings.scratch_reserve_bytes)
        for index, drive in enumerate(seen.drives):
            qemu_fleece.add_scratch(qmp, names, folder, index, drive)
        doubts = {d.disk.id: bitmap_doubt(d, since.get(d.disk.id)) for d in seen.drives}
        old = {d.disk.id: d.bitmaps[since[d.disk.id].value] for d in seen.drives if not doubts[d.disk.id]}
        server = qemu_server.start(qmp, folder, seen.line, self._names)
        checkpoint = self._names.new_checkpoint()
        # All writes in flight are waited for, on every disk.
        seconds, grain = self._settings.settle_seconds, qemu_fleece.FINE_BYTES if fine else qemu_fleece.GRAIN_BYTES
        moment = qemu_freeze.moment(
            plan, folder, lambda: qemu_fleece.freeze(qmp, names, seen.drives, old, checkpoint, seconds, grain)
        )
        notes = [*seen.notes, *moment.notes]
        # Labelled when it is certain to be over: nothing the guest wrote after `t` is in it.
        t = Instant(self._clock())
        disks = []
        for index, drive in enumerate(seen.drives):
            name = drive.disk.id
            merged = names.merged if name in old else ""
            uri = server.export(qemu_fleece.export(qmp, names, index, drive, merged))
            token = Token(TOKEN_KIND, checkpoint, qemu_fleeced.life(drive.disk))
            disks.append(FleecedDisk(drive.disk, token, uri, merged, since.get(name), doubts[name]))
        return QemuFrozen(
            self,
            seen.machine,
            t,
            seen.config,
            notes,
            disks,
            names,
            folder,
            watch,
            moment.consistency,
            moment.standstill,
        )

    def _end(self, names: LeaseNames, folder: Path, watch: Watch) -> None:
        """Take the frozen view down.  What a QEMU that does not answer keeps, `release` takes later, and reports."""
        try:
            with self._connect() as qmp:
                qemu_fleece.sweep(qmp, names.prefix, self._settings.settle_seconds)
                qemu_fleece.remove_bitmaps(qmp, self._look(qmp).drives, lambda name: name == names.merged)
                qemu_fleece.remove_folders(qmp, [folder])
        except HostUnreachable:
            watch.abandon()
        else:
            watch.stop()

    def verify(self, frozen: QemuFrozen) -> Sequence[str]:
        """What `QemuFrozen.verify` promises."""
        with self._connect() as qmp:
            broken = frozen.watch.reason or qemu_fleece.broken_jobs(qmp, frozen.names, len(frozen.disks))
        if broken:
            raise ReadFailed(
                f"The snapshot of machine {frozen.machine.name} did not hold: {broken}; "
                "nothing read from it is used, run the capture again"
            )
        return []

    # --- release ----------------------------------------------------------------------------------------------------

    def _remove_bitmaps(self, qmp: Qmp, keeping: Collection[str]) -> None:
        """Merged copies of leases that are over, and checkpoints that no committed point names."""
        still_open = any(str(job["id"]).startswith(self._names.prefix) for job in qmp.command("query-jobs"))

        def unwanted(name: str) -> bool:
            if self._names.is_merged(name):
                return not still_open
            return self._names.is_checkpoint(name) and name not in keeping

        qemu_fleece.remove_bitmaps(qmp, self._look(qmp).drives, unwanted)

    def _end_mirrors(self, machine: Machine, prefix: str) -> None:
        def folder_of(of_lease: str) -> Path:
            return self._scratch_dir / self._names.found(of_lease).folder(machine.id)

        end_left(self._connect, self.path, folder_of, prefix, self._settings.settle_seconds)

    def _thaw(self, qmp: Qmp, folders: Sequence[Path]) -> None:
        """No run of ours that is dead, and whose guard is dead too, holds the guest still."""
        for folder in filter(qemu_stop.left_over, folders):
            qemu_stop.go_on(qmp, folder)
        for folder in filter(qemu_freeze.left_over, folders):
            qemu_freeze.thaw(qmp, self._look(qmp).line.cwd, folder, self._freezing)

    def _folders(self, machine: Machine, lease: LeaseId | None) -> Sequence[Path]:
        if lease is not None:
            return [self._scratch_dir / self._names.of(lease).folder(machine.id)]
        return sorted(self._scratch_dir.glob(self._names.folder_prefix(machine.id) + "*"))

    def _remove_dead(self, folders: Sequence[Path]) -> None:
        """Without anybody at the socket no QEMU uses the scratch any more; what it had in memory is gone with it."""
        if qemu_server.is_dead(self.path):
            for folder in folders:
                qemu_server.remove_folder(folder)

    # --- looking at the machine -------------------------------------------------------------------------------------

    def _connect(self) -> Qmp:
        return Qmp(self.path, timeout_seconds=self._settings.reply_seconds)

    def _look(self, qmp: Qmp) -> _Seen:
        line = qemu_config.of_peer(qmp.peer)
        graph = BlockGraph.parse(qmp.command("query-named-block-nodes", flat=True), _optional(qmp, _GRAPH))
        uuid = _optional(qmp, "query-uuid")
        qemu_stop.refuse_elsewhere(self.path, _optional(qmp, "query-status"), lambda: _optional(qmp, "query-migrate"))
        skipped: dict[str, str] = {}
        devices = self._daemon(qmp, graph) if uuid is None else attached_devices(qmp, skipped)
        drives = [graph.drive(device) for device in devices]
        known = uuid is not None and uuid["UUID"] != _NO_UUID
        machine = Machine(
            id=MachineId(uuid["UUID"] if known else f"qemu:{self.path.resolve()}"),
            name=(_optional(qmp, "query-name") or {}).get("name") or self._fallback_name(),
            platform=self.platform,
            disks=tuple(drive.disk for drive in drives),
        )
        given = qemu_config.of_file(self._machine_file) if self._machine_file else line
        config = qemu_config.config(given, drives, _facts(qmp, skipped))
        return _Seen(machine, drives, line, config, [given.note] if given.note else [])

    def _fallback_name(self) -> str:
        """What people see of a machine without a name: that of its socket, or of the folder where that says nothing."""
        stem = self.path.stem
        return self.path.absolute().parent.name if stem in ("qmp", "monitor") else stem

    def _daemon(self, qmp: Qmp, graph: BlockGraph) -> Sequence[Device]:
        return daemon_devices(graph, qmp.command("query-block-exports"), self._names.prefix)


class _Snapshot(AbstractContextManager["QemuFrozen"]):
    """From the moment on until the view is not needed any more.  One that is dropped without leaving cleans up nothing."""

    def __init__(self, begin: Callable[[], QemuFrozen], end: Callable[[QemuFrozen], None]) -> None:
        self._begin = begin
        self._end = end
        self._frozen: QemuFrozen | None = None

    def __enter__(self) -> QemuFrozen:
        self._frozen = self._begin()
        return self._frozen

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        frozen, self._frozen = self._frozen, None
        if frozen is not None:
            self._end(frozen)


_GRAPH = "x-debug-query-block-graph"


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look at a machine."""

    machine: Machine
    drives: Sequence[Drive]
    line: CommandLine
    config: MachineConfig
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class QemuFrozen:
    """All disks of a machine at one moment."""

    hypervisor: QemuHypervisor
    machine: Machine
    t: Instant
    config: MachineConfig
    notes: Sequence[str]
    disks: Sequence[FleecedDisk]
    names: LeaseNames
    folder: Path
    watch: Watch
    consistency: Consistency
    standstill: Standstill

    def verify(self) -> Sequence[str]:
        """Every disk was copied before each write until now.  Raises ReadFailed when not."""
        return self.hypervisor.verify(self)


def bitmap_doubt(drive: Drive, token: Token | None) -> str:
    """Why changes since the token can't be proved; empty when they can."""
    if token is None:
        return "No earlier checkpoint was given"
    bitmap = drive.bitmaps.get(token.value)
    if token.kind != TOKEN_KIND or not has_size(token):
        return f"{token.kind} {token.value} is not a checkpoint of QEMU"
    if bitmap is None:
        return f"Checkpoint {token.value} is gone from disk {drive.disk.id}: the machine or the disk was restarted or replaced"
    if is_elsewhere(drive.disk, token):
        return f"Disk {drive.disk.id} is in another file than at its checkpoint"
    return _state_doubt(bitmap, drive.disk.id)


def _state_doubt(bitmap: Bitmap, disk: str) -> str:
    if bitmap.inconsistent:
        return f"Checkpoint {bitmap.name} on disk {disk} is inconsistent: the machine was not stopped cleanly"
    if not bitmap.recording:
        return f"Checkpoint {bitmap.name} on disk {disk} was switched off and missed changes"
    return f"Checkpoint {bitmap.name} on disk {disk} is in use by another job" if bitmap.busy else ""


def _optional(qmp: Qmp, command: str, **arguments: Any) -> Any:
    """The answer, or None when this QEMU has no such command, object or property."""
    try:
        return qmp.command(command, **arguments)
    except CommandRefused:
        return None


def attached_devices(qmp: Qmp, skipped: dict[str, str]) -> Sequence[Device]:
    """The devices whose disks are captured; the others land in `skipped` with the reason."""
    found = []
    for block in qmp.command("query-block"):
        path = qom_path(block)
        qom_type = _optional(qmp, "qom-get", path=path, property="type") if path else None
        name = device_id(block)
        if reason := why_skipped(block, qom_type or ""):
            skipped[name] = reason
            continue
        sector = _optional(qmp, "qom-get", path=path, property="logical_block_size") or 512
        found.append(Device(block["inserted"]["node-name"], name, int(sector)))
    return found


def _facts(qmp: Qmp, skipped: Mapping[str, str]) -> Facts:
    memory = _optional(qmp, "query-memory-size-summary") or {}
    cpus = _optional(qmp, "query-cpus-fast") or []
    machine_type = _optional(qmp, "qom-get", path="/machine", property="type") or ""
    return Facts(int(memory.get("base-memory", 0)), len(cpus), str(machine_type).removesuffix("-machine"), skipped)
