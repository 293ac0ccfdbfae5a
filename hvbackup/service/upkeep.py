"""check and regroup: is everything we promised still there, what can be put back, and can it take less room?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from hvbackup.errors import Busy, NotFound, UsageError
from hvbackup.model import Instant, MachineId, PointId
from hvbackup.service.damagedfiles import DamagedFiles, damaged_files
from hvbackup.service.reclaim import NICENESS, Throttle
from hvbackup.service.session import Session
from hvbackup.store.check import check as store_check
from hvbackup.store.check import repair as store_repair
from hvbackup.store.check.check import Wanted
from hvbackup.store.check.ledger import Level
from hvbackup.store.check.refill import refill
from hvbackup.store.reclaim import cold
from hvbackup.store.store import Store

__all__ = [
    "CheckOrder",
    "Checked",
    "Level",
    "check",
    "regroup",
    "sentence",
    "shape",
]

Progress = Callable[[int, int], None]
ALONE_SECONDS = 600.0  # for whoever writes when a check has ended
LOCK = "check.lock"  # in STATE: who holds it remembers what was found


@dataclass(frozen=True, slots=True)
class CheckOrder:
    """What somebody wants to be checked."""

    level: Level = Level.QUICK
    t: Instant = store_check.NEVER
    sample: float = 1.0
    bytes_per_second: int = 0
    resume: bool = False
    machine: str = ""
    point: str = ""
    repair: bool = False
    source: Session | None = None  # another store, from which lost blocks are taken
    files: bool = False  # name the files inside the machines that lie on what is lost


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found, and how it was made."""

    report: store_check.Report
    level: Level
    notes: Sequence[str] = ()
    repaired: Sequence[str] = ()
    files: Sequence[DamagedFiles] = ()


def check(session: Session, order: CheckOrder, progress: Progress) -> Checked:
    """Everything that is wrong with what was asked for, after what has another copy was put back, if it is to be repaired.

    Captures go on beside it.  Raises Busy when the store is to be repaired and somebody else is writing, NotFound, UsageError.
    """
    if order.source and not order.repair:
        raise UsageError("--from says where to take lost blocks from: it goes with --repair")
    if order.resume and (order.sample < 1 or order.machine or order.point):
        raise UsageError("--resume goes on with a check of the whole store; leave --sample, --machine and --point away")
    found = _repaired(session, order, progress) if order.repair else _checked(session, order, progress)
    if not order.files or not found.report.lost:
        return found
    with session.open() as store:
        return replace(found, files=list(damaged_files(store, found.report.problems)))


def _checked(session: Session, order: CheckOrder, progress: Progress) -> Checked:
    """As a reader: whoever captures or restores does not notice."""
    with ExitStack() as stack:
        store = stack.enter_context(session.open())
        wanted, notes = _wanted(store, order), []
        try:
            stack.enter_context(store.state.owner(LOCK, "The check of this store"))
        except Busy as e:
            if order.repair:
                raise  # what is not written down is not mended
            wanted = replace(wanted, record=False, t=store_check.NEVER)
            notes.append(f"{e}; checked beside it, so what is damaged is named, but not marked for healing")
        return Checked(store_check.check(store, wanted, progress=progress), order.level, notes)


def _repaired(session: Session, order: CheckOrder, progress: Progress) -> Checked:
    """The store is ours alone before and after what takes long, the check itself: captures go on beside that.

    Whatever is captured meanwhile finds in the index what was damaged before, and what the check adds to that is written down, so
    mending, which looks at every damaged place again, needs nothing to have stood still.
    """
    with session.open(owner=True) as store:  # at once, or Busy before a day was spent
        done = store_repair.repair(store)
    found = _checked(session, order, progress)
    if not found.report.problems:
        return replace(found, repaired=done)
    with ExitStack() as stack:
        store = stack.enter_context(_alone(session))
        stack.enter_context(store.state.owner(LOCK, "The check of this store"))
        done += store_repair.mend(store)
        done += store_repair.repair(store)  # copies of points may be in packs that are whole again
        other = stack.enter_context(order.source.open()) if order.source else None
        done += refill(store, other)
        if not done:
            return found
        again = store_check.check(store, replace(_wanted(store, order), level=Level.QUICK))
        return Checked(replace(again, read_bytes=found.report.read_bytes), order.level, repaired=done)


def _alone(session: Session) -> Store:
    """The store, as its owner, when whoever writes now has ended.  Raises Busy when that takes too long."""
    end = time.monotonic() + ALONE_SECONDS
    while True:
        try:
            return session.open(owner=True)
        except Busy:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def _wanted(store: Store, order: CheckOrder) -> Wanted:
    machine = store.find_machine(order.machine) if order.machine else None
    point = _point(store, machine, order.point) if order.point else None
    return Wanted(order.level, order.t, order.sample, order.bytes_per_second, order.resume, machine, point, record=True)


def _point(store: Store, machine: MachineId | None, text: str) -> PointId:
    """The point whose id begins with `text`.  Raises NotFound, UsageError when there are several."""
    folders = [store.ring.machine_name(machine)] if machine else store.machine_folders()
    ids = {path.rsplit("-", 1)[1] for folder in folders for path in store.point_paths(folder)}
    found = [i for i in ids if i.startswith(text)]
    if not found:
        raise NotFound(f"No point {text} in this store; `hvbackup points` lists them")
    if len(found) > 1:
        raise UsageError(f"{len(found)} points begin with {text}; write more of it")
    return PointId(found[0])


def regroup(
    session: Session, now: Instant, age_ns: int, group_bytes: int, progress: Progress, bytes_per_second: int = 0
) -> cold.Regrouped:
    """Blocks that were stored long ago take less room, once reclaim has removed the packs they were in.  Raises Busy."""
    os.nice(NICENESS)
    with session.open() as store, store.writing:
        done = cold.regroup_cold(store, now, age_ns, group_bytes, progress, Throttle(bytes_per_second))
        if done.packs:
            figures = {name: getattr(done, name) for name in ("packs", "made_packs", "old_bytes", "new_bytes")}
            store.tell("regroup", now, **figures)
        return done


def sentence(found: Checked) -> str:
    """All problems in one sentence."""
    lost = sum(1 for p in found.report.problems if p.lost)
    total = len(found.report.problems)
    what = f"{total} problem{'s' if total != 1 else ''} found"
    return f"{what}; {f'{lost} of them cost recoverable data' if lost else 'everything offered can still be recovered'}"


def shape(found: Checked) -> dict[str, Any]:
    """A check as JSON."""
    r = found.report
    names = ("points", "disks", "packs", "chunks", "segments", "read_bytes", "total_bytes", "debt_bytes")
    return {
        "ok": not r.problems,
        "level": found.level.name.lower(),
        "deep": found.level == Level.DEEP,
        "problems": [asdict(p) for p in r.problems],
        **{name: getattr(r, name) for name in names},
        "files": [asdict(f) for f in found.files],
        "repaired": list(found.repaired),
        "notes": list(found.notes),
    }
