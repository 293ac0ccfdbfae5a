"""Fold: a moment of a journal becomes a recovery point, without the hypervisor.

A fold is a capture whose frozen machine is the journal: what changed is what the journal touched since the point it builds upon,
and what is read are views.  A block that was overwritten 500 times is hashed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from hvbackup import extents
from hvbackup.capture import Options, after, point_of, take_in
from hvbackup.hypervisors import LEFT_ALONE, Changes, Standstill
from hvbackup.model import (
    Consistency,
    Continuity,
    Disk,
    Instant,
    Machine,
    MachineConfig,
    MachineId,
    Outcome,
    RecoveryPoint,
    Token,
)
from hvbackup.pipeline import Pace
from hvbackup.store.chunks.writer import ChunkWriter
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.journal.layered import LayeredView
from hvbackup.store.store import Store

TOKEN = Token("journal", "")  # "since the point this is folded upon": the journal proves continuity by itself


@dataclass(slots=True)
class FoldedDisk:
    """A disk at a moment, as a capture sees it."""

    disk: Disk
    token: Token | None
    view: LayeredView

    def changes(self, since: Token | None) -> Changes:
        """What the journal touched since the point; with None, the whole disk."""
        if since is None:
            return Changes(Continuity.UNKNOWN, extents.whole(self.disk.size), extents.EMPTY)
        return Changes(Continuity.INCREMENTAL, self.view.touched(), extents.EMPTY)

    def open(self) -> FoldedDisk:
        """A reader; the view itself may be read from any thread."""
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.  Raises ChunkDamaged."""
        self.view.read_into(offset, buffer)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(slots=True)
class FoldedMachine:
    """A machine at a moment of its journal."""

    machine: Machine
    t: Instant
    config: MachineConfig
    disks: Sequence[FoldedDisk]
    consistency: Consistency = Consistency.CRASH
    standstill: Standstill = LEFT_ALONE
    notes: Sequence[str] = ()

    def verify(self) -> Sequence[str]:
        """Views verify every byte themselves."""
        return ()


def frozen_at(history: History, moment: Moment) -> FoldedMachine:
    """The machine at a moment, as a capture sees it.  Raises NotFound, ChunkDamaged."""
    base, told = history.base(moment), history.told_until(moment.seq)
    tokens = told.tokens if told.named_seq == moment.seq else {}
    disks = []
    for disk_id in told.disks:
        view = history.view(moment, disk_id)
        token = Token(**tokens[disk_id]) if disk_id in tokens else None
        disks.append(FoldedDisk(view.disk, token, view))
    machine = replace(base.machine, disks=tuple(d.disk for d in disks))
    return FoldedMachine(machine, moment.t, base.config, disks, told.consistency(moment.seq))


def _built_upon(store: Store, machine: MachineId, moment: Moment, writer: ChunkWriter) -> tuple[History, RecoveryPoint]:
    """The journal, and the point that the moment builds upon, which stays until the writer ends."""
    while True:
        history = History(store, machine)
        parent = history.based(moment)
        writer.builds_upon(parent)
        if store.files.exists(store.path_of(parent)):
            return history, parent


def fold(store: Store, machine: MachineId, moment: Moment, options: Options) -> Outcome:
    """A recovery point of the moment exists when this returns.  Raises NotFound, StoreDamage, SpaceExhausted."""
    outcome = Outcome()
    options = replace(options, seq=moment.seq, sample_blocks=0, pace=Pace())  # it reads what is in the store already
    writer = store.writer()
    try:
        history, parent = _built_upon(store, machine, moment, writer)
        frozen = frozen_at(history, moment)
        if parent.seq == moment.seq:
            outcome.point = parent
            writer.abandon()
            return outcome
        labels = [label for m in history.told.marks if m.seq == moment.seq for label in m.label.split("; ") if label]
        options = replace(options, tags=(*options.tags, *labels))
        since = {d.disk.id: TOKEN for d in parent.disks}
        roots = take_in(store, writer, frozen, parent, since, options, outcome)
        t = after(parent, frozen.t, outcome)
        outcome.point = replace(point_of(frozen, roots, options, outcome), t=t)
        store.commit(outcome.point, writer)
    except BaseException:
        writer.abandon()
        raise
    outcome.figures.stored_bytes = writer.stored_bytes
    store.tell(
        "fold",
        options.clock(),
        machine=machine,
        point=store.path_of(outcome.point),
        status=outcome.status.name.lower(),
        notes=outcome.notes,
        figures=asdict(outcome.figures),
    )
    return outcome
