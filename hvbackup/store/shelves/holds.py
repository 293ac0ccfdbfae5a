"""Holds: a person says that a point must stay.  `holds/ID` is written once, removed on purpose, and ignored after its end.

A hold and a tombstone can't miss each other: who holds writes first and then looks for tombstones; who forgets writes the
tombstone first and then looks for holds.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvbackup.errors import Busy, NotFound
from hvbackup.model import Instant
from hvbackup.moments import rfc3339
from hvbackup.store.format import layout as f
from hvbackup.store.format.shelf import Shelf, Value
from hvbackup.store.shelves.tombstones import TOMBSTONES
from hvbackup.store.store import Store


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold on one point."""

    id: str
    point: str  # its path
    t: Instant
    until: Instant | None  # None: until it is released
    why: str
    by: str

    def is_active(self, now: Instant) -> bool:
        """Whether it still holds."""
        return self.until is None or now < self.until

    def reason(self) -> str:
        """For people."""
        until = f" until {rfc3339(self.until)[:19]}Z" if self.until is not None else ""
        return f"held{until}" + (f": {self.why}" if self.why else "")


def _dump(hold: Hold) -> Value:
    return {"point": hold.point, "t": hold.t, "until": hold.until, "why": hold.why, "by": hold.by}


def _load(name: str, value: Value) -> Hold:
    until = None if value["until"] is None else Instant(int(value["until"]))
    return Hold(name, str(value["point"]), Instant(int(value["t"])), until, str(value["why"]), str(value["by"]))


HOLDS = Shelf("holds", f.KIND_HOLD, _dump, _load)


def hold(store: Store, point: str, now: Instant, *, until: Instant | None, why: str, by: str) -> Hold:
    """The point stays, for sure, when this returns.  Raises Busy when it is just being forgotten, NotFound when it is gone."""
    made = Hold(secrets.token_hex(8), point, now, until, why, by)
    HOLDS.put(store.files, store.ring, made.id, made)
    doomed = {p for t in TOMBSTONES.all(store.files, store.ring) for p in t.points}
    if point in doomed or not store.files.exists(point):
        HOLDS.remove(store.files, made.id)
        if point in doomed:
            raise Busy(
                f"{point} is being forgotten or in the trash; take it out with `hvbackup forget --undo`, then hold it"
            )
        raise NotFound(f"{point} is not there any more")
    store.tell("hold", now, added=[HOLDS.path(made.id)], hold=_dump(made))
    return made


def release(store: Store, found: Hold, now: Instant, *, by: str) -> None:
    """The hold is gone when this returns, and the chain says so."""
    store.tell("release", now, removed=[HOLDS.path(found.id)], hold=_dump(found), by=by)
    HOLDS.remove(store.files, found.id)


def active(store: Store, now: Instant) -> Mapping[str, Sequence[Hold]]:
    """The holds on each point that is held.  Raises StoreDamage: a hold that can't be read may be on any point."""
    found: dict[str, list[Hold]] = {}
    for one in HOLDS.all(store.files, store.ring):
        if one.is_active(now):
            found.setdefault(one.point, []).append(one)
    return found
