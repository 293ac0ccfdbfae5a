"""Many snapshots of one QEMU, one after the other, at little cost each.

Made once for all of them: the folder, the NBD server, the watchdog.  Made anew for each: an empty scratch image (we write it
ourselves, and unlink it as soon as QEMU has it open), its node, the job, the export, the bitmap of the next cycle.  Between the
freezing and the end nobody holds the monitor, so the watchdog, and everybody else, can have it.

    killed after                       left behind                      cleaned by
    1 scratch file                     a file                           the lease: `release`
    2 node, transaction, export        node, job, export, bitmaps       the watchdog ends the job; `release` the rest
    3 end of the frozen view           bitmaps                          the next cycle; `release`

Bitmaps of cycles have 4 KiB grain: at 64 KiB, scattered small writes would be read twelve times over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvbackup import extents
from hvbackup.errors import DiskReplaced, HostUnreachable, HvbackupError, ReadFailed
from hvbackup.hypervisors import (
    LEFT_ALONE,
    Changes,
    Seat,
    Standstill,
    qemu_fleece,
    qemu_fleeced,
    qemu_freeze,
    qemu_seats,
    qemu_server,
    qemu_stop,
)
from hvbackup.hypervisors.qemu_graph import Bitmap, Drive
from hvbackup.hypervisors.qemu_names import TOKEN_KIND, LeaseNames
from hvbackup.hypervisors.qemu_scratch import write_empty_qcow2
from hvbackup.hypervisors.qemu_seats import Used
from hvbackup.hypervisors.qemu_watch import Watch
from hvbackup.hypervisors.qemu_wire import Command, Wire, dashed, until
from hvbackup.hypervisors.qmp import CommandRefused, Peer
from hvbackup.model import (
    Consistency,
    Continuity,
    Disk,
    DiskId,
    Instant,
    Machine,
    MachineConfig,
    Token,
)
from hvbackup.nbd.client import NbdClient
from hvbackup.nbd.uri import NbdUri

GRAIN_BYTES = qemu_fleece.FINE_BYTES
_DIRTY = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """What the cycles of one machine have in common."""

    path: Path
    machine: Machine
    config: MachineConfig
    names: LeaseNames
    folder: Path
    reply_seconds: float
    settle_seconds: float
    reserve_bytes: int
    clock: Callable[[], int]
    ask: str  # the command that tells where the disks are used: devices, or the exports of a storage daemon
    seats: Mapping[str, Used]  # by device or export, looked up before the disks were
    doubt: Callable[[Drive, Token | None], str]
    sweep: Callable[[], None]
    release: Callable[[Collection[Token]], None]
    plan: Callable[[], qemu_freeze.Plan]  # how the guest can be frozen now
    life: Callable[[Disk], str] = qemu_fleeced.life  # of tokens


@dataclass(slots=True)
class CycleDisk:
    """One disk at the moment."""

    disk: Disk
    token: Token | None
    uri: NbdUri
    merged: str
    doubt: str
    _client: NbdClient | None = None

    def changes(self, since: Token | None) -> Changes:
        """What the bitmap says; what of it is zero is seen when it is read."""
        if since is None or self.doubt:
            whole = extents.whole(self.disk.size)
            return Changes(Continuity.UNKNOWN, whole, extents.EMPTY, self.doubt or "No earlier checkpoint was given")
        context = f"qemu:dirty-bitmap:{self.merged}"
        client = NbdClient.open(self.uri, contexts=[context])
        self._client = client
        if context not in client.contexts:
            raise HostUnreachable(f"{self.uri}: QEMU does not offer {context} on disk {self.disk.id}")
        rows = client.status(context)
        return Changes(Continuity.INCREMENTAL, extents.spans(rows[(rows[:, 2] & _DIRTY) != 0, :2]), extents.EMPTY)

    def open(self) -> NbdClient:
        """The connection that told what changed."""
        client, self._client = self._client, None
        return client or NbdClient.open(self.uri)

    def close(self) -> None:
        """Let go of the connection if nobody read through it."""
        if self._client:
            self._client.close()
            self._client = None


@dataclass(slots=True)
class CycleFrozen:
    """All disks at one moment."""

    machine: Machine
    t: Instant
    config: MachineConfig
    disks: Sequence[CycleDisk]
    prove: Callable[[], None]
    consistency: Consistency = Consistency.CRASH
    standstill: Standstill = LEFT_ALONE
    notes: Sequence[str] = field(default_factory=tuple)

    def verify(self) -> Sequence[str]:
        """Every disk was copied before each write until now.  Raises ReadFailed when not."""
        self.prove()
        return ()


class QemuCycles:
    """See the module.  Thread safety: one thread."""

    def __init__(self, setting: Setting, peer: Peer, drives: Sequence[Drive], server: qemu_server.Server) -> None:
        self._set, self._peer, self._server = setting, peer, server
        self._drives = list(drives)
        self._watch: Watch | None = None
        self._keeping: set[str] | None = None  # names of checkpoints; None: not told yet, so nothing goes
        self._wire: Wire | None = None

    def snapshot(
        self, since: Mapping[DiskId, Token], *, freeze: bool = False, seat: Seat | None = None
    ) -> AbstractContextManager[CycleFrozen]:
        """Freeze all disks at one moment."""
        return self._frozen(since, freeze, seat)

    def keep(self, tokens: Collection[Token]) -> None:
        """What the next cycle, and `close`, do not remove."""
        self._keeping = {t.value for t in tokens if t.kind == TOKEN_KIND}

    def close(self) -> None:
        """Nothing is left but the checkpoints that are kept.  Where that fails the watchdog sees to what the guest waits for."""
        self._drop_wire()
        try:
            if self._keeping is not None:
                self._set.release([Token(TOKEN_KIND, name) for name in self._keeping])
        except BaseException:
            if self._watch:
                self._watch.abandon()
            raise
        if self._watch and qemu_stop.left_over(self._set.folder):
            self._watch.abandon()
        elif self._watch:
            self._watch.stop()

    # --- one cycle ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _frozen(self, since: Mapping[DiskId, Token], freeze: bool, seat: Seat | None) -> Iterator[CycleFrozen]:
        self._guard()
        try:
            frozen = self._begin(since, self._set.plan() if freeze else qemu_freeze.Plan(), seat)
            try:
                yield frozen
            finally:
                for disk in frozen.disks:
                    disk.close()
            self._end()
        except BaseException as e:
            self._drop_wire()
            with contextlib.suppress(HvbackupError):  # the first error says more; the lease and the watchdog stay
                self._sweep()
            if isinstance(e, CommandRefused | ReadFailed):
                self._refuse_moved()
            raise

    def _refuse_moved(self) -> None:
        """A QEMU that its machine has left while this went on refuses anything.  Raises HostUnreachable, which says why."""
        try:
            with Wire(self._set.path, self._set.reply_seconds) as wire:
                status, migration = wire.all([("query-status", {}), ("query-migrate", {})])
        except HvbackupError:
            return
        qemu_stop.refuse_elsewhere(self._set.path, status, lambda: migration)

    def _guard(self) -> None:
        """A watchdog looks after the scratch; the one before may have had to let the guest go, or have been killed."""
        s = self._set
        if self._watch is not None and not self._watch.reason and not self._watch.dead:
            return
        if self._watch is not None:
            self._watch.stop()
        qemu_fleece.refuse_full(s.folder, s.reserve_bytes)
        self._watch = Watch(s.path, s.names.prefix, s.folder, s.reserve_bytes)

    def _begin(self, since: Mapping[DiskId, Token], plan: qemu_freeze.Plan, seat: Seat | None) -> CycleFrozen:
        s = self._set
        with Wire(s.path, s.reply_seconds) as wire:
            drives = self._present(wire)
            doubts = {d.disk.id: s.doubt(d, since.get(d.disk.id)) for d in drives}
            old = {d.disk.id: d.bitmaps[since[d.disk.id].value] for d in drives if not doubts[d.disk.id]}
            checkpoint = s.names.store.new_checkpoint()
            switch = _Switch(self, wire, drives, old, checkpoint)
            moment = self._moment(switch, plan, seat)
        disks = []
        for drive in drives:
            disk = drive.disk
            uri = self._server.export(f"{s.names.prefix}{disk.id}")
            token = Token(TOKEN_KIND, checkpoint, s.life(disk))
            disks.append(CycleDisk(disk, token, uri, s.names.merged, doubts[disk.id]))
        t = Instant(switch.t)
        return CycleFrozen(
            s.machine, t, s.config, disks, self._prove, moment.consistency, moment.standstill, moment.notes
        )

    def _present(self, wire: Wire) -> Sequence[Drive]:
        """The disks as they are now.  Raises HostUnreachable when one is not what it was, is gone, or is new.

        The bitmap of a node that nobody writes to any more would say that nothing changed.
        """
        status: list[Command] = [] if self._set.ask == "query-block-exports" else [("query-status", {})]
        answers = wire.all([("query-named-block-nodes", {"flat": True}), (self._set.ask, {}), *status])
        if status:
            qemu_stop.refuse_elsewhere(self._set.path, answers[2], lambda: wire.one("query-migrate"))
        nodes = {n["node-name"]: n for n in answers[0]}
        then, now = self._set.seats, qemu_seats.seats_of(answers[1], {d.node for d in self._drives})
        said = f"Disks of machine {self._set.machine.name} are not what they were"
        if files := qemu_seats.other_files(self._drives, nodes):
            raise DiskReplaced(f"{said}: another file is in the node of {', '.join(files)}")
        changed = [*qemu_seats.moved(then, now), *qemu_seats.unplugged(then, now), *qemu_seats.added(then, now)]
        if changed := [*changed, *qemu_seats.other_sizes(self._drives, nodes)]:
            raise HostUnreachable(f"{said}: {', '.join(changed)}")
        found = []
        for drive in self._drives:
            bitmaps = {b["name"]: Bitmap.parse(b) for b in nodes[drive.node].get("dirty-bitmaps", ()) if b.get("name")}
            found.append(Drive(drive.disk, drive.node, drive.driver, drive.read_only, drive.keeps_bitmaps, bitmaps))
        return found

    def _moment(self, switch: _Switch, plan: qemu_freeze.Plan, seat: Seat | None) -> qemu_freeze.Moment:
        """The moment itself: alone, with the guest's file systems frozen, or together with other machines."""
        if seat and (why := qemu_stop.can_stop(switch.wire)):
            seat.leave(why)
            seat = None
        if not plan.freezes and seat is None:
            switch.all_at_once()
            return qemu_freeze.Moment(plan.notes, Consistency.CRASH, Standstill(remark=plan.remark))
        switch.prepare()
        taken = qemu_freeze.moment(plan, self._set.folder, lambda: self._switched(switch, seat))
        switch.export()
        return taken

    def _switched(self, switch: _Switch, seat: Seat | None) -> Sequence[str]:
        """The transaction, with the machine stopped around it where others stop as well."""
        if seat is None or not seat.ready():
            switch.transact()
            return []
        assert self._watch is not None  # `_guard` has seen to it
        with qemu_stop.stopped(switch.wire, self._watch, self._set.folder):
            together = seat.standing()
            if together:
                switch.transact()
                seat.switched(Instant(switch.t))
        if not together:
            switch.transact()
        return []

    @property
    def names(self) -> LeaseNames:
        """What all that is made is called."""
        return self._set.names

    def now(self) -> int:
        """By the clock of moments."""
        return self._set.clock()

    def scratch_path(self, index: int) -> Path:
        """Where the scratch of a disk is made."""
        return self._set.folder / f"scratch{index}.qcow2"

    def scratch(self, index: int, drive: Drive) -> Command:
        """An empty scratch image, and the command that opens it."""
        names, path = self._set.names, self.scratch_path(index)
        path.unlink(missing_ok=True)
        write_empty_qcow2(path, drive.disk.size, self._peer)
        cache = {"no-flush": True}  # losing the scratch with the host loses nothing
        file = dashed(driver="file", node_name=names.file(index), filename=str(path), cache=cache)
        return "blockdev-add", dashed(
            driver="qcow2", node_name=names.fleece(index), file=file, backing=drive.node, cache=cache, discard="unmap"
        )

    def actions(
        self, drives: Sequence[Drive], old: Mapping[DiskId, Bitmap], checkpoint: str, *, persistent: bool
    ) -> list[dict[str, Any]]:
        """What happens at the moment, all or nothing."""
        names, actions = self._set.names, []
        for index, drive in enumerate(drives):
            node = drive.node
            stays = persistent and drive.keeps_bitmaps
            actions.append(_action("add", node, name=checkpoint, granularity=GRAIN_BYTES, persistent=stays))
            if source := old.get(drive.disk.id):
                actions.append(_action("add", node, name=names.merged, granularity=source.granularity, disabled=True))
                actions.append(_action("merge", node, target=names.merged, bitmaps=[source.name]))
            actions += [_action("remove", node, name=name) for name in self._unwanted(drive, source)]
            backup = dashed(job_id=names.job(index), device=node, target=names.fleece(index), sync="none")
            actions.append({"type": "blockdev-backup", "data": {**backup, "auto-dismiss": False}})
        return actions

    def _unwanted(self, drive: Drive, source: Bitmap | None) -> list[str]:
        """Checkpoints of ours that no barrier and no point names any more."""
        if self._keeping is None:
            return []
        kept = {*self._keeping, source.name if source else ""}
        return [
            b.name for b in drive.bitmaps.values()
            if self._set.names.store.is_checkpoint(b.name) and b.name not in kept and not b.busy
        ]  # fmt: skip

    def _prove(self) -> None:
        """The frozen view held until now.  The connection stays, for the end, which follows at once."""
        s = self._set
        self._drop_wire()
        wire = self._wire = Wire(s.path, s.reply_seconds)
        jobs = {job["id"]: job for job in wire.one("query-jobs")}
        broken = self._watch.reason if self._watch else ""
        for index in range(len(self._drives)):
            job = jobs.get(s.names.job(index))
            if job is None or job["status"] not in ("running", "ready", "paused", "standby") or job.get("error"):
                said = (job or {}).get("error") or (job or {}).get("status", "gone")
                broken = broken or f"job {s.names.job(index)}: {said}"
        if broken:
            raise ReadFailed(
                f"The snapshot of machine {s.machine.name} did not hold: {broken}; nothing read from it is used"
            )

    def _end(self) -> None:
        """The frozen view is gone, and the copied bitmap."""
        s, names = self._set, self._set.names
        wire = self._wire or Wire(s.path, s.reply_seconds)
        numbers = range(len(self._drives))
        try:
            ending: list[Command] = [("block-export-del", {"id": names.export(i), "mode": "hard"}) for i in numbers]
            ending += [("job-cancel", {"id": names.job(i)}) for i in numbers]
            wire.all(ending)
            until(lambda: _is_over(wire, names), f"jobs {names.prefix}*", s.path, s.settle_seconds)
            last: list[Command] = [("job-dismiss", {"id": names.job(i)}) for i in numbers]
            last += [("blockdev-del", dashed(node_name=names.fleece(i))) for i in numbers]
            last += [("block-dirty-bitmap-remove", {"node": d.node, "name": names.merged}) for d in self._drives]
            wire.all(last)
        finally:
            self._wire = None
            wire.close()

    def _sweep(self) -> None:
        """Nothing of a cycle that failed is left, however far it came; what records changes stays."""
        self._set.sweep()

    def _drop_wire(self) -> None:
        if self._wire:
            self._wire.close()
            self._wire = None


class _Switch:
    """From the running disks to their frozen view: scratch nodes, the transaction, exports."""

    def __init__(
        self,
        cycles: QemuCycles,
        wire: Wire,
        drives: Sequence[Drive],
        old: Mapping[DiskId, Bitmap],
        checkpoint: str,
    ) -> None:
        self._cycles, self.wire, self._drives, self._old, self._checkpoint = cycles, wire, drives, old, checkpoint
        self.t = 0  # labelled when it is certain to be over: nothing the guest wrote after it is in it

    def prepare(self) -> None:
        """Nothing but the transaction and the exports is missing."""
        self.wire.all(self._adds())
        self._unlink()

    def transact(self) -> None:
        """The moment."""
        self._all([], [])

    def export(self) -> None:
        """The frozen view can be read."""
        self.wire.all(self._exports())

    def all_at_once(self) -> None:
        """Nodes, transaction and exports go out together; what depends on what failed is refused too."""
        self._all(self._adds(), self._exports())

    def _all(self, before: Sequence[Command], after: Sequence[Command]) -> None:
        try:
            self._send(before, after, persistent=True)
        except CommandRefused as refused:
            if "persistent" not in refused.reason:
                raise
            self._send([], after, persistent=False)
        finally:
            self._unlink()

    def _send(self, before: Sequence[Command], after: Sequence[Command], *, persistent: bool) -> None:
        def seen(number: int) -> None:
            if number == len(before):
                self.t = self._cycles.now()

        actions = self._cycles.actions(self._drives, self._old, self._checkpoint, persistent=persistent)
        self.wire.all([*before, ("transaction", {"actions": actions}), *after], seen)

    def _adds(self) -> list[Command]:
        return [self._cycles.scratch(index, drive) for index, drive in enumerate(self._drives)]

    def _exports(self) -> list[Command]:
        names = self._cycles.names
        return [_export(names, index, drive, drive.disk.id in self._old) for index, drive in enumerate(self._drives)]

    def _unlink(self) -> None:
        """QEMU has the scratch open; it goes with the node."""
        for index in range(len(self._drives)):
            self._cycles.scratch_path(index).unlink(missing_ok=True)


def _is_over(wire: Wire, names: LeaseNames) -> bool:
    exports, jobs = wire.all([("query-block-exports", {}), ("query-jobs", {})])
    mine = [j for j in jobs if str(j["id"]).startswith(names.prefix)]
    return all(j["status"] == "concluded" for j in mine) and not any(
        str(e["id"]).startswith(names.prefix) for e in exports
    )


def _export(names: LeaseNames, index: int, drive: Drive, has_bitmap: bool) -> Command:
    extra: dict[str, Any] = {"bitmaps": [names.merged]} if has_bitmap else {}
    name = f"{names.prefix}{drive.disk.id}"
    return "block-export-add", dashed(
        type="nbd", id=names.export(index), node_name=names.fleece(index), name=name, **extra
    )


def _action(what: str, node: str, **data: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{what}", "data": {"node": node, **data}}
