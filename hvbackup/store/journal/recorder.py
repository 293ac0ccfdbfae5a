"""The one writer of a machine's journal.

`take_over` settles what a dead writer left and begins a new epoch; every file of the journal carries the epoch, so that a writer
that was replaced and does not know it is fenced off.  Facts are appended in sets, a barrier closes a set, and only then is there
a new moment; of the writes of a stream each is one.  A log is sealed when it is old or large enough; sealing runs on a thread
of its own.

A set may be larger than a log: what changed while the first point of a large machine was made, say.  Then the log ends within the
set, with a barrier that says so and is no moment (`part`), and the set goes on in the next one.  So nobody, who writes, seals or
reads, ever holds more than one log in memory.  Should we die, what was written of the set stays, and does no harm: the next life
goes on from the moment before it, and whatever it reads lies over it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hvbackup.errors import StoreDamage
from hvbackup.model import SECOND, Disk, DiskId, Instant, MachineId, MiB, Token
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal
from hvbackup.store.journal.history import FANOUT, History
from hvbackup.store.journal.journal import FOLDER, LOG, Facts, LogWriter, Name
from hvbackup.store.journal.segment import write_segment
from hvbackup.store.journal.told import Doubt, Moment, carried
from hvbackup.store.store import Store

SEGMENT_MAX_BYTES = 64 * MiB  # sealed at the latest here: bounds replay after a crash to well under a second
SEGMENT_MAX_AGE_NS = 60 * SECOND  # and here: bounds how far a replica lags
FLUSH_BYTES = 16 * MiB  # of a set are on their way to the disk at most: a barrier has no more to wait for
SEALING_MAX = 4  # logs that wait to be sealed: each costs a reader as much memory
LOG_MAX_BYTES = 512 * MiB  # a log grows to this while so many wait, for whoever appends must not
CLOCK_STEP_NS = 60 * SECOND  # a step of the wall clock over this is a fact
GOES_ON = "a set that is larger than a file of the journal goes on in the next one"


def settle(store: Store, machine: MachineId) -> None:
    """Every log a dead writer left is sealed up to its last barrier, or removed where it has none."""
    folder = store.ring.machine_name(machine)
    names = journal.all_files(store.files, folder)
    for name in sorted(names, key=lambda n: (n.epoch, n.first)):
        if name.suffix == LOG and (any(n.covers(name) for n in names) or seal(store, folder, name)):
            store.files.remove(f"{FOLDER}/{folder}/{name}")


def seal(store: Store, folder: str, name: Name) -> bool:
    """The segment of a log exists when this returns, if the log holds any moment.  Whether the log may go."""
    try:
        frames = journal.up_to_last_barrier(journal.read_log(store.files, store.ring, folder, name))
        write_segment(store.files, store.ring, folder, name, frames)
    except StoreDamage:
        # A power cut took its header: nothing in it was ever durable.  Where something was, it is kept for whoever can read it.
        return not journal.held_moments(store.files, folder, name)
    return True


class Recorder:
    """Appends to the journal of one machine.  Thread safety: one thread, except `sync`."""

    def __init__(self, store: Store, machine: MachineId, disks: Sequence[Disk]) -> None:
        """Take over the journal: what was left is settled, and a new epoch begins with the first fact."""
        self._store, self._machine, self._folder = store, machine, store.ring.machine_name(machine)
        settle(store, machine)
        names = journal.list_files(store.files, self._folder)
        self.epoch = max((n.epoch for n in names), default=0) + 1
        # One number is left out: the point that a new life begins with takes it, and no moment before has it.
        self._next = (self._end(names[-1]) if names else 0) + 1
        self.doubts: list[Doubt] = []  # repeated at the head of each file
        self.newest = Moment(self._next - 1, Instant(0))  # what a set follows; whoever knows the moment says which
        self.disks: tuple[Disk, ...] = ()  # the machine's, from the next fact on
        self.clock_stepped = False  # the wall clock jumped in this epoch: ages mean nothing until somebody confirms it
        self._clock: tuple[int, int] | None = None  # wall and monotonic time of the newest barrier
        self._log: LogWriter | None = None
        self._began: Instant = Instant(0)
        self._flushed = 0  # bytes of the log
        self._sealing: deque[threading.Thread] = deque()
        self._sealed = 0
        self._position: dict[str, Any] = {}  # how far the ring of a stream has been taken into the journal
        self._carried: dict[str, Any] = {}  # the tokens of a stream, repeated at the head of each file
        self._failed: BaseException | None = None
        self._numbers: dict[DiskId, int] = {}
        self.set_disks(disks)

    def _end(self, name: Name) -> int:
        from hvbackup.store.journal.segment import Segment

        return name.first + len(Segment(self._store.files, self._store.ring, self._folder, name).facts)

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
            self._log = LogWriter(self._store.files, self._store.ring, self._folder, self.epoch, self._next)
            self._began, self._flushed = t, 0
            self._log.note(t, self._table(), barrier=False)
        return self._log

    def _in_set(self, t: Instant) -> LogWriter:
        """Where the next facts of a set go."""
        log = self._open(t)
        if log.size >= LOG_MAX_BYTES or (log.size >= SEGMENT_MAX_BYTES and not self._is_behind()):
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
        log, waiting = self._log, sum(thread.is_alive() for thread in tuple(self._sealing))
        return log is not None and log.size >= LOG_MAX_BYTES // 2 and waiting >= SEALING_MAX

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

    def barrier(self, t: Instant, tokens: Mapping[DiskId, Token], **more: Any) -> int:
        """The set is closed: its state is a durable moment when this returns the moment's sequence number.

        `more` is told with it: `gap={"from": t, "why": ...}` that ends here, `mark={"label": ...}`, `sampled=N` blocks that were
        as the tracker said, `doubt={"after": seq, "start": t, "why": ...}` about the moments since, this one included.
        """
        named = {"tokens": {d: asdict(token) for d, token in tokens.items()}}
        if self._position:
            self._carried = named
        value = {**named, **self._clock_step(t), **self._streamed(), **more}
        seq = self._open(t).note(t, value, barrier=True)
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
        if each and (step := self._clock_step(t)):
            log.note(t, step, barrier=True)
        self._position["rows"] += len(facts)
        seq = log.append(facts, data, t, barrier=each, each=each)
        if each:
            self.newest = Moment(seq, t)
        return seq

    def _streamed(self) -> dict[str, Any]:
        return {"stream": dict(self._position)} if self._position else {}

    def sync(self, t: Instant) -> None:
        """Everything that was appended is durable when this returns; at `t`, an old or large log ends here."""
        if self._log is None:
            return
        self._log.sync()
        self._flushed = self._log.size
        due = self._log.size >= SEGMENT_MAX_BYTES or t - self._began >= SEGMENT_MAX_AGE_NS
        if due and (self._log.size >= LOG_MAX_BYTES or not self._is_behind()):
            self.rotate()

    def _is_behind(self) -> bool:
        """Whether as many logs wait to be sealed as may."""
        while self._sealing and not self._sealing[0].is_alive():
            self._sealing.popleft()
        return len(self._sealing) >= SEALING_MAX

    def _clock_step(self, t: Instant) -> dict[str, Any]:
        """What to tell when the wall clock went another way than the monotonic one."""
        now, before = (int(t), time.monotonic_ns()), self._clock
        self._clock = now
        step = (now[0] - before[0]) - (now[1] - before[1]) if before else 0
        if abs(step) <= CLOCK_STEP_NS:
            return {}
        self.clock_stepped = True
        return {"clock": {"step_ns": step}}

    def rotate(self) -> None:
        """The log is being sealed, and the next fact begins a new one.  Raises what sealing the one before raised."""
        if self._log is None:
            return
        log, self._log = self._log, None
        self._next = log.next
        log.close()
        while len(self._sealing) >= SEALING_MAX:
            self._sealing.popleft().join()
        self._raise_failed()
        before = self._sealing[-1] if self._sealing else None
        thread = threading.Thread(target=self._seal, args=(log.name, before), name="hvbackup-seal")
        self._sealing.append(thread)
        thread.start()

    def _seal(self, name: Name, before: threading.Thread | None) -> None:
        if before:
            before.join()
        try:
            if seal(self._store, self._folder, name):
                self._store.files.remove(f"{FOLDER}/{self._folder}/{name}")
            self._sealed += 1
            if not self._position or self._sealed % FANOUT == 0:  # a stream seals every few seconds
                History(self._store, self._machine).warm()
        except BaseException as e:  # noqa: BLE001 - handed to the thread that owns the recorder
            self._failed = e

    def finish(self) -> None:
        """No segment is being sealed any more when this returns.  Raises what sealing raised."""
        while self._sealing:
            self._sealing.popleft().join()
        self._raise_failed()

    def _raise_failed(self) -> None:
        if self._failed:
            failed, self._failed = self._failed, None
            raise failed

    def abandon(self) -> None:
        """Let go of the log as it is; the next one to take over settles it."""
        if self._log:
            self._log.close()
            self._log = None
        for thread in self._sealing:
            thread.join()

    def close(self) -> None:
        """Everything is sealed when this returns."""
        self.rotate()
        self.finish()
