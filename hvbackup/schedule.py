"""When something is due: calendar expressions, intervals, retries, and what was missed.  Pure: the clock is a parameter.

    daily, hourly, weekly, monthly            at midnight, at the full hour, on Monday, on the 1st
    22:00        Mon..Fri 22:00               every day, on some days of the week
    *:0/15                                    every quarter of an hour
    Sat *-*-1..7 03:00                        on the first Saturday of each month
    30m, 4h, 2d                               so long after the last one began

Calendar expressions are local time.  A time that a change of the clocks leaves out happens at the same distance from midnight as
on other days; one that comes twice happens once, unless every hour is meant.  What was missed is done once, as soon as possible.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from hvbackup.errors import UsageError
from hvbackup.model import SECOND, Instant

FULL_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NAMED = {
    "minutely": "*-*-* *:*:00",
    "hourly": "*-*-* *:00:00",
    "daily": "*-*-* 00:00:00",
    "weekly": "Mon *-*-* 00:00:00",
    "monthly": "*-*-01 00:00:00",
    "quarterly": "*-1,4,7,10-01 00:00:00",
    "yearly": "*-01-01 00:00:00",
}
HORIZON_DAYS = 366 * 8 + 2  # a 29 February comes within eight years
BACKOFF_SECONDS = (60, 120, 300, 600, 1200, 1800)  # before a run that failed is tried again
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_STRETCH = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+")
_DATE = re.compile(r"(?:(\S+)-)?(\S+)-(\S+)")


def stretch(text: str) -> int:
    """Nanoseconds of `5s`, `1h30m`, `2d`.  Raises UsageError."""
    if not _STRETCH.fullmatch(text):
        raise UsageError(f"{text!r} is no stretch of time; write 5s, 10m, 1h30m or 2d")
    return round(sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"([\d.]+)([smhdw])", text)) * SECOND)


@dataclass(frozen=True, slots=True)
class Interval:
    """So long after the last one began."""

    text: str
    ns: int

    def after(self, t: Instant, zone: tzinfo) -> Instant:
        """The next time after `t`."""
        return Instant(t + self.ns)


@dataclass(frozen=True, slots=True)
class Calendar:
    """Days and times of the day."""

    text: str
    weekdays: frozenset[int]
    years: frozenset[int] | None  # None: every one
    months: frozenset[int]
    days: frozenset[int]
    times: tuple[time, ...]
    every_hour: bool

    def after(self, t: Instant, zone: tzinfo) -> Instant:
        """The next time after `t`.  Raises UsageError when there is none within eight years."""
        first = datetime.fromtimestamp(t / SECOND, zone).date() - timedelta(days=1)
        for n in range(HORIZON_DAYS):
            day = first + timedelta(days=n)
            if self._is_on(day) and (found := [v for v in self._of(day, zone) if v > t]):
                return min(found)
        raise UsageError(f"{self.text!r} never happens")

    def _is_on(self, day: date) -> bool:
        return (
            day.weekday() in self.weekdays
            and day.month in self.months
            and day.day in self.days
            and (self.years is None or day.year in self.years)
        )

    def _of(self, day: date, zone: tzinfo) -> Iterator[Instant]:
        for at in self.times:
            for fold in (0, 1) if self.every_hour else (0,):
                local = datetime.combine(day, at.replace(fold=fold), zone)
                yield Instant(int(local.astimezone(UTC).timestamp()) * SECOND)


When = Interval | Calendar


def parse(text: str) -> When:
    """The schedule a text describes.  Raises UsageError with what is wrong."""
    words = text.strip()
    if _STRETCH.fullmatch(words):
        if (ns := stretch(words)) < SECOND:
            raise UsageError(f"{text!r} is too short; the shortest interval is 1s")
        return Interval(words, ns)
    return _calendar(words, NAMED.get(words.lower(), words))


def _calendar(text: str, words: str) -> Calendar:
    parts = words.split()
    try:
        if not parts:
            raise ValueError("it is empty")
        days = _weekdays(parts.pop(0)) if parts and parts[0][0].isalpha() else frozenset(range(7))
        on = _DATE.fullmatch(parts.pop(0)) if parts and "-" in parts[0] else _DATE.fullmatch("*-*-*")
        at = parts.pop(0) if parts else "00:00:00"
        if parts or on is None or ":" not in at:
            raise ValueError("it has more or other parts than day, date and time")
        hours, minutes, seconds = ([*at.split(":"), "0"])[:3] if at.count(":") in (1, 2) else ("", "", "")
        years = None if on[1] in (None, "*") else frozenset(_numbers(on[1], 1970, 2200))
        times = [
            time(h, m, s) for h in _numbers(hours, 0, 23) for m in _numbers(minutes, 0, 59) for s in _numbers(seconds, 0, 59)
        ]  # fmt: skip
        months, month_days = frozenset(_numbers(on[2], 1, 12)), frozenset(_numbers(on[3], 1, 31))
        return Calendar(text, days, years, months, month_days, tuple(times), hours == "*")
    except ValueError as e:
        raise UsageError(
            f"{text!r} is no schedule ({e}); write daily, 22:00, Mon..Fri 22:00, *:0/15, or an interval such as 4h"
        ) from e


def _weekdays(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.lower().split(","):
        first, _, last = part.partition("..")
        a, b = _weekday(first), _weekday(last or first)
        found |= {(a + n) % 7 for n in range((b - a) % 7 + 1)}
    return frozenset(found)


def _weekday(word: str) -> int:
    for number in range(7):
        if len(word) >= 3 and FULL_DAYS[number].startswith(word):
            return number
    raise ValueError(f"{word} is no day; there are Mon to Sun")


def _numbers(text: str, low: int, high: int) -> list[int]:
    """`*`, `5`, `1,3`, `1..5`, `0/15`, `8..18/2`."""
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        first, dots, last = span.partition("..")
        if span == "*":
            a, b = low, high
        else:
            a = int(first)
            b = int(last) if dots else high if slash else a
        if not low <= a <= b <= high or (slash and int(step) < 1):
            raise ValueError(f"{part} is not within {low} to {high}")
        found.update(range(a, b + 1, int(step) if slash else 1))
    return sorted(found)


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of earlier runs of one task; times are 0 where there was none."""

    began: int = 0  # of the newest run, whatever became of it
    ended: int = 0
    succeeded: int = 0  # when the newest good one began
    failures: int = 0  # since then


def due(when: When, past: Past, now: Instant, zone: tzinfo, spread_ns: int = 0, key: str = "") -> Instant:
    """When the task is to run next; not after `now` means now.  What was missed, however often, is due once.

    A clock that was set back makes nothing wait: what began in the future began now.  `spread_ns` moves each key by its own
    share, so that a thousand machines do not begin at the same second.
    """
    began, ended, good = (Instant(min(t, now)) for t in (past.began, past.ended, past.succeeded))
    if past.failures:
        pause = BACKOFF_SECONDS[min(past.failures, len(BACKOFF_SECONDS)) - 1]
        return Instant(min(ended + pause * SECOND, _planned(when, began, zone, spread_ns, key)))
    return now if not good else _planned(when, max(good, began), zone, spread_ns, key)


def _planned(when: When, last: Instant, zone: tzinfo, spread_ns: int, key: str) -> Instant:
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    offset = int(spread_ns * share) if isinstance(when, Calendar) else 0
    return Instant(when.after(Instant(last - offset), zone) + offset)


def interval_for(rpo_ns: int, last_run_ns: int) -> Interval:
    """How often to run so that the newest point is never older than the target, given how long a run takes."""
    return Interval("rpo", max(rpo_ns // 2, rpo_ns - 2 * last_run_ns) if last_run_ns else rpo_ns // 2)


@dataclass(frozen=True, slots=True)
class Window:
    """A limit that holds from one time of the day to another, on some days; a window may go past midnight."""

    weekdays: frozenset[int]
    start: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Window:
        """`Mon..Fri 08:00-18:00` or `22:00-06:00`.  Raises UsageError."""
        days, _, hours = text.strip().rpartition(" ")
        found = re.fullmatch(r"(\d\d?):(\d\d)-(\d\d?):(\d\d)", hours)
        try:
            if found is None:
                raise ValueError("it is not from when to when")
            a, b, c, d = map(int, found.groups())
            return cls(_weekdays(days) if days else frozenset(range(7)), time(a, b), time(c % 24, d))
        except ValueError as e:
            raise UsageError(f"{text!r} is no window ({e}); write Mon..Fri 08:00-18:00") from e

    def holds(self, now: Instant, zone: tzinfo) -> bool:
        """Whether the moment is inside."""
        local = datetime.fromtimestamp(now / SECOND, zone)
        at, day = local.time(), local.weekday()
        if self.start < self.end:
            return day in self.weekdays and self.start <= at < self.end
        return (day in self.weekdays and at >= self.start) or ((day - 1) % 7 in self.weekdays and at < self.end)
