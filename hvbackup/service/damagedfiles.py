"""check --files: which files inside the machines lie on what is lost.

Each place that is lost is looked for at the newest point that lost it; points that lost nothing else are not looked into.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hvbackup.errors import StoreDamage, UsageError
from hvbackup.recover import browse
from hvbackup.recover.affected import Extent, affected
from hvbackup.store.check.check import Problem
from hvbackup.store.store import Store

MOST_FILES = 100  # of one disk, by name
MOST_REMARKS = 10


@dataclass(frozen=True, slots=True)
class DamagedFiles:
    """What of one disk, at one point, can't be read whole, and was not lost at a newer point too."""

    point: str
    machine: str
    disk: str
    files: tuple[str, ...] = ()
    more: int = 0
    remarks: tuple[str, ...] = ()


def damaged_files(store: Store, problems: Sequence[Problem]) -> Iterator[DamagedFiles]:
    """For each disk, the newest point that lost something first."""
    lost: dict[tuple[str, str], list[tuple[str, Problem]]] = {}
    places = {path.rsplit("-", 1)[1]: path for folder in store.machine_folders() for path in store.point_paths(folder)}
    for problem in problems:
        path = places.get(problem.point)
        if problem.kind == "disk" and path:
            lost.setdefault((path.rsplit("/", 1)[0], problem.disk), []).append((path, problem))
    for found in lost.values():
        known: set[Extent] = set()
        for path, problem in sorted(found, key=lambda pair: pair[0], reverse=True):
            extents = [e for e in problem.extents if e not in known]
            known.update(extents)
            if extents:
                yield _of(store, path, problem, extents)


def _of(store: Store, path: str, problem: Problem, extents: Sequence[Extent]) -> DamagedFiles:
    known = (problem.point, problem.machine, problem.disk)
    try:
        root = next(d for d in store.load_point(path).disks if d.disk.id == problem.disk)
        found = affected(browse.open(store.view(root), root.disk.sector), extents, MOST_FILES)
    except (StoreDamage, UsageError) as e:
        return DamagedFiles(*known, remarks=(f"The files on it can't be named: {e}",))
    remarks = found.remarks[:MOST_REMARKS]
    if len(problem.extents) >= 1000:
        remarks.append("Only files on the first 1000 places that are lost are named")
    return DamagedFiles(*known, tuple(sorted(found.files)), found.more, tuple(remarks))
