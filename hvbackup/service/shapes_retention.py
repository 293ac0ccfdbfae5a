"""What the verbs of retention answer, as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hvbackup.model import SECOND, Instant
from hvbackup.moments import rfc3339

if TYPE_CHECKING:
    from hvbackup.service.retention import Claims, Done, MachinePlan
    from hvbackup.store.keep.forget import Forgotten, Trashed
    from hvbackup.store.shelves.holds import Hold
    from hvbackup.store.shelves.pins import Pin
    from hvbackup.store.shelves.requests import Request
    from hvbackup.store.shelves.settings import Settings

Json = dict[str, Any]


def _id(path: str) -> str:
    return path.rsplit("-", 1)[1]


def _time(path: str) -> str:
    return rfc3339(Instant(int(path.rsplit("/", 1)[1].split("-")[0])))


def _until(t: Instant | None) -> str | None:
    return rfc3339(t) if t is not None else None


def plan(p: MachinePlan) -> Json:
    """What becomes of the points of a machine or group."""
    points = [
        {"id": _id(j.path), "time": _time(j.path), "keep": j.decision.keep, "reasons": list(j.decision.reasons)}
        for j in p.points
    ]
    return {"machine": {"id": p.machine, "name": p.name}, "group": p.group, "points": points}


def forgotten(f: Forgotten | None) -> Json | None:
    """What was forgotten."""
    if f is None:
        return None
    kept = [{"id": _id(path), "reasons": list(reasons)} for path, reasons in f.kept.items()]
    ids, lost = [_id(path) for path in f.points], [_id(path) for path in f.lost]
    return {"points": ids, "until": _until(f.until), "kept": kept, "lost": lost}


def request(r: Request | None) -> Json | None:
    """What waits for a second operator."""
    if r is None:
        return None
    what = {k: [_id(p) for p in v] if k == "points" else v for k, v in r.what.items()}
    return {"id": r.id, "action": r.action, **what, "by": str(r.by), "time": rfc3339(r.t), "why": r.why}


def done(d: Done) -> Json:
    """`prune` and `forget`."""
    return {
        "dry_run": False,
        "plans": [plan(p) for p in d.plans],
        "forgotten": forgotten(d.forgotten),
        "request": request(d.request),
    }


def trashed(t: Trashed) -> Json:
    """A point in the trash."""
    s = t.tombstone
    return {
        "id": t.id,
        "time": _time(t.path),
        "forgotten": rfc3339(s.t),
        "until": rfc3339(s.until),
        "by": s.by,
        "why": s.why,
    }


def hold(h: Hold) -> Json:
    """A hold."""
    return {
        "id": h.id,
        "point": _id(h.point),
        "since": rfc3339(h.t),
        "until": _until(h.until),
        "why": h.why,
        "by": h.by,
    }


def pin(p: Pin) -> Json:
    """A pin."""
    return {"id": p.id, "points": [_id(path) for path in p.points], "what": p.what, "expires": _until(p.expires)}


def claims(c: Claims) -> Json:
    """`holds`."""
    return {
        "holds": [hold(h) for h in c.holds],
        "pins": [pin(p) for p in c.pins],
        "requests": [request(r) for r in c.requests],
    }


def settings(s: Settings) -> Json:
    """`settings`."""
    return {
        "min_age_seconds": s.min_age_ns // SECOND,
        "trash_seconds": s.trash_ns // SECOND,
        "two_person": s.two_person,
        "immutable": s.immutable,
    }


def settings_lines(s: Settings) -> Iterator[str]:
    """The same for people."""
    yield (
        f"No point is forgotten before it is {_days(s.min_age_ns)} old"
        if s.min_age_ns
        else "Points may be forgotten at any age"
    )
    yield f"Forgotten points can be had back for {_days(s.trash_ns)}"
    yield f"Forgetting {'waits' if s.two_person else 'does not wait'} for a second operator"
    yield f"Files are {'immutable' if s.immutable else 'not immutable'} on the disk"


def _days(ns: int) -> str:
    hours = ns / (3600 * SECOND)
    return f"{hours / 24:g} days" if hours > 48 else f"{hours:g} hours"
