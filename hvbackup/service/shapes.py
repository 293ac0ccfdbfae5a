"""What results look like as JSON: sizes in bytes, moments in RFC 3339 (UTC), the same names everywhere.

`docs/cli.md` lists these shapes; a name, once released, keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hvbackup.errors import HvbackupError
from hvbackup.model import Disk, DiskRoot, Instant, Machine, Outcome, RecoveryPoint
from hvbackup.moments import rfc3339
from hvbackup.service.inventory import History

if TYPE_CHECKING:  # each verb pays for its own modules only
    from hvbackup.recover.boot import Boot
    from hvbackup.service.backup import Planned, Run
    from hvbackup.service.look import Leftover, Overview, StoreFigures
    from hvbackup.service.recovery import Mapped, RestoredPoint
    from hvbackup.service.redefine import Defined
    from hvbackup.service.timeline import Protected
    from hvbackup.store.shelves.pauses import Pause

Json = dict[str, Any]


def error(e: HvbackupError) -> Json:
    """An error."""
    return {"kind": type(e).__name__, "message": str(e), "exit_code": e.exit_code}


def machine(m: Machine) -> Json:
    """A machine."""
    return {"id": m.id, "name": m.name, "platform": m.platform, "disks": [disk(d) for d in m.disks]}


def disk(d: Disk) -> Json:
    """A disk."""
    return {"id": d.id, "size_bytes": d.size, "sector_bytes": d.sector, "path": d.path}


def root(d: DiskRoot) -> Json:
    """A disk inside a point."""
    return {**disk(d.disk), "how": d.how}


def point(p: RecoveryPoint) -> Json:
    """A recovery point."""
    return {
        "id": p.id,
        "time": rfc3339(p.t),
        "machine": {"id": p.machine.id, "name": p.machine.name, "platform": p.machine.platform},
        "consistency": str(p.consistency),
        "size_bytes": sum(d.disk.size for d in p.disks),
        "disks": [root(d) for d in p.disks],
        "figures": dict(p.figures),
        "notes": list(p.notes),
        "tags": list(p.tags),
    }


def outcome(o: Outcome) -> Json:
    """How a capture went."""
    return {
        "status": o.status.name.lower(),
        "point": point(o.point) if o.point else None,
        "figures": asdict(o.figures),
        "notes": list(o.notes),
        "remarks": list(o.remarks),
    }


def run(r: Run) -> Json:
    """One machine of a `backup`."""
    base: Json = {"source": r.source, "machine": machine(r.machine) if r.machine else None}
    if r.outcome:
        return {**base, **outcome(r.outcome), "error": None}
    return {
        **base,
        "status": "failed",
        "point": None,
        "notes": [],
        "remarks": [],
        "error": error(r.error) if r.error else None,
    }


def runs(all_: Sequence[Run]) -> Json:
    """A whole `backup`; its status is the worst."""
    shapes = [run(r) for r in all_]
    order = ("ok", "degraded", "failed")
    worst = max((s["status"] for s in shapes), key=order.index, default="ok")
    if worst == "failed" and any(s["status"] != "failed" for s in shapes):
        worst = "partly"
    return {"status": worst, "runs": shapes}


def planned(p: Planned) -> Json:
    """One machine of a `backup --dry-run`."""
    return {
        "source": p.source,
        "machine": machine(p.machine) | {"tags": list(p.machine.tags)},
        "newest": point(p.newest) if p.newest else None,
        "disks": [{**disk(d), "tracked": d.id in p.known} for d in p.machine.disks],
    }


def store(s: StoreFigures) -> Json:
    """The store as a whole."""
    return {
        "path": str(s.path),
        "id": s.id,
        "block_bytes": s.block,
        "cipher": s.cipher,
        "used_bytes": s.used_bytes,
        "free_bytes": s.free_bytes,
        "packs": s.packs,
        "debt_bytes": s.debt_bytes,
    }


def pause(p: Pause) -> Json:
    """A machine that is left alone."""
    return {"since": rfc3339(p.since), "until": None if p.until is None else rfc3339(p.until), "why": p.why}


def protected(h: History, now: Instant, journal: Protected | None = None) -> Json:
    """A machine in `status`; `protection` is null unless it is, or was, under continuous protection."""
    return {
        **machine(h.machine),
        "points": h.count,
        "oldest": rfc3339(h.oldest),
        "newest": point(h.points[-1]),
        "age_seconds": round(h.points[-1].age_seconds(now), 3),
        "protection": journal
        and {
            "newest": {"seq": journal.newest.seq, "time": rfc3339(journal.newest.t)},
            "lag_seconds": round(journal.lag_seconds, 3),
            "worker": journal.worker or None,
            "paused": journal.pause and pause(journal.pause),
        },
    }


def leftover(v: Leftover) -> Json:
    """A lease in `status`."""
    return {
        "lease": v.lease.id,
        "machine": {"id": v.lease.machine, "name": v.machine},
        "source": v.lease.source,
        "expires": rfc3339(v.lease.expires),
        "expired": v.expired,
    }


def overview(o: Overview, now: Instant) -> Json:
    """`status`."""
    return {
        "store": store(o.store),
        "machines": [protected(h, now, o.protected.get(h.machine.id)) for h in o.machines],
        "leases": [leftover(v) for v in o.leftovers],
        "boots": [boot(b) for b in o.boots],
        "notes": list(o.notes),
    }


def restored(r: RestoredPoint) -> Json:
    """`restore`."""
    return {
        "point": point(r.point),
        "disks": [
            {
                "id": d.root.disk.id,
                "file": str(d.path),
                "format": d.format,
                **(asdict(d.done) if d.done else {}),
                "error": error(d.error) if d.error else None,
            }
            for d in r.disks
        ],
        "machine_file": str(r.machine_file) if r.machine_file else None,
        "notes": list(r.notes),
    }


def defined(made: Defined | None) -> Json:
    """The domain that `restore --to-libvirt` made."""
    return {"defined": asdict(made) if made else None}


def boot(b: Boot) -> Json:
    """A machine booted from a point."""
    return {
        "name": b.name,
        "machine": {"id": b.machine, "name": b.machine_name},
        "point": b.point,
        "state": b.state,
        "since": rfc3339(b.made),
        "seconds": b.seconds,
        "folder": str(b.folder),
        "sockets": dict(b.sockets),
        "processes": {role: process.pid for role, process in b.processes.items()},
    }


def mapped(m: Mapped) -> Json:
    """`map`, once it listens."""
    disks = [{"id": disk, "uri": uri, "size_bytes": m.sizes[disk]} for disk, uri in m.disks.items()]
    return {"point": point(m.point), "disks": disks, "notes": list(m.notes)}
