"""Continuous protection by micro-snapshots: every few seconds a frozen moment of the machine goes into its journal.

A life of protection begins with a point that the journal's facts are laid over, and goes on in cycles: freeze, read what changed
since the last barrier, append it as one set, close the set with a barrier that names the new tokens.  Nothing that records
changes is released before a durable barrier or a committed point names its successor.

    killed after                    left behind                         cleaned by
    1 lease written                 nothing on the host                 settle() of the next life
    2 snapshot, new bitmaps         both sets of bitmaps recording      the same: what barrier and point name stays
    3 some facts appended           a set without a barrier             dropped when the log is taken over
    4 barrier durable               the old bitmaps                     settle(); the next cycle
    5 old bitmaps removed           snapshot's folder, lease            settle()

A life ends when something breaks: the host is gone, a bitmap is lost, the journal's disk is full.  The next one goes on from the
newest barrier where its bitmaps still prove what changed since; where they don't, it begins with a capture, which compares what
it must.  Either way the journal says from when to when nothing was recorded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

from hvbackup import extents
from hvbackup.capture import Options, Progress, capture, sampled
from hvbackup.copying import copy
from hvbackup.errors import Busy, HostUnreachable, HvbackupError, Interrupted, NotFound, SpaceExhausted
from hvbackup.fold import fold
from hvbackup.hypervisors import Changes, Cycles, Cycling, Frozen, FrozenDisk, Hypervisor
from hvbackup.leases import Lease, Leases, point_tokens
from hvbackup.model import SECOND, Consistency, Continuity, DiskId, LeaseId, Machine, MiB, RecoveryPoint, Token
from hvbackup.store.history import History, Moment
from hvbackup.store.recorder import Recorder
from hvbackup.store.store import Store
from hvbackup.store.window import Limits, check_budget, journal_bytes, trim

SAMPLE_EVERY_NS = 60 * SECOND  # opening the view to compare with costs as much as a cycle
SAMPLE_BLOCKS = 8  # of each disk
SET_MAX_BYTES = 1024 * MiB  # a larger set of changes makes a point at once: it would not fit a segment
FOLD_AT = 0.8  # of the budget: a point is made early, so that what it covers may go
FOLD_AGAIN_NS = 60 * SECOND  # after one that failed
TRIM_TO = 0.5  # of the budget: so much stays then, or there would be a point at every cycle from here on
BACKOFF_SECONDS = (1, 2, 5, 10, 30, 60)  # between lives, while the host does not answer
STRETCH_SECONDS = 30  # and no further than this, or each set of changes would be larger than the one before
BUSY_SHARE = (
    0.2  # the part of the time a machine may spend frozen: a longer cycle stretches the interval, for the guest's sake
)


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often moments and points are made, and how long moments are kept."""

    every_ns: int = 5 * SECOND
    fold_every_ns: int = 3600 * SECOND
    limits: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class Cycle:
    """What one cycle did."""

    moment: Moment
    read_bytes: int
    seconds: float
    lag_seconds: float  # from the moment to its durability: what would have been lost
    marks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Folded:
    """A point was made of a moment."""

    point: RecoveryPoint
    seconds: float
    removed_bytes: int  # of the journal, because its window has passed or its budget was used up


@dataclass(frozen=True, slots=True)
class Trouble:
    """A life ended or could not begin; it is tried again."""

    error: HvbackupError
    retry_seconds: float


@dataclass(frozen=True, slots=True)
class Begun:
    """A life has begun."""

    moment: Moment
    point: RecoveryPoint
    gap: Mapping[str, object] | None
    how: str  # "resumed" from the newest barrier, or "captured"
    seconds: float


Event = Cycle | Folded | Trouble | Begun


class ContinuityLost(HvbackupError):
    """The hypervisor can't say any more what changed since the last barrier; a new life compares the disks."""


class Mark:
    """A name for the next moment, and whether it has got one."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._done = threading.Event()
        self._moment: Moment | None = None

    def put_on(self, moment: Moment) -> None:
        """The moment is durable and has the name."""
        self._moment = moment
        self._done.set()

    def wait(self, seconds: float) -> Moment | None:
        """The moment, or None when there is none in time."""
        self._done.wait(seconds)
        return self._moment


class OneByOne:
    """Cycles on a platform that has none: each is a snapshot like any other, and its release."""

    def __init__(self, hypervisor: Hypervisor, machine: Machine, lease: LeaseId) -> None:
        self._hypervisor, self._machine, self._lease = hypervisor, machine, lease

    def snapshot(self, since: Mapping[DiskId, Token]) -> AbstractContextManager[Frozen]:
        """Freeze all disks."""
        return self._hypervisor.snapshot(self._machine, self._lease, since, Consistency.CRASH)

    def keep(self, tokens: Collection[Token]) -> None:
        """Release everything else."""
        self._hypervisor.release(self._machine, self._lease, tokens)

    def close(self) -> None:
        """Nothing is held between snapshots."""


@dataclass(slots=True)
class Life:
    """One life of protection: from a capture, or the newest barrier, to the loss of continuity."""

    recorder: Recorder
    cycles: Cycles
    lease: Lease
    point: RecoveryPoint
    tokens: dict[DiskId, Token]
    how: str
    newest: Moment
    gap: dict[str, object] | None = None  # to be told with the next barrier
    told_gap: Mapping[str, object] | None = None
    sampled: int = 0  # the time of the newest moment at which a sample was compared
    folded: int = 0  # the time of the moment that was folded last
    folding: threading.Thread | None = None
    fold_tokens: Sequence[Token] = ()  # what the point that is being made will name


class Protection:
    """Protects one machine until it is told to end.

    Thread safety: `run` on one thread; `mark` and `end` from any.  `writing` is held while chunks or points are written.
    """

    def __init__(
        self,
        store: Store,
        hypervisor: Hypervisor,
        machine: Machine,
        options: Options,
        rhythm: Rhythm,
        report: Callable[[Event], None] = lambda _: None,
        writing: AbstractContextManager[object] | None = None,
    ) -> None:
        self._store, self._hypervisor, self._machine = store, hypervisor, machine
        self._options, self._rhythm, self._report = replace(options, progress=self._go_on), rhythm, report
        self._writing = writing or threading.RLock()
        self._leases = Leases(store, options.clock)
        self._marks: list[Mark] = []
        self._lock = threading.Lock()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._failures = 0
        self._distrusted = False  # the tracker lied: the next life compares everything
        self._clock_stepped = False  # since we run: ages mean nothing until somebody starts us again

    def mark(self, label: str) -> Mark:
        """Name the moment of the next cycle, which begins at once."""
        mark = Mark(label)
        with self._lock:
            self._marks.append(mark)
        self._wake.set()
        return mark

    def end(self) -> None:
        """`run` returns soon."""
        self._ended.set()
        self._wake.set()

    def _go_on(self, _: Progress) -> None:
        """Called while a point is made: long work ends early when it is not wanted any more."""
        if self._ended.is_set():
            raise Interrupted("Protection was told to end while a point was being made; the next start makes it")

    def run(self) -> None:
        """Protect until told to end.  Raises UsageError, StoreDamage; whatever may pass by itself is waited for."""
        why = "protection was not running"
        while not self._ended.is_set():
            try:
                life = self.begin(why)
                self._live(life)
            except Interrupted:
                return
            except (HostUnreachable, ContinuityLost, Busy, SpaceExhausted) as e:
                pause = BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]
                why, self._failures = str(e), self._failures + 1
                self._report(Trouble(e, pause))
                self._ended.wait(pause)

    # -- a life begins and ends ------------------------------------------------------------------------------------------

    def begin(self, why: str) -> Life:
        """A life has begun: a moment of it is durable.  `why` says why there may be a gap before it."""
        began = time.monotonic()
        self._machine = self._present()
        history = History(self._store, self._machine.id)
        last = history.last
        recorder = Recorder(self._store, self._machine.id, self._machine.disks)
        try:
            if last and self._is_full():
                self._make_room(last)
            resumable = last is not None and not self._distrusted
            life = (self._resumed(recorder, history, last, why) if last and resumable else None) or self._captured(
                recorder, last, why
            )
        except BaseException:
            recorder.abandon()
            raise
        self._report(Begun(life.newest, life.point, life.told_gap, life.how, time.monotonic() - began))
        return life

    def _present(self) -> Machine:
        """The machine as it is now: its disks may have become others."""
        found = next((m for m in self._hypervisor.machines() if m.id == self._machine.id), None)
        if found is None:
            raise HostUnreachable(f"Machine {self._machine.name} ({self._machine.id}) is not there any more")
        return found

    def _resumed(self, recorder: Recorder, history: History, last: Moment, why: str) -> Life | None:
        """A life that goes on from the newest barrier, or None when its tokens prove nothing any more."""
        told = history.told
        tokens = {d: Token(**v) for d, v in told.tokens.items()}
        try:
            point = history.base(last)
        except NotFound:
            return None
        if set(tokens) != set(told.disks) or {d: v.size for d, v in told.disks.items()} != self._sizes():
            return None
        self._leases.settle(self._hypervisor, self._machine)
        life = self._life(recorder, point, tokens, "resumed")
        life.gap = {"from": int(last.t), "why": why}
        try:
            self.cycle(life)
        except ContinuityLost:
            self._let_go(life)
            recorder.rotate()  # what was appended belongs to no moment
            return None
        except BaseException:
            with contextlib.suppress(HvbackupError):
                self._let_go(life)
            raise
        return life

    def _captured(self, recorder: Recorder, last: Moment | None, why: str) -> Life:
        """A life that begins with a point, which compares what it must."""
        with self._writing:
            options = replace(self._options, seq=recorder.last, full=self._options.full or self._distrusted)
            outcome = capture(self._store, self._hypervisor, self._machine, options)
        self._distrusted = False
        point = outcome.point
        assert point is not None  # every other way out of `capture` raises
        recorder.set_disks([d.disk for d in point.disks])
        tokens = {d.disk.id: d.token for d in point.disks if d.token}
        life = self._life(recorder, point, tokens, "captured")
        gap = {"from": int(last.t), "to": int(point.t), "why": why} if last else None
        # Nothing before this point may be laid under what follows: what happened in between is in the point alone.
        told: dict[str, object] = {"base": point.seq, **({"gap": gap} if gap else {})}
        life.newest, life.told_gap = Moment(recorder.barrier(point.t, tokens, **told), point.t), gap
        return life

    def _sizes(self) -> dict[DiskId, int]:
        return {d.id: d.size for d in self._machine.disks}

    def _life(self, recorder: Recorder, point: RecoveryPoint, tokens: dict[DiskId, Token], how: str) -> Life:
        lease = self._leases.take(self._machine.id, self._options.source)
        if self._hypervisor.can.cycles:
            cycles = cast(Cycling, self._hypervisor).cycles(self._machine, lease.id)
        else:
            cycles = OneByOne(self._hypervisor, self._machine, lease.id)
        return Life(recorder, cycles, lease, point, tokens, how, Moment(0, point.t), folded=point.t)

    def _let_go(self, life: Life) -> None:
        """Nothing of the life is left on the host but what barrier and point name; else its lease stays."""
        life.cycles.close()
        self._leases.remove(life.lease.id)

    def _live(self, life: Life) -> None:
        every = self._rhythm.every_ns / SECOND
        pause = every
        try:
            while not self._ended.is_set():
                self._wake.wait(pause)
                if self._ended.is_set():
                    break
                self._wake.clear()
                done = self.cycle(life)
                self._failures = 0
                pause = max(every - done.seconds, min(STRETCH_SECONDS, done.seconds * (1 / BUSY_SHARE - 1)))
                self._report(done)
                self._maybe_fold(life)
        except BaseException:
            with contextlib.suppress(HvbackupError):
                self._close(life)
            raise
        self._close(life)

    def _close(self, life: Life) -> None:
        """The journal is sealed and the host is clean."""
        with contextlib.ExitStack() as stack:
            stack.callback(life.recorder.close)
            stack.callback(self._let_go, life)
            if life.folding:
                life.folding.join()

    # -- a cycle ---------------------------------------------------------------------------------------------------------

    def cycle(self, life: Life) -> Cycle:
        """One more moment.  Raises ContinuityLost, HostUnreachable, ReadFailed, SpaceExhausted."""
        began = time.monotonic()
        life.lease = self._leases.renew(life.lease)
        with self._taken_marks() as marks:
            with life.cycles.snapshot(life.tokens) as frozen:
                caught = time.monotonic()
                read = self._append(life, frozen)
                self._sample(life, frozen)
                frozen.verify()
                tokens = {d.disk.id: d.token for d in frozen.disks if d.token}
                t = frozen.t
            told: dict[str, object] = {"mark": {"label": "; ".join(m.label for m in marks)}} if marks else {}
            if life.gap:
                told["gap"] = {"to": int(t), **life.gap}
            moment = Moment(life.recorder.barrier(t, tokens, **told), t)
        lag = time.monotonic() - caught
        if life.gap:
            life.told_gap, life.gap = {"to": int(t), **life.gap}, None
        life.tokens, life.newest = tokens, moment
        for mark in marks:
            mark.put_on(moment)
        life.cycles.keep(self._kept(life))
        return Cycle(moment, read, time.monotonic() - began, lag, [m.label for m in marks])

    @contextmanager
    def _taken_marks(self) -> Iterator[Sequence[Mark]]:
        """The marks of the moment to come; they wait for the next one when there is none."""
        with self._lock:
            marks, self._marks = self._marks, []
        try:
            yield marks
        except BaseException:
            with self._lock:
                self._marks[:0] = marks
            raise

    def _kept(self, life: Life) -> list[Token]:
        """What barrier and point name: no clean-up may remove it."""
        return [*life.tokens.values(), *life.fold_tokens, *point_tokens(self._store, self._machine.id)]

    def _append(self, life: Life, frozen: Frozen) -> int:
        """Append what changed of every disk; how many bytes were read."""
        found = [(disk, self._changes(life, disk)) for disk in frozen.disks]
        total = sum(extents.total(changes.data) for _, changes in found)
        if total > SET_MAX_BYTES:
            raise ContinuityLost(f"{total} bytes changed, more than a journal takes at once")
        if {d.disk.id for d in frozen.disks} != set(life.tokens):
            raise ContinuityLost(f"The disks of machine {self._machine.name} are others than before")
        for disk, changes in found:
            if len(changes.zero):
                life.recorder.zero(disk.disk.id, frozen.t, [(a, b) for a, b in changes.zero.tolist()])
            if len(changes.data):
                with contextlib.closing(disk.open()) as reader:
                    copy(life.recorder, disk.disk.id, frozen.t, reader, changes.data)
        return total

    def _sample(self, life: Life, frozen: Frozen) -> None:
        """Trackers can lie: now and then a few blocks that did not change are read and compared with the newest moment."""
        if not self._options.sample_blocks or frozen.t - life.sampled < SAMPLE_EVERY_NS or not life.newest.seq:
            return
        history = History(self._store, self._machine.id)
        for disk in frozen.disks:
            changes = disk.changes(life.tokens.get(disk.disk.id))
            changed = extents.union(changes.data, changes.zero)
            view = history.view(life.newest, disk.disk.id)
            same = extents.align(extents.complement(changed, view.size), self._store.block, view.size)
            same = extents.subtract(same, extents.align(changed, self._store.block, view.size))
            with contextlib.closing(disk.open()) as reader:
                for offset, length in sampled(same, self._store.block, SAMPLE_BLOCKS, self._options.rng).tolist():
                    now, before = bytearray(length), bytearray(length)
                    reader.read_into(offset, memoryview(now))
                    view.read_into(offset, memoryview(before))
                    if now != before:
                        self._distrusted = True
                        raise ContinuityLost(
                            f"Disk {disk.disk.id}: the block at {offset} was called unchanged and had changed; "
                            "all disks are compared whole, and moments since the newest point may lack changes"
                        )
        life.sampled = frozen.t

    def _changes(self, life: Life, disk: FrozenDisk) -> Changes:
        changes = disk.changes(life.tokens.get(disk.disk.id))
        known = {d.id: d.size for d in life.recorder.disks}
        if changes.continuity is not Continuity.INCREMENTAL or known.get(disk.disk.id) != disk.disk.size:
            raise ContinuityLost(f"Disk {disk.disk.id}: {changes.reason or 'it is new or was resized'}")
        return changes

    # -- points ----------------------------------------------------------------------------------------------------------

    def _maybe_fold(self, life: Life) -> None:
        if life.folding and life.folding.is_alive() and not self._is_full():
            return
        if life.folding:
            life.folding.join()  # the budget is a promise: the next moment waits for room
        if self._is_full():
            self._make_room(self._prepare_fold(life))
        elif self._is_full(FOLD_AT) or life.newest.t - life.folded >= self._rhythm.fold_every_ns:
            moment = self._prepare_fold(life)
            life.folding = threading.Thread(target=self._fold, args=(life, moment), name="hvbackup-fold")
            life.folding.start()

    def _is_full(self, share: float = 1.0) -> bool:
        budget = self._rhythm.limits.budget_bytes
        return bool(budget) and journal_bytes(self._store, self._machine.id) > budget * share

    def _make_room(self, moment: Moment) -> None:
        """The journal is within its budget, or SpaceExhausted is raised: what no point covers never goes."""
        self._report(self.fold(moment))
        check_budget(self._store, self._machine.id, self._rhythm.limits)

    def _prepare_fold(self, life: Life) -> Moment:
        """The newest moment ends a segment, so that a point and the facts behind it never share one."""
        life.recorder.rotate()
        life.recorder.finish()
        self._clock_stepped |= life.recorder.clock_stepped
        life.folded, life.fold_tokens = life.newest.t, list(life.tokens.values())
        return life.newest

    def _fold(self, life: Life, moment: Moment) -> None:
        try:
            self._report(self.fold(moment))
        except Interrupted:
            return
        except HvbackupError as e:
            life.folded = moment.t - self._rhythm.fold_every_ns + FOLD_AGAIN_NS
            self._report(Trouble(e, FOLD_AGAIN_NS / SECOND))

    def fold(self, moment: Moment) -> Folded:
        """A point of the moment exists when this returns, and what need not be kept is gone; the hypervisor is not read."""
        began = time.monotonic()
        with self._writing:
            outcome = fold(self._store, self._machine.id, moment, self._options)
        point = outcome.point
        assert point is not None  # every other way out of `fold` raises
        limits = self._rhythm.limits
        if self._is_full(FOLD_AT):
            limits = replace(limits, budget_bytes=int(limits.budget_bytes * TRIM_TO))
        removed = trim(self._store, self._machine.id, limits, by_age=not self._clock_stepped)
        return Folded(point, time.monotonic() - began, removed)
