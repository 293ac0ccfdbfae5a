"""Continuous protection by micro-snapshots: every few seconds a frozen moment of the machine goes into its journal.

A life of protection begins with a capture, which makes the point that the journal's facts are laid over, and goes on in cycles:
freeze, read what changed since the last barrier, append it as one set, close the set with a barrier that names the new tokens.
Nothing that records changes is released before a durable barrier or a committed point names its successor.

    killed after                    left behind                         cleaned by
    1 lease written                 nothing on the host                 settle() of the next life
    2 snapshot, new bitmaps         both sets of bitmaps recording      the same: what barrier and point name stays
    3 some facts appended           a set without a barrier             dropped when the log is taken over
    4 barrier durable               the old bitmaps, snapshot, lease    settle()
    5 released                      the lease                           settle()

A life ends when continuity can't be proved any more (a lost bitmap, another QEMU, a host that is gone).  The next one begins
with a capture again, which compares what it must, and the journal says from when to when nothing was recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hvbackup import extents
from hvbackup.capture import Options, capture
from hvbackup.errors import HostUnreachable, HvbackupError
from hvbackup.extents import Spans
from hvbackup.fold import fold
from hvbackup.hypervisors import Frozen, FrozenDisk, Hypervisor
from hvbackup.leases import Leases, committed_tokens
from hvbackup.model import SECOND, Continuity, DiskId, Machine, MiB, RecoveryPoint, Token
from hvbackup.store.history import History, Moment
from hvbackup.store.recorder import Recorder
from hvbackup.store.store import Store

PIECE_BYTES = 1 * MiB  # read and appended at a time: bounds memory
BACKOFF_SECONDS = (1, 2, 5, 10, 30, 60)  # between lives, while the host does not answer
BUSY_SHARE = (
    0.5  # a cycle may take this part of the interval; a longer one stretches it, so that the guest keeps its throughput
)


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often moments and points are made."""

    every_ns: int = 5 * SECOND
    fold_every_ns: int = 3600 * SECOND


@dataclass(slots=True)
class Cycle:
    """What one cycle did."""

    moment: Moment
    read_bytes: int
    seconds: float
    lag_seconds: float  # from the moment to its durability: what would have been lost


class ContinuityLost(HvbackupError):
    """The hypervisor can't say any more what changed since the last barrier; a new life compares the disks."""


@dataclass(slots=True)
class Life:
    """One life of protection: from a capture to the loss of continuity."""

    recorder: Recorder
    point: RecoveryPoint
    tokens: dict[DiskId, Token]
    gap: dict[str, object] | None = None  # to be told with the first barrier
    folded: int = 0  # the moment of the newest point


class Protection:
    """Protects one machine until it is told to stop.  Thread safety: `run` on one thread, `mark` from any."""

    def __init__(
        self,
        store: Store,
        hypervisor: Hypervisor,
        machine: Machine,
        options: Options,
        rhythm: Rhythm,
        report: Callable[[Cycle | str], None] = lambda _: None,
    ) -> None:
        self._store, self._hypervisor, self._machine = store, hypervisor, machine
        self._options, self._rhythm, self._report = options, rhythm, report
        self._leases = Leases(store, options.clock)
        self._marks: list[str] = []
        self._lock = threading.Lock()

    def mark(self, label: str) -> None:
        """Name the moment of the next cycle."""
        with self._lock:
            self._marks.append(label)

    def run(self, stop: threading.Event) -> None:
        """Protect until `stop` is set.  Raises SpaceExhausted, UsageError, StoreDamage; an unreachable host is waited for."""
        failures, why = 0, "protection was not running"
        while not stop.is_set():
            try:
                life = self.begin(why)
                failures = 0
                self._live(life, stop)
                return
            except (HostUnreachable, ContinuityLost) as e:
                why = str(e)
                self._report(why)
                stop.wait(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)])
                failures += 1

    def begin(self, why: str) -> Life:
        """A life begins: a point, and an open journal behind it.  `why` says why there may be a gap."""
        history = History(self._store, self._machine.id)
        _, times = history.moments
        recorder = Recorder(self._store, self._machine.id, self._machine.disks)
        outcome = capture(self._store, self._hypervisor, self._machine, replace(self._options, seq=recorder.last))
        assert outcome.point is not None  # every other way out of `capture` raises
        point = outcome.point
        gap = {"from": int(times[-1]), "to": point.t, "why": why} if len(times) else None
        recorder.set_disks([d.disk for d in point.disks])
        tokens = {d.disk.id: d.token for d in point.disks if d.token}
        return Life(recorder, point, tokens, gap, point.t)

    def _live(self, life: Life, stop: threading.Event) -> None:
        try:
            pause = self._rhythm.every_ns / SECOND
            while not stop.wait(pause):
                done = self.cycle(life)
                pause = max(self._rhythm.every_ns / SECOND - done.seconds, done.seconds * (1 / BUSY_SHARE - 1))
                self._report(done)
                if done.moment.t - life.folded >= self._rhythm.fold_every_ns:
                    self.fold(life, done.moment)
        finally:
            life.recorder.close()

    def cycle(self, life: Life) -> Cycle:
        """One more moment.  Raises ContinuityLost, HostUnreachable, ReadFailed, SpaceExhausted."""
        began = self._options.clock()
        lease = self._leases.take(self._machine.id, self._options.source)
        with self._hypervisor.snapshot(self._machine, lease.id, life.tokens, self._options.consistency) as frozen:
            read = sum(self._append(life, frozen, disk) for disk in frozen.disks)
            frozen.verify()
            tokens = {d.disk.id: d.token for d in frozen.disks if d.token}
            t = frozen.t
        seq = life.recorder.barrier(t, tokens, **self._told(life))
        life.tokens, life.gap = tokens, None
        self._hypervisor.release(self._machine, lease.id, self._kept(tokens))
        self._leases.remove(lease.id)
        now = self._options.clock()
        return Cycle(Moment(seq, t), read, (now - began) / SECOND, (now - t) / SECOND)

    def _told(self, life: Life) -> dict[str, object]:
        with self._lock:
            labels, self._marks = self._marks, []
        told: dict[str, object] = {"gap": life.gap} if life.gap else {}
        if labels:
            told["mark"] = {"label": "; ".join(labels)}
        return told

    def _kept(self, tokens: Mapping[DiskId, Token]) -> list[Token]:
        """What barrier and point name: no clean-up may remove it."""
        return [*tokens.values(), *committed_tokens(self._store, self._machine.id)]

    def _append(self, life: Life, frozen: Frozen, disk: FrozenDisk) -> int:
        """Append what changed of one disk; how many bytes were read."""
        changes = disk.changes(life.tokens.get(disk.disk.id))
        if changes.continuity is not Continuity.INCREMENTAL or disk.disk not in life.point.machine.disks:
            raise ContinuityLost(f"Disk {disk.disk.id}: {changes.reason or 'it is new, gone or resized'}")
        if len(changes.zero):
            life.recorder.zero(disk.disk.id, frozen.t, [(a, b) for a, b in changes.zero.tolist()])
        reader = disk.open()
        try:
            for runs in _portions(changes.data):
                data = bytearray(sum(length for _, length in runs))
                at = 0
                for offset, length in runs:
                    reader.read_into(offset, memoryview(data)[at : at + length])
                    at += length
                life.recorder.write(disk.disk.id, frozen.t, runs, data)
        finally:
            reader.close()
        return extents.total(changes.data)

    def fold(self, life: Life, moment: Moment) -> None:
        """A point of the moment exists when this returns; the hypervisor is not read."""
        life.recorder.rotate()
        life.recorder.finish()
        outcome = fold(self._store, self._machine.id, moment, self._options)
        assert outcome.point is not None
        life.folded = moment.t


def _portions(data: Spans) -> Sequence[list[tuple[int, int]]]:
    """Ranges cut and gathered so that each portion has at most PIECE_BYTES."""
    portions: list[list[tuple[int, int]]] = [[]]
    room = PIECE_BYTES
    for offset, length in extents.pieces(data, PIECE_BYTES):
        if length > room:
            portions.append([])
            room = PIECE_BYTES
        portions[-1].append((offset, length))
        room -= length
    return [p for p in portions if p]
