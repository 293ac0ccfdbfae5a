"""timeline: what of a machine can be recovered, as a band of time with points, marks and gaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvbackup.model import SECOND, Consistency, Instant, Machine, RecoveryPoint
from hvbackup.moments import local
from hvbackup.service.control import worker_pid
from hvbackup.service.inventory import history_of
from hvbackup.service.session import Session
from hvbackup.store.journal.history import ClockStep, Common, Gap, History, Mark, Moment
from hvbackup.store.shelves import pauses
from hvbackup.store.shelves.pauses import Pause
from hvbackup.store.store import Store

WIDTH = 64  # cells of the band
DENSE, SPARSE, NOTHING = "█", "▒", "·"
SPARSE_FACTOR = 4  # a distance this many times the stretch's median shows


@dataclass(frozen=True, slots=True)
class Stretch:
    """Moments without a gap between them."""

    start: Instant
    end: Instant
    moments: int
    median_seconds: float  # between two moments: the achieved RPO
    p95_seconds: float
    longest_seconds: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Everything there is of one machine."""

    machine: Machine
    start: Instant
    now: Instant
    points: Sequence[RecoveryPoint]
    stretches: Sequence[Stretch]
    gaps: Sequence[Gap]
    marks: Sequence[Mark]
    clocks: Sequence[ClockStep]
    newest: Moment | None
    lag_seconds: float | None  # how old that is; None for a machine without a journal
    worker: int  # process that protects it on this host; 0: none
    pause: Pause | None = None  # it is left alone
    commons: Sequence[Common] = ()
    notes: Sequence[str] = ()

    def bands(self) -> Iterator[str]:
        """Lines of WIDTH cells: moments, and below them points, marks and gaps."""
        moments, events = [NOTHING] * WIDTH, [" "] * WIDTH
        for s in self.stretches:
            for i in range(self._cell(s.start), self._cell(s.end) + 1):
                moments[i] = DENSE if s.longest_seconds <= SPARSE_FACTOR * max(1.0, s.median_seconds) else SPARSE
        for g in self.gaps:
            for i in range(self._cell(g.start) + 1, self._cell(g.end)):
                moments[i] = NOTHING
        signs: list[tuple[int, str]] = [(p.t, "P") for p in self.points]
        signs += [(g.start, "!") for g in self.gaps] + [(m.t, "*") for m in self.marks]
        for t, sign in signs:
            if t >= self.start:
                events[self._cell(t)] = sign
        yield "".join(moments) + f"   {DENSE} moments  {NOTHING} nothing recorded"
        yield "".join(events) + "   P point  * mark  ! gap"

    def _cell(self, t: int) -> int:
        share = (t - self.start) / max(1, self.now - self.start)
        return min(WIDTH - 1, max(0, int(share * WIDTH)))

    def events(self) -> Iterator[str]:
        """Marks and gaps in their order."""
        rows = [(m.t, _mark_line(m)) for m in self.marks]
        for g in self.gaps:
            rows.append(
                (g.start, f"{local(g.start)}  ! nothing recorded for {(g.end - g.start) / SECOND:.1f} s: {g.why}")
            )
        for c in self.clocks:
            rows.append((c.t, f"{local(c.t)}  ! the clock jumped by {c.step_ns / SECOND:+.0f} s"))
        yield from (line for _, line in sorted(rows))
        yield from _common_lines(self.commons)


def _mark_line(m: Mark) -> str:
    how = "" if m.consistency == Consistency.CRASH else f", {m.consistency}-consistent"
    if not m.label:
        return f"{local(m.t)}  * (seq:{m.seq}{how})"
    return f"{local(m.t)}  * {m.label}  (tag:{m.label}, seq:{m.seq}{how})"


def _common_lines(commons: Sequence[Common]) -> Iterator[str]:
    """Each group's newest common moment, and how many there are."""
    newest = {c.group: c for c in commons}
    for c in newest.values():
        number = sum(other.group == c.group for other in commons)
        others = f"{len(c.machines)} machines within {c.spread_ms:g} ms"
        without = f", without {', '.join(c.left_out)}" if c.left_out else ""
        yield f"{local(c.t)}  = common:{c.id} of group {c.group}: {others}{without}; the newest of {number}"


def timeline(session: Session, machine: str, now: Instant, since_ns: int = 0) -> Timeline:
    """What of one machine can be recovered, of the last `since_ns` (0: all).  Raises NotFound."""
    with session.open() as store:
        known = history_of(store, machine)
        history = History(store, known.machine.id)
        start = Instant(now - since_ns) if since_ns else _oldest(known.points, history, now)
        told = history.told
        return Timeline(
            known.machine,
            start,
            now,
            [p for p in known.points if p.t >= start],
            [s for s in stretches(history) if s.end >= start],
            [g for g in told.gaps if g.end >= start],
            [m for m in told.marks if m.t >= start],
            [c for c in told.clocks if c.t >= start],
            history.last,
            _lag(history, history.last, now) if history.last else None,
            worker_pid(session.places, store.id, known.machine.id),
            pauses.current(store, known.machine.id, now),
            [c for c in told.commons if c.t >= start],
            list(known.damaged),
        )


def _oldest(points: Sequence[RecoveryPoint], history: History, now: Instant) -> Instant:
    first = [history.first.t] if history.first else []
    return min([*(p.t for p in points), *first], default=now)


def stretches(history: History) -> list[Stretch]:
    """The runs of moments between gaps, oldest first."""
    _, times = history.moments
    if not len(times):
        return []
    cuts = np.unique(np.searchsorted(times, [g.start for g in history.told.gaps], side="right"))
    parts = [part for part in np.split(times, cuts) if len(part)]
    return [_stretch(part) for part in parts]


def _stretch(times: NDArray[np.int64]) -> Stretch:
    apart = np.diff(times) / SECOND if len(times) > 1 else np.zeros(1)
    median, p95 = np.quantile(apart, [0.5, 0.95]).tolist()
    return Stretch(
        Instant(int(times[0])),
        Instant(int(times[-1])),
        len(times),
        round(median, 3),
        round(p95, 3),
        round(float(apart.max()), 3),
    )


@dataclass(frozen=True, slots=True)
class Protected:
    """How a machine's continuous protection stands, for `status`."""

    newest: Moment
    lag_seconds: float
    worker: int
    pause: Pause | None = None


def standing(session: Session, store: Store, machine: Machine, now: Instant) -> Protected | None:
    """None for a machine without a journal."""
    history = History(store, machine.id)
    newest = history.last
    if newest is None:
        return None
    worker = worker_pid(session.places, store.id, machine.id)
    pause = pauses.current(store, machine.id, now)
    return Protected(newest, _lag(history, newest, now), worker, pause)


def _lag(history: History, newest: Moment, now: Instant) -> float:
    return max(0.0, (now - history.told_at(newest)) / SECOND)
