"""What a machine's journal offers: moments, gaps and marks, and the disks as they were at any of its moments.

A view at a moment is the newest point that holds no later fact, and over it the pieces of every run of facts from there to the
moment: whole segments, whose pieces are kept under STATE, sixteen of them merged into one table and sixteen of those again; and
at last the facts of one segment up to the moment.  Opening it reads nothing else, however long ago the point was made, but the
log that is written to.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import JournalGap, NotFound, StoreDamage
from hvbackup.model import DiskId, Instant, MachineId, RecoveryPoint
from hvbackup.store.journal import journal, tables
from hvbackup.store.journal.journal import FOLDER, LOG, Name
from hvbackup.store.journal.layered import Layer, LayeredView
from hvbackup.store.journal.overlay import Pieces, Table
from hvbackup.store.journal.runs import Run, SealedRun, open_run
from hvbackup.store.journal.segment import PieceCache
from hvbackup.store.journal.tables import pieces_of
from hvbackup.store.journal.told import ClockStep, Common, Doubt, Gap, Mark, Moment, Told
from hvbackup.store.store import Store

__all__ = [
    "ClockStep",
    "Common",
    "Doubt",
    "Gap",
    "History",
    "Mark",
    "Moment",
    "Told",
    "newest_tokens",
]

FANOUT = 16  # tables merged into one; a view has at most 15 of each size
LEVELS = (FANOUT**2, FANOUT)  # segments in a merged table, largest first


class History:
    """The journal of one machine, as far as it was durable when this was opened.

    Thread safety: open on one thread; the views may be used from any.
    """

    def __init__(self, store: Store, machine: MachineId, *, whole: bool = False) -> None:
        """`whole`: also what no point is left for, and so is not offered any more."""
        self._store, self._machine, self._folder = store, machine, store.ring.machine_name(machine)
        self._pieces, self._tables = PieceCache(), tables.Cache(store.state, self._folder)
        self.runs: list[Run] = []
        self.lost: list[tuple[Name, str]] = []  # files that can't be read to their end, and why
        self._begins: dict[int, int] = {}  # epoch -> its first number in any file that counts
        self._open_all()
        if not whole:
            self._drop_baseless()

    def _drop_baseless(self) -> None:
        """A removal of old segments that was cut off leaves some without a point to lay them over."""
        if not self.runs:
            return
        seqs, oldest = [], self.runs[0].summary.first_moment
        for point in self._points():
            seqs.append(point.seq or 0)
            if seqs[-1] <= oldest:
                break
        while self.runs and not any(
            self._follows(self.runs[0]) <= s <= self.runs[0].summary.first_moment for s in seqs
        ):
            self.runs.pop(0)

    def _points(self) -> list[RecoveryPoint]:
        """The readable points that hold facts of the journal, the one with most of them first: clocks may step back."""
        found = [p for p in self._store.points(self._machine) if p.seq is not None]
        return sorted(found, key=lambda p: (p.seq or 0, p.t), reverse=True)

    def _open_all(self) -> None:
        while True:
            self.runs, self.lost = [], []
            try:
                names = journal.list_files(self._store.files, self._folder)
                self._begins = {n.epoch: n.first for n in reversed(names)}
                for name in names:
                    self._open(name)
            except FileNotFoundError:
                continue  # a log was sealed, or a segment's window passed, since we looked
            return

    def _open(self, name: Name) -> None:
        try:
            run = open_run(self._store, self._folder, name, self._pieces)
            if run.summary.moments:
                self.runs.append(run)
            if run.torn:
                self.lost.append((name, run.torn))
        except StoreDamage as e:
            self.lost.append((name, str(e)))

    @cached_property
    def moments(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sequence numbers, times) of all moments that are offered, ascending."""
        none = np.zeros(0, np.int64)
        seqs = np.concatenate([none, *(run.summary.seqs() for run in self.runs)])
        times = np.maximum.accumulate(np.concatenate([none, *(run.summary.times() for run in self.runs)]))
        sure = np.ones(len(seqs), np.bool_)
        for doubt in self.told.withheld:
            sure &= (seqs <= doubt.after) | (seqs > doubt.until)
        return seqs[sure], times[sure]

    @property
    def first(self) -> Moment | None:
        """The oldest moment, if there is one."""
        return Moment(self.runs[0].summary.first_moment, self.runs[0].summary.first_t) if self.runs else None

    @property
    def last(self) -> Moment | None:
        """The newest moment, if there is one."""
        return self._sure(self._newest(), self.told.withheld)

    @property
    def recorded(self) -> Moment | None:
        """The newest moment, also when a file that it needs can't be read."""
        return self._sure(self._newest(), [*self.told.doubts, *self.told.parts])

    def _newest(self) -> Moment | None:
        return self._in_run(len(self.runs) - 1, self.runs[-1].summary.moments - 1) if self.runs else None

    def doubt_of(self, seq: int) -> Doubt | None:
        """Why a moment is not offered although it was recorded."""
        return _doubt_of(seq, self.told.withheld)

    def doubt_of_point(self, seq: int) -> Doubt | None:
        """Why a point of a moment is not offered: it holds all that it needs, but that may not be true."""
        return _doubt_of(seq, self.told.doubts)

    def live_doubts(self) -> list[Doubt]:
        """Those that are about a moment or a point that is there: the others need not be repeated."""
        oldest = self.runs[0].summary.first_moment if self.runs else 0
        points = [p.seq for p in self._points() if p.seq is not None]
        return [d for d in self.told.doubts if d.until >= oldest or any(map(d.holds, points))]

    def _sure(self, found: Moment | None, withheld: Sequence[Doubt]) -> Moment | None:
        """The moment itself, or the newest one before it that is in no doubt."""
        while found and (doubt := _doubt_of(found.seq, withheld)):
            number = bisect.bisect_right([run.summary.first_moment for run in self.runs], doubt.after) - 1
            i = int(self.runs[number].summary.seqs().searchsorted(doubt.after, side="right")) - 1 if number >= 0 else -1
            found = self._in_run(number, i) if i >= 0 else None
        return found

    @cached_property
    def told(self) -> Told:
        """Everything the META facts say, up to the end; what needs a file that can't be read is withheld."""
        told = self.told_until(None)
        for name, why in self.lost:
            self._tell_lost(told, name, why)
        return told

    def _tell_lost(self, told: Told, name: Name, why: str) -> None:
        """No moment is offered from where a file is missing up to the next point."""
        before = [run.summary for run in self.runs if run.name.first <= name.first]
        after = [run for run in self.runs if run.name.first > name.first]
        if not before:
            return  # nothing is offered behind what has no point before it
        last = before[-1]
        if not after:
            self._tell_gap(told, Gap(last.last_t, self._written(name), why))
            return
        points = [p.seq for p in self._points() if p.seq is not None and p.seq >= after[0].name.first - 1]
        until = min(points) - 1 if points else self.runs[-1].summary.last_seq
        times = [s.times()[i:] for s in (run.summary for run in after) for i in [s.seqs().searchsorted(until, "right")]]
        end = Instant(next((int(t[0]) for t in times if len(t)), self.runs[-1].summary.last_t + 1))
        told.withhold(Doubt(last.last_seq, until, last.last_t, end, why))
        self._tell_gap(told, Gap(last.last_t, end, why))

    @staticmethod
    def _tell_gap(told: Told, gap: Gap) -> None:
        if gap.end > gap.start:
            told.gaps = sorted([gap, *told.gaps], key=lambda g: g.start)

    def _written(self, name: Name) -> Instant:
        """When a file was written last."""
        try:
            return Instant(self._store.files.path(f"{FOLDER}/{self._folder}/{name}").stat().st_mtime_ns)
        except OSError:
            return Instant(0)

    def told_until(self, seq: int | None) -> Told:
        """Everything the META facts up to `seq` say."""
        told = Told()
        for run in self.runs:
            if seq is not None and run.summary.first > seq:
                break
            if seq is None or run.summary.last_seq <= seq:
                for at, t, value in run.summary.metas:
                    told.tell(at, t, value)
                continue
            for at, data in run.meta():
                if at <= seq:
                    told.tell(at, int(run.facts["t"][at - run.name.first]), json.loads(data))
        return told

    # -- choosing a moment ---------------------------------------------------------------------------------------------

    @cached_property
    def _latest(self) -> list[int]:
        """For each run, the latest time of any moment up to its end: a clock that stepped back does not count."""
        return np.maximum.accumulate([run.summary.last_t for run in self.runs]).tolist() if self.runs else []

    def _in_run(self, number: int, i: int) -> Moment:
        summary = self.runs[number].summary
        floor = self._latest[number - 1] if number else 0
        return Moment(int(summary.seqs()[i]), Instant(max(floor, int(summary.times()[i]))))

    def told_at(self, moment: Moment) -> Instant:
        """When its writer says that it was; `t` of a moment behind a clock that was set back is later."""
        if not self.told.clocks:
            return moment.t
        run = next(run for run in reversed(self.runs) if run.name.first <= moment.seq)
        try:
            return Instant(int(run.facts["t"][moment.seq - run.name.first]))
        except StoreDamage:
            return moment.t

    def newest_at(self, t: Instant) -> Moment | None:
        """The newest moment not after `t`, whether or not `t` is in a gap."""
        return self._sure(self._newest_at(t), self.told.withheld)

    def _newest_at(self, t: Instant) -> Moment | None:
        number = bisect.bisect_right(self._latest, t)
        if number < len(self.runs):
            i = int(self.runs[number].summary.times().searchsorted(t, side="right")) - 1
            if i >= 0 and (number == 0 or self._latest[number - 1] <= t):
                return self._in_run(number, i)
        return self._in_run(number - 1, self.runs[number - 1].summary.moments - 1) if number else None

    def oldest_after(self, t: Instant) -> Moment | None:
        """The oldest moment after `t`."""
        number = bisect.bisect_right(self._latest, t)
        if number == len(self.runs):
            return None
        found = self._in_run(number, int(self.runs[number].summary.times().searchsorted(t, side="right")))
        doubt = self.doubt_of(found.seq)
        return self._after(doubt.until) if doubt else found

    def _after(self, seq: int) -> Moment | None:
        """The oldest moment behind a sequence number."""
        seqs, times = self.moments
        i = int(seqs.searchsorted(seq, side="right"))
        return Moment(int(seqs[i]), Instant(int(times[i]))) if i < len(seqs) else None

    def gap_at(self, t: Instant) -> Gap | None:
        """The gap that `t` is in."""
        return next((g for g in self.told.gaps if g.start < t < g.end), None)

    def at(self, t: Instant) -> Moment:
        """The newest moment not after `t`.  Raises JournalGap inside a gap, NotFound before the first moment."""
        gap = self.gap_at(t)
        if gap is not None:
            near = " and ".join(f"seq:{m.seq}" for m in (self.newest_at(gap.start), self.oldest_after(t)) if m)
            raise JournalGap(
                f"Nothing was recorded then ({gap.why}); the nearest recoverable moments are {near or 'none'}"
            )
        found = self.newest_at(t)
        if found is None:
            raise NotFound("The journal has no moment that early")
        return found

    def by_seq(self, seq: int) -> Moment:
        """The moment with this sequence number.

        Raises NotFound when it is no barrier, JournalGap when it may lack changes, naming the nearest.
        """
        if doubt := self.doubt_of(seq):
            sides = [f"seq:{doubt.after}", *(f"seq:{m.seq}" for m in (self._after(doubt.until),) if m)]
            raise JournalGap(
                f"seq:{seq} may lack changes ({doubt.why}); the nearest recoverable moments are {' and '.join(sides)}"
            )
        number = bisect.bisect_left([run.summary.last_moment for run in self.runs], seq)
        if number < len(self.runs):
            i = int(self.runs[number].summary.seqs().searchsorted(seq))
            found = self._in_run(number, i)
            if found.seq == seq:
                return found
        near = [f"seq:{s}" for s in self._neighbours(seq, number)]
        raise NotFound(f"seq:{seq} is no moment of this journal; the nearest are {' and '.join(near) or 'none'}")

    def _neighbours(self, seq: int, number: int) -> Iterator[int]:
        around = [s for run in self.runs[max(0, number - 1) : number + 1] for s in run.summary.seqs().tolist()]
        at = bisect.bisect_left(around, seq)
        yield from around[max(0, at - 1) : at + 1]

    # -- reading -------------------------------------------------------------------------------------------------------

    def base(self, moment: Moment) -> RecoveryPoint:
        """The newest point that holds no fact after the moment, and every fact that is not in the journal any more.

        Raises NotFound when there is none.
        """
        oldest = max(self.told_until(moment.seq).base, self._follows(self.runs[0]) if self.runs else 0)
        found = next((p for p in self._points() if (p.seq or 0) <= moment.seq), None)
        if found is None or (found.seq or 0) < oldest:
            raise NotFound(f"No recovery point is left to build seq:{moment.seq} upon")
        return found

    def based(self, moment: Moment) -> RecoveryPoint:
        """As `base`, and everything since is there.  Raises NotFound, StoreDamage."""
        point = self.base(moment)
        self._between(point.seq or 0, moment)
        return point

    def view(self, moment: Moment, disk: DiskId, base: RecoveryPoint | None = None) -> LayeredView:
        """One disk at a moment.  Raises NotFound, ChunkDamaged."""
        point, told = base or self.base(moment), self.told_until(moment.seq)
        root = point.disk(disk)
        now = told.disks.get(disk) or (root.disk if root else None)
        if now is None:
            raise NotFound(f"The machine had no disk {disk} at seq:{moment.seq}")
        under = self._store.view(root) if root else None
        layers = self._layers(moment, point.seq or 0, disk)
        return LayeredView(under, now, self._store.block, self._store.ring.block_key, layers)

    def _layers(self, moment: Moment, after: int, disk: DiskId) -> Sequence[Layer]:
        """The runs of facts after the point, up to the moment, newest first."""
        runs = self._between(after, moment)
        layers: list[Layer] = []
        for merges, group in itertools.groupby(runs, lambda r: self._merges(r, after, moment)):
            # In their order, whatever they are: a log may wait to be sealed before a segment.
            found = list(group)
            layers += self._merged_layers(found, disk) if merges else self._own_layers(found, after, moment, disk)
        return [layer for layer in reversed(layers) if len(layer.pieces)]

    @staticmethod
    def _is_whole(run: Run, after: int, moment: Moment) -> bool:
        return run.name.first > after and run.summary.last_seq <= moment.seq

    def _merges(self, run: Run, after: int, moment: Moment) -> bool:
        return run.name.suffix != LOG and self._is_whole(run, after, moment)

    def _own_layers(self, runs: Iterable[Run], after: int, moment: Moment, disk: DiskId) -> Iterator[Layer]:
        """A layer of each of these, of the facts after the point and up to the moment."""
        for run in runs:
            if self._is_whole(run, after, moment):
                yield Layer(run.summary.table(disk), _reading([run]))
            elif (number := next((n for n, d in run.summary.disks.items() if d == disk), None)) is not None:
                facts = run.facts[max(0, after + 1 - run.name.first) : moment.seq + 1 - run.name.first]
                yield Layer(Table.of(pieces_of(facts, number, 0)), _reading([run]))

    def _between(self, after: int, moment: Moment) -> list[Run]:
        """The files with what came between a point and a moment.  Raises StoreDamage when one is missing."""
        runs = [r for r in self.runs if r.summary.last_seq > after and r.name.first <= moment.seq]
        end = after
        for run in runs:
            if self._follows(run) > end:
                raise self._lacks(end + 1, run.name.first - 1)
            end = run.summary.last_seq
        if end < moment.seq:
            raise self._lacks(end + 1, moment.seq)
        return runs

    def _lacks(self, first: int, last: int) -> StoreDamage:
        why = next(
            (f" ({why})" for name, why in self.lost if first <= (name.last or name.first) and name.first <= last), ""
        )
        return StoreDamage(
            f"The journal of machine {self._machine} has lost its facts {first} to {last}{why}; "
            "moments that need them can't be read"
        )

    def _follows(self, run: Run) -> int:
        """The last number that may be before it: an epoch leaves one out, and a point that begins it takes that."""
        return run.name.first - (2 if run.name.first == self._begins[run.name.epoch] else 1)

    def _merged_layers(self, runs: Sequence[Run], disk: DiskId) -> list[Layer]:
        """Layers of whole segments, oldest first: as many as possible in merged tables."""
        layers, at = [], 0
        while at < len(runs):
            size = next((n for n in LEVELS if at % n == 0 and at + n <= len(runs)), 1)
            group = runs[at : at + size]
            layers.append(Layer(self._table(group, disk), _reading(group)))
            at += size
        return layers

    def _table(self, group: Sequence[Run], disk: DiskId) -> Table:
        """The pieces that a group of segments leaves behind; `source` is the number of the segment in the group."""
        if len(group) == 1:
            return group[0].summary.table(disk)
        key = f"{group[0].name.stem}+{len(group)}.{_short(disk)}"
        total = sum(run.bytes for run in group if isinstance(run, SealedRun))
        found = self._tables.merged(key, total, disk)
        if found is None:
            pieces = self._merge(group, disk)
            self._tables.keep_merged(key, total, disk, pieces)
            found = self._tables.merged(key, total, disk) or Table.of(pieces)
        return found

    def _merge(self, group: Sequence[Run], disk: DiskId) -> Pieces:
        step = max(1, len(group) // FANOUT)
        parts = [(i, self._table(group[i : i + step], disk)) for i in range(0, len(group), step)]
        return tables.merged(parts)

    def warm(self) -> None:
        """The tables that a view of the newest moment needs are there when this returns."""
        if self.runs and self.last:
            try:
                point, told = self.base(self.last), self.told
            except NotFound:
                return
            for disk in told.disks:
                self._layers(self.last, point.seq or 0, disk)

    def forget_removed(self) -> None:
        """Tables of segments that are gone go too."""
        self._tables.forget({key for run in self.runs for key in (run.name.stem, str(run.name))})


def _doubt_of(seq: int, withheld: Sequence[Doubt]) -> Doubt | None:
    return next((d for d in withheld if d.holds(seq)), None)


def _reading(group: Sequence[Run]) -> Any:
    return lambda source, pos, length: group[source].read(pos, length)


def _short(disk: DiskId) -> str:
    """A name of a disk that may be part of a file's."""
    return disk.encode().hex()[:40]


def newest_tokens(store: Store, machine: MachineId) -> dict[DiskId, dict[str, Any]]:
    """The tokens that the newest durable barrier of a machine names; read from the last file that can be read, alone."""
    folder = store.ring.machine_name(machine)
    while True:
        names = journal.list_files(store.files, folder)
        try:
            for name in reversed(names):
                told = Told()
                with contextlib.suppress(StoreDamage):
                    for at, t, value in open_run(store, folder, name, PieceCache()).summary.metas:
                        told.tell(at, t, value)
                if told.tokens_seq >= 0:
                    return told.tokens
        except FileNotFoundError:
            continue  # it was sealed since we looked
        return {}
