"""check: is everything we promised still there, and what can be put back?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvbackup.errors import Busy
from hvbackup.service.session import Session
from hvbackup.store import check as store_check
from hvbackup.store import repair as store_repair


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found, and how it was made."""

    report: store_check.Report
    deep: bool
    notes: Sequence[str] = ()
    repaired: Sequence[str] = ()  # before it was checked


def check(session: Session, *, deep: bool, repair: bool, progress: Callable[[int, int], None]) -> Checked:
    """Everything that is wrong with the store, after what is there twice was put back if `repair` says so.

    As the owner where possible, so that what is damaged is remembered and healed.  Raises Busy when it is to be repaired and
    somebody else owns it.
    """
    if repair:
        with session.open(owner=True) as store:
            done = store_repair.repair(store)
            return Checked(store_check.check(store, deep=deep, progress=progress), deep, repaired=done)
    try:
        opened, notes = session.open(owner=True), []
    except Busy as e:
        opened = session.open()
        notes = [f"{e}; checked beside it, so what is damaged is named, but not marked for healing"]
    with opened as store:
        return Checked(store_check.check(store, deep=deep, progress=progress), deep, notes)


def sentence(found: Checked) -> str:
    """All problems in one sentence."""
    lost = sum(1 for p in found.report.problems if p.lost)
    total = len(found.report.problems)
    what = f"{total} problem{'s' if total != 1 else ''} found"
    return f"{what}; {f'{lost} of them cost recoverable data' if lost else 'everything offered can still be recovered'}"


def shape(found: Checked) -> dict[str, Any]:
    """A check as JSON."""
    r = found.report
    figures = {"points": r.points, "disks": r.disks, "packs": r.packs, "chunks": r.chunks, "read_bytes": r.read_bytes}
    return {
        "ok": not r.problems,
        "deep": found.deep,
        "problems": [asdict(p) for p in r.problems],
        **figures,
        "repaired": list(found.repaired),
        "notes": list(found.notes),
    }
