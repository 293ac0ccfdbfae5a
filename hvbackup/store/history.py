"""What a machine's journal offers: moments, gaps and marks, and the disks as they were at any of its moments.

A view at a moment is the newest point that holds no later fact, and over it the pieces of every run of facts from there to the
moment: whole segments (their pieces are kept under STATE), and at last the facts of one segment up to the moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import JournalGap, NotFound
from hvbackup.model import Disk, DiskId, Instant, MachineId, RecoveryPoint
from hvbackup.store import journal
from hvbackup.store.journal import LOG, Facts, Name
from hvbackup.store.layered import Layer, LayeredView
from hvbackup.store.segment import Segment, barriers, pieces_of
from hvbackup.store.store import Store


class Run(Protocol):
    """A file of the journal, sealed or open: its facts, and their bytes."""

    name: Name

    @property
    def facts(self) -> Facts:
        """All facts up to the last barrier; the sequence number of row i is `name.first + i`."""

    def read(self, pos: int, length: int) -> bytes:
        """Bytes of facts, by their `pos`."""

    def meta(self) -> Iterator[tuple[int, bytes]]:
        """(sequence number, JSON) of every META fact."""


class OpenRun:
    """An open log, read into memory up to its last barrier."""

    def __init__(self, store: Store, machine: str, name: Name) -> None:
        self.name = name
        frames = journal.up_to_last_barrier(journal.read_log(store.files, store.ring, machine, name))
        self.facts, self._stream = journal.joined(frames)

    def read(self, pos: int, length: int) -> bytes:
        """Bytes of facts, by their `pos`."""
        return self._stream[pos : pos + length]

    def meta(self) -> Iterator[tuple[int, bytes]]:
        """(sequence number, JSON) of every META fact."""
        return journal.meta_of(self.name.first, self.facts, self.read)


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch in which nothing was recorded: views inside of it are refused."""

    start: Instant
    end: Instant | None  # None: still open
    why: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A named moment, better than crash-consistent or dear to a person."""

    seq: int
    t: Instant
    label: str
    consistency: str = "crash"


@dataclass(frozen=True, slots=True)
class Moment:
    """A state of a machine that is offered: the barrier `seq`, at `t`."""

    seq: int
    t: Instant


@dataclass(slots=True)
class Told:
    """What the META facts of a journal say, folded in order."""

    disks: dict[DiskId, Disk] = field(default_factory=dict)
    numbers: dict[int, DiskId] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    tokens: dict[DiskId, dict[str, Any]] = field(default_factory=dict)
    tokens_seq: int = -1
    epoch: int = -1


class History:
    """The journal of one machine, as far as it was durable when this was opened.

    Thread safety: open on one thread; the views may be used from any.
    """

    def __init__(self, store: Store, machine: MachineId) -> None:
        self._store, self._machine, self._folder = store, machine, store.ring.machine_name(machine)
        names = journal.list_files(store.files, self._folder)
        self.runs: list[Run] = [self._open(n) for n in names]

    def _open(self, name: Name) -> Run:
        if name.suffix == LOG:
            return OpenRun(self._store, self._folder, name)
        return Segment(self._store.files, self._store.ring, self._folder, name)

    @cached_property
    def moments(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sequence numbers, times) of all moments, ascending."""
        seqs, times = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for run in self.runs:
            found = barriers(run.facts, run.name.first)
            seqs.append(found)
            times.append(run.facts["t"][found - run.name.first])
        return np.concatenate(seqs), np.maximum.accumulate(np.concatenate(times))

    @cached_property
    def told(self) -> Told:
        """Everything the META facts say, up to the end."""
        return self.told_until(None)

    def told_until(self, seq: int | None) -> Told:
        """Everything the META facts up to `seq` say."""
        told = Told()
        for run in self.runs:
            for at, data in run.meta():
                if seq is not None and at > seq:
                    return told
                tell(told, at, int(run.facts["t"][at - run.name.first]), json.loads(data))
        return told

    # -- choosing a moment ---------------------------------------------------------------------------------------------

    def at(self, t: Instant) -> Moment:
        """The newest moment not after `t`.  Raises JournalGap inside a gap, NotFound before the first moment."""
        seqs, times = self.moments
        i = int(np.searchsorted(times, t, side="right")) - 1
        gap = next((g for g in self.told.gaps if g.start < t and (g.end is None or t < g.end)), None)
        if gap is not None:
            raise JournalGap(self._gap_sentence(gap, t))
        if i < 0:
            raise NotFound("The journal has no moment that early")
        return Moment(int(seqs[i]), Instant(int(times[i])))

    def by_seq(self, seq: int) -> Moment:
        """The moment with this sequence number.  Raises NotFound when it is no barrier, naming the nearest."""
        seqs, times = self.moments
        i = int(np.searchsorted(seqs, seq, side="right")) - 1
        if i < 0 or seqs[i] != seq:
            near = [str(int(s)) for s in seqs[max(0, i) : i + 2]]
            raise NotFound(f"seq:{seq} is no moment of this journal; the nearest are {' and '.join(near) or 'none'}")
        return Moment(seq, Instant(int(times[i])))

    def _gap_sentence(self, gap: Gap, t: Instant) -> str:
        seqs, times = self.moments
        i = int(np.searchsorted(times, gap.start, side="right"))
        near = [f"seq:{int(seqs[j])}" for j in (i - 1, i) if 0 <= j < len(seqs)]
        return (
            f"Nothing was recorded then ({gap.why}); the nearest recoverable moments are {' and '.join(near) or 'none'}"
        )

    # -- reading -------------------------------------------------------------------------------------------------------

    def base(self, moment: Moment) -> RecoveryPoint:
        """The newest point that holds no fact after the moment.  Raises NotFound when there is none."""
        found = [p for p in self._store.points(self._machine) if p.seq is not None and p.seq <= moment.seq]
        if not found:
            raise NotFound(f"No recovery point is old enough to build seq:{moment.seq} upon")
        return max(found, key=lambda p: (p.seq or 0, p.t))

    def view(self, moment: Moment, disk: DiskId) -> LayeredView:
        """One disk at a moment.  Raises NotFound, ChunkDamaged."""
        point, told = self.base(moment), self.told_until(moment.seq)
        root = point.disk(disk)
        now = told.disks.get(disk) or (root.disk if root else None)
        if now is None:
            raise NotFound(f"The machine had no disk {disk} at seq:{moment.seq}")
        base = self._store.view(root) if root else None
        return LayeredView(base, now, self._store.block, self._store.ring.block_key, self._layers(moment, point, disk))

    def _layers(self, moment: Moment, point: RecoveryPoint, disk: DiskId) -> Sequence[Layer]:
        """The runs of facts after the point, up to the moment, newest first."""
        layers = []
        for run in self.runs:
            first, last = run.name.first, run.name.first + len(run.facts) - 1
            if last <= (point.seq or 0) or first > moment.seq:
                continue
            number = next((n for n, d in numbers_of(run).items() if d == disk), None)
            if number is None:
                continue
            lo = max(0, (point.seq or 0) + 1 - first)
            facts = run.facts[lo : moment.seq + 1 - first]
            layers.append(Layer(pieces_of(facts, number, 0), run.read))
        return layers[::-1]


def numbers_of(run: Run) -> dict[int, DiskId]:
    """The disk table at the head of a file: number -> disk."""
    for _, data in run.meta():
        value = json.loads(data)
        if "disks" in value:
            return {int(d["number"]): DiskId(d["id"]) for d in value["disks"]}
    return {}


def tell(told: Told, seq: int, t: int, value: dict[str, Any]) -> None:
    """Fold one META fact into what is known."""
    if "disks" in value:
        told.numbers = {int(d["number"]): DiskId(d["id"]) for d in value["disks"]}
        told.disks = {DiskId(d["id"]): Disk(DiskId(d["id"]), d["size"], d["sector"]) for d in value["disks"]}
    if "epoch" in value:
        told.epoch = int(value["epoch"])
    if "gap" in value:
        gap = value["gap"]
        told.gaps.append(Gap(Instant(gap["from"]), Instant(gap.get("to", t)), gap["why"]))
    if "mark" in value:
        told.marks.append(Mark(seq, Instant(t), value["mark"]["label"], value["mark"].get("consistency", "crash")))
    if "tokens" in value:
        told.tokens = {DiskId(d): token for d, token in value["tokens"].items()}
        told.tokens_seq = seq
