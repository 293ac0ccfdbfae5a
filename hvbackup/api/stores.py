"""Routes of the whole: how everything stands, stores, policies, holds, queries, audit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import PlainTextResponse
from pydantic import Field

from hvbackup import __version__, configuration, metrics
from hvbackup.api import orders, scrape
from hvbackup.api.gate import Caller, Desk, TheDesk, audited, needs
from hvbackup.api.machines import seen, submitted
from hvbackup.auth import Permission
from hvbackup.daemon import rows
from hvbackup.daemon.rows import Row
from hvbackup.errors import NotFound
from hvbackup.model import Instant
from hvbackup.moments import rfc3339
from hvbackup.service import recovery, retention, shapes

router = APIRouter(prefix="/api/v1", tags=["service"])
outside = APIRouter(tags=["service"])
Reader = Annotated[Caller, Depends(needs(Permission.READ))]
Everything = Annotated[Caller, Depends(needs(Permission.READ, everything=True))]
Operator = Annotated[Caller, Depends(needs(Permission.OPERATE, everything=True))]
Restorer = Annotated[Caller, Depends(needs(Permission.RESTORE, everything=True))]
Admin = Annotated[Caller, Depends(needs(Permission.ADMIN, everything=True))]
Store = Annotated[str, Path(max_length=100)]


class Question(orders.Order):
    """One statement that only reads."""

    query: Annotated[str, Field(min_length=1, max_length=20_000)]
    store: orders.Line = ""


@router.get("/status")
def status(desk: TheDesk, caller: Reader) -> dict[str, Any]:
    """How many machines stand how, what is wrong, and the service itself."""
    mine = seen(desk, caller)
    names = {r.name for r in mine}
    alarms = [asdict(a) for a in desk.keeper.alarms if caller.principal.is_unlimited or a.subject in names]
    open_jobs = len(desk.keeper.jobs.open())
    return {"version": __version__, "machines": rows.counts(mine), "alarms": alarms, "open_jobs": open_jobs,
            "time": rfc3339(desk.keeper.clock())}  # fmt: skip


@router.get("/stores")
def stores(desk: TheDesk, caller: Everything) -> dict[str, Any]:
    """Every store: its room, what is free, and how it grows."""
    return {"stores": [scrape.store_shape(desk.keeper, name) for name in desk.keeper.stores]}


@router.post("/stores/{store}/check", status_code=202)
def check(desk: TheDesk, caller: Operator, store: Store, order: orders.Check) -> dict[str, Any]:
    """Look for damage."""
    return submitted(desk, caller, orders.check(desk.keeper, known_store(desk, store), order, caller.name))


def known_store(desk: Desk, name: str) -> str:
    """The name of a store: the first one for nothing.  Raises NotFound."""
    if name and name not in desk.keeper.stores:
        raise NotFound(f"There is no store {name}; there are {', '.join(desk.keeper.stores)}")
    return name or next(iter(desk.keeper.stores))


@router.post("/sql")
def sql(desk: TheDesk, caller: Everything, order: Question) -> dict[str, Any]:
    """Ask the index of a store, in SQL that only reads."""
    words = desk.keeper.store_words(known_store(desk, order.store))
    with audited(desk, caller, "sql", store=order.store, query=order.query[:500]):
        return desk.keeper.questions.ask("sql", *words, "--", order.query)


@router.get("/policies")
def policies(desk: TheDesk, caller: Everything) -> dict[str, Any]:
    """The policies, what each protects, and what is odd about them."""
    by_policy: dict[str, list[str]] = {}
    for row in desk.keeper.rows():
        by_policy.setdefault(row.policy, []).append(row.name)
    shape = configuration.shape(desk.keeper.settings)["policy"]
    found = [{"name": n, **v, "protects": by_policy.get(n, [])} for n, v in shape.items()]
    return {"policies": found, "warnings": list(desk.keeper.selection.warnings)}


@router.get("/holds")
def holds(desk: TheDesk, caller: Everything, store: Annotated[str, Query(max_length=100)] = "") -> dict[str, Any]:
    """Every hold, and what waits for a second operator."""
    session = desk.keeper.stores[known_store(desk, store)].session
    found = retention.claims(session, desk.keeper.clock())
    return {
        "holds": [
            {"id": h.id, "point": h.point[-16:], "time": rfc3339(h.t), "until": rfc3339(h.until) if h.until else None,
             "why": h.why, "by": h.by}
            for h in found.holds
        ],
        "requests": [{"id": r.id, "action": r.action, "by": str(r.by), "why": r.why} for r in found.requests],
    }  # fmt: skip


@router.delete("/holds/{hold}")
def release(
    desk: TheDesk, caller: Admin, hold: Annotated[str, Path(pattern="^[0-9a-f]{16}$")],
    store: Annotated[str, Query(max_length=100)] = "",
) -> dict[str, Any]:  # fmt: skip
    """End a hold; where two persons are needed, it waits for the second."""
    session = desk.session(caller, store)
    with audited(desk, caller, "release", store=store, hold=hold):
        _, request = retention.release(session, hold, desk.keeper.clock())
    return {"hold": hold, "waits": request.id if request else None}


@router.get("/boots")
def boots(desk: TheDesk, caller: Everything) -> dict[str, Any]:
    """Machines that are booted from points on this host."""
    session = next(iter(desk.keeper.stores.values())).session
    return {"boots": [shapes.boot(b) for b in recovery.boots(session, desk.keeper.clock())]}


@router.delete("/boots/{name}")
def discard(
    desk: TheDesk, caller: Restorer, name: Annotated[str, Path(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
) -> dict[str, Any]:
    """End a booted machine and remove what it wrote."""
    session = next(iter(desk.keeper.stores.values())).session
    with audited(desk, caller, "discard", boot=name):
        recovery.discard(session, name, desk.keeper.clock())
    return {"discarded": name}


@router.get("/audit")
def audit(
    desk: TheDesk, caller: Admin, first: Annotated[int, Query(ge=0, le=100_000)] = 0,
    count: Annotated[int, Query(ge=1, le=500)] = 100,
) -> dict[str, Any]:  # fmt: skip
    """Who did what, newest first; the store's chain of records has all of it."""
    found = desk.audited[::-1]
    known = {r.id: r for r in desk.keeper.rows()}
    shown = [_entry(e, known.get(e.get("machine", ""))) for e in found[first : first + count]]
    return {"total": len(found), "entries": shown}


def _entry(entry: dict[str, Any], row: Row | None) -> dict[str, Any]:
    """An entry of the audit; a machine that nobody knows any more has an id, and neither name nor key."""
    wanted = entry.get("machine", "")
    machine = {"id": wanted, "name": row and row.name, "key": row and row.key} if wanted else None
    return {**{k: v for k, v in entry.items() if k != "t"}, "machine": machine, "time": rfc3339(Instant(entry["t"]))}


@outside.get("/metrics", response_class=PlainTextResponse)
def prometheus(desk: TheDesk, caller: Everything) -> PlainTextResponse:
    """For Prometheus."""
    return PlainTextResponse(scrape.exposition(desk.keeper), media_type=metrics.CONTENT_TYPE)


@outside.get("/healthz")
def healthz() -> dict[str, str]:
    """The service answers."""
    return {"status": "ok"}
