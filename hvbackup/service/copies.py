"""copy: chosen points of a store, into another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvbackup import moments
from hvbackup.errors import HvbackupError, NotFound, PartlyFailed, UsageError
from hvbackup.model import Instant, RecoveryPoint
from hvbackup.replicate import Clock, Copied, Copier
from hvbackup.service import shapes
from hvbackup.service.inventory import Inventory, inventory
from hvbackup.service.session import Session
from hvbackup.store.shelves import pins

OnProgress = Callable[[RecoveryPoint, int, int], None]


@dataclass(frozen=True, slots=True)
class Which:
    """The points to copy: of these machines (none: of all), at a moment, or by their ids, or all there are."""

    machines: Sequence[str]
    at: str
    points: Sequence[str]
    everything: bool
    now: Instant


@dataclass(frozen=True, slots=True)
class CopiedPoints:
    """What a copy did."""

    results: Sequence[Copied]
    family: bool
    notes: Sequence[str] = ()


def copy(session: Session, to: Session, which: Which, clock: Clock, progress: OnProgress) -> CopiedPoints:
    """Each chosen point is in the other store too when this returns, or has an error.

    Raises StoreMissing, KeyRefused, NotFound, UsageError before anything is copied; Busy, SpaceExhausted: what is copied stays.
    """
    with session.open() as source, to.open() as target:
        found = inventory(source)
        copier, points = Copier(source, target, clock), chosen(found, which)
        with pins.pinned(source, points, f"copy to {to.places.store}") as notes:
            results = list(copier.copy(points, progress))
        return CopiedPoints(results, copier.family, [*found.notes, *notes, *(n for r in results for n in r.notes)])


def chosen(found: Inventory, which: Which) -> list[RecoveryPoint]:
    """The points that are meant.  Raises NotFound, UsageError."""
    machines = [found.machine(name) for name in which.machines] if which.machines else found.machines
    if which.points:
        every = [p for m in machines for p in m.points]
        return [_by_id(every, text) for text in which.points]
    if which.everything:
        return [p for m in machines for p in m.points]
    wanted = moments.parse(which.at, which.now)
    if wanted.seq is not None or wanted.tag:
        raise UsageError(f"{which.at} is a moment of a journal, and journals are not copied: choose a point")
    return [moments.pick(m.points, wanted, m.machine.name, moments.local) for m in machines]


def _by_id(points: Sequence[RecoveryPoint], text: str) -> RecoveryPoint:
    fits = [p for p in points if p.id.startswith(text.lower())]
    if len(text) < 4 or not fits:
        raise NotFound(f"There is no point {text}; `hvbackup points` lists them, and four digits of an id are enough")
    if len(fits) > 1:
        raise UsageError(f"{len(fits)} points begin with {text}: {', '.join(p.id for p in fits)}")
    return fits[0]


def verdict(done: CopiedPoints) -> HvbackupError | None:
    """The error that stands for all points that were not copied, or None."""
    errors = [r.error for r in done.results if r.error]
    if not errors or len(done.results) == 1:
        return errors[0] if errors else None
    what = f"{len(errors)} of {len(done.results)} points were not copied; the first: {errors[0]}"
    return type(errors[0])(what) if len(errors) == len(done.results) else PartlyFailed(what)


def shape(done: CopiedPoints) -> dict[str, Any]:
    """A copy as JSON."""
    return {
        "points": [
            {
                "point": shapes.point(r.point or r.source),
                "status": "failed" if r.error else "there" if r.was_there else "copied",
                "figures": asdict(r.figures),
                "error": shapes.error(r.error) if r.error else None,
            }
            for r in done.results
        ],
        "family": done.family,
        "notes": list(done.notes),
    }
