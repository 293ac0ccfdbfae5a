"""Boot: a machine on its disks as they were at a point, in seconds, because nothing is copied first.

Each disk is a qcow2 overlay whose backing file is our read-only export of the view, so the guest may write and the point
stays what it is.  Both processes, the export and QEMU, outlive us; what is known of them is in `boots/NAME/record` under
STATE, and their sockets are in a folder of their own with a short name.  `discard` ends both and removes everything.

    killed after                 left behind                               cleaned by
    1 folder made                an empty folder, which claims the name    discard
    2 record written             a record without processes                discard
    3 export started             a process the record does not name        discard: it has our socket
    4 overlays made              files in the folder                       discard
    5 QEMU started               a process the record does not name        discard: it has our socket
    6 record says running        a running machine, as asked for
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hvbackup.errors import HostUnreachable, HvbackupError, NotFound, UsageError
from hvbackup.files import TMP, Files
from hvbackup.model import DiskRoot, Instant, RecoveryPoint
from hvbackup.processes import Process, listener, start_detached, started_with
from hvbackup.recover import kvm, qemu_argv
from hvbackup.recover.qemu_argv import CommandLine, Place, Plain
from hvbackup.recover.qemu_disks import Overlay

SpawnExport = Callable[[RecoveryPoint, Sequence[DiskRoot], Path, Path], int]
"""Serves these disks of the point, named by their ids, on a Unix socket, logs into the folder; returns the process id."""

RECONNECT_SECONDS = 30  # how long the guest's reads wait for an export that was started again
START_SECONDS = 30.0
STOP_SECONDS = 10.0
EXPORT_SOCKET = "export.sock"
RECORD = "record"

_SOCKET_PATH_MAX_BYTES = 107
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What a person may choose."""

    name: str = ""  # of the boot; empty: the machine's and the point's
    disks: Collection[str] = ()  # empty: all
    generic: bool = False  # a plain machine, whatever was captured
    new_identity: bool = False  # another UUID and other network addresses
    memory_bytes: int = 0  # of a plain machine; 0: as captured
    cpus: int = 0


@dataclass(frozen=True, slots=True)
class Boot:
    """One machine booted from a point."""

    name: str
    machine: str
    machine_name: str
    point: str
    made: Instant
    folder: Path  # overlays and logs
    run: Path  # sockets
    sockets: Mapping[str, str] = field(default_factory=dict)  # qmp; and serial, agent, vnc where the machine has them
    processes: Mapping[str, Process] = field(default_factory=dict)  # export, qemu
    notes: tuple[str, ...] = ()
    seconds: float = 0.0  # from the order to a running machine; 0 while it is not

    @property
    def state(self) -> str:
        """running; stopped (QEMU has ended, what the guest wrote is still there); failed (it never ran)."""
        if not self.seconds:
            return "failed"
        return "running" if "qemu" in self.processes and self.processes["qemu"].is_running() else "stopped"

    def dump(self) -> bytes:
        """As it is written down."""
        return json.dumps(asdict(self), default=str, indent=1).encode()

    @classmethod
    def load(cls, data: bytes) -> Boot:
        """From a record.  Raises ValueError, KeyError, TypeError."""
        raw: dict[str, Any] = json.loads(data)
        raw["folder"], raw["run"] = Path(raw["folder"]), Path(raw["run"])
        raw["processes"] = {role: Process(**given) for role, given in raw["processes"].items()}
        return cls(**{**raw, "notes": tuple(raw["notes"])})


class Boots:
    """The machines booted on this host.  Thread safety: one thread."""

    def __init__(self, state: Path, run: Path, clock: Callable[[], Instant]) -> None:
        self._root, self._run, self._clock = state / "boots", run / "boots", clock

    def boot(
        self,
        point: RecoveryPoint,
        spawn_export: SpawnExport,
        options: Options | None = None,
        pin: Callable[[str], None] = lambda _name: None,
    ) -> Boot:
        """The machine runs when this returns; nothing of it is left when this raises.

        `pin` keeps what is read, for the boot of the name it is given; it is called before anything is read.
        Raises UsageError (a name that is taken, a program or file that is missing), NotFound, HvbackupError.
        """
        options = options or Options()
        begun = time.monotonic()
        disks = _chosen(point, options)
        _require("qemu-img")
        boot = self._claim(point, options)
        try:
            pin(boot.name)
            boot = self._start(boot, point, disks, spawn_export, options)
            boot = replace(boot, seconds=round(time.monotonic() - begun, 3))
            self._record(boot)
        except BaseException:
            with contextlib.suppress(HvbackupError):  # the first error says more
                self.discard(boot.name)
            raise
        return boot

    def discard(self, name: str) -> bool:
        """Machine, export, overlays and record are gone when this returns; False when there were none."""
        folder = self._folder(name)
        if not folder.is_dir():
            return False
        boot = self._load(name)
        for process in _processes(boot):
            process.stop(STOP_SECONDS)
        shutil.rmtree(boot.run, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        Files(self._root).sweep()  # a record that was being written when its boot was killed
        return True

    def get(self, name: str) -> Boot:
        """One boot.  Raises NotFound."""
        if not self._folder(name).is_dir():
            raise NotFound(f"No machine was booted as {name} on this host; `hvbackup status` lists them")
        return self._load(name)

    def all(self) -> list[Boot]:
        """Every boot that was not discarded, by name."""
        entries = sorted(self._root.iterdir()) if self._root.is_dir() else []
        return [self._load(entry.name) for entry in entries if entry.is_dir() and entry.name != TMP]

    # --- steps

    def _claim(self, point: RecoveryPoint, options: Options) -> Boot:
        name = options.name or f"{re.sub('[^A-Za-z0-9._-]+', '-', point.machine.name).strip('-.')[:40]}-{_short(point)}"
        folder = self._folder(name)
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            raise UsageError(
                f"A machine is booted as {name} already; `hvbackup discard {name}` ends it, or choose another name"
            ) from None
        run = _run_folder(self._run, name)
        machine = point.machine
        boot = Boot(name, machine.id, machine.name, point.id, self._clock(), folder, run)
        self._record(boot)
        return boot

    def _start(
        self, boot: Boot, point: RecoveryPoint, disks: Sequence[DiskRoot], spawn_export: SpawnExport, options: Options
    ) -> Boot:
        line = _command_line(boot, point, disks, options)
        boot.run.mkdir(parents=True, mode=0o700)
        socket = boot.run / EXPORT_SOCKET
        pid = spawn_export(point, disks, socket, boot.folder)
        boot = replace(boot, sockets=dict(line.sockets), notes=line.notes, processes=_identified(export=pid))
        self._record(boot)
        _wait_for_export(boot, socket)
        for disk in disks:
            _make_overlay(disk.disk.id, socket, _overlay_path(boot, disk))
        for source, target in line.copies:
            shutil.copyfile(source, target)
        qemu = start_detached(line.argv, boot.folder / "qemu.log")
        boot = replace(boot, processes={**boot.processes, "qemu": qemu})
        self._record(boot)
        _wait_for_machine(boot, qemu)
        return boot

    # --- records

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name == TMP:
            raise UsageError(f"{name!r} is no name for a boot; use letters, digits, dots, dashes and underscores")
        return self._root / name

    def _record(self, boot: Boot) -> None:
        Files(self._root).replace(f"{boot.name}/{RECORD}", boot.dump())

    def _load(self, name: str) -> Boot:
        try:
            return Boot.load((self._folder(name) / RECORD).read_bytes())
        except (OSError, ValueError, KeyError, TypeError):  # killed before it was written, or damaged
            return Boot(name, "", "", "", Instant(0), self._folder(name), self._run / name)


def _short(point: RecoveryPoint) -> str:
    """A part of a name: the beginning of a point's id, or seq4711 for a moment of a journal."""
    return point.id.replace(":", "") if ":" in point.id else point.id[:8]


def _chosen(point: RecoveryPoint, options: Options) -> list[DiskRoot]:
    there = {str(root.disk.id): root for root in point.disks}
    for name in options.disks:
        if name not in there:
            raise NotFound(f"Point {point.id} of {point.machine.name} has no disk {name}; it has {', '.join(there)}")
    beside = _beside(point, "tpm", *(("nvram",) if options.generic else ()))
    return [d for n, d in there.items() if n not in beside and (not options.disks or n in options.disks)]


def _beside(point: RecoveryPoint, *roles: str) -> set[str]:
    """What was captured with the disks and is none: it has no place in the machine that is booted."""
    listed = [d for d in point.config.portable.get("disks", ()) if isinstance(d, Mapping)]
    return {str(d.get("id")) for d in listed if d.get("role") in roles}


def _run_folder(base: Path, name: str) -> Path:
    """Where the sockets live: the name of a Unix socket may not be long."""
    folder = base / name
    if not folder.exists() and len(os.fsencode(folder / EXPORT_SOCKET)) <= _SOCKET_PATH_MAX_BYTES:
        return folder
    return Path(tempfile.gettempdir()) / f"hvbackup-{secrets.token_hex(6)}"


def _overlay_path(boot: Boot, disk: DiskRoot) -> Path:
    safe = re.sub("[^A-Za-z0-9._-]", "_", disk.disk.id)
    return boot.folder / f"{safe}-{_position(disk.disk.id)}.qcow2"


def _position(disk_id: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, disk_id).hex[:6]  # two ids may look alike once they are made safe


def _command_line(boot: Boot, point: RecoveryPoint, disks: Sequence[DiskRoot], options: Options) -> CommandLine:
    known = {str(d.get("id")): d for d in point.config.portable.get("disks", ()) if isinstance(d, Mapping)}
    overlays = [
        Overlay(
            d.disk.id,
            str(_overlay_path(boot, d)),
            node=str(known.get(d.disk.id, {}).get("node", "")),
            path=str(known.get(d.disk.id, {}).get("file", "")),
        )
        for d in disks
    ]
    native = _captured_line(point) if not options.generic else {}
    wants_kvm = not native or "kvm" in point.config.native
    identity = str(uuid.uuid4()) if options.new_identity else ""
    kvm_works = wants_kvm and kvm.works()
    place = Place(boot.name, str(boot.run), str(boot.folder), os.path.exists, kvm=kvm_works, identity=identity)
    if not native:
        overlays = [o for o in overlays if o.disk not in _beside(point, "nvram")]
        return _with_program(_generic(point, overlays, place, options))
    return _with_program(qemu_argv.rewrite(native["argv"], native.get("cwd") or "/", overlays, place))


def _captured_line(point: RecoveryPoint) -> dict[str, Any]:
    """The command line of the machine, with its directory; empty when there is none that starts a machine."""
    native: dict[str, Any] = _native(point)
    program = Path(native["argv"][0]).name if native.get("argv") else ""
    return {} if not program or "storage-daemon" in program else native


def _native(point: RecoveryPoint) -> dict[str, Any]:
    """A command line, with its directory, as the platform had it, or as it said QEMU would be started."""
    if point.config.kind == "qemu-argv":
        return dict(json.loads(point.config.native))
    return dict(point.config.portable.get("command_line") or {})


def _generic(point: RecoveryPoint, overlays: Sequence[Overlay], place: Place, options: Options) -> CommandLine:
    plain, portable = Plain(), point.config.portable
    memory = options.memory_bytes or int(portable.get("memory_bytes") or 0) or plain.memory_bytes
    cpus = options.cpus or int(portable.get("cpus") or 0) or plain.cpus
    line = qemu_argv.generic(overlays, place, Plain(memory, cpus))
    if options.generic:
        return line
    return replace(line, notes=(*line.notes, "How the machine was started is not known: it runs on a plain machine"))


def _with_program(line: CommandLine) -> CommandLine:
    """The program it was started with, or else the one of that name here."""
    name = Path(line.argv[0]).name
    fallback = name if name.startswith("qemu-system-") else "qemu-system-x86_64"
    program = shutil.which(line.argv[0]) or shutil.which(name) or _require(fallback)
    return replace(line, argv=(program, *line.argv[1:]))


def _require(program: str) -> str:
    found = shutil.which(program)
    if not found:
        package = _PACKAGES.get(program, "qemu-system")
        raise UsageError(
            f"The program {program} is missing; install Debian package {package}: apt-get install {package}"
        )
    return found


def _identified(**pids: int) -> dict[str, Process]:
    found = {role: Process.of(pid) for role, pid in pids.items()}
    return {role: process for role, process in found.items() if process is not None}


def _processes(boot: Boot) -> list[Process]:
    """QEMU first, so that it can still read while it ends."""
    qmp, export = boot.run / "qmp.sock", boot.run / EXPORT_SOCKET
    found = [boot.processes.get("qemu"), listener(qmp)]
    if not boot.seconds:  # we may have been killed before the record named it, and it may not listen yet
        found += [*started_with(qemu_argv.monitor(str(qmp))), *started_with(str(export))]
    found += [boot.processes.get("export"), listener(export)]
    return list(dict.fromkeys(process for process in found if process is not None))


def _wait_for_export(boot: Boot, socket: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while listener(socket) is None:
        if "export" not in boot.processes or not boot.processes["export"].is_running():
            raise HvbackupError(f"The export of point {boot.point} ended at once{_log_tail(boot.folder)}")
        if time.monotonic() > end:
            raise HvbackupError(f"The export of point {boot.point} did not begin within {START_SECONDS:g} s")
        time.sleep(0.02)


def _make_overlay(disk: str, socket: Path, path: Path) -> None:
    """An empty image over the export, which is as large as the disk."""
    server = {"type": "unix", "path": str(socket)}
    node = {"driver": "nbd", "server": server, "export": disk, "reconnect-delay": RECONNECT_SECONDS}
    backing = "json:" + json.dumps({"driver": "raw", "file": node})
    argv = [_require("qemu-img"), "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing, str(path)]
    try:
        subprocess.run(argv, capture_output=True, text=True, timeout=START_SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        raise HvbackupError(f"qemu-img made no overlay for disk {disk} within {START_SECONDS:g} s") from error
    except subprocess.CalledProcessError as error:
        raise HvbackupError(f"qemu-img cannot make an overlay for disk {disk}: {error.stderr.strip()}") from error


def _wait_for_machine(boot: Boot, qemu: Process) -> None:
    """The guest executes when this returns."""
    from hvbackup.hypervisors.qmp import Qmp  # it brings asyncio, which who only lists machines should not pay for

    end = time.monotonic() + START_SECONDS
    reason = "its monitor does not answer"
    while time.monotonic() < end:
        if not qemu.is_running():
            raise HvbackupError(f"QEMU ended at once when it started {boot.name}{_log_tail(boot.folder)}")
        try:
            with Qmp(boot.sockets["qmp"], timeout_seconds=5.0) as monitor:
                status = monitor.command("query-status")
        except HostUnreachable:
            time.sleep(0.05)
            continue
        if status["running"]:
            return
        reason = f"it is in state {status['status']}"
        time.sleep(0.05)
    raise HvbackupError(f"Machine {boot.name} does not run after {START_SECONDS:g} s: {reason}{_log_tail(boot.folder)}")


def _log_tail(folder: Path) -> str:
    """What the processes said last, for the end of a message."""
    logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    texts = [path.read_text(errors="replace").strip() for path in logs]
    said = next((text for text in reversed(texts) if text), "")
    return f": {said[-1500:]}" if said else ""
