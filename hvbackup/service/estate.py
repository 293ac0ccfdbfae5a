"""The estate: every machine of a store with the times of its points, kept in memory and brought up to date in milliseconds.

Names of point files carry machine and moment, and a folder's time tells whether anything in it changed.  So only folders that
changed are listed again, and only the newest point of each is read; nothing here can disagree with the store for long.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import NotFound, StoreDamage
from hvbackup.model import SECOND, Instant, MachineId, RecoveryPoint
from hvbackup.service.oddities import Oddities
from hvbackup.store.format import point as points
from hvbackup.store.journal import journal
from hvbackup.store.store import Store


@dataclass(slots=True)
class Known:
    """A machine of the store."""

    key: str  # the keyed name of the machine: the same for its points and its journal, safe in a URL
    newest: RecoveryPoint
    times: NDArray[np.int64]  # of all its points, oldest first
    ids: Sequence[str]
    journal_bytes: int = 0
    stamp: tuple[int, int] = (0, 0)  # when its folders changed last

    @property
    def id(self) -> MachineId:
        """Its platform's identity."""
        return self.newest.machine.id

    @property
    def name(self) -> str:
        """What people call it."""
        return self.newest.machine.name

    def path(self, number: int) -> str:
        """The path of one of its points in the store."""
        return f"{points.FOLDER}/{self.key}/{int(self.times[number]):020d}-{self.ids[number]}"

    def age_seconds(self, now: Instant) -> float:
        """How old its newest point is."""
        return max(0.0, (now - int(self.times[-1])) / SECOND)


@dataclass(slots=True)
class Estate:
    """The machines of one open store.  Thread safety: every method from any thread."""

    store: Store
    told: Oddities = field(init=False)  # drills and oddities, by its records
    _known: dict[str, Known] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.told = Oddities(self.store)

    def refresh(self) -> None:
        """What the store has now is known when this returns."""
        with self._lock:
            keys = set(self.store.machine_folders())
            for gone in set(self._known) - keys:
                del self._known[gone]
            for key in keys:
                stamp = (self._changed(points.FOLDER, key), self._changed(journal.FOLDER, key))
                if key not in self._known or self._known[key].stamp != stamp:
                    self._read(key, stamp)

    def _changed(self, folder: str, key: str) -> int:
        try:
            return self.store.files.path(f"{folder}/{key}").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _read(self, key: str, stamp: tuple[int, int]) -> None:
        names = [n for n in self.store.files.names(f"{points.FOLDER}/{key}") if points.is_name(n)]
        newest = self._newest(key, names)
        if newest is None:
            self._known.pop(key, None)
            return
        times = np.array([int(n[:20]) for n in names], np.int64)
        self._known[key] = Known(key, newest, times, [n[21:] for n in names], self._journal_bytes(key), stamp)

    def _journal_bytes(self, key: str) -> int:
        """Of the files that are still there: a worker seals and trims while we look."""
        total, folder = 0, f"{journal.FOLDER}/{key}"
        for name in self.store.files.names(folder):
            with contextlib.suppress(FileNotFoundError):
                total += self.store.files.size(f"{folder}/{name}")
        return total

    def _newest(self, key: str, names: Sequence[str]) -> RecoveryPoint | None:
        before = self._known.get(key)
        for name in reversed(names):
            if before and before.newest.id == name[21:]:
                return before.newest
            try:
                return self.store.load_point(f"{points.FOLDER}/{key}/{name}")
            except StoreDamage:
                continue
        return None

    def all(self) -> list[Known]:
        """Every machine, by name."""
        with self._lock:
            return sorted(self._known.values(), key=lambda k: (k.name, k.id))

    def get(self, key: str) -> Known:
        """The machine with this key.  Raises NotFound."""
        with self._lock:
            if key in self._known:
                return self._known[key]
        raise NotFound(f"There is no machine {key} in this store")

    def of(self, machine: str) -> Known | None:
        """The machine with this id, or None."""
        return self._known.get(self.store.ring.machine_name(MachineId(machine)))

    def find(self, text: str) -> Known:
        """The machine people call `text`: its key, id or newest name.  Raises NotFound."""
        fits = [k for k in self.all() if text in (k.key, k.id, k.name)]
        if len(fits) != 1:
            several = f"{len(fits)} machines are" if fits else "No machine is"
            raise NotFound(f"{several} called {text}" + ("; say which by its id" if fits else ""))
        return fits[0]

    def points(self, known: Known, first: int, count: int) -> list[RecoveryPoint]:
        """Some of a machine's points, newest first; those that can't be read are left out."""
        found = []
        for number in range(len(known.times) - 1 - first, max(-1, len(known.times) - 1 - first - count), -1):
            try:
                found.append(self.store.load_point(known.path(number)))
            except StoreDamage:
                continue
        return found
