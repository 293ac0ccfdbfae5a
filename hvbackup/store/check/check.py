"""Check: what is damaged, and which points need it.

    quick          every point, page and chunk is there: signatures, map pages, footers, sizes, the chain of runs
    authenticate   and the tag of every record is right
    deep           and every record decodes to what its ids say

The last two can look at a part of the store: some machine's, some point's, or a sample, which takes what was not verified for the
longest time.  Places found damaged leave the index, so that the next capture stores their chunks again; disks that need a lost
chunk are remembered, so that the next capture of that disk looks every block up.  What was verified when is in the ledger.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import StoreDamage
from hvbackup.model import DiskId, DiskRoot, Instant, MachineId, PointId, RecoveryPoint
from hvbackup.pipeline import ordered
from hvbackup.store.check import audit
from hvbackup.store.check.ledger import SAVE_SECONDS, Ledger, Level, debt, sizes
from hvbackup.store.check.verify import Throttle, Verified, rows_of, verify
from hvbackup.store.check.walk import Lost, Walk
from hvbackup.store.format import pack as packs
from hvbackup.store.format import parity
from hvbackup.store.index.generation import OFFSET_BITS
from hvbackup.store.journal import journal
from hvbackup.store.store import Store

THREADS = 2
PLACES_MAX = 1 << 22  # gathered before equal ones are joined

NEVER = Instant(0)

Place = tuple[str, int]  # pack, offset of the record


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be looked at, and how closely."""

    level: Level = Level.QUICK
    t: Instant = NEVER  # now, for the ledger; never: nothing is noted there
    sample: float = 1.0  # the part of all bytes that is verified
    bytes_per_second: int = 0  # at most; 0: any
    resume: bool = False  # go on with the check that was interrupted
    machine: MachineId | None = None
    point: PointId | None = None
    record: bool = False  # remember what is found although we are not the owner: who holds `check.lock` may

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.sample >= 1 and self.machine is None and self.point is None


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    kind: str  # "point" | "disk" | "pack" | "chunk" | "segment" | "parity" | "runs" | "key"
    what: str  # a sentence
    lost: bool  # whether something we offered can't be recovered because of it
    point: str = ""  # for a disk: which, of what, and the (offset, length) of what is lost of it, the first 1000
    machine: str = ""
    disk: str = ""
    extents: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Report:
    """What a check found."""

    problems: list[Problem] = field(default_factory=list)
    points: int = 0
    disks: int = 0
    packs: int = 0
    chunks: int = 0
    segments: int = 0
    read_bytes: int = 0
    total_bytes: int = 0  # of all packs and segments
    debt_bytes: int = 0  # of them, not verified within 30 days

    @property
    def lost(self) -> bool:
        """Whether any point or part of one is lost."""
        return any(p.lost for p in self.problems)

    def add(self, kind: str, what: str, *, lost: bool = False) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, what, lost))


def check(
    store: Store,
    wanted: Wanted | None = None,
    *,
    deep: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Everything that is wrong with what is wanted; `deep` alone wants all of the store.  `progress` gets (done, total) bytes."""
    wanted = wanted or Wanted(Level.DEEP if deep else Level.QUICK)
    return _Check(store, wanted, progress).run()


class _Check:
    """One check."""

    def __init__(self, store: Store, wanted: Wanted, progress: Callable[[int, int], None]) -> None:
        self._store, self._wanted, self._progress = store, wanted, progress
        self._records = store.owner or wanted.record
        self._report = Report()
        self._ledger = Ledger(store.state)
        self._bad = store.index.damaged
        self._sizes: dict[str, int] = {}
        self._unreadable: dict[str, str] = {}  # path of a point -> why

    def run(self) -> Report:
        if self._wanted.whole:
            self._store.index.rebuild()  # the packs are on trial, not a cache of them
        else:
            self._store.index.reread()
        _keys(self._store, self._report)
        self._measure()
        only = self._places() if self._wanted.machine or self._wanted.point else None
        chosen = self._sampled(sorted(self._sizes if only is None else only))
        self._structure(chosen if self._wanted.sample < 1 else self._sizes)
        if self._wanted.level > Level.QUICK:
            self._contents(chosen, only)
        if self._records:
            self._store.index.set_damaged(self._bad)
        else:
            self._store.index.suspect(self._bad)
        self._points()
        self._logs()
        for problem in audit.problems(self._store):
            self._report.add("runs", problem)
        return self._report

    # -- structure -----------------------------------------------------------------------------------------------------

    def _structure(self, names: Iterable[str]) -> None:
        """Headers, footers and sizes; the places of the index that lie in no readable record."""
        report = self._report
        for pack in self._store.index.unreadable:
            report.add("pack", f"Pack {pack} is unreadable: neither its footer nor any record can be made out")
        for name in sorted(names):
            rows, why = rows_of(self._store, name)
            if "/" in name:
                report.segments += 1
                if why:
                    report.add("segment", f"{_segment(name)}: {why}", lost=True)
                continue
            report.packs += 1
            report.chunks += len(rows)
            if why:
                gone = set() if _header_reads(self._store, name) else {int(o) for o in rows["offset"]}
                report.add("pack", f"{why}; {len(gone)} of its records are lost")
                self._bad |= {(name, o) for o in gone}

    def _measure(self) -> None:
        names = [*self._store.index.known(), *segments(self._store)]
        self._sizes = sizes(self._store.files, names)
        self._ledger.keep(names)
        self._report.total_bytes = sum(self._sizes.values())
        self._owed()

    def _owed(self) -> None:
        if self._wanted.t:
            self._report.debt_bytes = debt(self._ledger, self._sizes.items(), self._wanted.t)

    # -- contents ------------------------------------------------------------------------------------------------------

    def _contents(self, chosen: list[str], only: Mapping[str, NDArray[np.uint64]] | None) -> None:
        """Verify records; what is verified is judged anew, what was found elsewhere before stands."""
        todo = self._unless_done(chosen)
        throttle = Throttle(self._wanted.bytes_per_second)

        def work(pack: str) -> Verified:
            return verify(self._store, pack, self._wanted.level, throttle, None if only is None else only[pack])

        total, saved = sum(self._sizes.get(p, 0) for p in todo), time.monotonic()
        with closing(ordered(todo, work, threads=THREADS, depth=THREADS + 1)) as results:
            for found in results:
                self._note(found, whole=only is None)
                self._progress(self._report.read_bytes, total)
                if time.monotonic() > saved + SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        self._sidecars(todo)
        if self._wanted.whole:
            self._ledger.begun = NEVER
        self._save()
        self._owed()

    def _sidecars(self, todo: Iterable[str]) -> None:
        """Parity costs nobody anything until it is needed, so it is tested where packs are."""
        covered = set(parity.sidecars(self._store.files))
        for pack in covered.intersection(todo):
            if not parity.is_whole(self._store.files, pack):
                self._report.add(
                    "parity", f"The parity of pack {pack} is damaged; `hvbackup check --repair` makes it again"
                )

    def _note(self, found: Verified, *, whole: bool) -> None:
        report = self._report
        report.read_bytes += found.read_bytes
        if "/" in found.pack:
            for _, why in found.damaged:
                report.add("segment", f"{_segment(found.pack)}: {why}", lost=True)
        else:
            if whole and _header_reads(self._store, found.pack):
                self._bad = {place for place in self._bad if place[0] != found.pack}
            for offset, why in found.damaged:
                report.add("chunk", f"Pack {found.pack}: {why}")
                self._bad.add((found.pack, offset))
        if whole and self._wanted.t:
            self._ledger.note(found.pack, self._wanted.level, self._wanted.t)

    def _logs(self) -> None:
        """Logs that have ended: one that is damaged waits for ever to be sealed."""
        wanted = self._wanted
        if wanted.level == Level.QUICK or wanted.machine or wanted.point or wanted.sample < 1:
            return
        throttle = Throttle(wanted.bytes_per_second)
        for machine in self._store.files.names(journal.FOLDER):
            for name in journal.list_files(self._store.files, machine):
                if name.suffix == journal.LOG:
                    self._log(machine, name, throttle)

    def _log(self, machine: str, name: journal.Name, throttle: Throttle) -> None:
        try:
            log = journal.LogReader(self._store.files, self._store.ring, machine, name)
            if log.mark() is not None:  # else it may be written to
                for frame in log.whole():
                    throttle.take(len(frame.data))
                    self._report.read_bytes += len(frame.data)
        except FileNotFoundError:
            return  # it has just been sealed
        except StoreDamage as e:
            self._report.add("segment", f"{_segment(f'{journal.FOLDER}/{machine}/{name}')}: {e}", lost=True)

    def _save(self) -> None:
        """What was done so far survives us."""
        if self._records and self._wanted.t:
            self._store.index.set_damaged(self._bad)
            self._ledger.save()

    def _unless_done(self, todo: list[str]) -> list[str]:
        """What an interrupted check has left, if that is to be gone on with; else a whole check begins here."""
        ledger, wanted = self._ledger, self._wanted
        if not wanted.whole or not wanted.t:
            return todo
        if wanted.resume and ledger.begun and ledger.level >= wanted.level:
            return [p for p in todo if ledger.when(p, wanted.level) < ledger.begun]
        ledger.begun, ledger.level = wanted.t, wanted.level
        self._save()
        return todo

    def _sampled(self, todo: list[str]) -> list[str]:
        """The part that is wanted, beginning with what was not verified for the longest time."""
        if self._wanted.sample >= 1:
            return todo
        room = self._wanted.sample * sum(self._sizes.get(p, 0) for p in todo)
        chosen = []
        for pack in sorted(todo, key=lambda p: (self._ledger.when(p, self._wanted.level), p)):
            if room <= 0:
                break
            chosen.append(pack)
            room -= self._sizes.get(pack, 0)
        return chosen

    def _places(self) -> Mapping[str, NDArray[np.uint64]]:
        """The records that the wanted points need: 8 bytes for each of their blocks."""
        found, waiting = np.zeros(0, np.uint64), [np.zeros(0, np.uint64)]

        def join() -> NDArray[np.uint64]:
            joined: NDArray[np.uint64] = np.unique(np.concatenate([found, *waiting]))
            waiting.clear()
            return joined

        def seen(places: NDArray[np.void]) -> None:
            waiting.append((places["pack"].astype(np.uint64) << np.uint64(OFFSET_BITS)) | places["offset"])

        walk = Walk(self._store, seen)
        for _, point in self._wanted_points(self._paths()):
            for root in point.disks if point else ():
                for _ in walk.lost_blocks(root):
                    pass
                if sum(map(len, waiting)) > PLACES_MAX:
                    found = join()
        found = join()
        number = found >> np.uint64(OFFSET_BITS)
        offset = found & np.uint64((1 << OFFSET_BITS) - 1)
        return {self._store.index.packs[int(n)]: offset[number == n] for n in np.unique(number)}

    # -- points --------------------------------------------------------------------------------------------------------

    def _paths(self) -> Iterator[str]:
        """Every point that is wanted."""
        store, wanted = self._store, self._wanted
        folders = [store.ring.machine_name(wanted.machine)] if wanted.machine else store.machine_folders()
        for folder in folders:
            yield from (p for p in store.point_paths(folder) if not wanted.point or p.endswith(f"-{wanted.point}"))

    def _wanted_points(self, paths: Iterable[str]) -> Iterator[tuple[str, RecoveryPoint | None]]:
        """(path, point); None for one that can't be read."""
        for path in paths:
            try:
                yield path, self._store.load_point(path)
            except StoreDamage as e:
                if not self._store.files.exists(path) and not self._store.owner:
                    continue  # forgotten meanwhile
                self._unreadable[path] = str(e)
                yield path, None

    def _points(self) -> None:
        """Walk every wanted map; disks that need something that is lost are named, and remembered."""
        store, report, walk = self._store, self._report, Walk(self._store)
        damaged: list[tuple[str, DiskId]] = []
        seen: set[str] = set()
        points = list(self._paths())
        store.index.catch_up()  # a point that was committed meanwhile has its packs
        for path, point in self._wanted_points(points):
            report.points += 1
            seen.add(path)
            if point is None:
                why = self._unreadable[path]
                report.add("point", f"{why}; `hvbackup check --repair` puts its copy back", lost=True)
                continue
            for root in point.disks:
                report.disks += 1
                lost = walk.disk(root)
                if lost.count:
                    report.problems.append(_disk_problem(point, root, lost))
                    damaged.append((path, root.disk.id))
        if self._records:
            before = [] if self._wanted.whole else [d for d in store.damaged_disks() if d[0] not in seen]
            store.set_damaged_disks([*damaged, *before])


def segments(store: Store) -> Iterator[str]:
    """The paths of all sealed segments of journals."""
    for machine in store.files.names(journal.FOLDER):
        for name in store.files.names(f"{journal.FOLDER}/{machine}"):
            if name.endswith(journal.SEGMENT) and journal.parse_name(name):
                yield f"{journal.FOLDER}/{machine}/{name}"


def _segment(path: str) -> str:
    what = "Log" if path.endswith(journal.LOG) else "Segment"
    return f"{what} {path}, without which moments after its beginning and before the next point can't be rebuilt"


def _disk_problem(point: RecoveryPoint, root: DiskRoot, lost: Lost) -> Problem:
    where = ", ".join(f"{start}+{length}" for start, length in lost.extents[:4]) + (", …" if lost.count > 4 else "")
    what = (
        f"Point {point.id} of {point.machine.name}: disk {root.disk.id} has lost {lost.bytes} bytes in {lost.count} places "
        f"(at {where}); everything else of it can be read"
    )
    return Problem("disk", what, True, point.id, point.machine.name, root.disk.id, tuple(lost.extents))


def _keys(store: Store, report: Report) -> None:
    contents: dict[str, list[bytes]] = {}
    for name in store.files.names("keys"):
        contents.setdefault(name.split(".")[0], []).append(store.files.read(f"keys/{name}"))
    for kid, copies in contents.items():
        if len(copies) != 2 or copies[0] != copies[1] or not _is_json(copies[0]):
            report.add("key", f"Key {kid} has not two equal copies in keys/; copy the good one over the other")


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def _header_reads(store: Store, pack: str) -> bool:
    try:
        packs.cipher_of(store.files, store.ring, pack)
    except StoreDamage:
        return False
    return True
