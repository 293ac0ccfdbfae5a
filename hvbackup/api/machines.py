"""Routes of machines: what there is, what can be recovered, and what people order."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query

from hvbackup import jobs, moments
from hvbackup.api import orders
from hvbackup.api.gate import Caller, Desk, TheDesk, audited, needs, row_of
from hvbackup.api.timeline import Histories, answer, band
from hvbackup.auth import Permission
from hvbackup.daemon.rows import Row, Standing
from hvbackup.errors import NotFound, UsageError
from hvbackup.jobs import Task
from hvbackup.model import SECOND, Instant, PointId
from hvbackup.moments import rfc3339
from hvbackup.service import protection, retention, shapes
from hvbackup.service.estate import Known

router = APIRouter(prefix="/api/v1", tags=["machines"])
histories = Histories()  # keyed by machine and the times of its folders, so it can't be stale

Key = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="the machine's key, as the list of machines has it")]
Reader = Annotated[Caller, Depends(needs(Permission.READ))]
Operator = Annotated[Caller, Depends(needs(Permission.OPERATE))]
Restorer = Annotated[Caller, Depends(needs(Permission.RESTORE))]
Admin = Annotated[Caller, Depends(needs(Permission.ADMIN))]
When = Annotated[str, Query(max_length=100, description="a time, or -10m")]


def known_of(row: Row) -> Known:
    """What the store has of the machine.  Raises NotFound."""
    if row.known is None:
        raise NotFound(f"Machine {row.name} has no point yet")
    return row.known


def shape(row: Row, now: Instant) -> dict[str, Any]:
    """A machine as JSON; its age is of now, however long ago it was looked at."""
    age = max(0, now - row.recoverable) / SECOND if row.recoverable else None
    newest = row.known.newest if row.known else None
    return {
        "key": row.key,
        "id": row.id,
        "name": row.name,
        "platform": row.platform,
        "store": row.store,
        "source": row.source or None,
        "tags": list(row.tags),
        "policy": row.policy or None,
        "continuous": row.continuous,
        "state": str(row.standing),
        "why": row.why or None,
        "rpo_seconds": row.rpo_seconds,
        "recoverable": rfc3339(Instant(row.recoverable)) if row.recoverable else None,
        "age_seconds": None if age is None else round(age, 3),
        "points": row.points,
        "size_bytes": row.size_bytes,
        "newest": {"id": newest.id, "time": rfc3339(newest.t), "consistency": str(newest.consistency)}
        if newest
        else None,
        "journal_bytes": row.known.journal_bytes if row.known else 0,
        "worker": row.note and {"pid": row.note.process.pid, "trouble": row.note.trouble or None},
        "next_due": rfc3339(Instant(row.next_due)) if row.next_due else None,
        "job": row.open_job or None,
        "event": {"kind": row.event.kind, "time": rfc3339(Instant(row.event.t))} if row.event else None,
    }


def seen(desk: Desk, caller: Caller, state: str = "", text: str = "") -> list[Row]:
    """The machines of the caller that fit."""
    low = text.lower()
    return [
        r for r in desk.keeper.rows()
        if caller.sees(r) and (not state or r.standing == state)
        and (not low or low in r.name.lower() or low in r.id.lower() or low in r.policy.lower() or low in r.tags)
    ]  # fmt: skip


@router.get("/machines")
def machines(
    desk: TheDesk,
    caller: Reader,
    state: Standing | None = None,
    q: Annotated[str, Query(max_length=200)] = "",
    first: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
    count: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Every machine: how it stands, its newest point, and when the next one is due."""
    found = seen(desk, caller, state or "", q)
    return {"total": len(found), "machines": [shape(r, desk.keeper.clock()) for r in found[first : first + count]]}


@router.get("/machines/{key}")
def machine(desk: TheDesk, caller: Reader, key: Key) -> dict[str, Any]:
    """One machine, with its disks."""
    row = row_of(desk, caller, key)
    disks = [shapes.root(d) for d in row.known.newest.disks] if row.known else []
    return {**shape(row, desk.keeper.clock()), "disks": disks}


@router.get("/machines/{key}/points")
def points(
    desk: TheDesk,
    caller: Reader,
    key: Key,
    first: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
    count: Annotated[int, Query(ge=1, le=500)] = 50,
) -> dict[str, Any]:
    """Its recovery points, newest first."""
    row = row_of(desk, caller, key)
    known = known_of(row)
    found = desk.keeper.estate(row.store).points(known, first, count)
    return {"total": len(known.times), "points": [shapes.point(p) for p in found]}


@router.get("/machines/{key}/timeline")
def timeline(desk: TheDesk, caller: Reader, key: Key, since: When = "", until: When = "") -> dict[str, Any]:
    """What of it can be recovered: moments, points, marks, gaps, holds."""
    row = row_of(desk, caller, key)
    now = desk.keeper.clock()
    start, end = instant(since, now), instant(until, now)
    estate = desk.keeper.estate(row.store)
    return {"machine": row.id, **band(estate, histories, known_of(row), now, start, end).shape()}


@router.get("/machines/{key}/at")
def at(desk: TheDesk, caller: Reader, key: Key, time: When) -> dict[str, Any]:
    """What answers for a time: the newest point or moment at or before it, and how much was at risk there."""
    row, now = row_of(desk, caller, key), desk.keeper.clock()
    wanted = instant(time, now)
    if wanted is None:
        raise UsageError("Say which time")
    return answer(desk.keeper.estate(row.store), histories, known_of(row), wanted).shape()


def instant(text: str, now: Instant) -> int | None:
    """A time as people write it, or None for nothing.  Raises UsageError."""
    if not text:
        return None
    found = moments.parse(text, now)
    if found.t is None:
        raise UsageError(f"{text} is no time")
    return int(found.t)


# -- orders ------------------------------------------------------------------------------------------------------------------


def submitted(desk: Desk, caller: Caller, task: Task) -> dict[str, Any]:
    """The job of an order, which is in the audit."""
    with audited(desk, caller, task.kind, task.machine, command=jobs.command_line(task.words)) as note:
        job = desk.keeper.jobs.submit(task)
        note["job"] = job.id
    return jobs.shape(job)


@router.post("/machines/{key}/backup", status_code=202)
def backup(desk: TheDesk, caller: Operator, key: Key, order: orders.Backup) -> dict[str, Any]:
    """Make a recovery point now."""
    return submitted(desk, caller, orders.backup(desk.keeper, row_of(desk, caller, key), order, caller.name))


@router.post("/machines/{key}/boot", status_code=202)
def boot(desk: TheDesk, caller: Restorer, key: Key, order: orders.Boot) -> dict[str, Any]:
    """Boot it as it was at a moment, on this host; nothing is copied first."""
    row = row_of(desk, caller, key)
    known_of(row)
    return submitted(desk, caller, orders.boot(desk.keeper, row, order, caller.name))


@router.post("/machines/{key}/map", status_code=202)
def map_(desk: TheDesk, caller: Restorer, key: Key, order: orders.Which) -> dict[str, Any]:
    """Serve its disks as they were at a moment, read-only, until the job is cancelled."""
    row = row_of(desk, caller, key)
    known_of(row)
    return submitted(desk, caller, orders.map_(desk.keeper, row, order, caller.name))


@router.post("/machines/{key}/restore", status_code=202)
def restore(desk: TheDesk, caller: Restorer, key: Key, order: orders.Restore) -> dict[str, Any]:
    """Write its disks as they were at a moment to files in the service's folder for restores."""
    row = row_of(desk, caller, key)
    known_of(row)
    return submitted(desk, caller, orders.restore(desk.keeper, row, order, caller.name))


@router.post("/machines/{key}/drill", status_code=202)
def drill(desk: TheDesk, caller: Operator, key: Key, order: orders.Drill) -> dict[str, Any]:
    """Rehearse its recovery: every block is read and verified, to nowhere."""
    row = row_of(desk, caller, key)
    known_of(row)
    return submitted(desk, caller, orders.drill(desk.keeper, row, order, caller.name))


@router.post("/machines/{key}/prune", status_code=202)
def prune(desk: TheDesk, caller: Admin, key: Key, order: orders.Prune) -> dict[str, Any]:
    """Forget the points that the rules do not keep; they go to the trash first."""
    row = row_of(desk, caller, key)
    known_of(row)
    return submitted(desk, caller, orders.prune(desk.keeper, row, order, caller.name))


@router.post("/machines/{key}/tag")
def tag(desk: TheDesk, caller: Operator, key: Key, order: orders.Tag) -> dict[str, Any]:
    """Name the present moment of a machine under continuous protection."""
    row = row_of(desk, caller, key)
    session = desk.session(caller, row.store)
    with audited(desk, caller, "tag", row.id, tag=order.tag):
        made = protection.tag(session, row.id, order.tag)
    return {"machine": row.id, "tag": made.label, "seq": made.seq, "time": rfc3339(Instant(made.t))}


@router.post("/machines/{key}/pause")
def pause(desk: TheDesk, caller: Operator, key: Key, order: orders.Pause) -> dict[str, Any]:
    """Leave the machine alone until `resume`; the gap says why."""
    from hvbackup.schedule import stretch

    row = row_of(desk, caller, key)
    known_of(row)
    with audited(desk, caller, "pause", row.id, why=order.why):
        left = protection.pause(
            desk.keeper.stores[row.store].session, row.id, stretch(order.for_) if order.for_ else 0, order.why
        )
    until = left.pause.until if left.pause else None
    return {"machine": row.id, "paused": True, "until": rfc3339(until) if until else None}


@router.post("/machines/{key}/resume")
def resume(desk: TheDesk, caller: Operator, key: Key) -> dict[str, Any]:
    """Protect it again."""
    row = row_of(desk, caller, key)
    known_of(row)
    with audited(desk, caller, "resume", row.id):
        protection.resume(desk.keeper.stores[row.store].session, row.id)
    return {"machine": row.id, "paused": False}


@router.post("/machines/{key}/holds", status_code=201)
def hold(desk: TheDesk, caller: Operator, key: Key, order: orders.Hold) -> dict[str, Any]:
    """Let nobody forget one of its points."""
    row, now = row_of(desk, caller, key), desk.keeper.clock()
    if PointId(order.point) not in known_of(row).ids:
        raise NotFound(f"Machine {row.name} has no point {order.point}")
    until = instant(order.until, now) if order.until else None
    with audited(desk, caller, "hold", row.id, point=order.point, why=order.why):
        session = desk.session(caller, row.store)
        [made] = retention.hold(session, [order.point], now, until=Instant(until) if until else None, why=order.why)
    return {"hold": made.id, "point": order.point, "until": rfc3339(made.until) if made.until else None}
