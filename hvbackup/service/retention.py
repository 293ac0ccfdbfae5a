"""prune, forget, hold, holds, release: which points stay and which go."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, tzinfo
from typing import Any

from hvbackup.errors import NotFound, StoreDamage, UsageError
from hvbackup.files import Files
from hvbackup.model import Instant, RecoveryPoint
from hvbackup.service.inventory import History, history_of, inventory
from hvbackup.service.session import Session
from hvbackup.store.format import keys
from hvbackup.store.keep import forget as forgetting
from hvbackup.store.keep import must
from hvbackup.store.keep.forget import Forgotten, Trashed
from hvbackup.store.keep.retention import Candidate, Decision, Policy, plan
from hvbackup.store.reclaim import reserve
from hvbackup.store.shelves import holds as holding
from hvbackup.store.shelves import immutable, pins, requests, settings
from hvbackup.store.shelves.holds import Hold
from hvbackup.store.shelves.pins import Pin
from hvbackup.store.shelves.requests import CALLER, Operator, Request
from hvbackup.store.shelves.settings import Settings
from hvbackup.store.store import Store

GROUPS: Mapping[str, Callable[[RecoveryPoint], str]] = {
    "machine": lambda _point: "",
    "consistency": lambda point: str(point.consistency),
    "disks": lambda point: ", ".join(sorted(d.disk.id for d in point.disks)),
}
WAIT_SECONDS = 0.0  # between a tombstone and the second look at holds
ID_DIGITS_MIN = 4


@dataclass(frozen=True, slots=True)
class Judged:
    """A point and what becomes of it."""

    path: str
    point: RecoveryPoint | None  # None: it can't be read
    decision: Decision


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """What becomes of the points of one machine, or of one group of them."""

    name: str
    machine: str
    group: str
    points: Sequence[Judged]


@dataclass(frozen=True, slots=True)
class Done:
    """What came of an order to forget."""

    forgotten: Forgotten | None = None  # None: nothing was asked for, or it waits
    request: Request | None = None  # it waits for a second operator
    plans: Sequence[MachinePlan] = ()


def operator(session: Session, store: Store) -> Operator:
    """Who gives the orders of this session."""
    if session.caller:
        return Operator(f"{CALLER}{session.caller}", f"{session.caller}@{socket.gethostname()}", os.getuid())
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    key = keys.opened_with(store.files, session.secrets()) if store.ring.encrypted else ""
    return Operator(key, f"{name}@{socket.gethostname()}", os.getuid())


@contextmanager
def ordering(session: Session, now: Instant) -> Iterator[tuple[Store, Settings]]:
    """The store, nobody else of this machine forgetting, and what dead runs began is settled."""
    reserve.open_up(Files(session.places.store))
    with session.open() as store:
        immutable.arm(store)
        store.runs.settle()
        with forgetting.alone(store):
            reserve.using(store.files, lambda: forgetting.settle(store, now))
            yield store, settings.load(store)


# -- prune -----------------------------------------------------------------------------------------------------------------


def plans(store: Store, machines: Sequence[str], policy: Policy, group_by: str, now: Instant) -> list[MachinePlan]:
    """What a policy means for these machines (all, when none is named).  Raises NotFound, UsageError, StoreDamage."""
    plan([], policy, {})  # a policy that keeps nothing is refused, also where there is nothing to keep
    chosen = [history_of(store, name) for name in machines] if machines else inventory(store).machines
    return [p for one in chosen for p in _plans(store, one, policy, group_by, now)]


def _plans(store: Store, one: History, policy: Policy, group_by: str, now: Instant) -> Iterator[MachinePlan]:
    points = {store.path_of(p): p for p in one.points}
    folder = next(iter(points)).split("/")[1]
    reasons = must.firm(store, list(points), settings.load(store), now)
    for path, why in must.newest(store, folder).items():
        reasons.setdefault(path, []).extend(why)
    group_of = GROUPS[group_by]
    candidates = [Candidate(path, p.t, group_of(p), frozenset(p.tags)) for path, p in points.items()]
    decisions = plan(candidates, policy, reasons)
    groups = dict.fromkeys(group_of(points[d.key]) for d in decisions)
    for group in groups:
        mine = [Judged(d.key, points[d.key], d) for d in decisions if group_of(points[d.key]) == group]
        yield MachinePlan(one.machine.name, one.machine.id, group, mine)
    unreadable = [p for p in store.point_paths(folder) if p not in points]
    if unreadable:
        because = ("it can't be read: `hvbackup check --repair` may mend it; forget it by its id if not",)
        judged = [Judged(p, None, Decision(p, True, because)) for p in unreadable]
        yield MachinePlan(one.machine.name, one.machine.id, "unreadable", judged)


def dry_run(
    session: Session, machines: Sequence[str], policy: Policy, group_by: str, now: Instant
) -> list[MachinePlan]:
    """What `prune` would do; nothing is changed."""
    with session.open() as store:
        return plans(store, machines, policy, group_by, now)


def prune(
    session: Session,
    machines: Sequence[str],
    policy: Policy,
    group_by: str,
    now: Instant,
    *,
    wait_seconds: float = WAIT_SECONDS,
) -> Done:
    """What the policy does not keep is in the trash when this returns, or waits for a second operator."""
    with ordering(session, now) as (store, rules):

        def work() -> Done:
            forgetting.settle(store, now)
            forgetting.empty(store, now)
            pins.remove_expired(store, now)
            found = plans(store, machines, policy, group_by, now)
            paths = [j.path for p in found for j in p.points if not j.decision.keep]
            done = _forget(session, store, rules, paths, now, "prune", wait_seconds)
            return Done(done.forgotten, done.request, found)

        done = reserve.using(store.files, work)
        reserve.keep(store.files)
        return done


def _forget(
    session: Session, store: Store, rules: Settings, paths: Sequence[str], now: Instant, why: str, wait_seconds: float
) -> Done:
    by = operator(session, store)
    if rules.two_person and paths:
        return Done(request=requests.ask(store, "forget", {"points": list(paths)}, by, now, why))
    return Done(forgetting.forget(store, paths, rules, now, why=why, by=str(by), wait_seconds=wait_seconds))


# -- forget ----------------------------------------------------------------------------------------------------------------


def find(store: Store, text: str) -> str:
    """The path of the point with this id, or the only one whose id begins so.  Raises NotFound, UsageError."""
    every = [path for folder in store.machine_folders() for path in store.point_paths(folder)]
    return _by_id(every, text, "this store")


def _by_id(paths: Sequence[str], text: str, where: str) -> str:
    if len(text) < ID_DIGITS_MIN:
        raise UsageError(f"{text} is too short for a point's id; give at least {ID_DIGITS_MIN} digits")
    found = [path for path in paths if path.rsplit("-", 1)[1].startswith(text.lower())]
    if not found:
        raise NotFound(f"No point {text} in {where}; `hvbackup points` lists them")
    if len(found) > 1:
        raise UsageError(f"{len(found)} points begin with {text}: {', '.join(p.rsplit('-', 1)[1] for p in found)}")
    return found[0]


def forget(
    session: Session,
    texts: Sequence[str],
    now: Instant,
    *,
    why: str = "",
    even_newest: bool = False,
    wait_seconds: float = WAIT_SECONDS,
) -> Done:
    """These points are in the trash when this returns, or wait for a second operator.  All or none of them.

    Raises NotFound, UsageError when one must stay.
    """
    with ordering(session, now) as (store, rules):
        paths = [find(store, text) for text in texts]
        reasons = must.firm(store, paths, rules, now)
        if not even_newest:
            for folder in {path.split("/")[1] for path in paths}:
                for path, newest in must.newest(store, folder).items():
                    reasons.setdefault(path, []).extend(f"{n}; --even-newest forgets it" for n in newest)
        for path in paths:
            if path in reasons:
                raise UsageError(f"Point {path.rsplit('-', 1)[1]} stays: {'; '.join(reasons[path])}")
        return _forget(session, store, rules, paths, now, why or "forget", wait_seconds)


def undo(session: Session, texts: Sequence[str], now: Instant) -> list[Trashed]:
    """These points are out of the trash when this returns.  Raises NotFound, UsageError."""
    with ordering(session, now) as (store, _):
        there = {t.path: t for t in forgetting.trash(store)}
        found = [there[_by_id(list(there), text, "the trash")] for text in texts]
        for one in found:
            fresh = {t.path: t for t in forgetting.trash(store)}[one.path]  # its tombstone may name fewer by now
            forgetting.undo(store, fresh, now, by=str(operator(session, store)))
        return found


def trash(session: Session) -> list[Trashed]:
    """What can be had back."""
    with session.open() as store:
        return forgetting.trash(store)


# -- holds -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claims:
    """Everything that keeps points, and what waits for a second operator."""

    holds: Sequence[Hold]
    pins: Sequence[Pin]
    requests: Sequence[Request]


def hold(session: Session, texts: Sequence[str], now: Instant, *, until: Instant | None, why: str) -> list[Hold]:
    """These points stay until then when this returns.  Raises NotFound, UsageError, Busy."""
    if until is not None and until <= now:
        raise UsageError("A hold that ends in the past holds nothing; give a day to come with --until")
    with session.open() as store:
        immutable.arm(store)
        store.runs.settle()
        by = str(operator(session, store))
        paths = [find(store, text) for text in texts]
        return [holding.hold(store, path, now, until=until, why=why, by=by) for path in paths]


def claims(session: Session, now: Instant) -> Claims:
    """Who keeps what.  Raises StoreDamage."""
    with session.open() as store:
        held = [h for several in holding.active(store, now).values() for h in several]
        return Claims(held, pins.every(store, now), list(requests.REQUESTS.all(store.files, store.ring)))


def release(session: Session, name: str, now: Instant) -> tuple[Hold | Pin | None, Request | None]:
    """The hold (or a pin that somebody left) is gone when this returns, or waits for a second operator."""
    with ordering(session, now) as (store, rules):
        by = operator(session, store)
        pin = pins.PINS.get(store.files, store.ring, name) if name in pins.PINS.names(store.files) else None
        if pin:
            store.tell("release", now, pin=pin.what, by=str(by))
            pins.drop(store, name)
            return pin, None
        found = _hold(store, name)
        if rules.two_person:
            return None, requests.ask(store, "release", {"hold": name}, by, now)
        holding.release(store, found, now, by=str(by))
        return found, None


def _hold(store: Store, name: str) -> Hold:
    names = holding.HOLDS.names(store.files)
    found = holding.HOLDS.get(store.files, store.ring, name) if name in names else None
    if found is None:
        raise NotFound(f"No hold or pin {name} in this store; `hvbackup holds` lists them")
    return found


# -- a second operator -----------------------------------------------------------------------------------------------------


def approve(session: Session, name: str, now: Instant) -> tuple[Request, Forgotten | None]:
    """What was asked for is done when this returns.  Raises UsageError when we are who asked for it."""
    with ordering(session, now) as (store, rules):
        by = operator(session, store)
        found = requests.approve(store, name, by, now)
        done = _carry_out(store, rules, found, by, now)
        requests.done(store, found)
        return found, done


def _carry_out(store: Store, rules: Settings, found: Request, by: Operator, now: Instant) -> Forgotten | None:
    both = f"{found.by}, approved by {by}"
    if found.action == "forget":
        return forgetting.forget(store, list(found.what["points"]), rules, now, why=found.why, by=both)
    if found.action == "release":
        holding.release(store, _hold(store, str(found.what["hold"])), now, by=both)
    elif found.action == "settings":
        _apply(store, rules, Settings(**found.what["settings"]), now, both)
    else:
        raise StoreDamage(f"Request {found.id} asks for {found.action}, which this version does not know")
    return None


def change_settings(session: Session, changes: Mapping[str, Any], now: Instant) -> tuple[Settings, Request | None]:
    """The settings of the store, changed when there is anything to change; making them weaker may wait for a second operator."""
    if not changes:
        with session.open() as store:
            return settings.load(store), None
    with ordering(session, now) as (store, rules):
        new = Settings(**{**asdict(rules), **changes})
        by = operator(session, store)
        if new == rules:
            return rules, None
        if rules.two_person and new.is_weaker_than(rules):
            return rules, requests.ask(store, "settings", {"settings": asdict(new)}, by, now)
        _apply(store, rules, new, now, str(by))
        return new, None


def _apply(store: Store, old: Settings, new: Settings, now: Instant, by: str) -> None:
    """The settings count, and files are as they say."""
    if new.immutable != old.immutable:
        immutable.change(store, on=new.immutable)
    settings.change(store, new, now, by=by)


def zone(name: str) -> tzinfo:
    """A zone by its name, such as Europe/Berlin; empty: this machine's own.  Raises UsageError."""
    import zoneinfo

    if name.upper() in ("UTC", "Z"):
        return UTC
    try:
        return zoneinfo.ZoneInfo(name) if name else _local_zone()
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as e:
        raise UsageError(f"There is no time zone {name} on this machine; write Europe/Berlin, or UTC") from e


def _local_zone() -> tzinfo:
    """This machine's zone with its rules, not only with today's offset from UTC."""
    import zoneinfo
    from pathlib import Path

    named = os.environ.get("TZ", "").removeprefix(":")
    if named:
        return zoneinfo.ZoneInfo(named)
    file = Path("/etc/localtime")
    if not file.exists():
        return UTC
    with file.open("rb") as data:
        return zoneinfo.ZoneInfo.from_file(data, key="local time")
