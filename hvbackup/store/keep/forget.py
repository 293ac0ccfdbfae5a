"""Forget: points go into the trash, where they can be had back for a while, and at last for good.

    killed after                          left behind                            mended by
    1 tombstone written                   a tombstone that decided nothing       settle(): removed once it is HOUR old
    2 holds looked at again; decided      points that are to go                  settle(): carried out
    3 run record: forgotten               the same                               the same; the record may come twice
    4 each: copy in trash/                the point in both places               the same
    5 each: point removed                 it is in the trash                     nothing to mend
    (its time in the trash passes)
    6 each: removed from the trash        some of them gone                      empty(), the next time
    7 tombstone removed                   nothing

    undo: killed after
    1 point put back                      in both places                         settle() of the tombstone: the undo never was
    2 tombstone without it                the record does not say so             settle(): an orphan in the trash, told of
    3 run record: restored                a copy in the trash                    settle(): removed
    4 removed from the trash              nothing

The record comes before the removal, so that no point is ever gone without a record; `check` does not miss one that a record calls
forgotten, and misses every other.  What is in the trash is a root for reclaim, like a point.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from hvbackup.errors import HvbackupError, NotFound, StoreDamage
from hvbackup.model import Instant, RecoveryPoint
from hvbackup.store.format import point as points
from hvbackup.store.keep import must
from hvbackup.store.shelves.settings import HOUR_NS, Settings
from hvbackup.store.shelves.tombstones import TOMBSTONES, Tombstone
from hvbackup.store.store import Store

TRASH = "trash"
FORGET_LOCK = "forget.lock"  # under STATE
LOCK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What came of a wish to forget."""

    points: Sequence[str]  # in the trash now
    kept: Mapping[str, Sequence[str]] = field(default_factory=dict)  # with the reasons
    tombstone: str = ""
    until: Instant | None = None  # they can be had back until then
    lost: Sequence[str] = ()  # those of them that can't, for they could not be read


@dataclass(frozen=True, slots=True)
class Trashed:
    """A point in the trash."""

    path: str  # where it was
    tombstone: Tombstone

    @property
    def id(self) -> str:
        """The point's id."""
        return self.path.rsplit("-", 1)[1]


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """No other process of this machine forgets while the context lasts.  Raises Busy."""
    with store.state.owner(FORGET_LOCK, "Forgetting points of this store", wait_seconds=LOCK_SECONDS):
        yield


def forget(
    store: Store,
    paths: Sequence[str],
    settings: Settings,
    now: Instant,
    *,
    why: str,
    by: str,
    wait_seconds: float = 0.0,
) -> Forgotten:
    """Those of the points that may go are in the trash when this returns.  Inside `alone`.  Raises StoreDamage, SpaceExhausted.

    `wait_seconds` is for stores on a shared file system whose hosts don't see each other's files at once.
    """
    paths = [path for path in dict.fromkeys(paths) if store.files.exists(path)]
    if not paths:
        return Forgotten([])
    t = Tombstone(secrets.token_hex(8), tuple(paths), now, Instant(now + settings.trash_ns), why, by)
    TOMBSTONES.put(store.files, store.ring, t.id, t)
    time.sleep(wait_seconds)
    try:
        kept = must.firm(store, paths, settings, now)
    except StoreDamage:
        TOMBSTONES.remove(store.files, t.id)
        raise
    t = replace(t, points=tuple(p for p in paths if p not in kept), decided=True)
    if not t.points:
        TOMBSTONES.remove(store.files, t.id)
        return Forgotten([], kept)
    TOMBSTONES.put(store.files, store.ring, t.id, t)
    lost = _carry_out(store, t)
    if settings.trash_ns <= 0:
        empty(store, now)
    return Forgotten(t.points, kept, t.id, t.until, lost)


def _carry_out(store: Store, t: Tombstone) -> list[str]:
    """What is not in the trash afterwards, for what the disk can't read any more can't be had back."""
    here = [path for path in t.points if store.files.exists(path)]
    if not here:
        return []
    store.tell("forget", t.t, forgotten=list(t.points), tombstone=t.id, why=t.why, by=t.by)
    lost = []
    for path in here:
        if not _to_trash(store, path):
            lost.append(path)
        store.files.remove(path)
    return lost


def _to_trash(store: Store, path: str) -> bool:
    try:
        data = store.files.read(path)
    except HvbackupError:
        return False
    store.files.replace(f"{TRASH}/{path}", data)
    return True


def settle(store: Store, now: Instant) -> None:
    """What dead runs began is carried out, or as if it had never been.  Inside `alone`."""
    listed: set[str] = set()
    for t in TOMBSTONES.all(store.files, store.ring):
        if t.decided:
            _carry_out(store, t)
            listed.update(t.points)
        elif now - t.t > HOUR_NS:  # else it may be alive, on another host
            TOMBSTONES.remove(store.files, t.id)
        else:
            listed.update(t.points)
    for path in trash_paths(store):
        if path not in listed:
            _put_back(store, path, now)


def _put_back(store: Store, path: str, now: Instant) -> None:
    """A point whose tombstone does not name it any more is back in its place, told of, and not in the trash."""
    data = store.files.read(f"{TRASH}/{path}")
    store.files.write_new(path, data)
    stones = [r.value["tombstone"] for r in store.runs if path in r.value.get("forgotten", ())]
    for tombstone in dict.fromkeys(stones):
        store.tell("restored", now, restored=[path], tombstone=tombstone)
    store.files.remove(f"{TRASH}/{path}")


def undo(store: Store, found: Trashed, now: Instant, *, by: str) -> None:
    """The point is back when this returns.  Inside `alone`.  Raises NotFound when it is gone for good."""
    t, path = found.tombstone, found.path
    try:
        data = store.files.read(f"{TRASH}/{path}")
    except FileNotFoundError:
        raise NotFound(f"{path} is not in the trash any more") from None
    store.files.write_new(path, data)
    rest = replace(t, points=tuple(p for p in t.points if p != path))
    if rest.points:
        TOMBSTONES.put(store.files, store.ring, t.id, rest)
    else:
        TOMBSTONES.remove(store.files, t.id)
    store.tell("restored", now, restored=[path], tombstone=t.id, by=by)
    store.files.remove(f"{TRASH}/{path}")


def empty(store: Store, now: Instant) -> list[str]:
    """What had its time in the trash is gone for good; the paths where it was.  Inside `alone`, after `settle`."""
    gone: list[str] = []
    for t in TOMBSTONES.all(store.files, store.ring):
        if t.decided and now >= t.until:
            for path in t.points:
                store.files.remove(f"{TRASH}/{path}")
            TOMBSTONES.remove(store.files, t.id)
            gone += t.points
    return gone


def trash(store: Store) -> list[Trashed]:
    """Every point that can be had back."""
    stones = [t for t in TOMBSTONES.all(store.files, store.ring) if t.decided]
    return [Trashed(path, t) for t in stones for path in t.points if store.files.exists(f"{TRASH}/{path}")]


def trash_paths(store: Store) -> list[str]:
    """Where the points in the trash were."""
    folders = store.files.names(f"{TRASH}/{points.FOLDER}")
    return [
        f"{points.FOLDER}/{folder}/{name}"
        for folder in folders
        for name in store.files.names(f"{TRASH}/{points.FOLDER}/{folder}")
        if points.is_name(name)
    ]


def load_trashed(store: Store, path: str) -> RecoveryPoint:
    """A point in the trash.  Raises StoreDamage, FileNotFoundError."""
    return points.load(store.ring, path, store.files.read(f"{TRASH}/{path}"))
