"""Each write of a QEMU's disks goes to our target too, by a mirror of every disk that copies nothing but what is written.

    killed after                       left behind                      cleaned by
    1 folder, watchdog                 files                            the lease: `release`
    2 nodes, mirrors                   the guest waits for the target   the target ends with us; the watchdog cuts and cancels
    3 checkpoints                      bitmaps                          `release`, but those that barrier and point name

What was measured with QEMU 7.2, and shapes this: a write is on the disk before it is at the target, so whoever reads a disk and
wants what he saw to be in the stream has to drain QEMU first (any transaction does).  The mirror forwards no flush and swallows
discards.  A target that hangs holds the guest's write for ever, and a job that is cancelled meanwhile holds QEMU's main loop:
see qemu_stream_guard.py.  `qom-set` of a drive goes past the mirror unseen, and a machine that has moved to another QEMU writes
there, while the mirrors here stay ready: therefore `check`.  A connection that broke is not to be taken up again: its job stops,
the guest goes on, and another life begins with another target.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from hvbackup.errors import Busy, HostUnreachable, HvbackupError, StreamBroken, StreamBypassed, StreamUncertain
from hvbackup.hypervisors import qemu_seats, qemu_server, qemu_stop
from hvbackup.hypervisors.qemu_config import CommandLine
from hvbackup.hypervisors.qemu_cycles import GRAIN_BYTES, CycleDisk, Setting
from hvbackup.hypervisors.qemu_graph import Bitmap, Drive, device_id
from hvbackup.hypervisors.qemu_names import TOKEN_KIND
from hvbackup.hypervisors.qemu_seats import Used
from hvbackup.hypervisors.qemu_watch import StreamGuard, relieve
from hvbackup.hypervisors.qemu_wire import Command, Wire, dashed, until
from hvbackup.hypervisors.qmp import CommandRefused, Peer, Qmp
from hvbackup.model import DiskId, Token

TARGET_SOCKET = "tgt.sock"  # no longer than the name of the server's, whose path was looked at
_DRAINS = 5  # of a guest that never pauses
_FIRST_REPLY_SECONDS = 2.0  # of a second monitor: one that another program holds is none of ours

_TAKEN = ("busy", "in use", "Need a root block node")  # the last one: another job has put a node above the disk's

Arrived = Callable[[DiskId], int]  # bytes of a disk that have arrived at the target so far


class QemuStream:
    """See the module.  Thread safety: one thread."""

    def __init__(
        self,
        setting: Setting,
        peer: Peer,
        drives: Sequence[Drive],
        server: qemu_server.Server,
        line: CommandLine,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """`aliases`: what QEMU calls the devices of disks whose names are others."""
        self._aliases = aliases or {}
        self._set, self._peer, self._server = setting, peer, server
        self._drives = list(drives)
        self._second = [m for m in monitors(line) if m.resolve() != setting.path.resolve()]
        self._guard: StreamGuard | None = None
        self._keeping: set[str] | None = None  # names of checkpoints; None: not told yet, so nothing goes
        self._seats: Mapping[str, Used] = {}  # where the guest's devices were after arming
        self._offset: dict[DiskId, int] = {}  # what QEMU had counted and the target had not, by disk
        self._failed: dict[DiskId, int] = {}  # writes that had failed before, by disk
        self.disks = [d.disk for d in drives]
        self.socket = qemu_server.socket_path(setting.folder).with_name(TARGET_SOCKET)

    @property
    def reason(self) -> str:
        """Why the watchdog broke the stream off; empty while it did not."""
        return self._guard.reason if self._guard else ""

    # --- a stream begins and ends ---------------------------------------------------------------------------------------

    def arm(self, target: int, ring: Path, arrived: Arrived) -> None:
        """Every write that begins from here on goes to the target's export that is called as its disk.

        Raises Busy when another job holds a disk, HostUnreachable.
        """
        s = self._set
        if os.geteuid() == 0:
            os.chown(self.socket, self._peer.uid, self._peer.gid)
        with contextlib.ExitStack() as stack:
            fds = [stack.enter_context(line).fileno for line in self._out_of_band()]
            self._guard = StreamGuard(s.path, s.names.prefix, qemu_stop.marker(s.folder), target, ring, fds)
        with self._wire() as wire:
            self._refuse_standing(wire, HostUnreachable)
            try:
                wire.all([c for i, drive in enumerate(self._drives) for c in self._mirror(i, drive)])
            except CommandRefused as refused:
                raise self._explained(refused) from refused
            until(lambda: self._ready(wire), "the beginning of its mirrors", s.path, s.settle_seconds)
            self._seats = qemu_seats.seats_of(wire.one(s.ask), self._nodes())
            self._offset = offsets([d.id for d in self.disks], arrived, lambda: self._drained(wire))
        if passed := self._passed(self._seats):
            raise StreamBroken(f"QEMU at {s.path} does not send the writes of {', '.join(passed)} through the mirror")

    def _drained(self, wire: Wire) -> Mapping[DiskId, int]:
        """Bytes that the guest has written, all of which have arrived, or went by before we were here."""
        wire.one("transaction", actions=[])  # drains
        counted, failed = self._counted(wire)
        self._failed = self._failed or failed
        return counted

    def _out_of_band(self) -> Iterator[_OutOfBand]:
        """A second monitor, for the watchdog: open before anything can hang.  Without one it has to come by the first."""
        for path in self._second:
            with contextlib.suppress(HostUnreachable):
                yield _OutOfBand(path)
                return

    def _mirror(self, index: int, drive: Drive) -> Iterator[Command]:
        names = self._set.names
        server = {"type": "unix", "path": str(self.socket)}
        yield (
            "blockdev-add",
            dashed(driver="nbd", node_name=names.target(index), server=server, export=drive.disk.id, open_timeout=5),
        )
        errors = {"on-target-error": "stop", "on-source-error": "report"}  # no answer of ours is ever the guest's error
        yield (
            "blockdev-mirror",
            {
                **dashed(job_id=names.mirror(index), device=drive.node, target=names.target(index), sync="none"),
                **dashed(copy_mode="write-blocking", granularity=GRAIN_BYTES, auto_dismiss=False),
                **dashed(filter_node_name=names.filter(index)),
                **errors,
            },
        )

    def _ready(self, wire: Wire) -> bool:
        found = self._jobs(wire)
        return len(found) == len(self._drives) and all(job["status"] == "ready" for job in found)

    def _jobs(self, wire: Wire) -> list[dict[str, Any]]:
        mine = {self._set.names.mirror(i) for i in range(len(self._drives))}
        return [job for job in wire.one("query-jobs") if job["id"] in mine]

    def _explained(self, refused: CommandRefused) -> HvbackupError:
        if not any(word in refused.reason for word in _TAKEN):
            return refused
        return Busy(
            f"QEMU at {self._set.path}: {refused.reason}; a stream and another job exclude each other: "
            "wait for the other one or cancel it, or protect the machine without --stream"
        )

    def keep(self, tokens: Collection[Token]) -> None:
        """What `settle`, and `close`, do not remove."""
        self._keeping = {t.value for t in tokens if t.kind == TOKEN_KIND}

    def close(self, *, healthy: bool) -> None:
        """The guest's writes are its own again, and nothing is left but the checkpoints that are kept."""
        try:
            self._disarm(healthy and not self.reason)
            if self._keeping is None:
                self._set.sweep()
            else:
                self._set.release([Token(TOKEN_KIND, name) for name in self._keeping])
        except BaseException:
            if self._guard:
                self._guard.abandon()
            raise
        if self._guard:
            self._guard.stop()

    def _disarm(self, healthy: bool) -> None:
        """The mirrors are gone.  What QEMU keeps, `release` finds by its name, and reports.

        With a target that answers they end in good order, which drains QEMU; should it hang now, the guard kills it.
        """
        if healthy and self._ended_in_order():
            return
        if self._guard:
            self._guard.relieve(self._set.settle_seconds)

    def _ended_in_order(self) -> bool:
        s, over = self._set, ("concluded", "null")
        try:
            with self._wire() as wire:
                wire.all([("block-job-cancel", {"device": job["id"]}) for job in self._jobs(wire)])
                until(
                    lambda: all(j["status"] in over for j in self._jobs(wire)), "its mirrors", s.path, s.settle_seconds
                )
        except HostUnreachable:
            return False
        return True

    # --- while it goes on -----------------------------------------------------------------------------------------------

    def settle(self) -> Mapping[DiskId, Token]:
        """Every write that was on a disk before is at the target when this returns; new checkpoints record what follows."""
        with self._wire() as wire:
            return self._settled(wire, {})

    @contextmanager
    def changed(self, since: Mapping[DiskId, Token]) -> Iterator[Sequence[CycleDisk]]:
        """The disks as they are now and go on to be, to read what changed until now; as `settle` otherwise."""
        s = self._set
        with self._wire() as wire:
            drives = self._present(wire)
            doubts = {d.disk.id: s.doubt(d, since.get(d.disk.id)) for d in drives}
            old = {d.disk.id: d.bitmaps[since[d.disk.id].value] for d in drives if not doubts[d.disk.id]}
            tokens = self._settled(wire, old)
            wire.all([self._export(i, d, d.disk.id in old) for i, d in enumerate(drives)])
        disks = [
            CycleDisk(d.disk, tokens[d.disk.id], self._server.export(f"{s.names.prefix}{d.disk.id}"), s.names.merged,
                      doubts[d.disk.id])
            for d in drives
        ]  # fmt: skip
        try:
            yield disks
        finally:
            for disk in disks:
                disk.close()
            with self._wire() as wire:
                wire.all([("block-export-del", {"id": s.names.export(i), "mode": "hard"}) for i in range(len(drives))])
                until(lambda: not self._exports(wire), f"exports {s.names.prefix}*", s.path, s.settle_seconds)
                wire.all([_remove(d.node, s.names.merged) for d in drives if d.disk.id in old])

    def _exports(self, wire: Wire) -> list[Any]:
        return [e for e in wire.one("query-block-exports") if str(e["id"]).startswith(self._set.names.prefix)]

    def _export(self, index: int, drive: Drive, has_bitmap: bool) -> Command:
        names = self._set.names
        extra: dict[str, Any] = {"bitmaps": [names.merged]} if has_bitmap else {}
        name = f"{names.prefix}{drive.disk.id}"
        return "block-export-add", dashed(type="nbd", id=names.export(index), node_name=drive.node, name=name, **extra)

    def _settled(self, wire: Wire, old: Mapping[DiskId, Bitmap]) -> Mapping[DiskId, Token]:
        checkpoint = self._set.names.store.new_checkpoint()
        try:
            wire.one("transaction", actions=self._actions(checkpoint, old, persistent=True))
        except CommandRefused as refused:
            if "persistent" not in refused.reason:
                raise
            wire.one("transaction", actions=self._actions(checkpoint, old, persistent=False))
        self._remove_unwanted(wire, checkpoint)
        return {d.disk.id: Token(TOKEN_KIND, checkpoint, self._set.life(d.disk)) for d in self._drives}

    def _actions(self, checkpoint: str, old: Mapping[DiskId, Bitmap], *, persistent: bool) -> list[dict[str, Any]]:
        actions, merged = [], self._set.names.merged
        for drive in self._drives:
            stays = persistent and drive.keeps_bitmaps
            actions.append(_add(drive.node, checkpoint, GRAIN_BYTES, persistent=stays))
            if source := old.get(drive.disk.id):
                actions.append(_add(drive.node, merged, source.granularity, disabled=True))
                merge = {"node": drive.node, "target": merged, "bitmaps": [source.name]}
                actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
        return actions

    def _remove_unwanted(self, wire: Wire, fresh: str) -> None:
        """Checkpoints of ours that no barrier and no point names any more."""
        if self._keeping is None:
            return
        kept = {*self._keeping, fresh}
        wire.all([
            _remove(drive.node, name) for drive in self._present(wire) for name, bitmap in drive.bitmaps.items()
            if self._set.names.store.is_checkpoint(name) and name not in kept and not bitmap.busy
        ])  # fmt: skip

    def _present(self, wire: Wire) -> list[Drive]:
        """The disks with the bitmaps they have now.  Raises StreamBroken when one is gone, or in another file."""
        nodes = {n["node-name"]: n for n in wire.one("query-named-block-nodes", flat=True)}
        found = []
        if files := qemu_seats.other_files(self._drives, nodes):
            said = f"Disks of machine {self._set.machine.name} are not what they were"
            raise StreamBroken(f"{said}: another file is in the node of {', '.join(files)}")
        for d in self._drives:
            if d.node not in nodes:
                raise StreamBroken(f"Disk {d.disk.id} of machine {self._set.machine.name} is not where it was")
            bitmaps = {b["name"]: Bitmap.parse(b) for b in nodes[d.node].get("dirty-bitmaps", ()) if b.get("name")}
            found.append(Drive(d.disk, d.node, d.driver, d.read_only, d.keeps_bitmaps, bitmaps))
        return found

    def check(self, arrived: Arrived) -> None:
        """The machine runs here, its disks are what they were, and every write that QEMU has counted has arrived.

        Raises StreamBroken, StreamBypassed, HostUnreachable.
        """
        guard = self._guard
        if why := self.reason or ("its watchdog was killed" if guard and guard.dead else ""):
            raise StreamBroken(f"The stream of machine {self._set.machine.name} was broken off: {why}")
        with self._wire() as wire:
            self._refuse_standing(wire, StreamUncertain)
            jobs, blocks = self._jobs(wire), wire.one(self._set.ask)
            counted, failed = self._counted(wire)
        there = {disk: arrived(disk) for disk in counted}  # after QEMU was asked: what it counted has arrived by now
        self._compare(qemu_seats.seats_of(blocks, self._nodes()))
        if spoilt := [d for d, count in failed.items() if count != self._failed.get(d, 0)]:
            raise StreamUncertain(
                f"A write to disk {', '.join(spoilt)} failed, and a part of it may be there and not here"
            )
        for disk, count in counted.items():
            if count - self._offset[disk] > there[disk]:
                missed = count - self._offset[disk] - there[disk]
                raise StreamBypassed(f"Disk {disk}: the guest wrote {missed} bytes that did not come by the mirror")
        if len(jobs) != len(self._drives) or any(job["status"] != "ready" for job in jobs):
            # Of several disks one may have gone on without the others.
            said = [str(job.get("error", job["status"])) for job in jobs if job["status"] != "ready"]
            raise StreamBypassed(f"QEMU at {self._set.path} broke its mirror off: {'; '.join(said) or 'it is gone'}")

    def _nodes(self) -> set[str]:
        """Where a device of a captured disk may be: in its node, or the mirror's filter above it."""
        return {d.node for d in self._drives} | {self._set.names.filter(i) for i in range(len(self._drives))}

    def _passed(self, seats: Mapping[str, Used]) -> list[str]:
        """What uses a disk below the mirror's filter."""
        return [seat for seat, used in seats.items() if used.node in {d.node for d in self._drives}]

    def _compare(self, now: Mapping[str, Used]) -> None:
        """The disks are what they were.  Raises StreamBypassed, StreamUncertain, StreamBroken when only a new one is there."""
        then = self._seats
        if moved := [*qemu_seats.moved(then, now), *qemu_seats.replaced(then, now), *self._passed(now)]:
            raise StreamBypassed(f"The writes of {', '.join(moved)} do not go to the disk through the mirror any more")
        if changed := [*qemu_seats.unplugged(then, now), *qemu_seats.resized(then, now)]:
            raise StreamUncertain(
                f"Disks of machine {self._set.machine.name} are not what they were: {', '.join(changed)}"
            )
        if new := qemu_seats.added(then, now):
            raise StreamBroken(f"Machine {self._set.machine.name} has other disks than before: {', '.join(new)}")

    def _counted(self, wire: Wire) -> tuple[dict[DiskId, int], dict[DiskId, int]]:
        """Bytes that the guest has written, and its writes that failed, as QEMU counts them; a storage daemon does not."""
        known, filters = {d.id for d in self.disks}, {self._set.names.filter(i): d.id for i, d in enumerate(self.disks)}
        written: dict[DiskId, int] = {}
        failed: dict[DiskId, int] = {}
        for row in wire.one("query-blockstats") if self._set.ask == "query-block" else []:
            if not (row.get("qdev") or row.get("device")):
                continue
            name = device_id(row)
            seat = self._seats.get(qemu_seats.seat_of(row), Used(""))
            disk = filters.get(seat.node, DiskId(self._aliases.get(name, name)))
            if disk in known:
                written[disk] = int(row["stats"]["wr_bytes"])
                failed[disk] = int(row["stats"]["failed_wr_operations"])
        return written, failed

    def _refuse_standing(self, wire: Wire, kind: type[HostUnreachable]) -> None:
        """The machine runs here, and no write of it has failed half-way and waits to be made anew.  Raises `kind`."""
        if self._set.ask != "query-block":
            return  # a storage daemon, in which no machine runs
        status = wire.one("query-status")
        qemu_stop.refuse_elsewhere(self._set.path, status, lambda: wire.one("query-migrate"), kind)
        if status["status"] == "io-error":
            raise kind(
                f"Machine {self._set.machine.name} stands still, for an error of a disk (io-error): "
                "its writes are recorded again when it goes on"
            )

    def _wire(self) -> Wire:
        return Wire(self._set.path, self._set.reply_seconds)


def offsets(
    disks: Collection[DiskId], arrived: Arrived, drained: Callable[[], Mapping[DiskId, int]]
) -> dict[DiskId, int]:
    """How much QEMU has counted of each disk that never arrives: no less than that.

    What arrives while QEMU drains makes it more, and so much could go past us unseen: it drains again, until nothing does.  To
    ask what has arrived afterwards would be no way out: that is counted a moment later, and would be taken for missing.
    """
    found: dict[DiskId, int] = {}
    for _ in range(_DRAINS):
        before = {disk: arrived(disk) for disk in disks}
        now = {disk: count - before[disk] for disk, count in drained().items()}
        found = {disk: min(more, found.get(disk, more)) for disk, more in now.items()}
        if not now or all(arrived(disk) == count for disk, count in before.items()):
            break
    return found


def end_left(
    connect: Callable[[], AbstractContextManager[Qmp]],
    path: Path,
    folder_of: Callable[[str], Path],
    prefix: str,
    seconds: float,
) -> None:
    """Mirrors of dead streams are gone, if that can be done in time.  They are not cancelled like other jobs.

    The one who does it needs the monitor, which may serve one client at a time: nobody is connected meanwhile.
    `folder_of`: the folder of a lease, by its prefix; there is a marker in it when the machine may stand still (`qemu_stop`).
    """
    with connect() as qmp:
        left = [j for j in qmp.command("query-jobs") if j["type"] == "mirror" and str(j["id"]).startswith(prefix)]
    for of_lease in {str(job["id"]).rpartition("m")[0] for job in left}:
        relieve(path, of_lease, qemu_stop.marker(folder_of(of_lease)), seconds)


class _OutOfBand:
    """A monitor on which commands are carried out although the main loop hangs."""

    def __init__(self, path: Path) -> None:
        self._wire = Wire(path, _FIRST_REPLY_SECONDS, out_of_band=True)

    def __enter__(self) -> _OutOfBand:
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.close()

    @property
    def fileno(self) -> int:
        """For the watchdog, which has its own copy of it."""
        return self._wire.fileno()


def monitors(line: CommandLine) -> list[Path]:
    """The unix sockets on which a QEMU that was started like this serves its monitor protocol."""
    found = [value.partition(",")[0].removeprefix("unix:") for value in line.option("qmp") if value.startswith("unix:")]
    sockets = {}
    for value in line.option("chardev"):
        options = _options(value)
        if options.get("path"):
            sockets[options.get("id", "")] = options["path"]
    for value in [*line.option("mon"), *line.option("monitor")]:
        options = _options(value)
        if options.get("mode", "control") == "control" and options.get("chardev") in sockets:
            found.append(sockets[options["chardev"]])
    return [Path(line.cwd) / path for path in found]


def _options(value: str) -> dict[str, str]:
    if value.startswith("{"):
        return {k: str(v) for k, v in json.loads(value).items()}
    return {key: rest for key, _, rest in (part.partition("=") for part in value.split(","))}


def _add(node: str, name: str, granularity: int, **flags: bool) -> dict[str, Any]:
    return {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": name, "granularity": granularity, **flags}}


def _remove(node: str, name: str) -> Command:
    return "block-dirty-bitmap-remove", {"node": node, "name": name}
