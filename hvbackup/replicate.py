"""Copy: recovery points of one store become recovery points of another.

    a point's map  ->  blocks that the target's copy of the point before it does not have  ->  ids in the target's words
                   ->  chunks that the target lacks: read, verified, hashed, compressed, put  ->  map pages  ->  the point

Stores of one family share the id key, so ids and maps are equal in both: only chunks that the target lacks are read, and the root
of each copied disk must come out equal.  Any other target has ids of its own: a block must be read once to learn its id there,
and what was learnt is kept (store/chunks/translation.py).

    killed after                  left behind                              cleaned by
    1 record of what is to come   nothing                                  nothing: it says "begun", not "done"
    2 lease written               the lease                                the next copy, or a capture of the machine
    3 packs sealed                chunks no point refers to                the next copy refers to them; reclaim
    4 point file in place         the point: it is copied; the lease       Store._adopt() tells of it; the next copy
    5 run record written          the lease                                the next copy, or a capture of the machine

The copied point is signed by the target's key: whoever copies vouches for it, because he has verified every block.  It names its
origin with the digest and the signature of the original, so that the two can be compared for as long as both are there.
Journals are not copied, and checkpoints of hypervisors belong to the store that made them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import Busy, ChunkDamaged, HvbackupError, StoreDamage, UsageError
from hvbackup.leases import Leases
from hvbackup.model import ChunkId, DiskRoot, Instant, Machine, Origin, RecoveryPoint
from hvbackup.pipeline import ordered
from hvbackup.store.chunks.translation import Translation
from hvbackup.store.chunks.writer import ChunkWriter, Frame
from hvbackup.store.format.blockmap import BlockMap, Ids, MapEditor
from hvbackup.store.format.layout import ID_BYTES, PAGE_IDS
from hvbackup.store.format.sealed import proof
from hvbackup.store.index.index import NOWHERE
from hvbackup.store.shelves.tombstones import TOMBSTONES
from hvbackup.store.store import ADOPT_RECORDS, Store

THREADS = 2  # read, decode, hash and compress release the interpreter lock
BATCHES_AHEAD = 6  # bounds memory
BATCH_BLOCKS = 64
SAVE_PAIRS = 4 * 1024  # a copy that is killed reads no more than these again: 256 MiB
SAMPLE_BLOCKS = 32  # of those that were not read are compared before a point is committed
BEGUN_POINTS = 100  # told of at once: `Store._adopt` must find the record again

SOURCE = "copy:"  # begins the source of a copy's lease
Clock = Callable[[], Instant]


@dataclass(slots=True)
class CopyFigures:
    """What the copy of one point cost."""

    read_bytes: int = 0  # plain bytes of blocks that were read from the source
    new_bytes: int = 0  # of blocks the target did not have
    stored_bytes: int = 0  # added to the target, everything included
    reused_blocks: int = 0  # looked at and found in the target
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of one point."""

    source: RecoveryPoint
    point: RecoveryPoint | None = None  # in the target
    figures: CopyFigures = field(default_factory=CopyFigures)
    was_there: bool = False
    error: HvbackupError | None = None
    notes: Sequence[str] = ()


class WrongTranslation(Exception):
    """What was kept about ids does not hold; nothing was committed."""


class Copier:
    """Copies points from `source` to `target`, oldest first.  Thread safety: one thread."""

    def __init__(self, source: Store, target: Store, clock: Clock, rng: random.Random | None = None) -> None:
        """Raises UsageError when points can't go from one store to the other."""
        if source.id == target.id:
            raise UsageError(f"{target.files.root} is the store that is copied from; name another one with --to")
        if source.block != target.block:
            raise UsageError(
                f"The store at {source.files.root} has blocks of {source.block // 1024} KiB and the one at "
                f"{target.files.root} of {target.block // 1024} KiB; a point can only be copied between stores with equal "
                f"blocks: make the target with `hvbackup init --block {source.block // 1024}K`"
            )
        self._source, self._target, self._clock = source, target, clock
        self._rng = rng or random.Random()
        self.family = source.ring.ids == target.ring.ids
        self._translation: Translation | None = None
        self._stones: dict[str, list[str]] = {}  # of points that were forgotten in the target once, by path

    def copy(
        self, points: Sequence[RecoveryPoint], progress: Callable[[RecoveryPoint, int, int], None]
    ) -> Iterator[Copied]:
        """One result for each point, oldest first, as soon as it is known; what can't be copied has an error, the others go on.

        `progress` gets a point and done and total bytes of its disks.  Raises Busy, SpaceExhausted.
        """
        self._clean_up()
        todo = sorted(points, key=lambda p: (p.t, p.id))
        for at in range(0, len(todo), BEGUN_POINTS):
            group = todo[at : at + BEGUN_POINTS]
            missing = [path for p in group if not self._target.files.exists(path := self._path(p))]
            if missing:
                self._was_forgotten(group, missing)
                with self._target.writing:
                    self._target.tell("copying", self._clock(), begun=missing, origin=self._source.id.hex())
            for point in group:
                yield self._one(point, progress)

    def _was_forgotten(self, points: Sequence[RecoveryPoint], missing: Sequence[str]) -> None:
        """Who forgot these in the target before: once they are there again, a record must say so, or nobody would miss them.

        Reading all records takes a while, so those of points newer than what the target has, as nearly all are, are looked for
        among the newest records only.
        """
        newest = {p.machine.id: self._target.newest(p.machine.id) for p in points}
        late = all((n := newest[p.machine.id]) is not None and p.t > n.t for p in points if self._path(p) in missing)
        runs = self._target.runs
        for record in runs.recent(ADOPT_RECORDS) if late else runs:
            for path in {*record.value.get("forgotten", ())}.intersection(missing):
                self._stones.setdefault(path, []).append(str(record.value.get("tombstone", "")))

    def _path(self, point: RecoveryPoint) -> str:
        return self._target.path_of(point)

    def _one(self, point: RecoveryPoint, progress: Callable[[RecoveryPoint, int, int], None]) -> Copied:
        began = time.monotonic()
        if self._target.files.exists(self._path(point)):
            return self._there(point)
        try:
            self._refuse_forgotten(point)
            with self._target.holding(point.machine.id), self._target.writing, self._leased(point.machine) as renew:

                def tell(at: int, total: int) -> None:
                    renew()
                    progress(point, at * self._source.block, total * self._source.block)

                done = self._copied(point, tell, began)
                self._tell(done)
                return done
        except (StoreDamage, UsageError) as e:
            what = f"Point {point.id} of {point.machine.name} was not copied: {e}"
            return Copied(point, error=type(e)(what))

    def _refuse_forgotten(self, point: RecoveryPoint) -> None:
        """A point that was forgotten in the target on purpose comes back out of its trash, or not before that is empty."""
        path = self._path(point)
        if any(path in t.points for t in TOMBSTONES.all(self._target.files, self._target.ring)):
            raise UsageError(
                f"it was forgotten in {self._target.files.root} and is in the trash there; "
                f"`hvbackup --store {self._target.files.root} forget --undo {point.id}` puts it back"
            )

    def _there(self, point: RecoveryPoint) -> Copied:
        try:
            return Copied(point, self._target.load_point(self._path(point)), was_there=True)
        except StoreDamage as e:
            what = f"{e}; `hvbackup check --repair` of {self._target.files.root} puts its copy back"
            return Copied(point, was_there=True, error=type(e)(what))

    def _clean_up(self) -> None:
        """Leases of copies that died are gone: whoever holds their machine now knows that nobody copies it."""
        leases = Leases(self._target, self._clock)
        for machine in {lease.machine for lease in leases.all() if lease.source.startswith(SOURCE)}:
            with suppress(Busy), self._target.holding(machine):
                for dead in leases.stale(machine):
                    if dead.source.startswith(SOURCE):
                        leases.remove(dead.id)

    @contextmanager
    def _leased(self, machine: Machine) -> Iterator[Callable[[], object]]:
        """A lease says that chunks are being written which no point refers to yet."""
        leases = Leases(self._target, self._clock)
        lease = leases.take(machine.id, f"{SOURCE}{self._source.id.hex()}")
        try:
            yield lambda: leases.renew(lease)
        finally:
            leases.remove(lease.id)

    def _copied(self, point: RecoveryPoint, progress: Callable[[int, int], None], began: float) -> Copied:
        try:
            return self._attempt(point, progress, began)
        except WrongTranslation as e:
            self._translated().forget()
            done = self._attempt(point, progress, began)
            whose = f"ids of store {self._source.id.hex()}"
            return replace(
                done, notes=[f"What was kept about {whose} was wrong ({e}) and is forgotten; all was read again"]
            )

    def _attempt(self, point: RecoveryPoint, progress: Callable[[int, int], None], began: float) -> Copied:
        figures, writer = CopyFigures(), self._target.writer()
        try:
            base = self._built_upon(point, writer)
            disks = [_Disk(self, writer, root, base, figures) for root in point.disks]
            total = sum(-(-d.disk.size // self._source.block) for d in point.disks)
            before, roots = 0, []
            for disk in disks:
                roots.append(disk.run(lambda at, so_far=before: progress(so_far + at, total)))  # type: ignore[misc]
                before += disk.blocks
            for disk, root in zip(disks, roots, strict=True):
                disk.compare_sample(root, self._rng)
            made = self._made(point, roots, figures)
            self._target.commit(made, writer)
        except BaseException:
            writer.abandon()
            raise
        finally:
            if self._translation:
                self._translation.save()
        figures.stored_bytes, figures.seconds = writer.stored_bytes, round(time.monotonic() - began, 3)
        return Copied(point, made, figures)

    def _made(self, point: RecoveryPoint, roots: Sequence[DiskRoot], figures: CopyFigures) -> RecoveryPoint:
        """The point as the target has it."""
        path = self._source.path_of(point)
        digest, signature = proof(path, self._source.files.read(path))
        origin = Origin(self._source.id.hex(), path, self._source.descriptor.verify_key, digest, signature)
        costs = {"changed_bytes": point.figures.get("changed_bytes"), "read_bytes": figures.read_bytes}
        costs |= {"new_bytes": figures.new_bytes, "reused_blocks": figures.reused_blocks}
        return replace(point, disks=tuple(roots), figures=costs, seq=None, origin=origin)

    def _tell(self, done: Copied) -> None:
        assert done.point is not None
        for tombstone in self._stones.pop(path := self._path(done.point), ()):
            self._target.tell("restored", self._clock(), restored=[path], tombstone=tombstone)
        self._target.tell(
            "copy",
            self._clock(),
            machine=done.point.machine.id,
            point=path,
            status="degraded" if done.notes else "ok",
            notes=list(done.notes),
            origin=self._source.id.hex(),
            figures=asdict(done.figures),
        )

    def _built_upon(self, point: RecoveryPoint, writer: ChunkWriter) -> RecoveryPoint | None:
        """What the copy builds upon; it stays until the writer ends, though somebody forgets it."""
        while (base := self._base(point)) is not None:
            writer.builds_upon(base)
            if self._target.files.exists(self._target.path_of(base)):
                break
        return base

    def _base(self, point: RecoveryPoint) -> RecoveryPoint | None:
        """The newest point of the machine, not after this one, that both stores have (a family: that the target has)."""
        found = None
        for path in self._target.point_paths(self._target.ring.machine_name(point.machine.id)):
            t = int(path.rsplit("/", 1)[1].split("-")[0])
            if found is None or t <= point.t:
                found = path
        try:
            there = self._target.load_point(found) if found else None
            if there is None or self.family:
                return there
            known = there.origin is not None and there.origin.store == self._source.id.hex()
            return there if known and self._source.files.exists(self._source.path_of(there)) else None
        except StoreDamage:
            return None

    # -- what disks ask ------------------------------------------------------------------------------------------------

    @property
    def stores(self) -> tuple[Store, Store]:
        """(source, target)."""
        return self._source, self._target

    def _translated(self) -> Translation:
        if self._translation is None:
            self._translation = Translation(self._target.state, self._source.id)
        return self._translation

    @property
    def translation(self) -> Translation | None:
        """What is known of ids; None in a family, which needs none."""
        return None if self.family else self._translated()


@dataclass(frozen=True, slots=True)
class _Done:
    """A batch whose ids in the target are known."""

    blocks: NDArray[np.int64]
    ids: Ids
    frames: list[Frame]
    read_bytes: int
    pairs: list[tuple[bytes, bytes]]
    unread: NDArray[np.int64]  # blocks that were referred to without being read


class _Disk:
    """The copy of one disk.  Thread safety: one thread, but for `_work`."""

    def __init__(
        self, copier: Copier, writer: ChunkWriter, root: DiskRoot, base: RecoveryPoint | None, figures: CopyFigures
    ) -> None:
        self._copier, self._writer, self._root, self._figures = copier, writer, root, figures
        self._source, self._target = copier.stores
        self.blocks = -(-root.disk.size // self._source.block)
        self._map = BlockMap(root.root, self.blocks, self._source.chunks.page)
        self._base = self._pair(base)
        self._lock = threading.Lock()
        self._unread: list[int] = []

    def _pair(self, base: RecoveryPoint | None) -> tuple[BlockMap, BlockMap] | None:
        """(a map in the source's words, the same in the target's) of a state that the target has whole."""
        disk = self._root.disk.id
        here = base.disk(disk) if base and not self._target.is_damaged(base, disk) else None
        if base is None or here is None:
            return None
        blocks = -(-here.disk.size // self._target.block)
        mine = BlockMap(here.root, blocks, self._page)
        if self._copier.family:
            return mine, mine
        there = self._source.load_point(self._source.path_of(base)).disk(disk)
        return (BlockMap(there.root, blocks, self._source.chunks.page), mine) if there else None

    def _page(self, chunk: ChunkId) -> bytes:
        return self._writer.page(chunk) or self._target.chunks.page(chunk)

    def run(self, progress: Callable[[int], None]) -> DiskRoot:
        """The disk as the target has it; its pages and chunks are put.  Raises ChunkDamaged, SpaceExhausted."""
        try:
            changed = self._map.diff(self._base[0]) if self._base else None
        except ChunkDamaged:
            changed, self._base = None, None  # all is looked at, and what is really lost is named
        editor = MapEditor(self._base[1] if self._base else None, self.blocks, self._page, self._writer.put_page)
        batches = self._all() if changed is None else self._some(changed[changed < self.blocks])
        with closing(ordered(batches, self._work, threads=THREADS, depth=BATCHES_AHEAD)) as results:
            for done in results:
                self._keep(editor, done)
                progress(int(done.blocks[-1]) + 1)
        root = editor.finish()
        if self._copier.family and root != self._root.root:
            raise HvbackupError(
                f"The copy of disk {self._root.disk.id} came out otherwise than its source; nothing was committed, "
                "please report this"
            )
        return DiskRoot(self._root.disk, root, None, self._root.how)

    def _all(self) -> Iterator[tuple[NDArray[np.int64], Ids]]:
        for first, ids in self._map.leaves():
            some = np.flatnonzero(ids.any(axis=1))
            for at in range(0, len(some), BATCH_BLOCKS):
                part = some[at : at + BATCH_BLOCKS]
                yield first + part, np.ascontiguousarray(ids[part])

    def _some(self, changed: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Ids]]:
        for at in range(0, len(changed), BATCH_BLOCKS):
            part = changed[at : at + BATCH_BLOCKS]
            ids = np.zeros((len(part), ID_BYTES), np.uint8)
            for leaf in np.unique(part // PAGE_IDS).tolist():
                here = part // PAGE_IDS == leaf
                ids[here] = self._map.ids(leaf * PAGE_IDS, PAGE_IDS)[part[here] % PAGE_IDS]
            yield part, ids

    def _work(self, item: tuple[NDArray[np.int64], Ids]) -> _Done:
        """Find or make the chunk of each block in the target; on a worker's thread."""
        blocks, theirs = item
        some = np.flatnonzero(theirs.any(axis=1))
        theirs = np.ascontiguousarray(theirs[some])
        ours, known = self._known(theirs)
        wanted = ~known
        wanted[np.flatnonzero(known)[self._writer.claim(np.ascontiguousarray(ours[known]))]] = True
        frames, pairs, read = self._read(theirs, ours, known, np.flatnonzero(wanted))
        out = np.zeros((len(blocks), ID_BYTES), np.uint8)
        out[some] = ours
        return _Done(blocks, out, frames, read, pairs, blocks[some[~wanted]])

    def _known(self, theirs: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """(ids in the target, which of them are known)."""
        translation = self._copier.translation
        if translation is None:
            return theirs.copy(), np.ones(len(theirs), np.bool_)
        with self._lock:
            return translation.find(theirs)

    def _read(
        self, theirs: Ids, ours: Ids, known: NDArray[np.bool_], wanted: NDArray[np.int64]
    ) -> tuple[list[Frame], list[tuple[bytes, bytes]], int]:
        """(frames of what the target lacks, pairs of ids that were learnt, bytes read); fills in `ours`."""
        frames: list[Frame] = []
        pairs: list[tuple[bytes, bytes]] = []
        read, key, family = 0, self._target.ring.block_key, self._copier.family
        for row, data in self._source.chunks.blocks(np.ascontiguousarray(theirs[wanted])):
            i = int(wanted[row])
            read += len(data)
            chunk = ours[i].tobytes() if family else blake3.blake3(data, key=key).digest()
            if known[i] and chunk != ours[i].tobytes():
                raise WrongTranslation(f"chunk {theirs[i].tobytes().hex()} is {chunk.hex()} here")
            if not known[i]:
                ours[i] = np.frombuffer(chunk, np.uint8)
                pairs.append((theirs[i].tobytes(), chunk))
            if known[i] or self._writer.claim(ours[i : i + 1])[0]:
                frames += self._writer.compress([([data], [chunk])])
        return frames, pairs, read

    def _keep(self, editor: MapEditor, done: _Done) -> None:
        """Write a batch's chunks, and its ids into the map; on the thread that owns the writer."""
        for frame in done.frames:
            self._writer.put_blocks(frame)
            self._figures.new_bytes += sum(frame.plain)
        self._figures.read_bytes += done.read_bytes
        self._figures.reused_blocks += int(done.ids.any(axis=1).sum()) - len(done.frames)
        breaks = np.flatnonzero(np.diff(done.blocks) != 1) + 1
        for blocks, ids in zip(np.split(done.blocks, breaks), np.split(done.ids, breaks), strict=True):
            editor.put(int(blocks[0]), ids)
        self._unread += done.unread.tolist()
        if translation := self._copier.translation:
            with self._lock:
                for there, here in done.pairs:
                    translation.add(there, here)
                if translation.unsaved >= SAVE_PAIRS:
                    translation.save()

    def compare_sample(self, root: DiskRoot, rng: random.Random) -> None:
        """Some of the blocks that were referred to unread hold what the source holds.  Raises WrongTranslation."""
        if self._copier.family:
            return  # the ids are equal, and the root has shown it
        mine = BlockMap(root.root, self.blocks, self._page)
        for number in rng.sample(self._unread, min(SAMPLE_BLOCKS, len(self._unread))):
            theirs, ours = self._map.ids(number, 1), mine.ids(number, 1)
            if self._target.index.lookup(ours.view("V32").ravel())["pack"][0] == NOWHERE:
                continue  # of this copy, in a pack that is not sealed yet: its id was made of its content just now
            if self._source.chunks.block(theirs.tobytes()) != self._target.chunks.block(ours.tobytes()):
                raise WrongTranslation(f"block {number} of disk {self._root.disk.id} differs")
