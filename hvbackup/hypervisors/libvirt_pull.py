"""A domain that runs: libvirt's backup job in pull mode, with a checkpoint that the next one asks for.

    killed after                     left behind                               cleaned by
    1 folder, watchdog               a folder                                  release
    2 lost checkpoints redefined     nothing that was not there                (their bitmaps recorded all along)
    3 the job has begun              job, scratch, the new checkpoint          the watchdog ends both; release
    4 the job has ended              the new checkpoint, a folder              release

Where many small sets follow, the checkpoint is a fine one that QEMU is given by itself, a moment before the job: what it names is
more than what changed since, never less.  libvirt's own would have the grain of the image's clusters.

libvirt knows checkpoints by names and bitmaps by checkpoints.  Where it lost one (a transient domain, a daemon without its state,
a machine that was off and backed up from its images), the bitmap is still in the image: our token names it, libvirt is told of it
again, and looks whether it is there and whole.  What it can't find is compared.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvbackup.errors import Busy, HostUnreachable, HvbackupError, NotFound, ReadFailed, SpaceExhausted, UsageError
from hvbackup.hypervisors import (
    FrozenDisk,
    Standstill,
    libvirt_away,
    libvirt_freeze,
    libvirt_host,
    libvirt_lineage,
    libvirt_xml,
    qemu_fleece,
    qemu_freeze,
)
from hvbackup.hypervisors.libvirt_host import Domain, LibvirtRefused
from hvbackup.hypervisors.libvirt_lineage import Lineage
from hvbackup.hypervisors.libvirt_nbd import PORTS, Line, open_line
from hvbackup.hypervisors.libvirt_room import Room
from hvbackup.hypervisors.libvirt_seen import Seen
from hvbackup.hypervisors.libvirt_watch import LibvirtWatch
from hvbackup.hypervisors.libvirt_xml import DomainDisk, Wanted
from hvbackup.hypervisors.qemu_fleeced import FleecedDisk
from hvbackup.hypervisors.qemu_names import LeaseNames
from hvbackup.hypervisors.qemu_scratch import empty_qcow2, write_empty_qcow2
from hvbackup.hypervisors.qmp import Peer
from hvbackup.model import Consistency, Disk, DiskId, Instant, LeaseId, Machine, MachineConfig, Token

__all__ = ["LibvirtFrozen", "Pull", "Room"]

_REDEFINED = 1  # a time of creation for checkpoints libvirt lost: their order means nothing to us
_POLL_SECONDS = 0.02
_DISK = re.compile(r"disk '([^']+)'")


@dataclass(frozen=True, slots=True)
class LibvirtFrozen:
    """All disks of a domain at one moment."""

    machine: Machine
    t: Instant
    config: MachineConfig
    notes: Sequence[str]
    disks: Sequence[FrozenDisk]
    consistency: Consistency
    standstill: Standstill
    prove: Callable[[], Sequence[str]]
    end: Callable[[], None] = field(repr=False)

    def verify(self) -> Sequence[str]:
        """The view held until now.  Raises ReadFailed when not."""
        return self.prove()


@dataclass(slots=True)
class _Open:
    """What one lease has open."""

    names: LeaseNames
    folder: Path
    watch: LibvirtWatch
    line: Line | None = None


@dataclass(slots=True)
class _Ask:
    """What is asked of libvirt for one moment; doubts grow while it refuses."""

    disks: Sequence[DomainDisk]
    lineages: Mapping[str, Lineage]
    since: Mapping[DiskId, Token]
    checkpoint: str
    doubts: dict[str, str]
    recording: bool = False  # the checkpoint is there already
    notes: list[str] = field(default_factory=list)

    @property
    def recorded(self) -> list[str]:
        """The disks of the next checkpoint."""
        return [d.target for d in self.disks if self.checkpoint and self.lineages[d.target].tracked]

    def old(self, target: str) -> str:
        """The checkpoint since which a disk's changes are known."""
        return "" if self.doubts[target] else self.since[DiskId(target)].value


Record = Callable[[Room, Domain, Seen, Path, str, Collection[str]], bool]


class Pull:
    """Snapshots of one running domain."""

    def __init__(self, room: Room, domain: Domain, machine: Machine, record: Record | None = None) -> None:
        """`record` makes fine checkpoints; None leaves them to libvirt."""
        self._room, self._domain, self._machine, self._record = room, domain, machine, record

    # --- a snapshot begins and ends ------------------------------------------------------------------------------------

    def begin(
        self, seen: Seen, lease: LeaseId, since: Mapping[DiskId, Token], wanted: Consistency | None
    ) -> LibvirtFrozen:
        """The moment.  Raises Busy, HostUnreachable, UsageError, SpaceExhausted."""
        room, names = self._room, self._room.names.of(lease)
        with room.locked(self._machine.id):
            self._refuse_busy()
            plan = libvirt_freeze.plan(self._domain, seen, wanted, room.freezing)
            folder = room.folder(self._machine, names)
            room.make(folder)
            opened = _Open(names, folder, LibvirtWatch(room, self._domain, names.prefix, folder))
            try:
                return self._freeze(seen, opened, since, plan)
            except BaseException:
                with contextlib.suppress(HvbackupError):  # the first error says more; the lease stays
                    self._end(opened)
                raise

    def _refuse_busy(self) -> None:
        if not self._domain.busy():
            return
        ours = any(e.startswith(self._room.names.prefix) for e in libvirt_xml.exports(self._domain.backup_xml()))
        whose = "the snapshot of another run of ours" if ours else "another job (a backup, a migration, a save)"
        raise Busy(f"Machine {self._machine.name} is held by {whose}; wait for it to end")

    def _freeze(
        self, seen: Seen, opened: _Open, since: Mapping[DiskId, Token], plan: qemu_freeze.Plan
    ) -> LibvirtFrozen:
        room, names = self._room, opened.names
        if room.where.local:
            qemu_fleece.refuse_full(opened.folder, room.limits.scratch_reserve_bytes)
        ask = self._ask(seen, since)
        if self._record and ask.recorded:
            ask.recording = self._record(room, self._domain, seen, opened.folder, ask.checkpoint, ask.recorded)
        line = open_line(room, opened.folder, names)
        beside: list[FrozenDisk] = []

        def transaction() -> Sequence[str]:
            self._begin(ask, opened, line)
            found, notes = seen.read_sidecars()
            beside.extend(found)
            return [*ask.notes, *notes]

        moment = qemu_freeze.moment(plan, opened.folder, transaction)
        # Labelled when it is certain to be over: nothing the guest wrote after `t` is in it.
        t = Instant(room.clock())
        opened.line = line
        line.connect()
        disks: list[FrozenDisk] = [*(self._disk(d, ask, names, line) for d in seen.disks), *beside]
        return LibvirtFrozen(
            Machine(seen.machine.id, seen.machine.name, seen.machine.platform, tuple(d.disk for d in disks)),
            t,
            seen.config(),
            [*seen.notes, *moment.notes],
            disks,
            moment.consistency,
            moment.standstill,
            lambda: self._verify(opened),
            lambda: self._leave(opened),
        )

    def _disk(self, disk: DomainDisk, ask: _Ask, names: LeaseNames, line: Line) -> FleecedDisk:
        # Asked now that a job holds the disk: it can't be resized any more.
        found = Disk(DiskId(disk.target), self._domain.capacity(disk.target), disk.sector, disk.path)
        lineage, since = ask.lineages[disk.target], ask.since.get(found.id)
        recorded = disk.target in ask.recorded
        token = libvirt_lineage.token(ask.checkpoint, found.size, lineage) if recorded else None
        merged = names.merged if ask.old(disk.target) else ""
        return FleecedDisk(found, token, line.export(_export(names, disk)), merged, since, ask.doubts[disk.target])

    # --- the moment ----------------------------------------------------------------------------------------------------

    def _ask(self, seen: Seen, since: Mapping[DiskId, Token]) -> _Ask:
        lineages = seen.lineages()
        doubts = {
            d.target: libvirt_lineage.doubt(since.get(DiskId(d.target)), d.target, lineages[d.target])
            for d in seen.disks
        }
        checkpoint = self._room.names.new_checkpoint() if any(v.tracked for v in lineages.values()) else ""
        ask = _Ask(seen.disks, lineages, since, checkpoint, doubts)
        self._remind(ask)
        return ask

    def _remind(self, ask: _Ask) -> None:
        """libvirt knows every checkpoint that is asked for, or it is in doubt."""
        known = self._domain.checkpoints()
        for name in {ask.old(d.target) for d in ask.disks} - {""}:
            targets = [d.target for d in ask.disks if ask.old(d.target) == name]
            if name in known and set(targets) <= set(libvirt_xml.bitmaps(known[name])):
                continue
            there = [t for t in targets if self._redefined(name, [t])]
            ask.doubts |= {
                t: f"Checkpoint {name} is gone from disk {t}: the machine or the disk was restarted or replaced"
                for t in targets
                if t not in there
            }
            if len(there) > 1:
                self._redefined(name, there)

    def _redefined(self, name: str, targets: Sequence[str]) -> bool:
        try:
            self._domain.redefine(libvirt_xml.checkpoint(name, targets, made=_REDEFINED))
        except LibvirtRefused:
            return False
        return True

    def _begin(self, ask: _Ask, opened: _Open, line: Line) -> None:
        """The job runs, and the checkpoint records.  A bitmap that libvirt finds broken is given up, and the disk compared."""
        for _ in range(len(ask.disks) + 2 + PORTS):
            targets = [] if ask.recording else ask.recorded
            checkpoint = libvirt_xml.checkpoint(
                ask.checkpoint, targets, [d.target for d in ask.disks if d.target not in targets]
            )
            try:
                wanted = self._wanted(ask, opened)
                formatted = self._formatted(wanted, opened.folder)
                backup = libvirt_xml.backup(line.server, wanted, self._skipped)
                self._domain.begin_backup(backup, checkpoint if targets else "", formatted=formatted)
            except LibvirtRefused as refused:
                if not line.another_port(refused.words) and not _given_up(ask, refused):
                    raise self._explained(refused) from refused
            else:
                return
        raise HostUnreachable(f"Machine {self._machine.name}: libvirt refuses every checkpoint; use --full")

    @property
    def _skipped(self) -> Collection[str]:
        return libvirt_xml.spec(self._domain.xml()).skipped

    def _wanted(self, ask: _Ask, opened: _Open) -> Sequence[Wanted]:
        names = opened.names
        return [
            Wanted(
                d.target,
                _export(names, d),
                self._room.scratch(opened.folder, names, d.target, d.path),
                ask.old(d.target),
                names.merged,
            )
            for d in ask.disks
        ]

    def _formatted(self, wanted: Sequence[Wanted], folder: Path) -> bool:
        """Empty scratch is there when this returns; False leaves it to libvirt, where another host's storage can't be used.

        libvirt has QEMU format it, and 7.2 fails an assertion, which is the end of the guest, when anybody lists its nodes
        meanwhile: whoever asks libvirt for the size of a disk.
        """
        room, sizes = self._room, {w.scratch: self._domain.capacity(w.target) for w in wanted}
        if not room.where.local:
            images = {path: empty_qcow2(size) for path, size in sizes.items()}
            return "" not in sizes and libvirt_away.put(room, self._domain.host, folder, images)
        for path, size in sizes.items():
            Path(path).unlink(missing_ok=True)  # of a try that was refused
            write_empty_qcow2(Path(path), size, Peer(0, room.uid, room.gid))
        return True

    def _explained(self, refused: LibvirtRefused) -> HvbackupError:
        """libvirt's refusal in our words."""
        name, words = self._machine.name, refused.words
        if refused.code == libvirt_host.OFF_LINE:
            return Busy(f"Machine {name} was switched off at this moment; try again ({words})")
        if refused.code == libvirt_host.UNSUPPORTED:
            return UsageError(f"Machine {name}: libvirt can't do this with one of its disks: {words}")
        if refused.code == libvirt_host.LOCKED or (refused.code == libvirt_host.NOT_NOW and "job" in words):
            return Busy(f"Machine {name} is held by another job; wait for it to end ({words})")
        if "different size" in words:
            return Busy(f"Machine {name}: a disk was resized at this moment; try again ({words})")
        if "No space left" in words:
            return SpaceExhausted(f"Machine {name}: no room left for scratch: {words}")
        return refused

    # --- its end -------------------------------------------------------------------------------------------------------

    def _verify(self, opened: _Open) -> Sequence[str]:
        broken = opened.watch.reason
        if not broken and not self._is_open(opened.names.prefix):
            broken = "its backup job ended early"
        if broken:
            raise ReadFailed(
                f"The snapshot of machine {self._machine.name} did not hold: {broken}; "
                "nothing read from it is used, run the capture again"
            )
        return []

    def _is_open(self, prefix: str) -> bool:
        return any(e.startswith(prefix) for e in libvirt_xml.exports(self._domain.backup_xml()))

    def _leave(self, opened: _Open) -> None:
        """Take the frozen view down.  What a daemon that does not answer keeps, `release` takes later, and reports."""
        with contextlib.suppress(HostUnreachable):
            self._end(opened)

    def _end(self, opened: _Open) -> None:
        try:
            self.end_job(opened.names.prefix)
            libvirt_away.remove(self._domain.host, opened.folder)
            if not self._room.is_marked(opened.folder):  # else `release` looks into QEMU first
                self._room.remove(opened.folder)
        except HostUnreachable:
            opened.watch.abandon()
            raise
        else:
            opened.watch.stop()
        finally:
            if opened.line:
                opened.line.close()

    def end_job(self, prefix: str) -> None:
        """No backup with this prefix is open, and the machine runs as it did."""
        with contextlib.suppress(NotFound):  # it is gone, and the job with it
            if self._is_open(prefix):
                self._abort(prefix)
            end = time.monotonic() + self._room.limits.settle_seconds
            while self._is_open(prefix):
                if time.monotonic() > end:
                    raise HostUnreachable(f"The backup job of machine {self._machine.name} does not end; try again")
                time.sleep(_POLL_SECONDS)
            if self._domain.paused_by_error():
                self._domain.resume()

    def _abort(self, prefix: str) -> None:
        """Its end was asked for, or it has ended by itself.  Raises LibvirtRefused."""
        try:
            self._domain.abort_job()
        except LibvirtRefused:
            if self._is_open(prefix):
                raise

    # --- release -------------------------------------------------------------------------------------------------------

    def release(self, folders: Sequence[Path], keeping: Collection[str]) -> None:
        """What `Hypervisor.release` promises, of a running domain whose job has ended."""
        for folder in filter(qemu_freeze.left_over, folders):
            libvirt_freeze.thaw(self._domain, folder, self._room.freezing)
        names = self._room.names
        known = self._domain.checkpoints()
        for name in known:
            if names.is_checkpoint(name) and name not in keeping:
                self._delete(name)
        if self._room.where.local:
            self._delete_unknown(set(known) | set(keeping))

    def _delete(self, name: str) -> None:
        try:
            self._domain.delete_checkpoint(name)
        except LibvirtRefused as refused:
            if "not found in backing chain" not in refused.words:
                raise
            self._domain.forget_checkpoint(name)  # its bitmap is gone already

    def _delete_unknown(self, known: Collection[str]) -> None:
        """Bitmaps of ours that libvirt lost: it is told of them, so that it can delete them."""
        disks = libvirt_xml.spec(self._domain.xml()).disks
        for disk in disks:
            info = libvirt_lineage.here(disk, in_use=True).info
            for name in info.bitmaps if info else ():
                if self._room.names.is_checkpoint(name) and name not in known and self._redefined(name, [disk.target]):
                    self._delete(name)


def _given_up(ask: _Ask, refused: LibvirtRefused) -> bool:
    """Whether another try makes sense: without the bitmap that was refused, or without a new checkpoint."""
    if refused.code in (libvirt_host.NO_CHECKPOINT, libvirt_host.INCONSISTENT):
        named = _DISK.search(refused.words)
        trusted = [d.target for d in ask.disks if not ask.doubts[d.target]]
        for target in [named[1]] if named and named[1] in trusted else trusted:
            ask.doubts[target] = (
                f"Checkpoint {ask.since[DiskId(target)].value} on disk {target} is missing or broken: "
                "the machine was not stopped cleanly, or its disk was replaced"
            )
        return bool(trusted)
    if ask.recorded and not ask.recording and ("bitmap" in refused.words or "qcow2 v2" in refused.words):
        ask.notes.append(f"Changes can't be recorded, so the next capture compares every disk: {refused.words}")
        ask.checkpoint = ""
        return True
    return False


def _export(names: LeaseNames, disk: DomainDisk) -> str:
    return f"{names.prefix}{disk.target}"
