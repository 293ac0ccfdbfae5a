"""What continuous protection looks like as JSON; the manners are those of `shapes`."""

from __future__ import annotations

from typing import Any

from hvbackup.model import Instant, Machine
from hvbackup.moments import rfc3339
from hvbackup.protect.events import Begun, Cycle, Event, Folded, Paused, Streamed
from hvbackup.service import shapes
from hvbackup.service.protection import Left
from hvbackup.service.timeline import Timeline
from hvbackup.store.journal.history import Moment

Json = dict[str, Any]


def moment(m: Moment) -> Json:
    """A moment."""
    return {"seq": m.seq, "time": rfc3339(m.t)}


def event(machine: Machine, e: Event) -> Json:
    """A line of `protect --json`."""
    base: Json = {"machine": {"id": machine.id, "name": machine.name}}
    if isinstance(e, Cycle):
        figures = {"read_bytes": e.read_bytes, "seconds": round(e.seconds, 4), "lag_seconds": round(e.lag_seconds, 4)}
        return {"event": "moment", **base, **moment(e.moment), **figures, "marks": list(e.marks),
                "common": dict(e.common) or None, "notes": list(e.notes)}  # fmt: skip
    if isinstance(e, Streamed):
        figures = {
            "writes": e.writes,
            "bytes": e.bytes,
            "seconds": round(e.seconds, 4),
            "lag_seconds": round(e.lag_seconds, 4),
        }
        return {"event": "moment", **base, **moment(e.moment), **figures, "marks": list(e.marks)}
    if isinstance(e, Begun):
        gap = _gap(dict(e.gap)) if e.gap else None
        return {"event": "begun", **base, **moment(e.moment), "how": e.how, "point": e.point.id, "gap": gap,
                "seconds": round(e.seconds, 3)}  # fmt: skip
    if isinstance(e, Folded):
        return {"event": "folded", **base, "point": shapes.point(e.point), "seconds": round(e.seconds, 3),
                "removed_bytes": e.removed_bytes}  # fmt: skip
    if isinstance(e, Paused):
        return {"event": "paused", **base, **shapes.pause(e.pause)}
    return {"event": "trouble", **base, "error": shapes.error(e.error), "retry_seconds": e.retry_seconds}


def left(found: Left) -> Json:
    """`protect pause`, `protect resume`."""
    machine = {"id": found.machine.id, "name": found.machine.name}
    return {"machine": machine, "paused": shapes.pause(found.pause) if found.pause else None, "worker": found.worker}


def _gap(g: Json) -> Json:
    return {"from": rfc3339(Instant(g["from"])), "to": rfc3339(Instant(g["to"])), "why": g["why"]}


def timeline(t: Timeline) -> Json:
    """`timeline`."""
    return {
        "machine": shapes.machine(t.machine),
        "from": rfc3339(t.start),
        "to": rfc3339(t.now),
        "newest": moment(t.newest) if t.newest else None,
        "lag_seconds": t.lag_seconds,
        "worker": t.worker or None,
        "paused": shapes.pause(t.pause) if t.pause else None,
        "stretches": [
            {
                "from": rfc3339(s.start),
                "to": rfc3339(s.end),
                "moments": s.moments,
                "median_seconds": s.median_seconds,
                "p95_seconds": s.p95_seconds,
                "longest_seconds": s.longest_seconds,
            }
            for s in t.stretches
        ],
        "points": [{"id": p.id, "time": rfc3339(p.t), "seq": p.seq} for p in t.points],
        "marks": [{"tag": m.label, "seq": m.seq, "time": rfc3339(m.t), "consistency": m.consistency} for m in t.marks],
        "common_moments": [
            {
                "id": c.id,
                "group": c.group,
                "seq": c.seq,
                "time": rfc3339(c.t),
                "machines": list(c.machines),
                "spread_ms": c.spread_ms,
                "left_out": c.left_out,
            }
            for c in t.commons
        ],
        "gaps": [{"from": rfc3339(g.start), "to": rfc3339(g.end), "why": g.why} for g in t.gaps],
        "clock_steps": [{"seq": c.seq, "time": rfc3339(c.t), "step_seconds": c.step_ns / 1e9} for c in t.clocks],
    }
