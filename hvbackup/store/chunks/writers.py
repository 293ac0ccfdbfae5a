"""Writers: who adds chunks and points now, written down in `writers/ID`, so that reclaim removes nothing under their hands.

A writer refers to chunks that are there already, and its point, which makes them needed, comes only at its end.  It finds them in
two ways: in the index, and in the map of the point it builds upon.  The rules that keep such a chunk:

    writer   1 writes its lease; 2 reads what is condemned, then lists the packs, and takes nothing from the index that is in
             packs that are condemned or gone; 3 puts the roots of what it builds upon into the lease, and then makes sure that
             this point is still there; 4 renews the lease while it works; 5 seals its packs; 6 makes sure that the lease
             still holds; 7 puts the point in place; 8 makes sure once more, else takes the point back and fails; 9 removes
             the lease
    reclaim  1 writes the condemned list; 2 lists the leases; 3 waits until each that has not `seen` the list is gone, or has not
             been renewed for LEASE_SECONDS; 4 marks everything that any point or the roots in any lease need; 5 copies, and
             removes packs

Why no chunk is lost: take a writer and a list.  Either the lease was there when reclaim looked, or the list was there when the
writer looked, because each writes before it reads.  In the second case the writer takes nothing from its packs, and what it
builds upon is marked: as a point, or, if that was forgotten since, by the lease.  In the first case reclaim waits: for the end,
and then the point is there to be marked; or for the lease to run out, and then step 6 or 8 of the writer finds it run out, for
it counts from before its last renewal and reclaim from after it.  Each side counts with its own clock only, so clocks may differ.
A writer that was stopped between 6 and 8 for all that time, and killed before 8, leaves a point that nobody was told of, and
that `check` names.

    killed after                left behind                     cleaned by
    lease written               the lease                       begin() of the next writer of this STATE, or reclaim, after
                                                                LEASE_SECONDS
    point in place              the lease                       the same

A host knows that its own writer is dead by a lock in STATE, which ends with the process.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import Busy, StoreDamage
from hvbackup.files import Files
from hvbackup.store.backend import Backend
from hvbackup.store.chunks.condemned import CONDEMNED
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack
from hvbackup.store.format.keys import Keyring
from hvbackup.store.format.root import Root
from hvbackup.store.format.sealed import seal, unseal
from hvbackup.store.index.index import Index

FOLDER = "writers"  # in the store; and in STATE, for the locks
LEASE_SECONDS = 15 * 60.0
RENEW_SECONDS = LEASE_SECONDS / 3
COUNTS = "counts"  # under STATE: what reclaim counted; it knows nothing of what a writer that died has left
Clock = Callable[[], tuple[float, float]]


def passed_time() -> tuple[float, float]:
    """Two clocks: one that runs on while the machine sleeps, and the wall's; whichever says more is believed."""
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


class WriterLease:
    """The lease of one writer, from `begin` to `end`.  Thread safety: every method from any thread."""

    def __init__(self, backend: Backend, state: Files, ring: Keyring, writer: str, clock: Clock = passed_time) -> None:
        self._backend, self._state, self._ring, self._writer, self._clock = backend, state, ring, writer, clock
        self.id = secrets.token_hex(8)
        self.seen: list[str] = []
        self._roots: list[Root] = []  # of what is built upon
        self.unfit: frozenset[str] = frozenset()  # packs that nothing may refer to
        self._unfit_numbers = np.zeros(0, np.uint32)
        self._everything = False
        self._written = clock()
        self._lock = threading.Lock()
        self._exit = ExitStack()

    def begin(self, index: Index) -> WriterLease:
        """Reclaim knows of us, and we of what it condemned, when this returns."""
        remove_dead(self._backend, self._state, self._ring, self._writer)
        self._state.write_new(f"{FOLDER}/{self.id}", b"")
        try:
            self._exit.enter_context(self._state.owner(f"{FOLDER}/{self.id}", f"Writer {self.id}"))
            self._write()
            self._look(index)
        except BaseException:
            self.end()
            raise
        return self

    def _look(self, index: Index) -> None:
        try:
            lists = list(CONDEMNED.all(self._backend, self._ring))
        except StoreDamage:
            self._everything = True  # what it listed is unknown, so everything is stored again
            return
        self.seen = [c.id for c in lists]
        gone = set(index.packs).difference(pack.list_packs(self._backend))
        self.unfit = frozenset(gone).union(*(c.packs for c in lists))
        self._unfit_numbers = np.array([i for i, n in enumerate(index.packs) if n in self.unfit], np.uint32)
        if self.seen:
            self._write()

    def _write(self) -> None:
        began = self._clock()
        path = f"{FOLDER}/{self.id}"
        roots = [root.dump() for root in self._roots]
        value = {"writer": self._writer, "seen": self.seen, "roots": roots, "began": time.time_ns()}
        self._backend.replace(path, seal(self._ring, f.KIND_WRITER, path, value))
        self._written = began

    def builds_upon(self, roots: Iterable[Root]) -> None:
        """What these maps need stays until we end, when this returns; then the caller sees that their point is still there."""
        with self._lock:
            self._roots = [root for root in roots if any(root.id)]
            if self._roots:
                self._write()

    def avoids(self, numbers: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which of these packs, by their numbers in the index, nothing may refer to."""
        if self._everything:
            return np.ones(len(numbers), np.bool_)
        return np.isin(numbers, self._unfit_numbers)

    def fits(self, name: str) -> bool:
        """Whether a new reference may lead into this pack."""
        return not self._everything and name not in self.unfit

    def renew(self) -> None:
        """The lease holds for longer, if some of its time has passed."""
        with self._lock:
            if self._age() > RENEW_SECONDS:
                self.confirm()
                self._write()

    def _age(self) -> float:
        return max(now - then for now, then in zip(self._clock(), self._written, strict=True))

    def confirm(self) -> None:
        """Raises Busy when the lease has run out: what we refer to may have been removed meanwhile."""
        if self._age() > LEASE_SECONDS:
            raise Busy(
                f"Nothing was written for {self._age():.0f} s, longer than a writer's lease holds, and what this run refers to "
                "may have been reclaimed meanwhile; no point was made, run again"
            )

    def end(self) -> None:
        """Reclaim need not wait for us any more; nothing happens the second time."""
        try:
            self._backend.remove(f"{FOLDER}/{self.id}")
        finally:
            self._exit.close()
        self._state.remove(f"{FOLDER}/{self.id}")


@dataclass(frozen=True, slots=True)
class Seen:
    """A lease as reclaim finds it; of a damaged one only the name is known."""

    id: str
    writer: str
    seen: frozenset[str]
    roots: tuple[Root, ...]
    data: bytes  # changes with every renewal


def leases(backend: Backend, ring: Keyring) -> Iterator[Seen]:
    """Everybody who writes now, or was killed while doing so."""
    for name in backend.names(FOLDER):
        if not re.fullmatch("[0-9a-f]{16}", name):
            continue
        path = f"{FOLDER}/{name}"
        try:
            data = backend.read(path)
        except FileNotFoundError:
            continue
        try:
            value = unseal(ring, f.KIND_WRITER, path, data)
            roots = tuple(Root.load(root) for root in value["roots"])
            yield Seen(name, str(value["writer"]), frozenset(map(str, value["seen"])), roots, data)
        except (StoreDamage, KeyError, TypeError, ValueError):
            yield Seen(name, "", frozenset(), (), data)


def remove_dead(backend: Backend, state: Files, ring: Keyring, writer: str) -> None:
    """The leases of writers of this STATE that are dead are gone when this returns."""
    for lease in leases(backend, ring):
        if lease.writer == writer and is_dead(state, lease.id):
            state.remove(COUNTS)
            backend.remove(f"{FOLDER}/{lease.id}")
    for name in state.names(FOLDER):
        if is_dead(state, name):
            state.remove(f"{FOLDER}/{name}")


def is_dead(state: Files, lease: str) -> bool:
    """Whether a writer of this STATE has ended without saying so; without its lock file nobody knows."""
    if not state.exists(f"{FOLDER}/{lease}"):
        return False
    try:
        with state.owner(f"{FOLDER}/{lease}", f"Writer {lease}"):
            return True
    except Busy:
        return False


class Wait:
    """What reclaim waits for before it believes a mark: writers that may not know of a condemned list.

    `rest` is asked again and again; it says who is left.  Thread safety: one thread.
    """

    def __init__(self, backend: Backend, state: Files, ring: Keyring, writer: str, list_id: str) -> None:
        self._backend, self._state, self._ring, self._writer, self._list = backend, state, ring, writer, list_id
        self._waiting: dict[str, tuple[bytes, float]] | None = None  # lease -> (as it was, since when)

    def rest(self, now: float) -> list[str]:
        """The leases that still count.  `now` is a clock that never steps."""
        found = {v.id: v for v in leases(self._backend, self._ring) if self._list not in v.seen}
        if self._waiting is None:
            self._waiting = {name: (v.data, now) for name, v in found.items()}
        for name, (data, since) in list(self._waiting.items()):
            lease = found.get(name)
            if lease is None or self._has_run_out(lease, data, since, now):
                del self._waiting[name]
            elif lease.data != data:
                self._waiting[name] = (lease.data, now)
        return sorted(self._waiting)

    def _has_run_out(self, lease: Seen, data: bytes, since: float, now: float) -> bool:
        dead = lease.writer == self._writer and is_dead(self._state, lease.id)
        if not dead and (lease.data != data or now - since <= LEASE_SECONDS + RENEW_SECONDS):
            return False
        self._state.remove(COUNTS)
        self._backend.remove(f"{FOLDER}/{lease.id}")
        return True
