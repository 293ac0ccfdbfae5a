"""map, restore, boot, discard: a point becomes exports, files, or a running machine."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hvbackup.bandwidth import pace_of
from hvbackup.config import KeyOptions, private
from hvbackup.errors import NotFound, StoreDamage, UsageError
from hvbackup.files import PARTIAL
from hvbackup.model import DiskRoot, Instant, RecoveryPoint
from hvbackup.moments import rfc3339
from hvbackup.nbd.server import NbdServer
from hvbackup.nbd.uri import NbdUri
from hvbackup.pipeline import Take
from hvbackup.processes import start_detached
from hvbackup.recover import restore as restoring
from hvbackup.recover.boot import Boot, Boots
from hvbackup.recover.boot import Options as BootOptions
from hvbackup.recover.export import exports
from hvbackup.recover.qcow2 import to_qcow2
from hvbackup.recover.restore import Mode, Restored
from hvbackup.service import bootpin, lonefile
from hvbackup.service.bootpin import BootPin
from hvbackup.service.inventory import roots
from hvbackup.service.moment import choose
from hvbackup.service.session import Session

MACHINE_FILE = "machine.json"  # beside the disks of a restored machine
FORMATS = ("raw", "qcow2")
BESIDE = ("nvram", "tpm")  # what a machine keeps beside its disks: files, whatever format disks get
OnProgress = Callable[[str, int, int], None]
OnError = Callable[[str, str, Exception], None]  # the export, what was asked of it, what went wrong


@dataclass(frozen=True, slots=True)
class Which:
    """A machine at a moment, and some of its disks."""

    machine: str
    at: str
    now: Instant
    disks: Sequence[str] = ()  # empty: all


# -- map -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """Where an export listens."""

    socket: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """HOST:PORT, [HOST]:PORT or :PORT.  Raises UsageError."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            raise UsageError(f"{text} is no address to listen on; write HOST:PORT, such as localhost:10809")
        return cls(host=host.strip("[]") or "localhost", port=int(port))


@dataclass(frozen=True, slots=True)
class Mapped:
    """Disks of a point that are being served."""

    point: RecoveryPoint
    disks: Mapping[str, str]  # id -> URI
    sizes: Mapping[str, int]
    notes: Sequence[str] = ()


@contextmanager
def mapped(session: Session, which: Which, address: Address, on_error: OnError) -> Iterator[Mapped]:
    """The disks are served, read-only, for as long as the context lasts.  Raises NotFound, Busy."""
    with session.open() as store:
        found = choose(store, which.machine, which.at, which.now)
        point, notes = found.point, found.notes
        chosen = roots(point, which.disks)
        with ExitStack() as stack:
            notes = [*notes, *stack.enter_context(found.pinned("map"))]
            server = stack.enter_context(NbdServer(exports(point, chosen, found.view), on_error=on_error))
            uri = _listen(session, server, address)
            where = {str(d.disk.id): str(replace(uri, export=d.disk.id)) for d in chosen}
            sizes = {str(d.disk.id): d.disk.size for d in chosen}
            yield Mapped(point, where, sizes, notes)


def _listen(session: Session, server: NbdServer, address: Address) -> NbdUri:
    if address.host:
        return server.listen_tcp(address.host, address.port)
    return server.listen_unix(address.socket or private(session.places.run) / f"map-{os.getpid()}.sock")


# -- restore ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """Where a restore goes."""

    to: Path
    format: str = ""  # empty: as the file's name says, or raw
    mode: Mode = Mode.NEW


@dataclass(frozen=True, slots=True)
class RestoredDisk:
    """One disk of a restore."""

    root: DiskRoot
    path: Path
    format: str
    mode: Mode
    done: Restored | None = None
    error: StoreDamage | None = None


@dataclass(frozen=True, slots=True)
class RestoredPoint:
    """What a restore did; disks whose bytes are damaged have an error, the others are whole."""

    point: RecoveryPoint
    disks: Sequence[RestoredDisk]
    machine_file: Path | None = None
    notes: Sequence[str] = ()


def restore(session: Session, which: Which, goal: Goal, progress: OnProgress) -> RestoredPoint:
    """Every disk is a file of its own when this returns.  Nothing is overwritten without leave.

    Raises NotFound, UsageError (something is there already), SpaceExhausted; what was written stays for `--resume`.
    """
    with session.open() as store:
        found = choose(store, which.machine, which.at, which.now)
        point, notes = found.point, found.notes
        chosen = roots(point, which.disks)
        single = len(which.disks) == 1 and not goal.to.is_dir()
        machine_file = None if which.disks else goal.to / MACHINE_FILE
        plan = [_single(chosen[0], goal)] if single else _folder(chosen, goal, machine_file)
        _refuse_overwriting(plan, machine_file, goal)
        with found.pinned("restore") as more:
            take = pace_of(session.places.run, "", session.places.store).store
            done = [_one(found.view(d.root), d, store.ring.block_key, progress, take) for d in plan]
            notes = [*notes, *more]
        if machine_file:
            lonefile.write(machine_file, _machine_json(point, done))
            if not any(d.error for d in done):
                _unfinished(machine_file).unlink(missing_ok=True)
        return RestoredPoint(point, done, machine_file, notes)


def _single(root: DiskRoot, goal: Goal) -> RestoredDisk:
    by_name = "qcow2" if goal.to.suffix == ".qcow2" else "raw"
    return RestoredDisk(root, goal.to, goal.format or by_name, goal.mode)


def _folder(chosen: Sequence[DiskRoot], goal: Goal, machine_file: Path | None) -> list[RestoredDisk]:
    """One file for each disk, named for it."""
    if goal.to.exists() and not goal.to.is_dir():
        raise UsageError(f"{goal.to} is no folder; several disks go to a folder, one disk to a file with --disk DISK")
    found, taken = [], set()
    for root in chosen:
        form = "raw" if root.disk.id in BESIDE else goal.format or "raw"
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", root.disk.id).strip("_.") or "disk"
        name, n = safe, 1
        while name in taken:
            n += 1
            name = f"{safe}-{n}"
        taken.add(name)
        path = goal.to / f"{name}.{form}"
        found.append(RestoredDisk(root, path, form, _mode(path, machine_file, goal)))
    return found


def _refuse_overwriting(plan: Sequence[RestoredDisk], machine_file: Path | None, goal: Goal) -> None:
    """Before anything is written.  Raises UsageError, Busy."""
    if plan and not plan[0].path.parent.is_dir():
        if plan[0].path.parent != goal.to:
            raise UsageError(f"There is no directory {plan[0].path.parent}")
        _make_folder(goal.to)
    for disk in plan:
        restoring.check_target(disk.path, disk.mode, disk.format)
    if machine_file and machine_file.exists() and goal.mode is Mode.NEW:
        raise UsageError(f"{machine_file} exists; say --replace to overwrite it, or choose another folder")
    if machine_file:
        lonefile.write(_unfinished(machine_file), b"{}\n")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UsageError(f"Cannot make the folder {folder}: {e.strerror}; choose another one") from e


def _mode(path: Path, machine_file: Path | None, goal: Goal) -> Mode:
    """Of one disk: one that is whole already in a folder where a restore did not end is compared like the others."""
    if goal.mode is Mode.RESUME and machine_file and path.is_file() and _unfinished(machine_file).exists():
        return Mode.DIFFERENTIAL
    return goal.mode


def _unfinished(machine_file: Path) -> Path:
    """Says, for as long as a restore of a whole machine has not ended, that what is in the folder is of its making."""
    return machine_file.with_name(machine_file.name + PARTIAL)


def _one(view: Any, disk: RestoredDisk, key: bytes, progress: OnProgress, take: Take) -> RestoredDisk:
    write = to_qcow2 if disk.format == "qcow2" else restoring.to_file
    try:
        done = write(view, disk.path, key, lambda at, total: progress(disk.root.disk.id, at, total), disk.mode, take)
    except StoreDamage as e:
        return replace(disk, error=e)
    return replace(disk, done=done)


def _machine_json(point: RecoveryPoint, done: Sequence[RestoredDisk]) -> bytes:
    """The machine's own configuration, and which file is which disk."""
    value = {
        "machine": {"id": point.machine.id, "name": point.machine.name, "platform": point.machine.platform},
        "point": point.id,
        "time": rfc3339(point.t),
        "consistency": str(point.consistency),
        "disks": [{"id": d.root.disk.id, "file": d.path.name, "format": d.format} for d in done],
        "configuration": asdict(point.config),
    }
    return json.dumps(value, indent=1).encode() + b"\n"


def verdict(done: RestoredPoint) -> StoreDamage | None:
    """The error that stands for all damaged disks, or None."""
    bad = [d for d in done.disks if d.error]
    if not bad:
        return None
    names = ", ".join(d.root.disk.id for d in bad)
    return StoreDamage(
        f"{len(bad)} of {len(done.disks)} disks could not be restored whole ({names}): {bad[0].error}; "
        "`hvbackup check` names every point that is affected, try another one with --at"
    )


# -- boot ------------------------------------------------------------------------------------------------------------------


def boot(session: Session, which: Which, options: BootOptions) -> tuple[Boot, list[str]]:
    """The machine runs on overlays over the point when this returns, with notes.  Raises NotFound, UsageError."""
    unattended = replace(session, ask=None)  # the export is a process of its own, which nobody can type to
    with unattended.open() as store:
        found = choose(store, which.machine, which.at, which.now)
        point, notes = found.point, found.notes
        roots(point, which.disks)
        with BootPin(session.places, store, found.read, which.now) as pin:
            booted = _boots(session, which.now).boot(point, _spawner(session), options, pin.take)
    return booted, [*notes, *pin.notes, *booted.notes]


def boots(session: Session, now: Instant) -> list[Boot]:
    """Every machine that is booted on this host."""
    return _boots(session, now).all()


def discard(session: Session, name: str, now: Instant) -> None:
    """Machine, export and overlays are gone when this returns.  Raises NotFound."""
    known = _boots(session, now)
    gone = known.discard(name)
    bootpin.drop(session.places, name)
    if not gone:
        names = [b.name for b in known.all()]
        near = difflib.get_close_matches(name, names, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise NotFound(f"No machine was booted as {name} on this host{hint} There are: {', '.join(names) or 'none'}")


def _boots(session: Session, now: Instant) -> Boots:
    return Boots(session.places.state, session.places.run, lambda: now)


def _spawner(session: Session) -> Callable[[RecoveryPoint, Sequence[DiskRoot], Path, Path], int]:
    """Starts `hvbackup map` as a process that outlives us."""

    def spawn(point: RecoveryPoint, disks: Sequence[DiskRoot], socket: Path, folder: Path) -> int:
        words = [sys.executable, "-m", "hvbackup", "map", point.machine.id, "--at", point.id, "--socket", str(socket)]
        words += ["--quiet", "--store", str(session.places.store), *_key_words(session.keys)]
        for disk in disks:
            words += [f"--disk={disk.disk.id}"]
        return start_detached(words, folder / "export.log").pid

    return spawn


def _key_words(keys: KeyOptions) -> list[str]:
    named = {"--key-file": keys.key_file, "--passphrase-file": keys.passphrase_file}
    return [word for option, path in named.items() if path for word in (option, str(path.absolute()))]
