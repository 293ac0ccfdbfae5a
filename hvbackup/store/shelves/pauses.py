"""Pauses: machines that continuous protection leaves alone for a while, so that an administrator may work on their disks.

A pause is a small sealed file, `pauses/MACHINE`, so it lasts over restarts of whoever protects the machine, and anybody who has
the store can end it.  It is over when its time has passed or its file is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvbackup.errors import StoreDamage
from hvbackup.model import Instant, MachineId
from hvbackup.store.format import layout as f
from hvbackup.store.format.sealed import seal, unseal
from hvbackup.store.store import Store

FOLDER = "pauses"


@dataclass(frozen=True, slots=True)
class Pause:
    """A machine is left alone."""

    since: Instant
    until: Instant | None  # None: until somebody ends it
    why: str


def _path(store: Store, machine: MachineId) -> str:
    return f"{FOLDER}/{store.ring.machine_name(machine)}"


def begin(store: Store, machine: MachineId, pause: Pause) -> None:
    """The machine is to be left alone when this returns; a pause there was is replaced."""
    value = {"machine": machine, "since": pause.since, "until": pause.until, "why": pause.why}
    path = _path(store, machine)
    store.files.replace(path, seal(store.ring, f.KIND_PAUSE, path, value))


def end(store: Store, machine: MachineId) -> None:
    """The machine may be protected again when this returns; nothing happens when it might be already."""
    store.files.remove(_path(store, machine))


def current(store: Store, machine: MachineId, now: Instant) -> Pause | None:
    """The pause that is not over; one that can't be read lasts until somebody ends it."""
    path = _path(store, machine)
    if not store.files.exists(path):
        return None
    try:
        v = unseal(store.ring, f.KIND_PAUSE, path, store.files.read(path))
        until = None if v["until"] is None else Instant(int(v["until"]))
        found = Pause(Instant(int(v["since"])), until, str(v["why"]))
    except FileNotFoundError:
        return None
    except (StoreDamage, KeyError, TypeError, ValueError):
        return Pause(Instant(0), None, f"{path} is damaged, so nobody knows for how long")
    return None if found.until is not None and found.until <= now else found
