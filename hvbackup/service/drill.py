"""drill: rehearse the recovery of a machine at a random recent moment, and write down what came of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hvbackup.bandwidth import pace_of
from hvbackup.errors import HvbackupError, JournalGap, NotFound, StoreDamage
from hvbackup.model import DiskRoot, Instant, RecoveryPoint
from hvbackup.moments import rfc3339
from hvbackup.recover.drill import Rehearsed, rehearse
from hvbackup.service import shapes
from hvbackup.service.inventory import history_of
from hvbackup.service.moment import Chosen, choose
from hvbackup.service.session import Session
from hvbackup.store.store import Store

WITHIN_NS = 30 * 86400 * 1_000_000_000  # how old the moment may be
TRIES = 8  # of a random time, which may lie in a gap

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class DrilledDisk:
    """One disk, or why it could not be recovered."""

    root: DiskRoot
    done: Rehearsed | None
    error: HvbackupError | None = None


@dataclass(frozen=True, slots=True)
class Drilled:
    """What a drill came to."""

    point: RecoveryPoint
    disks: Sequence[DrilledDisk]
    seconds: float  # how long the recovery took
    notes: Sequence[str]

    @property
    def error(self) -> HvbackupError | None:
        """The first disk that can't be recovered."""
        return next((d.error for d in self.disks if d.error), None)


def drill(
    session: Session, machine: str, at: str, now: Instant, progress: OnProgress, rng: random.Random | None = None
) -> Drilled:
    """Every block of every disk was read as for a restore, and the records say so, when this returns.

    `at`: which moment; "": a random one of the last 30 days.  Raises NotFound, JournalGap, UsageError.
    """
    with session.open() as store:
        found = choose(store, machine, at, now) if at else _random(store, machine, now, rng or random.Random())
        take, began = pace_of(session.places.run, "", session.places.store).store, time.monotonic()
        disks = []
        with found.pinned("drill") as more:
            for root in found.point.disks:
                disks.append(_one(found, root, store.ring.block_key, progress, take))
        done = Drilled(found.point, disks, round(time.monotonic() - began, 3), [*found.notes, *more])
        store.tell(
            "drill", now, machine=found.point.machine.id, at=found.point.id, moment=int(found.point.t),
            seconds=done.seconds, read_bytes=sum(d.done.read_bytes for d in disks if d.done),
            error=str(done.error or ""),
        )  # fmt: skip
        return done


def _one(found: Chosen, root: DiskRoot, key: bytes, progress: OnProgress, take: Callable[[int], None]) -> DrilledDisk:
    try:
        view: Any = found.view(root)
        return DrilledDisk(root, rehearse(view, key, lambda n, total: progress(root.disk.id, n, total), take))
    except StoreDamage as e:
        return DrilledDisk(root, None, e)


def _random(store: Store, machine: str, now: Instant, rng: random.Random) -> Chosen:
    """A moment like those that people ask for, wherever it may be kept."""
    first = max(int(history_of(store, machine).points[0].t), now - WITHIN_NS)
    for _ in range(TRIES):
        try:
            return choose(store, machine, rfc3339(Instant(rng.randint(first, int(now)))), now)
        except (JournalGap, NotFound):
            continue
    return choose(store, machine, "latest", now)


def shape(d: Drilled) -> dict[str, Any]:
    """A drill as JSON."""
    return {
        "machine": shapes.machine(d.point.machine),
        "at": d.point.id,
        "time": rfc3339(d.point.t),
        "ok": d.error is None,
        "seconds": d.seconds,
        "disks": [
            {"id": v.root.disk.id, "size_bytes": v.root.disk.size, "read_bytes": v.done.read_bytes if v.done else None,
             "seconds": v.done.seconds if v.done else None, "holds": v.done.holds if v.done else None,
             "error": str(v.error) if v.error else None}
            for v in d.disks
        ],
        "notes": list(d.notes),
    }  # fmt: skip
