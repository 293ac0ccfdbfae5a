"""The one writer of a machine's journal.

It takes over what a dead writer left and begins a new epoch; every file of the journal carries the epoch, so that a writer
that was replaced and does not know it is fenced off.  Facts are appended in sets, a barrier closes a set, and only then is there
a new moment; of the writes of a stream each is one.  A log ends when it is old or large enough, and is sealed (sealing.py).

A set may be larger than a log: what changed while the first point of a large machine was made, say.  Then the log ends within the
set, with a barrier that says so and is no moment (`part`), and the set goes on in the next one.  So nobody, who writes, seals or
reads, ever holds more than one log in memory.  Should we die, what was written of the set stays, and does no harm: the next life
goes on from the moment before it, and whatever it reads lies over it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hvbackup.errors import StoreDamage
from hvbackup.model import SECOND, Disk, DiskId, Instant, MachineId, MiB, Token
from hvbackup.store.format import layout as f
from hvbackup.store.journal.journal import Facts, LogWriter, Name, all_files
from hvbackup.store.journal.logfile import taken_over
from hvbackup.store.journal.runs import open_run
from hvbackup.store.journal.sealing import Sealing, take_over
from hvbackup.store.journal.segment import PieceCache
from hvbackup.store.journal.told import Doubt, Moment, carried
from hvbackup.store.store import Store

SEGMENT_MAX_BYTES = 64 * MiB  # a log ends here at the latest: bounds replay after a crash to well under a second
SEGMENT_MAX_AGE_NS = 60 * SECOND  # and here: what reads segments alone is not far behind
FLUSH_BYTES = 16 * MiB  # of a set are on their way to the disk at most: a barrier has no more to wait for
LOG_MAX_BYTES = 512 * MiB  # a log grows to this while too much waits to be sealed, for whoever appends must not
BURST_BYTES = 32 * MiB  # of single writes a second: sealing rests, which would take from what the guest writes with
LOOK_SECONDS = 0.1  # from one look at that to the next: what begins to be sealed is not stopped
CALM_SECONDS = 2.0  # and so long afterwards
FACTS_MAX = 2**32  # no file has as many: numbers that are left out behind one that can't be read
CLOCK_STEP_NS = 60 * SECOND  # a step of the wall clock over this is a fact
GOES_ON = "a set that is larger than a file of the journal goes on in the next one"


class Steps:
    """The wall clock against the monotonic one.  Thread safety: one thread.

    What the times of facts say is of no use here: what is recorded may have been read, or have waited, for long.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._seen: tuple[int, int] | None = None
        self.any = False  # ages mean nothing until somebody starts us again

    def begin(self) -> None:
        """Steps are noticed from here on."""
        self._seen = self._seen or (self._clock(), time.monotonic_ns())

    def step(self) -> int:
        """By how many nanoseconds the wall clock jumped since somebody looked last; 0: it did not."""
        now, before = (self._clock(), time.monotonic_ns()), self._seen
        self._seen = now
        step = (now[0] - before[0]) - (now[1] - before[1]) if before else 0
        if abs(step) <= CLOCK_STEP_NS:
            return 0
        self.any = True
        return step


class Recorder:
    """Appends to the journal of one machine.  Thread safety: one thread."""

    def __init__(
        self,
        store: Store,
        machine: MachineId,
        disks: Sequence[Disk],
        sealing: Sealing | None = None,
        steps: Steps | None = None,
    ) -> None:
        """Take over the journal: a new epoch begins with the first fact.  `sealing` and `steps` live longer than this writer."""
        self._store, self._folder, self._steps = store, store.ring.machine_name(machine), steps or Steps(time.time_ns)
        self._steps.begin()
        self._sealing = sealing or Sealing(store, machine)
        taken = take_over(store, machine)
        self.epoch = taken.epoch + 1
        # One number is left out: the point that a new life begins with takes it, and no moment before has it.
        # Neither does it go on below what a point covers: facts there would count as part of it.
        covered = max((p.seq or 0 for p in store.points(machine)), default=0)
        end = self._end(taken.names[-1]) if taken.names else 0
        self._next = (end if covered <= end else covered + 1) + 1
        self.doubts: list[Doubt] = []  # repeated at the head of each file
        self.newest = Moment(self._next - 1, Instant(0))  # what a set follows; whoever knows the moment says which
        self.disks: tuple[Disk, ...] = ()  # the machine's, from the next fact on
        self._log: LogWriter | None = None
        self._began: Instant = Instant(0)
        self._flushed = 0  # bytes of the log
        self._looked, self._streamed_bytes = time.monotonic(), 0  # since then
        self._burst_until = 0.0
        self._position: dict[str, Any] = {}  # how far the ring of a stream has been taken into the journal
        self._carried: dict[str, Any] = {}  # the tokens of a stream, repeated at the head of each file
        self._numbers: dict[DiskId, int] = {}
        self.set_disks(disks)
        self._sealing.begin(taken.left)

    def _end(self, name: Name) -> int:
        """The number behind all that this file may have."""
        with contextlib.suppress(StoreDamage):
            run = open_run(self._store, self._folder, name, PieceCache())
            if not run.torn:
                return name.first + len(run.facts)
        return (name.last or name.first) + FACTS_MAX

    @property
    def last(self) -> int:
        """The sequence number of the newest fact, 0 before the first."""
        return (self._log.next if self._log else self._next) - 1

    def set_disks(self, disks: Sequence[Disk]) -> None:
        """The machine has these disks from the next fact on (new ones, gone ones, other sizes)."""
        if tuple(disks) != self.disks:
            self.disks = tuple(disks)
            self._numbers = {d.id: i for i, d in enumerate(self.disks)}
            self.rotate()  # each file has one table of disks, at its head

    def _table(self) -> dict[str, Any]:
        disks = [{"number": i, "id": d.id, "size": d.size, "sector": d.sector} for i, d in enumerate(self.disks)]
        # Nothing is told of a ring before its writes are moments: whoever finds it would take them for some.
        stream = {**self._carried, **self._streamed()} if self._carried else {}
        return {"disks": disks, "epoch": self.epoch, **carried(self.doubts), **stream}

    def _open(self, t: Instant) -> LogWriter:
        if self._log is None:
            self._refuse_replaced()
            self._log = LogWriter(self._store.files, self._store.ring, self._folder, self.epoch, self._next)
            self._began, self._flushed = t, 0
            self._log.past_cache(self.in_burst)
            self._log.note(t, self._table(), barrier=False)
        return self._log

    def _refuse_replaced(self) -> None:
        """Nobody has taken the journal over since: what we write counts.  Raises Busy."""
        if any(name.epoch > self.epoch for name in all_files(self._store.files, self._folder)):
            raise taken_over(self._folder)

    def _in_set(self, t: Instant) -> LogWriter:
        """Where the next facts of a set go."""
        log = self._open(t)
        if log.size >= LOG_MAX_BYTES or (log.size >= SEGMENT_MAX_BYTES and not self._sealing.is_full):
            self._part(log, t)
            return self._open(t)
        if log.size - self._flushed >= FLUSH_BYTES:
            log.sync()
            self._flushed = log.size
        return log

    def _part(self, log: LogWriter, t: Instant) -> None:
        """The log ends here, and the set does not."""
        doubt = {"after": self.newest.seq, "start": int(self.newest.t), "why": GOES_ON}
        log.note(t, {"part": True, "doubt": doubt}, barrier=True)
        log.sync()
        self.rotate()

    @property
    def must_wait(self) -> bool:
        """Whether whoever appends to a set had better wait until a log is sealed.  From any thread."""
        log = self._log
        return log is not None and log.size >= LOG_MAX_BYTES // 2 and self._sealing.is_full

    def write(
        self, disk: DiskId, t: Instant, extents: Sequence[tuple[int, int]], data: bytes | bytearray | memoryview
    ) -> None:
        """Facts of one set: `data` holds the bytes of the extents (offset, length), one after the other."""
        facts = np.zeros(len(extents), f.FACT)
        rows = np.array(extents, np.uint64).reshape(-1, 2)
        facts["t"], facts["disk"], facts["kind"] = t, self._numbers[disk], f.FACT_DATA
        facts["offset"], facts["length"] = rows[:, 0], rows[:, 1]
        facts["pos"] = np.cumsum(rows[:, 1]) - rows[:, 1]
        self._in_set(t).append(facts, data, t, barrier=False)

    def zero(self, disk: DiskId, t: Instant, extents: Sequence[tuple[int, int]]) -> None:
        """Facts of one set: these extents (offset, length) read as zeroes."""
        facts = np.zeros(len(extents), f.FACT)
        facts["t"], facts["disk"], facts["kind"] = t, self._numbers[disk], f.FACT_ZERO
        rows = np.array(extents, np.uint64).reshape(-1, 2)
        facts["offset"], facts["length"] = rows[:, 0], rows[:, 1]
        self._in_set(t).append(facts, b"", t, barrier=False)

    def barrier(self, t: Instant, tokens: Mapping[DiskId, Token] | None, **more: Any) -> int:
        """The set is closed: its state is a durable moment when this returns the moment's sequence number.

        Without `tokens` those that were named last are as good as they were.
        `more` is told with it: `gap={"from": t, "why": ...}` that ends here, `mark={"label": ...}`, `sampled=N` blocks that were
        as the tracker said, `doubt={"after": seq, "start": t, "why": ...}` about the moments since, this one included.
        """
        named = {} if tokens is None else {"tokens": {d: asdict(token) for d, token in tokens.items()}}
        if self._position and named:
            self._carried = named
        value = {**named, **self._clock_step(), **self._streamed(), **more}
        seq = self._open(t).note(t, value, barrier=True)
        if doubt := more.get("doubt"):
            self.doubts.append(Doubt(**{"until": seq, "end": int(t), **doubt}))
        self.sync(t)
        self.newest = Moment(seq, t)
        return seq

    # -- streams -----------------------------------------------------------------------------------------------------------

    def begin_stream(self, ring: str, rows: int = 0) -> None:
        """What `stream` is given from here on comes from this ring, of which so many rows are in the journal."""
        self._position = {"ring": ring, "rows": rows}

    def end_stream(self) -> None:
        """Nothing more comes from a ring."""
        self._position, self._carried = {}, {}

    def stream(self, facts: Facts, data: bytes | memoryview, *, each: bool) -> int:
        """Single writes in the order in which they arrived; `each`: every one is a moment once `sync` has returned.

        Else they are part of a set.  Returns the sequence number of the last one.
        """
        t = Instant(int(facts["t"][-1]))
        log = self._open(t) if each else self._in_set(t)
        if each and (step := self._clock_step()):
            log.note(t, step, barrier=True)
        self._position["rows"] += len(facts)
        seq = log.append(facts, data, t, barrier=each, each=each)
        if each:
            self.newest = Moment(seq, t)
            self._streamed_bytes += len(data)
        return seq

    def _streamed(self) -> dict[str, Any]:
        return {"stream": dict(self._position)} if self._position else {}

    def sync(self, t: Instant) -> None:
        """Everything that was appended is durable when this returns; at `t`, an old or large log ends here."""
        self.flush()
        self.end_if_due(t)

    def flush(self) -> None:
        """Everything that was appended is durable when this returns."""
        if self._log:
            self._log.sync()
            self._flushed = self._log.size

    def end_if_due(self, t: Instant) -> None:
        """An old or large log, all of it durable, ends at `t`."""
        if self._log is None:
            return
        self._look_at_the_guest()
        self._log.past_cache(self.in_burst)
        due = self._log.size >= SEGMENT_MAX_BYTES or abs(t - self._began) >= SEGMENT_MAX_AGE_NS  # clocks are set back
        if due and (self._log.size >= LOG_MAX_BYTES or not self._sealing.is_full):
            self.rotate()

    @property
    def in_burst(self) -> bool:
        """Whether the guest of a stream writes as much as it can."""
        return time.monotonic() < self._burst_until

    def _look_at_the_guest(self) -> None:
        """Sealing rests while it writes as much as it can."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            if self._streamed_bytes >= BURST_BYTES * (now - self._looked):
                self._sealing.rest(CALM_SECONDS)
                self._burst_until = now + CALM_SECONDS
            self._looked, self._streamed_bytes = now, 0

    def _clock_step(self) -> dict[str, Any]:
        step = self._steps.step()
        return {"clock": {"step_ns": step}} if step else {}

    def rotate(self) -> None:
        """The log ends, and the next fact begins a new one.  Raises what sealing raised."""
        if self._log is None:
            return
        log, self._log = self._log, None
        self._next = log.next
        try:
            log.close()
        finally:
            self._sealing.add(log.name, log.size)
        if log.size >= LOG_MAX_BYTES:
            self._sealing.wait_for_room(log.size)
        self._sealing.check()

    def finish(self) -> None:
        """No segment is being sealed any more when this returns.  Raises what sealing raised."""
        self._sealing.finish()

    def abandon(self) -> None:
        """Let go of everything as it is; the next one to take over finds what somebody leaves who dies."""
        if self._log:
            self._log.abandon()
            self._log = None
        self._sealing.abandon()

    def close(self, *, seal: bool = True) -> None:
        """Everything is sealed when this returns; without `seal`, by and by.  Raises what sealing raised."""
        try:
            self.rotate()
        finally:
            if seal:
                self.finish()
