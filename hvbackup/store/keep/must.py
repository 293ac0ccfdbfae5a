"""What must stay, whatever a policy says, and why: holds, pins, the minimum age, moments of a journal, the newest good point.

Where anything that decides can't be read, everything it could speak of stays.
"""

from __future__ import annotations

from hvbackup.errors import StoreDamage
from hvbackup.model import SECOND, Instant, MachineId, RecoveryPoint
from hvbackup.store.journal import window
from hvbackup.store.shelves import holds, pins
from hvbackup.store.shelves.settings import Settings
from hvbackup.store.store import Store

Reasons = dict[str, list[str]]  # path of a point -> why it must stay


def firm(store: Store, paths: list[str], settings: Settings, now: Instant) -> Reasons:
    """What nobody may forget, also not by name.  Raises StoreDamage."""
    found: Reasons = {}
    for held in (holds.active(store, now), pins.active(store, now)):
        for path, claims in held.items():
            found.setdefault(path, []).extend(claim.reason() for claim in claims)
    for path in paths:
        age = now - int(path.rsplit("/", 1)[1].split("-")[0])
        if age < settings.min_age_ns:
            found.setdefault(path, []).append(
                f"younger than the store's minimum age ({settings.min_age_ns / (86400 * SECOND):g} days)"
            )
    for folder in sorted({path.split("/")[1] for path in paths}):
        for path, why in _of_journal(store, folder).items():
            found.setdefault(path, []).append(why)
    wanted = set(paths)
    return {path: why for path, why in found.items() if path in wanted}


def _of_journal(store: Store, folder: str) -> dict[str, str]:
    points = _readable(store, folder)
    with_seq = [p for p in points if p.seq is not None]
    if not with_seq:
        return {}
    try:
        needed = window.all_needed(store, with_seq[-1].machine.id)
    except StoreDamage as e:
        return {store.path_of(p): f"its journal can't be read ({e})" for p in with_seq}
    return {store.path_of(p): "moments of the journal build upon it" for p in needed}


def newest(store: Store, folder: str) -> Reasons:
    """What no policy forgets: the newest point of a machine, and the newest one that is good, if that is another."""
    points = _readable(store, folder)
    good = [p for p in points if not any(store.is_damaged(p, d.disk.id) for d in p.disks)]
    found = {store.path_of(points[-1]): ["the newest point"]} if points else {}
    if good and good[-1] != points[-1]:
        found[store.path_of(good[-1])] = ["the newest good point"]
    return found


def _readable(store: Store, folder: str) -> list[RecoveryPoint]:
    found = []
    for path in store.point_paths(folder):
        try:
            found.append(store.load_point(path))
        except StoreDamage:
            continue
    return found


def machine_of(store: Store, folder: str) -> MachineId | None:
    """The machine whose points are in a folder; None when none can be read."""
    points = _readable(store, folder)
    return points[-1].machine.id if points else None
