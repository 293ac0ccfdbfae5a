"""Retention: which points stay, which go, and why.  Pure: a value in, a value out.

A rule such as `daily=7` keeps the newest point of each of the last 7 days *that have one*.  Days, weeks and so on are those of a
calendar in a zone; weeks are ISO weeks, and an hour that a clock change repeats is two hours.  Rules count in one of two ways:

    restic    each rule looks at all points by itself, so one point may serve several rules; a rule that is not used up at the end
              keeps the oldest point as well
    proxmox   rules in the order last, hourly, daily, weekly, monthly, yearly; each looks only at periods that hold no point kept
              by a rule before it, so what they keep adds up

`within` keeps what is less than that older than the newest point.  Beside the rules some points always stay: whoever makes the
plan finds out which and why (`must.py`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from hvbackup.errors import UsageError
from hvbackup.model import SECOND, Instant

UNLIMITED = -1
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


class Count(enum.StrEnum):
    """How rules count."""

    RESTIC = "restic"
    PROXMOX = "proxmox"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of calendar time, such as 1y6mo or 30d."""

    months: int = 0
    days: int = 0
    seconds: int = 0
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> Span:
        """Numbers with y, mo, w, d, h or min behind them.  Raises UsageError."""
        parts = re.findall(r"(\d+)(y|mo|w|d|h|min)", text)
        if not parts or "".join(n + unit for n, unit in parts) != text:
            hint = "; m could be months or minutes, so write mo or min" if re.search(r"\dm(?![oi])", text) else ""
            raise UsageError(f"{text} is no stretch of time; write 30d, 1y6mo, 2w or 12h{hint}")
        n = dict.fromkeys(("y", "mo", "w", "d", "h", "min"), 0)
        for number, unit in parts:
            n[unit] += int(number)
        return cls(12 * n["y"] + n["mo"], 7 * n["w"] + n["d"], 3600 * n["h"] + 60 * n["min"], text)

    def before(self, t: Instant, zone: tzinfo) -> Instant:
        """The moment that lies this much before `t` in the zone's calendar."""
        local = datetime.fromtimestamp(t // SECOND, zone).replace(tzinfo=None)
        year, month = divmod(local.year * 12 + local.month - 1 - self.months, 12)
        if year < 1:
            return Instant(0)
        local = local.replace(year=year, month=month + 1, day=min(local.day, _days(year, month + 1)))
        try:
            local -= timedelta(days=self.days)
            exact = local.replace(tzinfo=zone).astimezone(UTC) - timedelta(seconds=self.seconds)
        except OverflowError:
            return Instant(0)
        return Instant(int(exact.timestamp()) * SECOND + t % SECOND)


def _days(year: int, month: int) -> int:
    following = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
    return (following - timedelta(days=1)).day


@dataclass(frozen=True, slots=True)
class Policy:
    """What is to be kept.  Counts: 0 does not ask for anything, UNLIMITED keeps all."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Span | None = None
    tags: frozenset[str] = frozenset()
    zone: tzinfo = UTC
    count: Count = Count.RESTIC

    def rules(self) -> list[tuple[str, int]]:
        """The rules that ask for something, in order."""
        found = [(name, int(getattr(self, name))) for name in RULES]
        return [(name, n) for name, n in found if n]

    def keeps_something(self) -> bool:
        """Whether there is any rule at all."""
        return bool(self.rules() or self.within or self.tags)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point as retention sees it."""

    key: str  # unique; its path
    t: Instant
    group: Hashable = ""
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one point, and why."""

    key: str
    keep: bool
    reasons: tuple[str, ...]


def plan(points: Sequence[Candidate], policy: Policy, must: Mapping[str, Sequence[str]]) -> list[Decision]:
    """One decision for each point, newest first within its group.

    `must` names points that stay whatever the rules say, with the reasons; the rules count them like any other.
    Raises UsageError when the policy keeps nothing: that is no way to say "forget everything".
    """
    if not policy.keeps_something():
        raise UsageError("No rule says what to keep; give at least one, such as --keep-daily 7")
    groups: dict[Hashable, list[Candidate]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    return [d for group in groups.values() for d in _group(group, policy, must)]


def _group(points: Sequence[Candidate], policy: Policy, must: Mapping[str, Sequence[str]]) -> list[Decision]:
    points = sorted(points, key=lambda p: (p.t, p.key), reverse=True)
    reasons: dict[str, list[str]] = {p.key: list(must.get(p.key, ())) for p in points}
    for point in points:
        reasons[point.key] += [f"tag {tag}" for tag in sorted(point.tags & policy.tags)]
    if policy.within:
        since = policy.within.before(points[0].t, policy.zone)
        for point in points:
            reasons[point.key] += [f"within {policy.within.text}"] if point.t > since else []
    count = _restic if policy.count is Count.RESTIC else _proxmox
    for key, reason in count(points, policy):
        reasons[key].append(reason)
    return [Decision(p.key, bool(reasons[p.key]), tuple(reasons[p.key] or ["no rule keeps it"])) for p in points]


def _restic(points: Sequence[Candidate], policy: Policy) -> list[tuple[str, str]]:
    kept = []
    for name, n in policy.rules():
        used, last = 0, None
        for point in points:
            period = PERIODS[name](point, policy.zone)
            oldest = point is points[-1]
            if (n == UNLIMITED or used < n) and (period != last or oldest):
                used += 1
                kept.append((point.key, f"{'oldest ' if period == last else ''}{_numbered(name, used, n)}"))
                last = period
    return kept


def _proxmox(points: Sequence[Candidate], policy: Policy) -> list[tuple[str, str]]:
    kept: dict[str, str] = {}
    passed: set[str] = set()  # a rule has looked at them: no later one does
    for name, n in policy.rules():
        covered = {PERIODS[name](p, policy.zone) for p in points if p.key in kept}
        mine: set[Hashable] = set()
        for point in [p for p in points if p.key not in kept and p.key not in passed]:
            period = PERIODS[name](point, policy.zone)
            if period in covered:
                continue
            if period in mine:
                passed.add(point.key)
            elif n != UNLIMITED and len(mine) >= n:
                break
            else:
                mine.add(period)
                kept[point.key] = _numbered(name, len(mine), n)
    return list(kept.items())


def _numbered(name: str, number: int, of: int) -> str:
    return f"{name} {number}" if of == UNLIMITED else f"{name} {number}/{of}"


def _local(point: Candidate, zone: tzinfo) -> datetime:
    return datetime.fromtimestamp(point.t // SECOND, zone)


def _hour(point: Candidate, zone: tzinfo) -> Hashable:
    t = _local(point, zone)
    return (t.year, t.month, t.day, t.hour, t.utcoffset())  # the offset tells a repeated hour from the first


def _day(point: Candidate, zone: tzinfo) -> Hashable:
    return _local(point, zone).date()


def _week(point: Candidate, zone: tzinfo) -> Hashable:
    return tuple(_local(point, zone).isocalendar()[:2])


def _month(point: Candidate, zone: tzinfo) -> Hashable:
    t = _local(point, zone)
    return (t.year, t.month)


def _year(point: Candidate, zone: tzinfo) -> Hashable:
    return _local(point, zone).year


PERIODS: Mapping[str, Callable[[Candidate, tzinfo], Hashable]] = {
    "last": lambda point, _zone: point.key,
    "hourly": _hour,
    "daily": _day,
    "weekly": _week,
    "monthly": _month,
    "yearly": _year,
}
