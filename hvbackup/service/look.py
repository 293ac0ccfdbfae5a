"""points, status, sql: what is there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvbackup.model import Instant, MachineId
from hvbackup.service.inventory import History, Inventory, heads, inventory, newest
from hvbackup.service.session import Session
from hvbackup.store.catalog.catalog import Catalog
from hvbackup.store.check.ledger import Ledger, debt
from hvbackup.store.check.ledger import sizes as lengths
from hvbackup.store.store import Store

if TYPE_CHECKING:  # only `status` pays for what protects machines
    from hvbackup.leases import Lease
    from hvbackup.recover.boot import Boot
    from hvbackup.service.timeline import Protected


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
    debt_bytes: int = 0  # of packs, not verified within 30 days


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


def points(session: Session, machine: str = "", last: int = sys.maxsize) -> Inventory:
    """The newest points of all machines, or of one, at most `last` in all.  Raises NotFound."""
    with session.open() as store:
        return newest(store, machine, last)


def status(session: Session, now: Instant, *, every: bool = False) -> Overview:
    """Machines, their newest points and moments, the store's figures, and what runs left on hypervisors.

    Of each machine the newest point is read; with `every` all are, and each that can't be read is named.
    """
    from hvbackup.leases import Leases
    from hvbackup.recover.boot import Boots
    from hvbackup.service.timeline import standing

    with session.open() as store:
        found = inventory(store) if every else heads(store)
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
        return Overview(_figures(store, session, now), found.machines, leftovers, boots, notes, protected)


def sql(session: Session, query: str) -> Answer:
    """The answer to one statement that only reads.  Raises UsageError with the reason, Busy."""
    with session.open() as store:
        catalog = Catalog(store.state)
        notes = catalog.reconcile(store)
        return Answer(*catalog.query(query), notes)


def _figures(store: Store, session: Session, now: Instant) -> StoreFigures:
    sizes = list(_sizes(session.places.store))
    packs = list(_sizes(session.places.store / "packs"))
    free = shutil.disk_usage(session.places.store).free
    owed = debt(Ledger(store.state), lengths(store.files, store.index.known()).items(), now)
    d = store.descriptor
    return StoreFigures(session.places.store, d.id.hex(), d.block, d.cipher, sum(sizes), len(packs), free, owed)


def used_bytes(folder: Path) -> int:
    """How much room a store takes on its disk."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    """How much room each file below a folder takes."""
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(at, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # a writer finished it meanwhile
