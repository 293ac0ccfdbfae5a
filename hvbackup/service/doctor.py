"""doctor: is everything here as protection and recovery need it?  Each finding says what to do about it.

It looks and changes nothing.  A problem is what makes protection or recovery fail now, or soon; a warning is what will when
something else goes wrong as well.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvbackup import config
from hvbackup.config import Places
from hvbackup.errors import HvbackupError
from hvbackup.model import SECOND, GiB, Instant
from hvbackup.moments import local
from hvbackup.service import backup, look
from hvbackup.service.look import Overview
from hvbackup.service.session import Session
from hvbackup.service.timeline import Protected
from hvbackup.store.store import Store

LITTLE_SHARE, LITTLE_BYTES = 0.1, GiB  # of a file system: less is a warning, and less than that a problem
DAYS_LEFT = 30  # of a certificate
CLOCK_ERROR_STATUS = 0x40  # STA_UNSYNC of adjtimex(2)
VERSION_SECONDS = 10.0
FUTURE_NS = 60 * SECOND
STALE_LAG_SECONDS = 15 * 60  # of a protected machine: its worker is there and records nothing
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")

PROGRAMS = (  # what they are for, the package, and whether nothing goes without them
    ("qemu-img", "makes and reads images", "qemu-utils", True),
    ("qemu-nbd", "reads qcow2 images of machines that are off", "qemu-utils", True),
    ("qemu-system-x86_64", "boots machines from their points here", "qemu-system-x86", False),
    ("setpriv", "ends servers together with us", "util-linux", True),
)
ADAPTERS = (  # the module, the sources that need it, and how to get it
    ("qemu.qmp", "qemu:", "pip install qemu.qmp"),
    ("libvirt", "libvirt:", "apt install python3-libvirt, or pip install libvirt-python"),
)


class Level(enum.IntEnum):
    """How bad a finding is."""

    OK = 0
    WARNING = 1
    PROBLEM = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked at."""

    level: Level
    subject: str
    what: str
    fix: str = ""


def ok(subject: str, what: str) -> Finding:
    """Nothing is to be done."""
    return Finding(Level.OK, subject, what)


def warning(subject: str, what: str, fix: str) -> Finding:
    """It works, until something else goes wrong."""
    return Finding(Level.WARNING, subject, what, fix)


def problem(subject: str, what: str, fix: str) -> Finding:
    """It does not work, or soon won't."""
    return Finding(Level.PROBLEM, subject, what, fix)


def doctor(session: Session, sources: Sequence[str], now: Instant) -> Iterator[Finding]:
    """Every finding, as it is made."""
    yield from programs()
    yield from adapters()
    yield clock()
    yield from folders(session.places)
    yield from certificates(session.places.configuration, now)
    try:
        store = session.open()
    except HvbackupError as e:
        yield problem("store", str(e), "do what it says, then run `hvbackup doctor` again")
        return
    with store:
        yield ok("store", f"{session.places.store} opens with its key")
        yield from keys(session, store)
        overview = look.status(session, now, every=True)
        yield from leftovers(overview, now)
        yield from machines(overview)
        for source in sources:
            yield from source_of(session, store, source)


# -- this host ---------------------------------------------------------------------------------------------------------


def programs() -> Iterator[Finding]:
    """What we run."""
    for name, purpose, package, needed in PROGRAMS:
        if path := shutil.which(name):
            yield ok(name, _version(path))
        else:
            make = problem if needed else warning
            yield make(name, f"is missing; it {purpose}", f"apt install {package}")


def _version(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"is there, and did not say its version ({e})"
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return f"version {found[0]}" if found else "is there"


def adapters() -> Iterator[Finding]:
    """What we talk to hypervisors with."""
    for module, scheme, how in ADAPTERS:
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if there:
            yield ok(f"sources {scheme[:-1]}", f"{module} is installed")
        else:
            yield warning(f"sources {scheme[:-1]}", f"the Python package {module} is missing", how)


def clock() -> Finding:
    """Moments are labelled by this machine's clock."""
    buffer = ctypes.create_string_buffer(256)  # struct timex; modes = 0 changes nothing
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtimex(buffer) < 0:
        return warning("clock", "the kernel does not say whether it is set", "run chrony or systemd-timesyncd")
    status = int.from_bytes(buffer.raw[40:44], "little")
    if status & CLOCK_ERROR_STATUS:
        return warning(
            "clock",
            "is not kept right by anybody: moments will be labelled with wrong times",
            "apt install chrony (or set the clock of the host from outside)",
        )
    return ok("clock", "is kept right")


def folders(places: Places) -> Iterator[Finding]:
    """The directories: there, ours, and with room."""
    for name, folder in (("store", places.store), ("state", places.state)):
        if folder.is_dir():
            yield _writable(f"{name} folder", folder)
            yield room(f"{name} folder", folder)
            yield from _file_system(f"{name} folder", folder)
    try:
        yield ok("run folder", f"{config.private(places.run)} is ours")
    except HvbackupError as e:
        yield problem("run folder", str(e), "remove it, or set HVBACKUP_RUN")


def _writable(subject: str, folder: Path) -> Finding:
    if os.access(folder, os.W_OK | os.X_OK):
        return ok(subject, f"{folder} can be written")
    return problem(subject, f"{folder} can't be written by this user", f"run as its owner, {folder.owner()}")


def room(subject: str, folder: Path) -> Finding:
    """How much room is left where a folder is."""
    found = shutil.disk_usage(folder)
    what = f"{found.free / GiB:.1f} GiB of {found.total / GiB:.1f} GiB are free at {folder}"
    fix = "make room: `hvbackup prune` and `hvbackup reclaim`, or a larger file system"
    if found.free < LITTLE_BYTES:
        return problem(subject, what, fix)
    if found.free < found.total * LITTLE_SHARE:
        return warning(subject, what, fix)
    return ok(subject, what)


def _file_system(subject: str, folder: Path) -> Iterator[Finding]:
    kind = mounted(folder, Path("/proc/self/mounts").read_text())
    if kind == "tmpfs":
        yield problem(subject, f"{folder} is in memory: a reboot takes it", "move it to a disk")
    elif kind in NETWORK_FILE_SYSTEMS and subject.startswith("state"):
        yield warning(
            subject, f"{folder} is on {kind}: locks and mapped files are not reliable there", "use a local disk"
        )


def mounted(folder: Path, mounts: str) -> str:
    """The kind of file system a folder is on, by the text of /proc/mounts."""
    rows = [line.split() for line in mounts.splitlines()]
    found = [(row[1], row[2]) for row in rows if folder.resolve().is_relative_to(_plain(row[1]))]
    return max(found, key=lambda row: len(row[0]))[1] if found else ""


def _plain(text: str) -> str:
    """A path of /proc/mounts, where blanks are written in octal."""
    return re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), text)


def certificates(configuration: Path, now: Instant) -> Iterator[Finding]:
    """How long certificates in the configuration are good for."""
    for path in sorted(p for p in configuration.rglob("*") if p.suffix in (".pem", ".crt")):
        from cryptography import x509

        try:
            found = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError):
            continue  # a key, or somebody else's
        days = (found.not_valid_after_utc.timestamp() - now / SECOND) / 86400
        name, fix = f"certificate {path.name}", f"put a new one at {path}, then reload the service"
        if days < 0:
            yield problem(name, f"has expired {-days:.0f} days ago", fix)
        elif days < DAYS_LEFT:
            yield warning(name, f"expires in {days:.0f} days", fix)
        else:
            yield ok(name, f"is good for {days:.0f} days")


# -- the store ---------------------------------------------------------------------------------------------------------


def keys(session: Session, store: Store) -> Iterator[Finding]:
    """Keys kept here: private, and not the only copy."""
    if store.descriptor.cipher == "none":
        yield warning("encryption", "the store is not encrypted", "make an encrypted store and `hvbackup copy` into it")
        return
    for path in config.kept_keys(session.places.configuration, store.id.hex()):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield problem("key", f"{path} can be read by others", f"chmod 600 {path}")
        if path.resolve().is_relative_to(session.places.store.resolve()):
            yield problem("key", f"{path} lies in the store that it opens", "move it out of the store")
    if len(store.files.names("keys")) <= 2:  # each wrapping is there twice
        yield warning(
            "key",
            "one key opens the store: if it is lost, so is everything",
            "`hvbackup key paper` prints one for a safe; `hvbackup key add` makes another",
        )


def leftovers(found: Overview, now: Instant) -> Iterator[Finding]:
    """What ended badly and was not cleaned up, and what can't be read."""
    for left in found.leftovers:
        if left.expired:
            source = left.lease.source or "SOURCE"
            what = f"a run did not end, and left something on {left.lease.source or 'its host'}"
            yield warning(f"machine {left.machine}", what, f"`hvbackup backup {source}` cleans it up")
    for boot in found.boots:
        if boot.state != "running":
            what = "did not start" if boot.state == "failed" else "has stopped; what its guest wrote is still there"
            yield warning(f"boot {boot.name}", what, f"`hvbackup discard {boot.name}`")
    for damaged in (text for history in found.machines for text in history.damaged):
        yield problem("points", damaged, "`hvbackup check --repair` puts back what is there twice")
    newest = max((h.points[-1].t for h in found.machines), default=Instant(0))
    if newest > now + FUTURE_NS:
        what = f"the newest point is of {local(newest)}, which is still to come: the clock went back"
        yield problem("clock", what, "set the clock of this host")


def machines(found: Overview) -> Iterator[Finding]:
    """Machines that have a journal should have a worker that records."""
    for history in found.machines:
        if standing := found.protected.get(history.machine.id):
            yield _recorded(history.machine.name, standing)


def _recorded(name: str, standing: Protected) -> Finding:
    subject = f"machine {name}"
    if standing.pause:
        until = f"until {local(standing.pause.until)}" if standing.pause.until else "until somebody ends it"
        return warning(subject, f"is paused {until}: {standing.pause.why}", f"`hvbackup protect resume {name}`")
    if not standing.worker:
        what = f"nothing is recorded since {local(standing.newest.t)}: no worker runs here"
        return problem(subject, what, "`hvbackup protect SOURCE` goes on")
    if standing.lag_seconds > STALE_LAG_SECONDS:
        what = (
            f"its worker, process {standing.worker}, has recorded nothing for {standing.lag_seconds / 60:.0f} minutes"
        )
        return problem(subject, what, f"`hvbackup timeline {name}` and the worker's messages say why")
    return ok(subject, f"is recorded by process {standing.worker}")


# -- hypervisors -------------------------------------------------------------------------------------------------------


def source_of(session: Session, store: Store, source: str) -> Iterator[Finding]:
    """Whether a source answers, and what it can do."""
    try:
        hypervisor = backup.open_hypervisor(session, store, source, backup.Request([source]))
        found = hypervisor.machines()
    except HvbackupError as e:
        yield problem(source, str(e), "see that it runs and that this user may talk to it")
        return
    if not found:
        yield warning(source, "answers, and has no machine", "see that this user may see them")
    if not hypervisor.can.changed_extents:
        yield warning(
            source, "does not know what changed: every capture reads everything", "protect it by its hypervisor"
        )
    for machine in found:
        if machine.disks:
            yield ok(source, f"machine {machine.name} with {', '.join(d.id for d in machine.disks)}")
        else:
            yield warning(source, f"machine {machine.name} has no disk that can be captured", "see its configuration")
