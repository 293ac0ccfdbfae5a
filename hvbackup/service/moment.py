"""From what `--at` says to disks that can be read: a recovery point, or a moment of the machine's journal.

The newest point or moment at or before a time answers; a time in a gap is refused, and the nearest on both sides are named.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from hvbackup import moments
from hvbackup.errors import JournalGap, NotFound
from hvbackup.model import DiskRoot, Instant, MachineId, PointId, RecoveryPoint
from hvbackup.moments import local
from hvbackup.service.inventory import history_of
from hvbackup.store.chunks.view import DiskView
from hvbackup.store.journal import readers
from hvbackup.store.journal.history import Gap, History, Moment
from hvbackup.store.journal.layered import LayeredView
from hvbackup.store.shelves import pins
from hvbackup.store.store import Store

JOURNAL = "journal"  # how the disks of a moment were read


@dataclass(frozen=True, slots=True)
class Chosen:
    """A machine at a moment.  `point` says everything of it, also where it is a moment of the journal (then its id is seq:N)."""

    point: RecoveryPoint
    store: Store
    notes: Sequence[str] = ()
    history: History | None = None
    moment: Moment | None = None
    base: RecoveryPoint | None = None

    def view(self, root: DiskRoot) -> DiskView | LayeredView:
        """One of its disks, read-only."""
        if self.history is None or self.moment is None:
            return self.store.view(root)
        return self.history.view(self.moment, root.disk.id, self.base)

    @property
    def read(self) -> RecoveryPoint:
        """The point that is read: itself, or what the moment builds upon."""
        return self.base or self.point

    @contextmanager
    def pinned(self, what: str) -> Iterator[list[str]]:
        """What the views read stays for as long as the context lasts, and we live; `what` we do with it.  Yields notes."""
        with pins.pinned(self.store, [self.read], what) as notes, ExitStack() as stack:
            if self.moment is not None:
                seq = self.read.seq or 0
                stack.enter_context(readers.pinned(self.store, self.point.machine.id, seq, os.getpid()))
            yield notes


def choose(store: Store, machine: str, at: str, now: Instant) -> Chosen:
    """What answers for a moment of a machine.  Raises NotFound, JournalGap, UsageError."""
    wanted = moments.parse(at, now)
    known = history_of(store, machine)
    notes, name = list(known.damaged), known.machine.name
    history = History(store, known.machine.id)
    if wanted.point:
        chosen = moments.pick(known.points, wanted, name, local)
        if chosen.seq is not None and history.doubt_of_point(chosen.seq):
            history.by_seq(chosen.seq)  # which says why not
        return Chosen(chosen, store, notes)
    points = [p for p in known.points if p.seq is None or not history.doubt_of_point(p.seq)]
    if wanted.seq is not None:
        found: Moment | None = _by_seq(history, points, wanted.seq, name)
    elif wanted.tag:
        tagged = next((p for p in reversed(points) if wanted.tag in p.tags), None)
        if tagged:
            return Chosen(tagged, store, notes)
        found = _by_tag(history, wanted.tag, name)
    elif wanted.common:
        found = _by_common(store, history, wanted.common, name)
    else:
        found = _by_time(history, points, wanted.t, name)
    # A point that is the moment itself is complete by reference, and so quicker to read.
    point = next((p for p in reversed(points) if found is not None and p.seq == found.seq), None)
    if found is None or point is not None:
        return Chosen(point or moments.pick(points, wanted, name, local), store, notes)
    return _of_journal(store, history, found, notes)


def _by_seq(history: History, points: Sequence[RecoveryPoint], seq: int, name: str) -> Moment:
    for point in points:
        if point.seq == seq:
            return Moment(seq, point.t)
    if history.first is None:
        raise NotFound(f"Machine {name} has no journal, so no moment has a sequence number; choose a point by its id")
    return history.by_seq(seq)


def _by_tag(history: History, tag: str, name: str) -> Moment:
    marks = {label: m for m in history.told.marks for label in (m.label, *m.label.split("; "))}
    if tag in marks:
        return Moment(marks[tag].seq, marks[tag].t)
    near = difflib.get_close_matches(tag, list(marks), 1, 0.5)
    hint = f"; did you mean tag:{near[0]}?" if near else ";"
    raise NotFound(f"Machine {name} has no moment that is tagged {tag}{hint} `hvbackup timeline {name}` lists all tags")


def _by_common(store: Store, history: History, wanted: str, name: str) -> Moment:
    """A common moment by its id, or the newest one of a group that all its machines have."""
    known = {c.id: c for c in history.told.commons}
    others: dict[MachineId, set[str]] = {}
    for common in reversed(known.values()):
        if common.id != wanted and common.group != wanted:
            continue
        for machine in common.machines:
            if machine not in others:
                others[machine] = {c.id for c in History(store, machine).told.commons}
        lacking = [machine for machine in common.machines if common.id not in others[machine]]
        if not lacking:
            return Moment(common.seq, common.t)
        if common.id == wanted:
            raise NotFound(f"Common moment {wanted} was not recorded by {', '.join(lacking)}; take another one")
    groups = sorted({c.group for c in known.values()})
    hint = (
        f"it has been in groups {', '.join(groups)}"
        if groups
        else "it has none; `hvbackup protect --group NAME` makes them"
    )
    raise NotFound(
        f"Machine {name} has no common moment {wanted}; {hint}, and `hvbackup timeline {name}` lists the newest"
    )


def _by_time(history: History, points: Sequence[RecoveryPoint], t: Instant | None, name: str) -> Moment | None:
    """The newest moment at or before a time; None when a point is newer, or there is no journal."""
    found = history.last if t is None else history.newest_at(t)
    gap = history.gap_at(t) if t is not None else None
    if gap is not None and t is not None:
        raise JournalGap(_refusal(history, points, gap, t, name))
    before = [p for p in points if t is None or p.t <= t]
    return None if found is None or (before and before[-1].t > found.t) else found


def _refusal(history: History, points: Sequence[RecoveryPoint], gap: Gap, t: Instant, name: str) -> str:
    """Where to go instead, on both sides."""
    moment, after = history.newest_at(t), history.oldest_after(t)
    sides = [(m.t, f"seq:{m.seq}") for m in (moment, after) if m] + [(p.t, p.id) for p in points]
    earlier = max((s for s in sides if s[0] <= t), default=None)
    later = min((s for s in sides if s[0] > t), default=None)
    near = " and ".join(f"{what} of {_precisely(at)}" for at, what in filter(None, (earlier, later)))
    return (
        f"Nothing of machine {name} was recorded at {local(t)} (from {local(gap.start)} to {local(gap.end)}: {gap.why}); "
        f"the nearest that can be recovered are {near or 'none'}"
    )


def _precisely(t: Instant) -> str:
    return moments.rfc3339(t)[:23] + "Z"


def _of_journal(store: Store, history: History, found: Moment, notes: Sequence[str]) -> Chosen:
    base, told = history.base(found), history.told_until(found.seq)
    disks = []
    for disk in told.disks.values():
        root = base.disk(disk.id)
        disk = replace(disk, path=root.disk.path) if root else disk
        disks.append(DiskRoot(disk, root.root if root else b"", None, JOURNAL))  # type: ignore[arg-type]
    machine = replace(base.machine, disks=tuple(d.disk for d in disks))
    point = replace(
        base, id=PointId(f"seq:{found.seq}"), machine=machine, t=found.t, disks=tuple(disks), seq=found.seq, figures={}, notes=(),
        consistency=told.consistency(found.seq),
    )  # fmt: skip
    return Chosen(point, store, notes, history, found, base)
