"""Leases: what we made on a hypervisor, written down in the store before it is made.

    killed after                left behind                              cleaned by
    1 lease written             nothing on the host                      settle(): released, removed
    2 snapshot, bitmaps made    snapshot, old and new bitmaps            settle(): the committed ones stay
    3 point committed           snapshot, the old bitmap                 settle(): the old bitmap goes
    4 released                  the lease                                settle(): released again, removed

A lease file `leases/ID` is sealed like a point, and, unlike everything else in a store, replaced: that is how it is renewed.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from hvbackup.errors import HvbackupError, StoreDamage
from hvbackup.hypervisors import Hypervisor
from hvbackup.model import SECOND, Instant, LeaseId, Machine, MachineId, Token
from hvbackup.store.format import layout as f
from hvbackup.store.format.sealed import seal, unseal
from hvbackup.store.store import Store

LEASE_NS = 15 * 60 * SECOND
FOLDER = "leases"


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease as it stands in the store."""

    id: LeaseId
    machine: MachineId
    source: str  # how to reach the hypervisor again
    writer: str  # the machine that runs hvbackup
    expires: Instant


class Leases:
    """The leases of one store.  Thread safety: one thread."""

    def __init__(self, store: Store, clock: Callable[[], Instant]) -> None:
        self._store, self._clock = store, clock
        self._written: dict[LeaseId, Lease] = {}

    def take(self, machine: MachineId, source: str) -> Lease:
        """A lease that is on disk when this returns; it stays there until `remove`, or for `settle`."""
        self._store.runs.settle()  # under a name that we still have after a crash
        lease = Lease(LeaseId(secrets.token_hex(6)), machine, source, self._store.runs.writer, self._expiry())
        self._write(lease)
        return lease

    def _expiry(self) -> Instant:
        return Instant(self._clock() + LEASE_NS)

    def renew(self, lease: Lease) -> Lease:
        """The same lease, good for another 15 minutes, once less than half of its time is left."""
        lease = self._written.get(lease.id, lease)
        if lease.expires - self._clock() > LEASE_NS // 2:
            return lease
        renewed = Lease(lease.id, lease.machine, lease.source, lease.writer, self._expiry())
        self._write(renewed)
        return renewed

    def _write(self, lease: Lease) -> None:
        path = f"{FOLDER}/{lease.id}"
        value = {"machine": lease.machine, "source": lease.source, "writer": lease.writer, "expires": lease.expires}
        self._store.files.replace(path, seal(self._store.ring, f.KIND_LEASE, path, value))
        self._written[lease.id] = lease

    def remove(self, lease: LeaseId) -> None:
        """The lease is gone when this returns."""
        self._store.files.remove(f"{FOLDER}/{lease}")

    def all(self) -> list[Lease]:
        """Every lease; of a damaged one only the name is known, which is what a hypervisor wants to hear."""
        names = [n for n in self._store.files.names(FOLDER) if re.fullmatch("[0-9a-f]{12}", n)]
        return [found for name in names if (found := self._read(name))]

    def _read(self, name: str) -> Lease | None:
        path = f"{FOLDER}/{name}"
        try:
            v = unseal(self._store.ring, f.KIND_LEASE, path, self._store.files.read(path))
            return Lease(LeaseId(name), v["machine"], v["source"], v["writer"], Instant(v["expires"]))
        except FileNotFoundError:
            return None  # another writer of the store has just given it back
        except (StoreDamage, KeyError, TypeError):
            return Lease(LeaseId(name), MachineId(""), "", "", Instant(0))

    def stale(self, machine: MachineId) -> list[Lease]:
        """Leases of a machine whose holder is dead: ours (we own the store, so nobody else runs here), or expired."""
        ours, now = self._store.runs.writer, self._clock()
        return [v for v in self.all() if v.machine in (machine, "") and (v.writer == ours or v.expires < now)]

    def settle(self, hypervisor: Hypervisor, machine: Machine) -> list[str]:
        """Undo on the hypervisor what dead runs left there; what newest points name stays.  Returns notes."""
        notes = []
        for lease in self.stale(machine.id):
            try:
                hypervisor.release(machine, lease.id, committed_tokens(self._store, machine.id))
                self.remove(lease.id)
                notes.append(f"Cleaned up after run {lease.id}, which did not end")
            except HvbackupError as e:
                notes.append(f"Could not clean up after run {lease.id}: {e}")
        return notes


def committed_tokens(store: Store, machine: MachineId) -> list[Token]:
    """The tokens that the newest point and the newest barrier of a machine name: what no clean-up may remove."""
    from hvbackup.store.journal.history import newest_tokens  # only after a run that did not end

    barrier = [Token(**token) for token in newest_tokens(store, machine).values()]
    return [*point_tokens(store, machine), *barrier]


def point_tokens(store: Store, machine: MachineId) -> list[Token]:
    """The tokens that the newest point of a machine names."""
    point = store.newest(machine)
    return [d.token for d in point.disks if d.token] if point else []
