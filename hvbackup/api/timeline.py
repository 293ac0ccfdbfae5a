"""What of a machine can be recovered, as a band of time: from names of points and the index of its journal, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvbackup.model import SECOND, Instant, MachineId
from hvbackup.moments import rfc3339
from hvbackup.service.estate import Estate, Known
from hvbackup.service.oddities import Drill, Oddity
from hvbackup.service.timeline import Stretch, stretches
from hvbackup.store.journal.history import Gap, History, Mark
from hvbackup.store.shelves import holds

CELLS = 1200  # of a band: more than a screen shows
KEPT = 64  # histories in memory


@dataclass(slots=True)
class Histories:
    """Journals' indexes, kept until the journal changes.  Thread safety: any thread; at worst one is read twice."""

    _kept: dict[str, tuple[tuple[int, int], History]] = field(default_factory=dict)

    def get(self, estate: Estate, known: Known) -> History | None:
        """The history of a machine that has a journal."""
        if not known.stamp[1]:
            return None
        found = self._kept.get(known.key)
        if found is None or found[0] != known.stamp:
            found = (known.stamp, History(estate.store, MachineId(known.id)))
            self._kept[known.key] = found
            while len(self._kept) > KEPT:
                self._kept.pop(next(iter(self._kept)))
        return found[1]


@dataclass(frozen=True, slots=True)
class Band:
    """A machine's time from `start` to `end`."""

    start: int
    end: int
    points: Sequence[tuple[int, str]]  # at most one for each cell
    points_total: int
    stretches: Sequence[Stretch]
    gaps: Sequence[Gap]
    marks: Sequence[Mark]
    held: Sequence[tuple[int, str, str]]  # time, id of the point, why
    first: int  # of everything there is
    drills: Sequence[Drill] = ()
    oddities: Sequence[Oddity] = ()

    def shape(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "from": rfc3339(Instant(self.start)),
            "to": rfc3339(Instant(self.end)),
            "first": rfc3339(Instant(self.first)),
            "points_total": self.points_total,
            "points": [{"id": i, "time": rfc3339(Instant(t))} for t, i in self.points],
            "stretches": [
                {"from": rfc3339(s.start), "to": rfc3339(s.end), "moments": s.moments,
                 "median_seconds": s.median_seconds, "longest_seconds": s.longest_seconds}
                for s in self.stretches
            ],
            "gaps": [{"from": rfc3339(g.start), "to": rfc3339(g.end), "why": g.why} for g in self.gaps],
            "marks": [{"tag": m.label, "seq": m.seq, "time": rfc3339(m.t)} for m in self.marks],
            "verified": [
                {"time": rfc3339(Instant(d.moment)), "at": d.at, "when": rfc3339(Instant(d.t)), "seconds": d.seconds,
                 "error": d.error or None}
                for d in self.drills
            ],
            "oddities": [{"time": rfc3339(Instant(o.t)), "kind": o.kind, "why": o.text} for o in self.oddities],
            "holds": [{"time": rfc3339(Instant(t)), "point": i, "why": w} for t, i, w in self.held],
        }  # fmt: skip


def band(estate: Estate, histories: Histories, known: Known, now: int, start: int | None, end: int | None) -> Band:
    """What there is between two times (default: from the first point or moment until now)."""
    history = histories.get(estate, known)
    first = int(known.times[0])
    if history and history.first:
        first = min(first, int(history.first.t))
    a, b = max(start if start is not None else first, 0), end if end is not None else now
    b = max(b, a + SECOND)
    low, high = np.searchsorted(known.times, [a, b + 1]).tolist()
    told = history.told if history else None
    drills, oddities = estate.told.of(known.id)
    if told:
        oddities = [*oddities, *(Oddity(int(d.start), "tracker", d.why) for d in told.doubts)]
    return Band(
        a, b, _thinned(known, low, high, a, b), high - low,
        [s for s in stretches(history) if s.end >= a and s.start <= b] if history else [],
        [g for g in told.gaps if g.end >= a and g.start <= b] if told else [],
        [m for m in told.marks if a <= m.t <= b] if told else [],
        _held(estate, known, now), first,
        [d for d in drills if a <= d.moment <= b], [o for o in oddities if a <= o.t <= b],
    )  # fmt: skip


def _thinned(known: Known, low: int, high: int, a: int, b: int) -> list[tuple[int, str]]:
    """The newest point of each cell."""
    times = known.times[low:high]
    if not len(times):
        return []
    cells = ((times - a) * CELLS // max(1, b - a)).astype(np.int64)
    last = np.flatnonzero(np.r_[cells[1:] != cells[:-1], True])
    return [(int(times[i]), known.ids[low + int(i)]) for i in last.tolist()]


def _held(estate: Estate, known: Known, now: int) -> list[tuple[int, str, str]]:
    folder = f"points/{known.key}/"
    found = holds.active(estate.store, Instant(now))
    return [
        (int(path.rsplit("/", 1)[1][:20]), path[-16:], "; ".join(h.reason() for h in several))
        for path, several in found.items() if path.startswith(folder)
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What the cursor stands on."""

    at: str  # as --at has it
    t: int
    kind: str  # point | moment | gap | nothing
    text: str
    rpo_seconds: float | None  # between the moment that answers and the one after it: what was at risk there
    behind_seconds: float = 0.0  # from the moment that answers to the one that was asked for

    def shape(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "at": self.at, "time": rfc3339(Instant(self.t)) if self.t else None, "kind": self.kind, "text": self.text,
            "rpo_seconds": self.rpo_seconds, "behind_seconds": self.behind_seconds,
        }  # fmt: skip


def answer(estate: Estate, histories: Histories, known: Known, t: int) -> Answer:
    """What `--at` of this time gives: the newest point or moment at or before it, or the gap it lies in."""
    history = histories.get(estate, known)
    gap = history.gap_at(Instant(t)) if history else None
    if gap is not None:
        return Answer(
            "", 0, "gap", f"Nothing was recorded from {rfc3339(gap.start)} to {rfc3339(gap.end)}: {gap.why}", None
        )
    moment = history.newest_at(Instant(t)) if history else None
    number = int(np.searchsorted(known.times, t, side="right")) - 1
    point = int(known.times[number]) if number >= 0 else 0
    if moment is None and not point:
        return Answer(
            "", 0, "nothing", f"The oldest that can be recovered is of {rfc3339(Instant(int(known.times[0])))}", None
        )
    if moment is not None and moment.t >= point:
        after = history.oldest_after(moment.t) if history else None
        rpo = (int(after.t) - int(moment.t)) / SECOND if after else None
        return Answer(f"seq:{moment.seq}", int(moment.t), "moment", "", rpo, (t - int(moment.t)) / SECOND)
    after_t = int(known.times[number + 1]) if number + 1 < len(known.times) else 0
    rpo = (after_t - point) / SECOND if after_t else None
    return Answer(known.ids[number], point, "point", "", rpo, (t - point) / SECOND)
