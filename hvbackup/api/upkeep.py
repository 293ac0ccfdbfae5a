"""Routes of stores' upkeep: all that the command line can do with a store, for who is not limited to some machines.

Nothing here takes a path of this host or gives one a new meaning: other stores are named as the configuration names them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import Field

from hvbackup import configuration
from hvbackup.api.gate import Caller, Desk, TheDesk, audited, needs
from hvbackup.api.machines import submitted
from hvbackup.api.orders import Line, Order, Stretch
from hvbackup.auth import Permission
from hvbackup.configuration import Problems
from hvbackup.errors import UsageError
from hvbackup.jobs import Task
from hvbackup.schedule import stretch
from hvbackup.service import audit, retention, shapes_retention, stores

router = APIRouter(prefix="/api/v1", tags=["upkeep"])
Reader = Annotated[Caller, Depends(needs(Permission.READ, everything=True))]
Operator = Annotated[Caller, Depends(needs(Permission.OPERATE, everything=True))]
Admin = Annotated[Caller, Depends(needs(Permission.ADMIN, everything=True))]
Store = Annotated[str, Path(max_length=100, description="its name in the configuration")]
Point = Annotated[str, Field(pattern="^[0-9a-f]{4,16}$")]
Points = Annotated[list[Point], Field(min_length=1, max_length=10_000)]
Id = Annotated[str, Path(pattern="^[0-9a-f]{8,64}$")]


class Reclaim(Order):
    """How space is freed."""

    empty_trash: bool = False
    dry_run: bool = False


class Prune(Order):
    """Which points of which machines stay."""

    machines: list[Line] = Field(default_factory=list, max_length=10_000, description="names or ids; none: all")
    keep: dict[
        Literal["last", "hourly", "daily", "weekly", "monthly", "yearly"],
        Annotated[int, Field(ge=1, le=100_000)] | Literal["all"],
    ] = Field(default_factory=dict)
    within: Line = ""
    tags: list[Line] = Field(default_factory=list, max_length=100)
    zone: Line = ""
    count: Literal["restic", "proxmox"] = "restic"
    group_by: Literal["machine", "consistency", "disks"] = "machine"
    wait_seconds: float = Field(0.0, ge=0, le=3600)
    dry_run: bool = False

    def words(self) -> list[str]:
        """As options."""
        rules = [f"--keep-{rule}={n}" for rule, n in self.keep.items()] + [f"--keep-tag={tag}" for tag in self.tags]
        rules += [f"--keep-within={self.within}"] * bool(self.within) + [f"--zone={self.zone}"] * bool(self.zone)
        how = [f"--count={self.count}", f"--group-by={self.group_by}", f"--wait={self.wait_seconds:g}"]
        return [*rules, *how, *["--dry-run"] * self.dry_run]


class Regroup(Order):
    """What is joined."""

    older_than: Stretch = "7d"


class Parity(Order):
    """Whether packs are to have parity."""

    off: bool = False


class Copy(Order):
    """Which points go to which other store of the configuration."""

    to: Line
    machines: list[Line] = Field(default_factory=list, max_length=10_000, description="ids; none: all")
    points: list[Point] = Field(default_factory=list, max_length=1000)
    all: bool = False


class Forget(Order):
    """Points that go to the trash."""

    points: Points
    why: Line = ""
    even_newest: bool = False


class Undo(Order):
    """Points that come back out of it."""

    points: Points


class Settings(Order):
    """What the store demands of who forgets."""

    min_age: Stretch | None = None
    trash: Stretch | None = None
    immutable: bool | None = None
    two_person: bool | None = None


class Size(Order):
    """A policy whose room is wanted."""

    keep: dict[
        Literal["last", "hourly", "daily", "weekly", "monthly", "yearly"], Annotated[int, Field(ge=1, le=100_000)]
    ] = Field(min_length=1)
    machines: list[Line] = Field(default_factory=list, max_length=10_000)
    every: Stretch | None = None
    window: Stretch | None = None

    def words(self) -> list[str]:
        """As options."""
        rules = [f"--keep-{rule}={n}" for rule, n in self.keep.items()]
        return [*rules, *(f"--every={v}" for v in [self.every] if v), *(f"--window={v}" for v in [self.window] if v)]


class NewStore(Order):
    """How a store is made."""

    encrypted: bool = True
    parity: bool = False


class Label(Order):
    """What the list calls a key."""

    label: Line = "paper"


def job(desk: Desk, caller: Caller, store: str, kind: str, *words: str) -> dict[str, Any]:
    """A command about a whole store, as a job."""
    desk.session(caller, store)
    verb, behind = [w for w in words if w != "--"], []
    if "--" in words:
        at = words.index("--")
        verb, behind = list(words[:at]), list(words[at:])
    task = Task(kind, [*verb, *desk.keeper.store_words(store), *behind], store, who=caller.name)
    return submitted(desk, caller, task)


# -- jobs ----------------------------------------------------------------------------------------------------------------------


@router.post("/stores/{store}/reclaim", status_code=202)
def reclaim(desk: TheDesk, caller: Admin, store: Store, order: Reclaim) -> dict[str, Any]:
    """Free the space of what was forgotten."""
    words = ["--empty-trash"] * order.empty_trash + ["--dry-run"] * order.dry_run
    return job(desk, caller, store, "reclaim", "reclaim", *words)


@router.post("/stores/{store}/prune", status_code=202)
def prune(desk: TheDesk, caller: Admin, store: Store, order: Prune) -> dict[str, Any]:
    """Forget the points that no rule keeps, of some machines or all; they go to the trash first."""
    machines = ["--", *order.machines] if order.machines else []
    return job(desk, caller, store, "prune", "prune", *order.words(), *machines)


@router.post("/stores/{store}/regroup", status_code=202)
def regroup(desk: TheDesk, caller: Admin, store: Store, order: Regroup) -> dict[str, Any]:
    """Join and compress harder what was stored long ago."""
    return job(desk, caller, store, "regroup", "regroup", f"--older-than={order.older_than}")


@router.post("/stores/{store}/parity", status_code=202)
def parity(desk: TheDesk, caller: Admin, store: Store, order: Parity) -> dict[str, Any]:
    """Keep a tenth more, out of which damaged packs can be mended; or no more."""
    return job(desk, caller, store, "parity", "parity", *["--off"] * order.off)


@router.post("/stores/{store}/copy", status_code=202)
def copy(desk: TheDesk, caller: Operator, store: Store, order: Copy) -> dict[str, Any]:
    """Copy points into another store: the newest of each machine, or those that are named."""
    to = desk.session(caller, order.to).places.store
    if order.all and order.points:
        raise UsageError("Either all points are copied, or those that are named")
    words = [f"--to={to}", *["--all"] * order.all, *([f"--points={','.join(order.points)}"] if order.points else [])]
    return job(desk, caller, store, "copy", "copy", *words, *(["--", *order.machines] if order.machines else []))


@router.post("/stores/{store}/doctor", status_code=202)
def doctor(desk: TheDesk, caller: Operator, store: Store) -> dict[str, Any]:
    """Find what is wrong here and with the sources; the job's answer has the findings."""
    sources = [s.uri for s in desk.keeper.settings.sources.values()]
    return job(desk, caller, store, "doctor", "doctor", "--", *sources)


# -- forgetting ----------------------------------------------------------------------------------------------------------------


@router.get("/stores/{store}/trash")
def trash(desk: TheDesk, caller: Reader, store: Store) -> dict[str, Any]:
    """What was forgotten and can be had back."""
    return {"trash": [shapes_retention.trashed(t) for t in retention.trash(desk.session(caller, store))]}


@router.post("/stores/{store}/forget")
def forget(desk: TheDesk, caller: Admin, store: Store, order: Forget) -> dict[str, Any]:
    """Put points into the trash; where two persons are needed, it waits for the second."""
    session = desk.session(caller, store)
    with audited(desk, caller, "forget", store=store, points=list(order.points), why=order.why):
        done = retention.forget(
            session, order.points, desk.keeper.clock(), why=order.why, even_newest=order.even_newest, wait_seconds=0.0
        )
    return shapes_retention.done(done)


@router.post("/stores/{store}/forget/undo")
def undo(desk: TheDesk, caller: Admin, store: Store, order: Undo) -> dict[str, Any]:
    """Have points back out of the trash."""
    session = desk.session(caller, store)
    with audited(desk, caller, "undo", store=store, points=list(order.points)):
        back = retention.undo(session, order.points, desk.keeper.clock())
    return {"restored": [t.id for t in back]}


@router.post("/stores/{store}/requests/{request}/approve")
def approve(desk: TheDesk, caller: Admin, store: Store, request: Id) -> dict[str, Any]:
    """Let another person's wish come true; a token is no person."""
    session = desk.session(caller, store)
    with audited(desk, caller, "approve", store=store, request=request):
        if not caller.csrf:
            raise UsageError("A person approves, who has logged in: neither a token nor whoever reaches the socket")
        found, forgotten = retention.approve(session, request, desk.keeper.clock())
    return {"approved": shapes_retention.request(found), "forgotten": shapes_retention.forgotten(forgotten)}


@router.get("/stores/{store}/settings")
def settings(desk: TheDesk, caller: Reader, store: Store) -> dict[str, Any]:
    """What the store demands of who forgets."""
    found, _ = retention.change_settings(desk.session(caller, store), {}, desk.keeper.clock())
    return {"settings": shapes_retention.settings(found)}


@router.patch("/stores/{store}/settings")
def change_settings(desk: TheDesk, caller: Admin, store: Store, order: Settings) -> dict[str, Any]:
    """Change it; making it weaker may wait for a second person."""
    changes: dict[str, Any] = {f"{k}_ns": stretch(v) for k in ("min_age", "trash") if (v := getattr(order, k))}
    changes |= {k: v for k in ("immutable", "two_person") if (v := getattr(order, k)) is not None}
    session = desk.session(caller, store)
    with audited(desk, caller, "settings", store=store, changes=changes):
        found, request = retention.change_settings(session, changes, desk.keeper.clock())
    return {"settings": shapes_retention.settings(found), "request": shapes_retention.request(request)}


# -- the store itself ------------------------------------------------------------------------------------------------------------


@router.post("/stores/{store}", status_code=201)
def init(desk: TheDesk, caller: Admin, store: Store, order: NewStore) -> dict[str, Any]:
    """Make a store that the configuration names; its key stays on this host, and the answer says where."""
    session = desk.session(caller, store)
    with audited(desk, caller, "init", store=store, encrypted=order.encrypted):
        made = stores.init(session, block=0, encrypted=order.encrypted, parity=order.parity)
    desk.keeper.look_again(store)
    return {"store": {"path": str(made.path), "id": made.id, "encrypted": made.encrypted},
            "key_file": str(made.key_file) if made.key_file else None}  # fmt: skip


@router.get("/stores/{store}/keys")
def keys(desk: TheDesk, caller: Admin, store: Store) -> dict[str, Any]:
    """Every key that opens the store, without what opens."""
    found = stores.list_keys(desk.session(caller, store))
    return {"keys": [{"id": w.id, "kind": w.kind, "label": w.label} for w in found]}


@router.post("/stores/{store}/keys", status_code=201)
def add_key(desk: TheDesk, caller: Admin, store: Store, order: Label) -> dict[str, Any]:
    """One more key, for paper: its text is shown once and kept nowhere."""
    session = desk.session(caller, store)
    with audited(desk, caller, "key add", store=store, label=order.label):
        made, text = stores.paper_key(session, order.label)
    return {"key": {"id": made.id, "kind": made.kind, "label": made.label}, "text": text}


@router.delete("/stores/{store}/keys/{key}")
def remove_key(desk: TheDesk, caller: Admin, store: Store, key: Id) -> dict[str, Any]:
    """Let a key open the store no more."""
    session = desk.session(caller, store)
    with audited(desk, caller, "key remove", store=store, key=key):
        notes = stores.remove_key(session, key)
    return {"removed": key, "notes": notes}


@router.get("/stores/{store}/stats")
def store_stats(
    desk: TheDesk, caller: Reader, store: Store, days: Annotated[int, Query(ge=1, le=3650)] = 30
) -> dict[str, Any]:
    """What each machine costs, how the store grows, and when its disk is full."""
    desk.session(caller, store)
    return desk.keeper.questions.ask("stats", f"--days={days}", *desk.keeper.store_words(store))


@router.post("/stores/{store}/size")
def size(desk: TheDesk, caller: Reader, store: Store, order: Size) -> dict[str, Any]:
    """How much room a policy needs."""
    desk.session(caller, store)
    words = [*order.words(), *desk.keeper.store_words(store), "--", *order.machines]
    return desk.keeper.questions.ask("size", *words)


@router.get("/stores/{store}/records")
def verify(desk: TheDesk, caller: Admin, store: Store) -> dict[str, Any]:
    """Whether any record of the store was put back or cut off."""
    found = audit.verify(desk.session(caller, store), None)
    return {"ok": not found.problems, "problems": list(found.problems), "heads": found.heads}


# -- the configuration -----------------------------------------------------------------------------------------------------------


@router.get("/configuration")
def shown(desk: TheDesk, caller: Admin) -> dict[str, Any]:
    """The configuration that holds now, with every default."""
    return configuration.shape(desk.keeper.settings)


@router.get("/configuration/check")
def check(desk: TheDesk, caller: Admin) -> dict[str, Any]:
    """Every mistake in the files as they are now: what a reload would say."""
    try:
        configuration.load(desk.keeper.places.configuration)
    except Problems as e:
        return {"ok": False, "problems": e.found}
    return {"ok": True, "problems": []}
