"""How much room a policy needs, out of what was measured.  Pure.

    base      the newest state: its data, at what first backups stored for each byte of theirs
    points    for every point the policy keeps, what changed since the kept one before it, at what later backups stored for each
              changed byte: so compression, deduplication and map pages are in it
    journal   the window, at what the journal took for each second
    margin    10 % of all that

What changed between two points depends on how far they are apart, and not in proportion: what is overwritten every hour counts
once a day when only daily points are kept.  So change is measured at several distances, and in between it is interpolated.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hvbackup.errors import UsageError
from hvbackup.model import SECOND, Instant
from hvbackup.store.keep.retention import UNLIMITED, Candidate, Policy, plan

DAY_NS = 86400 * SECOND
HOUR_NS = 3600 * SECOND
MARGIN = 0.10
CANDIDATES_MAX = 100_000
REACH_DAYS = {"daily": 1, "weekly": 7, "monthly": 31, "yearly": 366}  # what one point of a rule looks back


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of one machine."""

    machine: str
    name: str
    points: int
    interval_ns: int  # between two of its captures
    data_bytes: int  # of the newest point: blocks that are not zero
    first_share: float  # stored for each byte of data of the first capture
    share: float  # stored for each changed byte of later ones: 1 - reduction
    changes: Mapping[int, float] = field(default_factory=dict)  # distance of two points -> bytes that differ
    journal_bytes_per_day: float | None = None  # None: it has no journal

    @property
    def day_bytes(self) -> float:
        """What differs from one day to the next."""
        return change(self, DAY_NS)


@dataclass(frozen=True, slots=True)
class Need:
    """What one machine needs."""

    measured: Measured
    kept: int  # points
    base_bytes: int
    points_bytes: int
    journal_bytes: int
    notes: Sequence[str] = ()

    @property
    def total_bytes(self) -> int:
        """With the margin."""
        return math.ceil((self.base_bytes + self.points_bytes + self.journal_bytes) * (1 + MARGIN))


def change(m: Measured, distance_ns: int) -> float:
    """Bytes that differ between two points so far apart: measured, interpolated, or in proportion to the farthest measured."""
    known = sorted(m.changes.items())
    if not known:
        return 0.0
    if distance_ns <= known[0][0]:
        return known[0][1] * distance_ns / known[0][0]
    for (near, less), (far, more) in itertools.pairwise(known):
        if distance_ns <= far:
            return less + (more - less) * (distance_ns - near) / (far - near)
    far, most = known[-1]
    return min(max(most, float(m.data_bytes)), most * distance_ns / far)


def distances(policy: Policy, interval_ns: int, now: Instant) -> list[int]:
    """How far each point that the policy keeps is from the kept one before it, once it has been followed for long enough.

    Raises UsageError for a policy that keeps nothing, or everything for ever.
    """
    plan([], policy, {})
    times = _schedule(policy, interval_ns, now)
    kept = {d.key for d in plan([Candidate(str(t), Instant(t)) for t in times], policy, {}) if d.keep}
    stay = sorted(t for t in times if str(t) in kept)
    return [b - a for a, b in itertools.pairwise(stay)]


def _schedule(policy: Policy, interval_ns: int, now: Instant) -> list[int]:
    """Moments of captures, back as far as the policy reaches: each near the present, one a day before that."""
    if UNLIMITED in (n for _, n in policy.rules()):
        raise UsageError("A rule that keeps all points needs more room every day, for ever; say how many")
    within = now - policy.within.before(now, policy.zone) if policy.within else 0
    near = max(policy.last * interval_ns, (policy.hourly + 1) * max(HOUR_NS, interval_ns), within, 2 * DAY_NS)
    if near // interval_ns > CANDIDATES_MAX:
        raise UsageError(f"The rules keep more than {CANDIDATES_MAX} points of a machine; ask for fewer")
    rules = dict(policy.rules())
    days = max(((rules[name] + 1) * reach for name, reach in REACH_DAYS.items() if name in rules), default=0)
    exact = range(now, now - near, -interval_ns)
    daily = max(DAY_NS, interval_ns)
    before = range(exact[-1] - daily, max(0, now - days * DAY_NS), -daily)
    return [*exact, *before]


def need(m: Measured, policy: Policy, window_ns: int, now: Instant) -> Need:
    """What a machine needs under a policy.  Raises UsageError."""
    found = distances(policy, m.interval_ns, now)
    changed = sum(change(m, distance) for distance in found)
    journal, notes = 0.0, []
    if window_ns and m.journal_bytes_per_day is None:
        journal = m.share * change(m, HOUR_NS) * window_ns / HOUR_NS
        notes.append(f"{m.name} has no journal to measure: its window is reckoned from what changes in an hour")
    elif window_ns:
        journal = (m.journal_bytes_per_day or 0.0) * window_ns / DAY_NS
    base = m.data_bytes * m.first_share
    return Need(m, len(found) + 1, math.ceil(base), math.ceil(changed * m.share), math.ceil(journal), notes)


@dataclass(frozen=True, slots=True)
class Trend:
    """How the store grows."""

    per_day_bytes: float  # the mean of the days that were looked at
    days: int
    full: datetime.date | None  # when its disk is full if it goes on like this; None: not within a hundred years


def trend(days: Mapping[datetime.date, int], today: datetime.date, free_bytes: int, span: int) -> Trend:
    """Out of what was stored on each day; days on which nothing was stored count, back to the first one that is known."""
    since = max(min(days, default=today), today - datetime.timedelta(days=span))
    length = max(1, (today - since).days)
    stored = sum(n for day, n in days.items() if since <= day <= today)
    per_day = stored / length
    left = free_bytes / per_day if per_day > 0 else math.inf
    return Trend(per_day, length, today + datetime.timedelta(days=int(left)) if left < 36525 else None)
