"""How long a journal is kept, and how large it may become.

A segment goes when its window has passed or room is needed, and only when a committed point covers its end: oldest first, each
removal durable before the next, so a crash leaves the newest part, whole.  What no point covers is never removed: then nothing
more is recorded until a point is made or the budget is raised, and the journal has a gap.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hvbackup.errors import NotFound, SpaceExhausted
from hvbackup.model import SECOND, Instant, MachineId, RecoveryPoint
from hvbackup.store.journal import journal, merging, readers
from hvbackup.store.journal.history import History
from hvbackup.store.journal.journal import FOLDER, Name
from hvbackup.store.journal.sealing import exclusive
from hvbackup.store.shelves import pins
from hvbackup.store.store import Store


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be kept of one journal."""

    window_ns: int = 24 * 3600 * SECOND  # 0: as long as there is room
    budget_bytes: int = 0  # 0: as much as the disk holds


@dataclass(frozen=True, slots=True)
class Piece:
    """A file of the journal, with what decides about it."""

    name: Name
    size: int
    last_seq: int
    last_t: Instant


def journal_bytes(store: Store, machine: MachineId) -> int:
    """How large the journal of a machine is."""
    folder = store.ring.machine_name(machine)
    return sum(_size(store, f"{FOLDER}/{folder}/{n}") for n in journal.all_files(store.files, folder))


def _size(store: Store, path: str) -> int:
    try:
        return store.files.size(path)
    except FileNotFoundError:
        return 0  # a log that has just been sealed


def check_budget(
    store: Store, machine: MachineId, limits: Limits, *, by_age: bool = True, covered: bool = False
) -> None:
    """Raises SpaceExhausted when the journal is full of moments that no point covers; what need not be kept is gone before.

    `covered`: a point covers all of them; the newest file, however large, goes as soon as another one has begun.
    """
    if not limits.budget_bytes or journal_bytes(store, machine) <= limits.budget_bytes:
        return
    trim(store, machine, limits, by_age=by_age)
    used = journal_bytes(store, machine) - (_newest_bytes(store, machine) if covered else 0)
    if used > limits.budget_bytes:
        raise SpaceExhausted(
            f"The journal of machine {machine} has {used} bytes that no point covers yet, and may have {limits.budget_bytes}; "
            "nothing is recorded until there is room: raise --journal-budget or make room in the store"
        )


def _newest_bytes(store: Store, machine: MachineId) -> int:
    folder = store.ring.machine_name(machine)
    newest = max(journal.all_files(store.files, folder), key=lambda n: (n.epoch, n.first), default=None)
    return _size(store, f"{FOLDER}/{folder}/{newest}") if newest else 0


def removable(pieces: Sequence[Piece], covered: Collection[int], limits: Limits) -> list[Piece]:
    """The oldest pieces that may and should go.  Pure.  Age counts from the newest moment, not from anybody's clock.

    `covered` are the sequence numbers of committed points: one of them must hold exactly what goes, or what stays would
    have nothing to build upon.
    """
    cuts = [
        k for k in range(1, len(pieces)) if any(pieces[k - 1].last_seq <= p < pieces[k].name.first for p in covered)
    ]
    newest = pieces[-1].last_t if pieces else Instant(0)
    old = [k for k in cuts if limits.window_ns and newest - max(p.last_t for p in pieces[:k]) > limits.window_ns]
    count = max(old, default=0)
    if limits.budget_bytes and sum(p.size for p in pieces[count:]) > limits.budget_bytes:
        enough = [k for k in cuts if k > count and sum(p.size for p in pieces[k:]) <= limits.budget_bytes]
        count = min(enough, default=max([count, *cuts]))
    return list(pieces[:count])


def trim(store: Store, machine: MachineId, limits: Limits, *, by_age: bool) -> int:
    """What need not be kept is gone; how many bytes that were.  Only for the owner of the store."""
    with exclusive(store, machine):
        return _trim(store, machine, limits, by_age=by_age)


def _trim(store: Store, machine: MachineId, limits: Limits, *, by_age: bool) -> int:
    history = History(store, machine, whole=True)
    limits = limits if by_age else Limits(0, limits.budget_bytes)
    folder = store.ring.machine_name(machine)
    pieces = _pieces(store, folder, history)
    gone = removable(pieces, _covered(store, machine), limits)
    pinned = readers.pinned_from(store, machine)
    if pinned is not None and any(piece.last_seq > pinned for piece in gone):
        gone = removable(pieces, {seq for seq in _covered(store, machine) if seq <= pinned}, limits)
    if not gone:
        return 0
    base = [
        p
        for p in store.points(machine)
        if p.seq is not None and gone[-1].last_seq <= p.seq < pieces[len(gone)].name.first
    ]
    try:
        with pins.pinned(store, base, f"the journal of {machine}"):  # what stays builds upon it
            for piece in gone:
                for part in merging.parts_of(store, folder, piece.name):  # first, or they would count again
                    store.files.remove(f"{FOLDER}/{folder}/{part}")
                store.files.remove(f"{FOLDER}/{folder}/{piece.name}")
    except NotFound:
        return 0  # it was forgotten just now: the next trim knows
    History(store, machine, whole=True).forget_removed()
    return sum(piece.size for piece in gone)


def _pieces(store: Store, folder: str, history: History) -> list[Piece]:
    """The files of a journal in their order; one that can't be read ends at the latest where the next one begins."""
    known = {run.name: run.summary for run in history.runs}
    names = sorted({*known, *(name for name, _ in history.lost)}, key=lambda n: (n.first, n.epoch))
    ends = [name.first - 1 for name in names[1:]] + [sys.maxsize]
    pieces, t = [], Instant(0)
    for name, end in zip(names, ends, strict=True):
        t = known[name].last_t if name in known else t
        last = known[name].last_seq if name in known else end
        pieces.append(Piece(name, _size(store, f"{FOLDER}/{folder}/{name}"), last, t))
    return pieces


def _covered(store: Store, machine: MachineId) -> set[int]:
    """The sequence numbers of committed points: each holds every fact up to its own."""
    return {p.seq for p in store.points(machine) if p.seq is not None}


def needed(store: Store, machine: MachineId) -> RecoveryPoint | None:
    """The newest point at or before the oldest moment of the journal: nobody may forget it while that moment is offered."""
    runs = History(store, machine).runs
    before = [p for p in store.points(machine) if p.seq is not None and runs and p.seq <= runs[0].summary.first_moment]
    return max(before, key=lambda p: p.seq or 0) if before else None


def all_needed(store: Store, machine: MachineId) -> list[RecoveryPoint]:
    """Every point without which some moment of the journal could not be offered any more.

    That is the one the oldest moments build upon, and the one with which each life began: nothing older may be laid under what
    follows it.  While a file can't be read every one is: nobody knows what it says of that, and what follows needs the next one.
    """
    history = History(store, machine, whole=True)
    bases = {int(value["base"]) for run in history.runs for _, _, value in run.summary.metas if "base" in value}
    if history.lost:
        bases |= _covered(store, machine)
    oldest = needed(store, machine)
    return [p for p in store.points(machine) if p.seq is not None and (p.seq in bases or p == oldest)]
