"""Which machines a store has, with their points: what every verb that looks one up by name begins with."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from hvbackup import moments
from hvbackup.errors import NotFound, StoreDamage, UsageError
from hvbackup.model import DiskRoot, Instant, Machine, RecoveryPoint
from hvbackup.service.chosen import no_disk
from hvbackup.store.store import Store

EPOCH = Instant(0)


@dataclass(slots=True)
class History:
    """All points of one machine, oldest first."""

    machine: Machine  # as its newest point has it
    points: Sequence[RecoveryPoint]
    damaged: Sequence[str] = ()  # points that can't be read
    count: int = 0  # of its points, also where only the newest was read
    oldest: Instant = EPOCH


@dataclass(slots=True)
class Inventory:
    """Every machine of a store, by name."""

    machines: list[History] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # every point that can't be read
    total: int = 0  # of points there are, also where only some were read

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


def machine_of(store: Store, name: str) -> Machine:
    """The machine people call `name`.  Raises NotFound, UsageError."""
    return heads(store).machine(name).machine


def history_of(store: Store, name: str) -> History:
    """The machine people call `name` with its points; of all others, only the newest point is read.  Raises as `machine_of`."""
    folder = store.ring.machine_name(machine_of(store, name).id)
    return _inventory(store, [store.point_paths(folder)]).machines[0]


def newest(store: Store, name: str, last: int) -> Inventory:
    """The newest points of all machines, or of one, at most `last` in all: no others are read.  Raises as `machine_of`.

    How many there are and how old each is, their names say.
    """
    folders = [store.ring.machine_name(machine_of(store, name).id)] if name else store.machine_folders()
    every = [store.point_paths(folder) for folder in folders]
    total = sum(map(len, every))
    if total > last:
        chosen = set(heapq.nlargest(last, (path for paths in every for path in paths), key=_time_of))
        every = [[path for path in paths if path in chosen] for paths in every]
    found = _inventory(store, every)
    found.total = total
    return found


def heads(store: Store) -> Inventory:
    """Every machine with its newest readable point: one small file for each, however many points there are."""
    found = Inventory()
    for folder in store.machine_folders():
        paths, damaged = store.point_paths(folder), []
        for path in reversed(paths):
            try:
                newest = store.load_point(path)
            except StoreDamage as e:
                damaged.append(f"{e}; `hvbackup check` says more")
                continue
            found.machines.append(History(newest.machine, [newest], damaged, len(paths), _time_of(paths[0])))
            break
        found.notes += damaged
    found.machines.sort(key=lambda h: (h.machine.name, h.machine.id))
    return found


def _time_of(path: str) -> Instant:
    return Instant(int(path.rsplit("/", 1)[1].split("-")[0]))


def inventory(store: Store) -> Inventory:
    """Every machine of the store with its points."""
    return _inventory(store, [store.point_paths(folder) for folder in store.machine_folders()])


def _inventory(store: Store, folders: Sequence[Sequence[str]]) -> Inventory:
    """The machines whose points have these paths, each with its own."""
    found = Inventory(total=sum(map(len, folders)))
    for paths in folders:
        good, damaged = [], []
        for path in paths:
            try:
                good.append(store.load_point(path))
            except StoreDamage as e:
                damaged.append(f"{e}; `hvbackup check` says more")
        found.notes += damaged
        if good:
            found.machines.append(History(good[-1].machine, good, damaged, len(good), good[0].t))
    found.machines.sort(key=lambda h: (h.machine.name, h.machine.id))
    return found


def roots(point: RecoveryPoint, names: Sequence[str]) -> list[DiskRoot]:
    """The named disks of a point, all when none is named.  Raises NotFound."""
    known = {d.disk.id: d for d in point.disks}
    for name in names:
        if name not in known:
            raise NotFound(no_disk(f"{point.machine.name} at {moments.local(point.t)}", name, list(known)))
    return [d for d in point.disks if not names or d.disk.id in names]
