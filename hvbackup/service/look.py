"""points, status, sql: what is there."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvbackup import moments
from hvbackup.errors import NotFound, StoreDamage, UsageError
from hvbackup.leases import Lease, Leases
from hvbackup.model import SECOND, DiskRoot, Instant, Machine, MachineId, RecoveryPoint
from hvbackup.recover.boot import Boot, Boots
from hvbackup.service.chosen import no_disk
from hvbackup.service.session import Session
from hvbackup.store.catalog import Catalog
from hvbackup.store.store import Store

if TYPE_CHECKING:
    from hvbackup.service.timeline import Protected


@dataclass(slots=True)
class History:
    """All points of one machine, oldest first."""

    machine: Machine  # as its newest point has it
    points: Sequence[RecoveryPoint]
    damaged: Sequence[str] = ()  # points that can't be read


@dataclass(slots=True)
class Inventory:
    """Every machine of a store, by name."""

    machines: list[History] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # every point that can't be read

    def machine(self, name: str) -> History:
        """The machine people call `name`: its id or its newest name.  Raises NotFound, UsageError when two have it."""
        fits = [h for h in self.machines if name in (h.machine.id, h.machine.name)]
        if len(fits) > 1:
            ids = ", ".join(sorted(h.machine.id for h in fits))
            raise UsageError(f"{len(fits)} machines are called {name}; say which by its id: {ids}")
        if not fits:
            known = [h.machine.name for h in self.machines]
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ";"
            raise NotFound(f"No machine {name} in this store{hint} It has: {', '.join(known) or 'none yet'}")
        return fits[0]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the index answers; values are what JSON has."""

    columns: list[str]
    rows: list[list[Any]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """The store as a whole."""

    path: Path
    id: str
    block: int
    cipher: str
    used_bytes: int
    packs: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something a run has, or left, on a hypervisor."""

    lease: Lease
    machine: str  # its name where it is known
    expired: bool


@dataclass(frozen=True, slots=True)
class Overview:
    """What `status` says."""

    store: StoreFigures
    machines: Sequence[History]
    leftovers: Sequence[Leftover]
    boots: Sequence[Boot]
    notes: Sequence[str]
    protected: Mapping[MachineId, Protected] = field(default_factory=dict)  # machines that have a journal


def points(session: Session, machine: str = "") -> Inventory:
    """The points of all machines, or of one.  Raises NotFound."""
    with session.open() as store:
        found = inventory(store)
        if not machine:
            return found
        one = found.machine(machine)
        return Inventory([one], list(one.damaged))


def status(session: Session, now: Instant) -> Overview:
    """Machines, their newest points and moments, the store's figures, and what runs left on hypervisors."""
    from hvbackup.service.timeline import standing

    with session.open() as store:
        found = inventory(store)
        names = {h.machine.id: h.machine.name for h in found.machines}
        leases = Leases(store, lambda: now).all()
        leftovers = [Leftover(v, names.get(v.machine, v.machine), v.expires < now) for v in leases]
        boots = Boots(session.places.state, session.places.run, lambda: now).all()
        notes = [
            f"A run on machine {v.machine} did not end; its next capture cleans up what is left on the host"
            for v in leftovers
            if v.expired
        ]
        protected = {
            h.machine.id: standing_ for h in found.machines if (standing_ := standing(session, store, h.machine, now))
        }
        notes = [*found.notes, *notes]
        return Overview(_figures(store, session), found.machines, leftovers, boots, notes, protected)


def sql(session: Session, query: str) -> Answer:
    """The answer to one statement that only reads.  Raises UsageError with the reason, Busy."""
    with session.open() as store:
        catalog = Catalog(store.state)
        notes = catalog.reconcile(store)
        return Answer(*catalog.query(query), notes)


def _figures(store: Store, session: Session) -> StoreFigures:
    sizes = list(_sizes(session.places.store))
    packs = list(_sizes(session.places.store / "packs"))
    free = shutil.disk_usage(session.places.store).free
    d = store.descriptor
    return StoreFigures(session.places.store, d.id.hex(), d.block, d.cipher, sum(sizes), len(packs), free)


def _sizes(folder: Path) -> Iterator[int]:
    """How much room each file below a folder takes."""
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(at, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # a writer finished it meanwhile


def inventory(store: Store) -> Inventory:
    """Every machine of the store with its points."""
    found = Inventory()
    for folder in store.machine_folders():
        good, damaged = [], []
        for path in store.point_paths(folder):
            try:
                good.append(store.load_point(path))
            except StoreDamage as e:
                damaged.append(f"{e}; `hvbackup check` says more")
        found.notes += damaged
        if good:
            found.machines.append(History(good[-1].machine, good, damaged))
    found.machines.sort(key=lambda h: (h.machine.name, h.machine.id))
    return found


def roots(point: RecoveryPoint, names: Sequence[str]) -> list[DiskRoot]:
    """The named disks of a point, all when none is named.  Raises NotFound."""
    known = {d.disk.id: d for d in point.disks}
    for name in names:
        if name not in known:
            raise NotFound(no_disk(f"{point.machine.name} at {moments.local(point.t)}", name, list(known)))
    return [d for d in point.disks if not names or d.disk.id in names]


def age_seconds(point: RecoveryPoint, now: Instant) -> float:
    """How old a point is."""
    return max(0.0, (now - point.t) / SECOND)
