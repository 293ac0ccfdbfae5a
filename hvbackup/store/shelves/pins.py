"""Pins: who reads points now.  `pins/ID` names the points and the roots of their maps, so that both stay while they are read.

A pin is taken before anything is read; like a hold and a tombstone, a pin and a tombstone can't miss each other.  Its owner
renews it, and it expires by itself when the owner is dead; one without an end (a machine booted from a point) stays until it is
dropped.  Reclaim marks from the roots of pins as from those of points, so what is pinned can be read even when its point is
forgotten behind our back.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from hvbackup.errors import HvbackupError, NotFound
from hvbackup.model import SECOND, Instant, RecoveryPoint
from hvbackup.store.format import layout as f
from hvbackup.store.format.root import Root, roots_of
from hvbackup.store.format.shelf import Shelf, Value
from hvbackup.store.shelves.tombstones import TOMBSTONES
from hvbackup.store.store import Store

PIN_SECONDS = 15 * 60.0  # as long as a lease
RENEW_SECONDS = PIN_SECONDS / 3
LATE_SECONDS = PIN_SECONDS  # believed for so much longer: clocks of hosts differ


@dataclass(frozen=True, slots=True)
class Pin:
    """One reader's claim."""

    id: str
    what: str  # for people: "map", "boot NAME on HOST", ...
    points: tuple[str, ...]  # their paths
    roots: tuple[Root, ...]
    expires: Instant | None  # None: when it is dropped

    def is_active(self, now: Instant) -> bool:
        """Whether it still counts."""
        return self.expires is None or now < self.expires + int(LATE_SECONDS * SECOND)

    def reason(self) -> str:
        """For people."""
        return f"pinned by {self.what}"


def _dump(pin: Pin) -> Value:
    roots = [root.dump() for root in pin.roots]
    return {"what": pin.what, "points": list(pin.points), "roots": roots, "expires": pin.expires}


def _load(name: str, v: Value) -> Pin:
    roots = tuple(Root.load(root) for root in v["roots"])
    expires = None if v["expires"] is None else Instant(int(v["expires"]))
    return Pin(name, str(v["what"]), tuple(map(str, v["points"])), roots, expires)


PINS = Shelf("pins", f.KIND_PIN, _dump, _load)


def take(
    store: Store, points: Sequence[RecoveryPoint], what: str, now: Instant, *, lasting: bool = False, pin_id: str = ""
) -> Pin:
    """These points stay when this returns: until `drop` if the pin is lasting, else for PIN_SECONDS.

    Raises NotFound (one was forgotten just now), HvbackupError where nothing can be written.
    """
    roots = tuple(root for p in points for root in roots_of(p))
    expires = None if lasting else _expiry(now)
    pin = Pin(pin_id or secrets.token_hex(8), what, tuple(store.path_of(p) for p in points), roots, expires)
    PINS.put(store.files, store.ring, pin.id, pin)
    doomed = {path for t in TOMBSTONES.all(store.files, store.ring) for path in t.points}
    gone = [path for path in pin.points if path in doomed or not store.files.exists(path)]
    if gone:
        drop(store, pin.id)
        raise NotFound(f"{gone[0]} was forgotten just now; choose another point")
    return pin


def _expiry(now: Instant) -> Instant:
    return Instant(now + int(PIN_SECONDS * SECOND))


def drop(store: Store, pin_id: str) -> None:
    """The pin is gone when this returns."""
    PINS.remove(store.files, pin_id)


@contextmanager
def pinned(store: Store, points: Sequence[RecoveryPoint], what: str) -> Iterator[list[str]]:
    """These points stay for as long as the context lasts, and we live.

    Yields notes: a store that can't be written is read all the same, and then nobody knows that we read.  They may change
    for as long as the context lasts.
    """
    if os.statvfs(store.files.root).f_flag & os.ST_RDONLY:
        yield []  # nothing can be removed from it either
        return
    try:
        pin = take(store, points, f"{what} (process {os.getpid()} on {socket.gethostname()})", Instant(time.time_ns()))
    except NotFound:
        raise
    except (HvbackupError, OSError) as e:
        yield [f"Nobody knows that the point is read, and it could be forgotten meanwhile: {e}"]
        return
    ended, notes = threading.Event(), list[str]()
    thread = threading.Thread(target=_renew, args=(store, pin, ended, notes), name="hvbackup-pin", daemon=True)
    thread.start()
    try:
        yield notes
    finally:
        ended.set()
        thread.join()
        drop(store, pin.id)


def _renew(store: Store, pin: Pin, ended: threading.Event, notes: list[str]) -> None:
    while not ended.wait(RENEW_SECONDS):
        try:
            PINS.put(store.files, store.ring, pin.id, replace(pin, expires=_expiry(Instant(time.time_ns()))))
        except (HvbackupError, OSError) as e:  # tried again; reclaim believes it for LATE_SECONDS longer than it says
            notes[:] = [
                f"The claim on the point that is read could not be renewed, and it could be forgotten meanwhile: {e}"
            ]
        else:
            notes.clear()


def active(store: Store, now: Instant) -> Mapping[str, Sequence[Pin]]:
    """The pins on each point that is pinned.  Raises StoreDamage: a pin that can't be read may be on any point."""
    found: dict[str, list[Pin]] = {}
    for pin in every(store, now):
        for point in pin.points:
            found.setdefault(point, []).append(pin)
    return found


def every(store: Store, now: Instant) -> list[Pin]:
    """All pins that count.  Raises StoreDamage."""
    return [pin for pin in PINS.all(store.files, store.ring) if pin.is_active(now)]


def remove_expired(store: Store, now: Instant) -> None:
    """What dead readers left is gone when this returns."""
    for pin in PINS.all(store.files, store.ring):
        if not pin.is_active(now):
            drop(store, pin.id)
