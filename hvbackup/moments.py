"""Moments as people write them, and the recovery point that answers.  Pure.

    latest                      the newest point
    2026-11-22T14:03:07Z        RFC 3339; without a zone the time is local
    2026-11-22 14:03[:07]       local; seconds may be left out
    -10m, -1h30m, -2d           ago: s, m, h, d, w
    4f1c…                       a point's id, or its beginning (four digits at least)
    seq:4711, tag:NAME          a moment of the machine's journal, by its number or by what it was called
    common:GROUP, common:ID     a moment that several machines have in common, the newest of a group or by its id

The newest point at or before the moment is taken.  A time given to the second means the end of that second, because that is
how `points` prints them; given to the minute, or with a fraction, it means exactly what it says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from hvbackup.errors import NotFound, UsageError
from hvbackup.model import SECOND, Instant, RecoveryPoint

LATEST = "latest"
FORMS = "latest, 2026-11-22 14:03[:07], 2026-11-22T14:03:07Z, -10m, a point's id, tag:NAME, common:GROUP, or seq:N"

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGO = re.compile(r"-((?:\d+[smhdw])+)")
_ID = re.compile(r"[0-9a-f]{4,16}")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?\s*(\S+)?", re.IGNORECASE)
_SEQ = re.compile(r"seq:(\d{1,18})")
_TAG = re.compile(r"tag:(.*\S.*)")
_COMMON = re.compile(r"common:(.*\S.*)")


@dataclass(frozen=True, slots=True)
class Moment:
    """What `--at` says: a time, a point's id, or a moment's number or tag."""

    text: str
    t: Instant | None = None
    point: str = ""  # the beginning of an id
    seq: int | None = None
    tag: str = ""
    common: str = ""  # a group, or an id


def parse(text: str, now: Instant) -> Moment:
    """What the text means.  Raises UsageError naming the forms there are."""
    text = text.strip()
    if text == LATEST:
        return Moment(text)
    if seq := _SEQ.fullmatch(text):
        return Moment(text, seq=int(seq[1]))
    if tag := _TAG.fullmatch(text):
        return Moment(text, tag=tag[1].strip())
    if common := _COMMON.fullmatch(text):
        return Moment(text, common=common[1].strip())
    ago = _AGO.fullmatch(text)
    if ago:
        seconds = sum(int(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+)([smhdw])", ago[1]))
        return Moment(text, Instant(now - seconds * SECOND))
    if _ID.fullmatch(text.lower()):
        return Moment(text, point=text.lower())
    time = _TIME.fullmatch(text)
    if time is None:
        raise UsageError(f"{text} is no moment; write {FORMS}")
    return Moment(text, _instant(text, time))


def _instant(text: str, time: re.Match[str]) -> Instant:
    date, minutes, seconds, fraction, zone = time.groups()
    try:
        local = datetime.fromisoformat(f"{date}T{minutes or '00:00'}:{seconds or '00'}{_offset(zone)}")
        aware = local if local.tzinfo else _as_local(local, zone)
    except (ValueError, OverflowError) as e:
        raise UsageError(f"{text} is no moment ({e}); write {FORMS}") from e
    whole = int(aware.timestamp()) * SECOND
    rest = int(fraction.ljust(9, "0")) if fraction else SECOND - 1 if seconds else 0
    return Instant(whole + rest)


def _offset(zone: str | None) -> str:
    """A zone as `fromisoformat` wants it; empty for none, and for a name."""
    if zone is None or not re.fullmatch(r"z|utc|gmt|[+-]\d\d:?\d\d", zone.lower()):
        return ""
    return zone if zone[0] in "+-" else "+00:00"


def _as_local(time: datetime, zone: str | None) -> datetime:
    """A time without an offset, in the zone of this machine; a zone's name must be the one used here at that time."""
    aware = time.astimezone()
    if zone is not None and aware.tzname() != zone:
        other = time.replace(fold=1).astimezone()  # the hour that comes twice
        if other.tzname() != zone:
            raise ValueError(f"zone {zone} is not the local one, {aware.tzname()}; write an offset such as +01:00")
        return other
    return aware


def pick(
    points: Sequence[RecoveryPoint], moment: Moment, machine: str, show: Callable[[Instant], str]
) -> RecoveryPoint:
    """The point that answers; `points` are of one machine, oldest first.

    Raises NotFound with the nearest points on both sides, UsageError when an id's beginning fits several.
    """
    if not points:
        raise NotFound(f"Machine {machine} has no readable point; `hvbackup check` says why")
    if moment.point:
        return _by_id(points, moment.point, machine)
    before = [p for p in points if moment.t is None or p.t <= moment.t]
    if not before:
        first = points[0]
        raise NotFound(
            f"Machine {machine} has no point at or before {moment.text}{_resolved(moment, show)}; "
            f"its oldest is {first.id} of {show(first.t)}, its newest {points[-1].id} of {show(points[-1].t)}"
        )
    return before[-1]


def _resolved(moment: Moment, show: Callable[[Instant], str]) -> str:
    return f" ({show(moment.t)})" if moment.t is not None and moment.text.startswith("-") else ""


def _by_id(points: Sequence[RecoveryPoint], text: str, machine: str) -> RecoveryPoint:
    found = [p for p in points if p.id.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{len(found)} points of machine {machine} begin with {text}: {', '.join(p.id for p in found)}"
        )
    ids = sorted([*(p.id for p in points), text])
    at = ids.index(text)
    near = ids[max(0, at - 1) : at] + ids[at + 1 : at + 2]
    raise NotFound(
        f"Machine {machine} has no point {text}; the nearest ids are {' and '.join(near)}, "
        f"and `hvbackup points {machine}` lists all {len(points)}"
    )


def local(t: Instant) -> str:
    """A moment for people: local time with its zone, to the second."""
    return datetime.fromtimestamp(t // SECOND, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def rfc3339(t: Instant) -> str:
    """A moment for programs: UTC, to the nanosecond."""
    return datetime.fromtimestamp(t // SECOND, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{t % SECOND:09d}Z"
