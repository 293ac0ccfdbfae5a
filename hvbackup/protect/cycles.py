"""A life in micro-snapshots: every few seconds a frozen moment of the machine goes into its journal.

A cycle freezes all disks, reads what changed since the last barrier, appends it as one set, and closes the set with a barrier
that names the new tokens.  Nothing that records changes is released before a durable barrier or a committed point names its
successor.

    killed after                    left behind                         cleaned by
    1 lease written                 nothing on the host                 settle() of the next life
    2 snapshot, new bitmaps         both sets of bitmaps recording      the same: what barrier and point name stays
    3 some facts appended           a set without a barrier             dropped when the log is taken over
    4 barrier durable               the old bitmaps                     settle(); the next cycle
    5 old bitmaps removed           snapshot's folder, lease            settle()
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import cast

from hvbackup import extents
from hvbackup.capture import Progress
from hvbackup.copying import copy, portions
from hvbackup.errors import DiskReplaced, StoreDamage
from hvbackup.hypervisors import Changes, Cycles, Cycling, Frozen, FrozenDisk, Hypervisor, Seat
from hvbackup.leases import Lease, point_tokens
from hvbackup.model import SECOND, Consistency, Continuity, DiskId, Instant, LeaseId, Machine, MiB, RecoveryPoint, Token
from hvbackup.protect import marks, taking
from hvbackup.protect.events import ContinuityLost, Cycle, JournalStalled, TrackerLied
from hvbackup.protect.journaling import READING_SECONDS, Journaling
from hvbackup.protect.meeting import MachineSeat
from hvbackup.protect.points import Points
from hvbackup.protect.samples import Content, Samples
from hvbackup.protect.setting import Setting
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.journal.recorder import Recorder

SET_MAX_BYTES = 1024 * MiB  # of a usual set
STRETCH_SECONDS = 30  # and no further than this, or each set of changes would be larger than the one before
RENEW_SECONDS = 60.0  # between two looks at the lease within a set
BUSY_SHARE = (
    0.2  # the part of the time a machine may spend frozen: a longer cycle stretches the interval, for the guest's sake
)


class OneByOne:
    """Cycles on a platform that has none: each is a snapshot like any other, and its release."""

    def __init__(self, hypervisor: Hypervisor, machine: Machine, lease: LeaseId) -> None:
        self._hypervisor, self._machine, self._lease = hypervisor, machine, lease

    def snapshot(
        self, since: Mapping[DiskId, Token], *, freeze: bool = False, seat: Seat | None = None
    ) -> AbstractContextManager[Frozen]:
        """Freeze all disks."""
        if seat:
            seat.leave("its platform can't hold it still")
        wanted = None if freeze else Consistency.CRASH
        return self._hypervisor.snapshot(self._machine, self._lease, since, wanted, fine=True)

    def keep(self, tokens: Collection[Token]) -> None:
        """Release everything else."""
        self._hypervisor.release(self._machine, self._lease, tokens)

    def close(self) -> None:
        """Nothing is held between snapshots."""


def cycles_of(hypervisor: Hypervisor, machine: Machine, lease: LeaseId) -> Cycles:
    """Snapshots one after the other, at as little cost as the platform can."""
    if hypervisor.can.cycles:
        return cast(Cycling, hypervisor).cycles(machine, lease)
    return OneByOne(hypervisor, machine, lease)


@dataclass(slots=True)
class CycleLife:
    """See the module.  Thread safety: one thread."""

    setting: Setting
    recorder: Recorder
    cycles: Cycles
    lease: Lease
    points: Points
    point: RecoveryPoint
    tokens: Mapping[DiskId, Token]
    how: str
    newest: Moment
    samples: Samples
    journaling: Journaling
    gap: dict[str, object] | None = None  # to be told with the next barrier
    told_gap: Mapping[str, object] | None = None
    notes: list[str] = field(default_factory=list)  # to be told with the next moment
    frozen: int = field(
        default_factory=time.monotonic_ns
    )  # when the guest took part in a moment last, by the monotonic clock
    _sets: int = 0  # so many are closed
    _renewed: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.cycles.keep(self._kept())  # also where the first moment fails, and nothing else would ever be said

    def step(self) -> float:
        """One more moment; it is reported, and a point is made when one is due."""
        self._mark_frozen()
        done = self.cycle()
        self.setting.report(done)
        self.points.keep_up(self)
        every = self.setting.rhythm.every_ns / SECOND
        return max(every - done.seconds, min(STRETCH_SECONDS, done.seconds * (1 / BUSY_SHARE - 1)))

    def _mark_frozen(self) -> None:
        """Now and then the guest takes part in a moment."""
        every = self.setting.rhythm.freeze_every_ns
        if every and time.monotonic_ns() - self.frozen >= every:
            self.setting.marks.add(marks.Mark(marks.FROZEN, Consistency.FILESYSTEM))
            self.frozen = time.monotonic_ns()

    def catch_up(self) -> None:
        """A moment of this life is durable."""
        self.cycle()

    def name_tokens(self) -> None:
        """Every moment does."""

    def close(self, *, seal: bool = True) -> None:
        """The host is clean, and then, however long a point takes that is being made, the journal is sealed."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.recorder.close, seal=seal)
            stack.callback(self.journaling.close)
            stack.callback(self.points.join)
            self.let_go()

    def let_go(self) -> None:
        """Nothing of the life is left on the host but what barrier and point name; else its lease stays."""
        self.cycles.close()
        self.setting.leases.remove(self.lease.id)

    def cycle(self) -> Cycle:
        """One more moment.  Raises ContinuityLost, HostUnreachable, ReadFailed, SpaceExhausted."""
        try:
            return self._cycle()
        except JournalStalled:
            raise  # nobody waits for it
        except BaseException as e:
            self.journaling.drain()
            if isinstance(e, TrackerLied):
                good = History(self.setting.store, self.setting.machine.id).told.good
                self._doubt(str(e), good or Moment(0, Instant(0)))
            if isinstance(e, DiskReplaced):
                self._doubt(str(e), self.newest)  # which was the disk; its tokens prove nothing any more
            raise

    def _cycle(self) -> Cycle:
        began = time.monotonic()
        self.lease = self.journaling.call(lambda: self.setting.leases.renew(self.lease))
        now = self.setting.options.clock()
        picked = self.journaling.call(lambda: self._picked(now), READING_SECONDS)
        with self.setting.marks.taken() as taken, self._seat() as seat:
            freeze = marks.wants_freeze(taken)
            with self.cycles.snapshot(self.tokens, freeze=freeze, seat=seat) as frozen:
                caught = time.monotonic()
                found = self._found(frozen)
                read = self._append(frozen, found)
                sampled = self._sample(frozen, found, picked)
                frozen.verify()
                tokens = {d.disk.id: d.token for d in frozen.disks if d.token}
                t = frozen.t
            gap = {"to": int(t), **self.gap} if self.gap else None
            fitting = marks.fitting(taken, frozen.consistency, [*frozen.notes, frozen.standstill.remark])
            common = seat.common() if seat else {}
            told = {
                **sampled,
                **marks.told(fitting, frozen.consistency),
                **({"common": common} if common else {}),
                **({"gap": gap} if gap else {}),
            }
            self.cycles.keep([*self._kept(), *tokens.values()])  # until one of the two barriers is known to be durable
            moment = Moment(self.journaling.call(lambda: self.recorder.barrier(t, tokens, **told)), t)
        lag = time.monotonic() - caught
        self.told_gap, self.gap = gap or self.told_gap, None
        self.tokens, self.newest, self.setting.left = tokens, moment, None
        self._sets += 1
        for mark in fitting:
            mark.put_on(moment)
            if mark.point:
                self.points.want(moment, mark)
        self.cycles.keep(self._kept())
        labels, notes = [m.label for m in fitting if m.label], [*self.notes, *marks.refusals(taken)]
        self.notes = []
        seconds = lag if seat else time.monotonic() - began  # waiting for other machines keeps nobody frozen
        return Cycle(moment, read, seconds, lag, labels, common, notes)

    @contextmanager
    def _seat(self) -> Iterator[MachineSeat | None]:
        """The place at a common moment; nobody waits for a cycle that failed."""
        seat = self.setting.take_seat()
        try:
            yield seat
        except BaseException as e:
            if seat:
                seat.leave(str(e) or type(e).__name__)
            raise

    def _kept(self) -> list[Token]:
        """What barrier and point name: no clean-up may remove it."""
        store, machine = self.setting.store, self.setting.machine
        return [*self.tokens.values(), *self.points.tokens, *point_tokens(store, machine.id)]

    # -- one disk after the other ----------------------------------------------------------------------------------------

    def _found(self, frozen: Frozen) -> list[Changes]:
        """What changed of each disk."""
        found = [self._changes(disk) for disk in frozen.disks]
        total = sum(extents.total(changes.data) for changes in found)
        gap = bool(self.gap)
        room = self.journaling.call(self.setting.room) if gap or total > SET_MAX_BYTES else total
        if total > taking.limit(room, SET_MAX_BYTES, gap=gap):
            taking.refuse(self.setting, total, room, behind_point=self.how == "captured" and not self._sets)
        if {d.disk.id for d in frozen.disks} != set(self.tokens):
            raise ContinuityLost(f"The disks of machine {self.setting.machine.name} are others than before")
        return found

    def _append(self, frozen: Frozen, found: Sequence[Changes]) -> int:
        """Append what changed of every disk; how many bytes were read."""
        done, total = 0, sum(extents.total(changes.data) for changes in found)
        for disk, changes in zip(frozen.disks, found, strict=True):
            if len(changes.zero):
                self.journaling.zero(disk.disk.id, frozen.t, [(a, b) for a, b in changes.zero.tolist()])
            if not len(changes.data):
                continue
            with contextlib.closing(disk.open()) as reader:
                for runs in portions(changes.data):
                    copy(
                        self.journaling, disk.disk.id, frozen.t, reader, extents.spans(runs), self.setting.options.pace
                    )
                    done += sum(length for _, length in runs)
                    if total > SET_MAX_BYTES:
                        self._go_on(Progress(disk.disk.id, done, total))
        return total

    def _go_on(self, progress: Progress) -> None:
        """A set that takes long ends early when it is not wanted any more, and keeps its lease.  Raises Interrupted."""
        self.setting.options.progress(progress)
        if time.monotonic() - self._renewed >= RENEW_SECONDS:
            self._renewed = time.monotonic()
            self.lease = self.journaling.call(lambda: self.setting.leases.renew(self.lease))

    def _changes(self, disk: FrozenDisk) -> Changes:
        changes = disk.changes(self.tokens.get(disk.disk.id))
        known = {d.id: d.size for d in self.recorder.disks}
        if changes.continuity is not Continuity.INCREMENTAL or known.get(disk.disk.id) != disk.disk.size:
            raise ContinuityLost(f"Disk {disk.disk.id}: {changes.reason or 'it is new or was resized'}")
        return changes

    def _picked(self, now: Instant) -> Content:
        """What is compared with the journal in this cycle; nothing when that has been done lately."""
        if not self.samples.due(now):
            return {}
        try:
            history = History(self.setting.store, self.setting.machine.id)
            return self.samples.picked(history, self.newest, self.recorder.disks, self.setting.store.block)
        except StoreDamage as e:  # of a point, or of a cache that is made again: no reason to record nothing
            self.notes.append(f"What did not change could not be compared: {e}")
            self.samples.compared(now)
            return {}

    def _sample(self, frozen: Frozen, found: Sequence[Changes], picked: Content) -> dict[str, object]:
        """What the barrier says of blocks that were called unchanged, and are.  Raises TrackerLied."""
        compared = 0
        for disk, changes in zip(frozen.disks, found, strict=True):
            self.samples.look(disk, changes)
            if picked:
                compared += self.samples.compare(picked.get(disk.disk.id, {}), disk, changes)
        if not picked:
            return {}
        self.samples.compared(self.setting.options.clock())
        return {"sampled": compared}

    def _doubt(self, why: str, good: Moment) -> None:
        """No moment since the last good one is offered any more, and no token believed, when this returns."""
        self.recorder.rotate()  # what was appended belongs to no moment
        doubt: dict[str, object] = {"after": good.seq, "start": int(good.t), "why": why}
        self.setting.tell_doubt(self.recorder, self.newest.t, self.tokens, doubt)
