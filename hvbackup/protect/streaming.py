"""A life in single writes: each write of the guest comes to our target, and is a moment of its own.

The target keeps what it answers in a ring, which outlives us; here it is taken out ten times a second, appended to the journal,
fsynced, and only then the ring's room is given back.  So what the guest was told survives our death, and a power cut takes what
came since the last fsync.

    killed after                     left behind                            cleaned by
    1 lease written                  nothing on the host                    settle() of the next life
    2 target started, ring made      a ring that nobody wrote to            salvage() of the next life
    3 mirrors armed                  QEMU waits for the target              the target ends with us, the watchdog cancels
    4 some of the closing set        a set without a barrier                dropped when the log is taken over
    5 closing barrier durable        what the ring holds                    salvage(): it follows what the journal has
    6 writes appended, not freed     the same in the ring                   salvage(): it counts what the journal has

A life begins with a gap, for nobody knows what was written meanwhile.  It is closed by reading what the checkpoint of the newest
barrier calls changed, while the stream runs: before each piece is read, what has arrived is appended, so whatever the reading
did not see comes behind it.  When all is read, QEMU is drained, and what has arrived then closes the set.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hvbackup import extents
from hvbackup.capture import Progress
from hvbackup.copying import copy, portions
from hvbackup.errors import HostUnreachable, StreamBroken, StreamBypassed, StreamUncertain
from hvbackup.hypervisors import FrozenDisk, Reader, Stream
from hvbackup.leases import Lease, point_tokens
from hvbackup.model import SECOND, Consistency, Continuity, DiskId, Instant, KiB, MiB, RecoveryPoint, Token
from hvbackup.processes import give_way, idle, may_idle
from hvbackup.protect import marks, taking
from hvbackup.protect.events import ContinuityLost, JournalStalled, Streamed, Trouble
from hvbackup.protect.journaling import STALL_SECONDS
from hvbackup.protect.looks import Look, Looks
from hvbackup.protect.points import Points
from hvbackup.protect.rings import ring_path
from hvbackup.protect.setting import Setting
from hvbackup.store.format import layout as f
from hvbackup.store.journal.history import Moment
from hvbackup.store.journal.recorder import Recorder
from hvbackup.target.process import Export, Target

SET_MAX_BYTES = 256 * MiB  # of a usual closing set
FRAME_BYTES = 768 * KiB  # taken out of the ring at a time: fits the processor's cache, and is many writes
KEEP_UP_SECONDS = 1.0  # between two looks at whether a point is due
IDLE_SECONDS = 5.0  # a guest that writes nothing has a moment so often: of a look that found the machine there
NEVER = 0.0, 0.0
UNSEEN_SECONDS = 60.0  # without a look: then it is told, and the moments since are good only once there was another
CALLED_SECONDS = 10.0  # whoever had to be called does not stand back for so long
LEFT_ALONE = "a stream leaves the guest alone"


@dataclass(slots=True)
class StreamLife:
    """See the module.  Thread safety: one thread."""

    setting: Setting
    recorder: Recorder
    stream: Stream
    lease: Lease
    points: Points
    point: RecoveryPoint
    tokens: Mapping[DiskId, Token]
    how: str
    newest: Moment
    gap: dict[str, object] | None = None  # to be told with the next barrier
    told_gap: Mapping[str, object] | None = None
    target: Target | None = None
    _rows: int = 0  # of the ring that are in the journal
    _data: int = 0  # and their bytes
    _failed: bool = False  # to append to the journal
    _closed: bool = False  # the gap at the head of the life: single writes are moments from here on
    _good: Moment | None = None  # known at the newest look at QEMU
    _seen: tuple[Instant, float] = (Instant(0), 0.0)  # when that look began: wall and monotonic clock
    _came: float = 0.0  # when the newest moment did, but for those that only name tokens
    _looks: Looks | None = None
    _unasked: tuple[float, float] = NEVER  # from when to when looks found nobody to ask, since the newest good one
    _told: bool = False  # of that
    _kept_up: float = 0.0
    _called_until: float = 0.0  # no standing back until then
    _since: Streamed | None = None  # what to report with the next look
    _numbers: dict[DiskId, int] = field(default_factory=dict)

    # -- beginning and end -----------------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Every write is recorded from here on, and the gap before is closed.  Raises ContinuityLost, StreamBroken, Busy."""
        disks, rhythm = self.stream.disks, self.setting.rhythm
        if [d.id for d in disks] != [d.id for d in self.recorder.disks]:
            raise ContinuityLost(f"The disks of machine {self.setting.machine.name} are others than before")
        self._numbers = {d.id: i for i, d in enumerate(disks)}
        self.stream.keep(self._kept())
        path = ring_path(self.setting)
        self.target = target = Target(
            [Export(d.id, d.size) for d in disks], path, self.stream.socket, rhythm.ring_bytes
        )
        give_way()
        may_idle()  # asked now, for it takes a moment
        self.recorder.begin_stream(target.ring.id)
        self.stream.arm(target.pid, path, self._arrived)
        with self.stream.changed(self.tokens) as live:
            read = self._append_changed(target, live)
        tokens = self.stream.settle()
        self._take(target, each=False)
        self._look_at_target(target)
        self.stream.check(self._arrived)
        self._close_gap(tokens)
        self._since = Streamed(self.newest, 0, read, 0.0, 0.0)

    def _close_gap(self, tokens: Mapping[DiskId, Token]) -> None:
        t = Instant(self.setting.options.clock())
        gap = {"to": int(t), **self.gap} if self.gap else None
        seq = self.recorder.barrier(t, tokens, **({"gap": gap} if gap else {}))
        self.tokens, self.newest, self.gap = tokens, Moment(seq, t), None
        self._good = self.newest
        self._came = time.monotonic()
        self._seen = t, self._came
        self.told_gap, self._closed, self.setting.left = gap or self.told_gap, True, None
        self._looks = Looks(self.stream, self._arrived, self._broke_off, self.setting.options.clock)
        self.stream.keep(self._kept())

    def let_go(self) -> None:
        """The guest's writes are its own again; what had arrived is in the journal.  Else the lease stays."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.recorder.end_stream)
            stack.callback(self._end_target)
            stack.callback(self._disarm)
            if self._looks:
                stack.callback(self._looks.join)
            if self.target:
                stack.callback(self.target.ring.end)
                self._look_back(self.target)
        self.setting.leases.remove(self.lease.id)

    def _look_back(self, target: Target) -> None:
        """What went past us since the newest look is told of: nobody is offered a moment that lacks it.

        Whoever can't ask QEMU closes all the same; moments of a long time in which nobody could are not offered either.
        """
        if not (self._looks and self._closed):
            return
        if self._failed:
            self._remember(self._looks.unheard())
            return
        try:
            if not self._broke_off():
                self._record(target)
            for look in self._looks.last(self.newest):
                self._heed(look)
        except StreamBroken as e:
            self.setting.report(Trouble(e, 0))
        self._doubt_unseen()

    def _disarm(self) -> None:
        self.stream.close(healthy=self.target is not None and not self.target.dead)

    def _end_target(self) -> None:
        """What had arrived is in the journal, or else stays in the ring: the next life finds it."""
        if not self.target:
            return
        target, self.target = self.target, None
        kept = self._closed
        try:
            if self._closed and not self._failed:
                self._record(target)
                kept = False
        finally:
            target.close(keep_ring=kept)

    def close(self, *, seal: bool = True) -> None:
        """The host is clean and the journal is sealed."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.recorder.close, seal=seal)
            stack.callback(self.let_go)
            self.points.join()

    # -- the closing set -------------------------------------------------------------------------------------------------

    def _append_changed(self, target: Target, live: Collection[FrozenDisk]) -> int:
        """What changed until the stream was armed, read while it runs; how many bytes."""
        found = [(disk, self._changes(disk)) for disk in live]
        total = sum(extents.total(spans) for _, spans in found)
        captured, room, done = self.how == "captured", self.setting.room(), 0
        limit = taking.limit(room, SET_MAX_BYTES, gap=not captured)

        def admit(arrived: int) -> None:
            if total + arrived > limit:
                taking.refuse(self.setting, total + arrived, room, behind_point=captured)

        admit(0)
        for disk, spans in found:
            if len(spans):
                with contextlib.closing(disk.open()) as reader:
                    for runs in portions(spans):
                        self._append(target, disk.disk.id, reader, runs)
                        admit(self._data if captured else 0)
                        done += sum(length for _, length in runs)
                        self.setting.options.progress(Progress(disk.disk.id, done, total))
                        self.lease = self.setting.leases.renew(self.lease)
        return total

    def _append(self, target: Target, disk: DiskId, reader: Reader, runs: Sequence[tuple[int, int]]) -> None:
        self._take(target, each=False)  # what is read next may be newer than this, and never older
        self._look_at_target(target)
        copy(self.recorder, disk, Instant(self.setting.options.clock()), reader, extents.spans(runs))

    def _changes(self, disk: FrozenDisk) -> extents.Spans:
        changes = disk.changes(self.tokens.get(disk.disk.id))
        known = {d.id: d.size for d in self.recorder.disks}
        if changes.continuity is not Continuity.INCREMENTAL or known.get(disk.disk.id) != disk.disk.size:
            raise ContinuityLost(f"Disk {disk.disk.id}: {changes.reason or 'it is new or was resized'}")
        return extents.union(changes.data, changes.zero)

    # -- from the ring into the journal ----------------------------------------------------------------------------------

    def step(self) -> float:
        """What has arrived is durable; seconds until the next step is due."""
        assert self.target
        began = time.monotonic()
        self._record(self.target)
        self._look_at_target(self.target)
        if self._looks and (look := self._looks.poll(self.newest)):
            self._heed(look)
        if began - self._kept_up >= KEEP_UP_SECONDS:
            self._keep_up()
        return max(0.0, self.setting.rhythm.every_ns / SECOND - (time.monotonic() - began))

    @contextlib.contextmanager
    def _last_in_line(self, target: Target) -> Iterator[None]:
        """While the guest writes as much as it can we take what nobody else wants of the processors, for as long as that will do.

        Threads that begin meanwhile would be of that class for ever, and nobody could call them: none does.
        The target calls us when it will not: when the ring fills, or nothing has been taken out of it for a while.
        """
        if not self.recorder.in_burst or time.monotonic() < self._called_until or not may_idle():
            yield
            return
        ring = target.ring
        calls, ring.idler = ring.calls, threading.get_native_id()
        idle()
        try:
            yield
        finally:
            give_way()
            ring.idler = 0
            if ring.calls != calls:
                self._called_until = time.monotonic() + CALLED_SECONDS

    def _record(self, target: Target) -> None:
        """Every write that has arrived is a durable moment, and marks are on the newest."""
        began, self._failed = time.monotonic(), True  # a log in which something went wrong is not written to again
        with self.setting.marks.taken() as taken:
            with self._alarmed(), self._last_in_line(target):
                writes, size, oldest = self._take(target, each=True)
                self.recorder.flush()
            t = Instant(self.setting.options.clock())
            self.recorder.end_if_due(t)
            fitting = marks.fitting(taken, Consistency.CRASH, [LEFT_ALONE])
            if fitting:
                self._name(t, **marks.told(fitting, Consistency.CRASH))
                self._came = time.monotonic()
        target.ring.free(self._rows, self._data)
        self._failed = False
        lag = (self.setting.options.clock() - oldest) / SECOND if writes else 0.0
        for mark in fitting:
            mark.put_on(self.newest)
            if mark.point:
                self.points.want(self.newest, mark)
        self._note(writes, size, time.monotonic() - began, lag, [m.label for m in fitting if m.label])

    @contextlib.contextmanager
    def _alarmed(self) -> Iterator[None]:
        """Somebody is told at once when this takes long, for a power cut would take all that is not durable."""
        alarm = threading.Timer(STALL_SECONDS, self._stalled)
        alarm.daemon = True
        alarm.start()
        try:
            yield
        finally:
            alarm.cancel()

    def _stalled(self) -> None:
        why = (
            f"The journal's disk of machine {self.setting.machine.name} has not answered for {STALL_SECONDS:g} s; "
            "writes are kept in memory until the ring is full, and a power cut would take them"
        )
        self.setting.report(Trouble(JournalStalled(why), 0))

    def _take(self, target: Target, *, each: bool) -> tuple[int, int, int]:
        """Append what the ring holds; how many writes and bytes, and when the oldest came."""
        first, at, oldest = self._rows, self._data, 0
        for batch in target.ring.batches(self._rows, self._data, FRAME_BYTES):
            facts = batch.rows.view(f.FACT)
            seq = self.recorder.stream(facts, batch.data, each=each)
            self._rows, self._data = batch.row_end, batch.data_end
            oldest = oldest or int(facts["t"][0])
            if each:
                self.newest, self._came = Moment(seq, Instant(int(facts["t"][-1]))), time.monotonic()
            else:
                target.ring.free(self._rows, self._data)  # the set counts once it is closed
        return self._rows - first, self._data - at, oldest

    def _name(self, t: Instant, **more: object) -> None:
        """The newest moment names the tokens: what they call changed is more than what changed since, never less."""
        self.newest = Moment(self.recorder.barrier(t, self.tokens, **more), t)

    def name_tokens(self) -> None:
        """The newest moment names tokens, so that a point made of it has them."""
        self._name(self.newest.t)

    def _broke_off(self) -> bool:
        """Whether writes do not arrive any more, of all disks at one moment."""
        assert self.target
        return self.target.dead or bool(self.target.ring.heads.broken)

    def _arrived(self, disk: DiskId) -> int:
        assert self.target
        return self.target.ring.written(self._numbers[disk])[1]

    # -- is everything still as it should be? ----------------------------------------------------------------------------

    def _look_at_target(self, target: Target) -> None:
        """Raises StreamBroken when writes are not kept any more; what came before is good."""
        why = "the target ended" if target.dead else target.ring.heads.broken
        if why:
            if self._closed:
                self._record(target)
            raise StreamBroken(
                f"The stream of machine {self.setting.machine.name} broke off: {self.stream.reason or why}"
            )

    def _doubt(self, why: str, tokens: Mapping[DiskId, Token] | None) -> None:
        """No moment since the newest good look is offered.  Without tokens those before it are as good as they were."""
        self._closed = False  # what is in the ring belongs to no moment either
        seq = self.setting.tell_doubt(self.recorder, self.newest.t, tokens, self._doubted(why))
        self.newest = Moment(seq, self.newest.t)

    def _doubted(self, why: str) -> dict[str, object]:
        good = self._good or self.newest
        return {"after": good.seq, "start": int(good.t), "why": why}

    def _distrusted(self, error: Exception) -> Mapping[DiskId, Token] | None:
        """The tokens that prove nothing any more."""
        return None if isinstance(error, StreamUncertain) else self.tokens

    def _doubt_unseen(self) -> None:
        if self._closed and self._silent > UNSEEN_SECONDS:
            self._doubt(self._silence(), None)

    def _remember(self, unheard: Sequence[Look]) -> None:
        """What has to be doubted, where the journal takes nothing more, is what the next life begins with."""
        for look in unheard:
            if isinstance(look.error, StreamBypassed):
                self.setting.keep_doubt(
                    self._doubted(str(look.error)), self._distrusted(look.error), self.recorder.epoch
                )
        if self._silent > UNSEEN_SECONDS and not self.setting.untold:
            self.setting.keep_doubt(self._doubted(self._silence()), None, self.recorder.epoch)

    @property
    def _silent(self) -> float:
        """For how many seconds QEMU could not be asked; a time in which nobody tried counts for nothing."""
        began, ended = self._unasked
        return ended - began

    def _silence(self) -> str:
        return f"nobody could look at its QEMU for {self._silent:.0f} s before the stream ended"

    def _heed(self, look: Look) -> None:
        """Raises StreamBroken, and StreamBypassed once no moment is offered any more that may lack a write."""
        if isinstance(look.error, StreamBypassed):
            self._doubt(str(look.error), self._distrusted(look.error))
        if look.error:
            raise look.error
        if look.silence:
            self._unasked = self._unasked[0] or look.began, look.ended
            self._tell_silence(look.silence)
        if look.good:
            self._good, self._seen, self._unasked, self._told = look.good, (look.t, look.began), NEVER, False
        if look.tokens and self.target:
            self._record(self.target)  # what the new checkpoints don't hold has arrived before
            self.tokens = look.tokens
            self.name_tokens()
            self.stream.keep(self._kept())

    def _keep_up(self) -> None:
        """Points are made when they are due, and what was done is told."""
        self._kept_up = time.monotonic()
        self.lease = self.setting.leases.renew(self.lease)
        t, seen = self._seen
        if seen - self._came >= IDLE_SECONDS:  # all that had arrived by then is in the journal
            self._name(t)
            self._came = seen
        if self._since:
            self.setting.report(self._since)
            self._since = None
        self.points.keep_up(self)

    def _tell_silence(self, why: HostUnreachable) -> None:
        """Somebody is told, once, when nobody has been able to look at QEMU for long."""
        if self._told or self._silent <= UNSEEN_SECONDS:
            return
        self._told = True
        name = self.setting.machine.name
        self.setting.report(
            Trouble(
                HostUnreachable(
                    f"Nobody could look at the QEMU of machine {name} for {UNSEEN_SECONDS:g} s ({why}); moments go on, and those "
                    "since then are not offered any more should the stream end before somebody can: end what holds its monitor"
                ),
                0,
            )
        )

    def _kept(self) -> list[Token]:
        """What barrier and point name: no clean-up may remove it."""
        store, machine = self.setting.store, self.setting.machine
        return [*self.tokens.values(), *self.points.tokens, *point_tokens(store, machine.id)]

    def _note(self, writes: int, size: int, seconds: float, lag: float, labels: list[str]) -> None:
        s = self._since or Streamed(self.newest, 0, 0, 0.0, 0.0)
        self._since = Streamed(
            self.newest, s.writes + writes, s.bytes + size, max(s.seconds, seconds), max(s.lag_seconds, lag),
            [*s.marks, *labels],
        )  # fmt: skip
