"""Capture: a frozen machine becomes a recovery point.

    killed after                        left behind                             cleaned by
    1 lease written                     nothing on the host                     leases.settle() before the next capture
    2 snapshot and new bitmap made      both bitmaps recording, the snapshot    leases.settle(): what is committed stays
    3 packs sealed                      chunks no point refers to               the next run refers to them; reclaim
    4 point file in place = commit      old bitmap, snapshot, lease             leases.settle(); the next run
    5 run record written                the same                                the same
    6 old bitmap released               the lease                               leases.settle()

What is read: with proof of continuity the blocks that changed; without it every allocated block, hashed and compared with the
parent point at the same place, so that lost tracking costs reading time and never space.  A sample of the blocks a hypervisor
calls unchanged is read as well: trackers can lie, and one lie makes the disk be compared whole.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup import extents
from hvbackup.endings import let_finish
from hvbackup.errors import ChunkDamaged, HvbackupError
from hvbackup.extents import Spans
from hvbackup.hypervisors import Changes, Frozen, FrozenDisk, Hypervisor, Reader
from hvbackup.leases import Lease, Leases, committed_tokens
from hvbackup.model import (
    SECOND,
    ChunkId,
    Consistency,
    Continuity,
    DiskId,
    DiskRoot,
    Figures,
    Instant,
    Machine,
    MiB,
    Outcome,
    RecoveryPoint,
    Token,
)
from hvbackup.pipeline import Pace, ordered
from hvbackup.sampling import sampled, witness
from hvbackup.store.chunks.writer import ChunkWriter, Frame
from hvbackup.store.format.blockmap import BlockMap, Ids, MapEditor
from hvbackup.store.format.layout import ID_BYTES
from hvbackup.store.format.point import new_id
from hvbackup.store.store import Store

BATCH_BYTES = 4 * MiB  # read and hashed by one worker at a time: amortises every per-call cost
THREADS = 2  # workers of one disk: read, hash and compress release the interpreter lock
BATCHES_AHEAD = 6  # bounds memory: at most so many batches of compressed blocks wait for the writer
GROUP_BLOCKS = 1  # blocks compressed together; decision 0003 has the measurements
SAMPLE_BLOCKS = 32  # re-read at each incremental capture of a disk

Clock = Callable[[], Instant]


def system_clock() -> Instant:
    """Now, by this machine's clock."""
    return Instant(time.time_ns())


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a capture is."""

    disk: DiskId
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Options:
    """How a capture is to be made."""

    source: str = ""  # how to reach the hypervisor again, for the lease
    consistency: Consistency | None = None  # the least wanted; None: the best there is
    name: str = ""  # what people call the machine, if not what the platform says
    fine: bool = False  # many small sets follow: checkpoints are to be as fine as the platform can
    full: bool = False  # read and compare everything, whatever the tracker says
    sample_blocks: int = SAMPLE_BLOCKS
    seq: int | None = None  # of the machine's journal: every fact up to this one is in the point, and none after it
    tags: tuple[str, ...] = ()  # what a user calls the point
    clock: Clock = system_clock
    progress: Callable[[Progress], None] = lambda _: None
    pace: Pace = field(default_factory=Pace)
    rng: random.Random = field(default_factory=random.Random)


def capture(store: Store, hypervisor: Hypervisor, machine: Machine, options: Options) -> Outcome:
    """Make a recovery point of a machine.  It exists when this returns an outcome with a point.

    Raises HostUnreachable, ReadFailed, Busy, SpaceExhausted, UsageError; then there is no new point.
    """
    began, cpu = time.monotonic(), time.process_time()
    outcome = Outcome()
    leases = Leases(store, options.clock)
    for note in leases.settle(hypervisor, machine):
        outcome.degrade(note)
    lease = leases.take(machine.id, options.source)
    try:
        point = _captured(store, hypervisor, machine, options, outcome, leases, lease)
    except BaseException:
        # Undo at once what can be undone; the lease stays for what can't.
        if _release(hypervisor, machine, lease, committed_tokens(store, machine.id), outcome):
            with suppress(HvbackupError):
                leases.remove(lease.id)
        raise
    # The point is committed: from here on trouble is a note, never an error that says there is none.
    outcome.point = point
    released = _release(hypervisor, machine, lease, [d.token for d in point.disks if d.token], outcome)
    _measure(outcome.figures, began, cpu)
    _conclude(store, leases, lease if released else None, machine, outcome, options)
    return outcome


def _captured(
    store: Store,
    hypervisor: Hypervisor,
    machine: Machine,
    options: Options,
    outcome: Outcome,
    leases: Leases,
    lease: Lease,
) -> RecoveryPoint:
    """Steps 2 to 4 of the crash table."""
    writer = store.writer()
    try:
        parent = store.parent(machine.id, writer)
        since = {} if parent is None or options.full else {d.disk.id: d.token for d in parent.disks if d.token}
        with hypervisor.snapshot(machine, lease.id, since, options.consistency, fine=options.fine) as frozen:
            _stood_still(frozen, parent if options.consistency is None else None, outcome)
            roots = take_in(store, writer, frozen, parent, since, options, outcome, lambda: leases.renew(lease))
        t = after(parent, frozen.t, outcome)
        point = replace(point_of(frozen, roots, options, outcome), t=t)
        store.commit(point, writer)
    except BaseException:
        writer.abandon()
        raise
    outcome.figures.stored_bytes = writer.stored_bytes
    return point


def _stood_still(frozen: Frozen, parent: RecoveryPoint | None, outcome: Outcome) -> None:
    """Write down how the guest took part; less of it than for the newest point is trouble, if nobody has said so yet."""
    outcome.figures.freezing_seconds = frozen.standstill.freezing_seconds
    outcome.figures.frozen_seconds = frozen.standstill.frozen_seconds
    levels, remark = list(Consistency), frozen.standstill.remark
    if remark:
        outcome.remarks.append(remark)
    if parent and not frozen.notes and levels.index(frozen.consistency) < levels.index(parent.consistency):
        outcome.degrade(
            f"The newest point was {parent.consistency}-consistent, this one is only {frozen.consistency}-consistent"
        )


def after(parent: RecoveryPoint | None, t: Instant, outcome: Outcome) -> Instant:
    """The moment of a point as we label it: later than its parent, so that the newest point stays the one captured last."""
    if parent is None or t > parent.t:
        return t
    outcome.degrade(
        f"The clock went back {(parent.t - t) / SECOND:.3f} seconds behind the newest point; this point is labelled as the one "
        "right after it: set the clock of the host"
    )
    return Instant(parent.t + 1)


def take_in(
    store: Store,
    writer: ChunkWriter,
    frozen: Frozen,
    parent: RecoveryPoint | None,
    since: Mapping[DiskId, Token],
    options: Options,
    outcome: Outcome,
    renew: Callable[[], object] = lambda: None,
) -> list[DiskRoot]:
    """Bring every disk of a frozen machine into the store, building upon `parent`, and let the machine prove itself.

    Raises HostUnreachable, ReadFailed, SpaceExhausted.
    """
    run = _Run(store, writer, outcome, options, renew)
    roots = [run.disk(d, parent, since.get(d.disk.id)) for d in frozen.disks]
    for note in [*frozen.notes, *frozen.verify()]:
        outcome.degrade(note)
    return roots


def point_of(frozen: Frozen, roots: Sequence[DiskRoot], options: Options, outcome: Outcome) -> RecoveryPoint:
    """The recovery point of a frozen machine, not committed yet."""
    machine = replace(frozen.machine, name=options.name) if options.name else frozen.machine
    return RecoveryPoint(
        new_id(),
        machine,
        frozen.t,
        frozen.consistency,
        tuple(roots),
        frozen.config,
        {k: v for k, v in asdict(outcome.figures).items() if k not in ("stored_bytes", "seconds", "cpu_seconds")},
        tuple(outcome.notes),
        options.seq,
        options.tags,
    )


@let_finish
def _release(hypervisor: Hypervisor, machine: Machine, lease: Lease, keep: Sequence[Token], outcome: Outcome) -> bool:
    """Whether nothing of the lease is left on the host; if not, the lease must stay."""
    try:
        hypervisor.release(machine, lease.id, keep)
    except HvbackupError as e:
        outcome.degrade(f"Could not clean up on the host yet ({e}); the next run does it")
        return False
    return True


@let_finish
def _conclude(
    store: Store, leases: Leases, lease: Lease | None, machine: Machine, outcome: Outcome, options: Options
) -> None:
    """Tell of the point, then give the lease back if nothing needs it any more."""
    try:
        _tell(store, machine, outcome, options)
        if lease is not None:
            leases.remove(lease.id)
    except HvbackupError as e:
        outcome.degrade(f"The point is committed, and writing that down failed ({e}); the next run does it")


def _measure(figures: Figures, began: float, cpu: float) -> None:
    figures.seconds = round(time.monotonic() - began, 3)
    figures.cpu_seconds = round(time.process_time() - cpu, 3)


def _tell(store: Store, machine: Machine, outcome: Outcome, options: Options) -> None:
    point = outcome.point
    assert point is not None  # every other way out of `_captured` raises
    store.tell(
        "capture",
        options.clock(),
        machine=machine.id,
        point=store.path_of(point),
        status=outcome.status.name.lower(),
        notes=outcome.notes,
        figures=asdict(outcome.figures),
        **({"distrusted": True} if outcome.distrusted else {}),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with one disk."""

    read: Spans  # whole blocks (the last one may be short)
    zero: Spans  # whole blocks that are zero without being read
    unchanged: Spans  # what the hypervisor says did not change
    how: str


def plan(changes: Changes, size: int, parent_size: int | None, block: int) -> Plan:
    """Decide what to read of a disk.  Pure."""
    data, zero = extents.clip(changes.data, 0, size), extents.clip(changes.zero, 0, size)
    if parent_size is not None and parent_size != size:
        # The block at the smaller end was padded with zeroes, and trackers call a grown tail clean.
        edge = min(size, parent_size) // block * block
        tail = extents.spans([(edge, size - edge)])
        data = extents.union(data, extents.subtract(tail, zero))
    data = extents.align(data, block, size)
    touched = extents.align(extents.union(data, zero), block, size)
    zero = extents.subtract(extents.shrink(zero, block, size), data)
    known = changes.continuity is Continuity.INCREMENTAL
    how = "incremental" if known else "full" if parent_size is None else "compared"
    unchanged = extents.complement(touched, size) if known else extents.EMPTY
    return Plan(extents.subtract(touched, zero), zero, unchanged, how)


Batch = tuple[tuple[int, int], ...]  # runs of whole blocks, (offset, length) in bytes, read and hashed together


def batches(read: Spans, block: int) -> Iterator[Batch]:
    """Cut what is to be read into batches of at most BATCH_BYTES, in ascending order."""
    runs: list[tuple[int, int]] = []
    room = BATCH_BYTES
    for offset, length in extents.pieces(read, BATCH_BYTES):
        padded = -(-length // block) * block
        if padded > room:
            yield tuple(runs)
            runs, room = [], BATCH_BYTES
        runs.append((offset, length))
        room -= padded
    if runs:
        yield tuple(runs)


@dataclass(frozen=True, slots=True)
class _Done:
    """A batch that was read and hashed."""

    batch: Batch
    ids: Ids
    changed: NDArray[np.bool_]
    frames: list[Frame]
    zero_blocks: int
    reused_blocks: int


class _Run:
    """The capture of one machine's disks, one after the other."""

    def __init__(
        self, store: Store, writer: ChunkWriter, outcome: Outcome, options: Options, renew: Callable[[], object]
    ) -> None:
        self._store, self._writer, self._outcome, self._options = store, writer, outcome, options
        self._renew = renew
        self._block, self._key, self._zero = store.block, store.ring.block_key, bytes(store.block)
        self._local = threading.local()

    def disk(self, frozen: FrozenDisk, parent: RecoveryPoint | None, since: Token | None) -> DiskRoot:
        """Bring one disk into the store.  Raises ReadFailed, HostUnreachable, SpaceExhausted."""
        old = parent.disk(frozen.disk.id) if parent else None
        with ExitStack() as stack:
            readers = _Readers(frozen, stack)
            if parent is None or old is None:
                return self._fold(frozen, readers, None, self._plan(frozen, None, None))
            if self._store.is_damaged(parent, old.disk.id):
                return self._healed(frozen, readers, "its newest point has lost chunks")
            try:
                base = BlockMap(old.root, -(-old.disk.size // self._block), self._page)
                return self._fold(frozen, readers, base, self._trusted(frozen, readers, base, old.disk.size, since))
            except ChunkDamaged as e:
                self._writer.drop_claims()
                return self._healed(frozen, readers, f"the map of its newest point can't be read ({e})")

    def _healed(self, frozen: FrozenDisk, readers: _Readers, why: str) -> DiskRoot:
        """A disk whose parent can't be built upon: every block is looked up again, and what is lost is stored again."""
        self._outcome.degrade(f"Disk {frozen.disk.id}: {why}; it was read whole")
        return self._fold(frozen, readers, None, self._plan(frozen, None, None))

    def _plan(self, frozen: FrozenDisk, since: Token | None, parent_size: int | None) -> Plan:
        changes = frozen.changes(since)
        if since is None:
            changes = replace(changes, continuity=Continuity.UNKNOWN)
        if changes.reason and since is not None:
            self._outcome.degrade(f"Disk {frozen.disk.id}: {changes.reason}; it was read whole and compared")
        return plan(changes, frozen.disk.size, parent_size, self._block)

    def _trusted(
        self, frozen: FrozenDisk, readers: _Readers, base: BlockMap, parent_size: int, since: Token | None
    ) -> Plan:
        """What to read, after the hypervisor's word was tested on a sample."""
        found = self._plan(frozen, since, parent_size)
        sample = sampled(found.unchanged, self._block, self._options.sample_blocks, self._options.rng)
        for batch in batches(extents.union(sample, witness(base, found.unchanged, self._block)), self._block):
            # Only compared: what a sample claimed, nobody would write.
            if self._compared(readers, base, batch)[3].any():
                self._outcome.distrusted = True
                self._outcome.degrade(
                    f"Disk {frozen.disk.id}: blocks the hypervisor called unchanged had changed; "
                    "the whole disk was read and compared"
                )
                return self._plan(frozen, None, parent_size)
        return found

    def _page(self, chunk: ChunkId) -> bytes:
        return self._writer.page(chunk) or self._store.chunks.page(chunk)

    def _fold(self, frozen: FrozenDisk, readers: _Readers, base: BlockMap | None, found: Plan) -> DiskRoot:
        """Read, hash and store what the plan says, and make the next map."""
        disk, figures = frozen.disk, self._outcome.figures
        editor = MapEditor(base, -(-disk.size // self._block), self._page, self._writer.put_page)
        for offset, length in found.zero.tolist():
            editor.zero(offset // self._block, -(-length // self._block))
            figures.zero_blocks += -(-length // self._block)
        done, total = 0, extents.total(found.read)
        results = ordered(
            batches(found.read, self._block),
            lambda batch: self._work(readers, base, batch),
            threads=THREADS,
            depth=BATCHES_AHEAD,
        )
        with closing(results):
            for result in results:
                self._keep(editor, result)
                done += sum(length for _, length in result.batch)
                self._options.progress(Progress(disk.id, done, total))
                self._renew()
        figures.read_bytes += total
        return DiskRoot(disk, editor.finish(), frozen.token, found.how)

    def _work(self, readers: _Readers, base: BlockMap | None, batch: Batch) -> _Done:
        """Read, hash, deduplicate and compress one batch; on a worker's thread."""
        blocks, ids, nonzero, changed = self._compared(readers, base, batch)
        wanted = np.flatnonzero(changed & nonzero)
        fresh = wanted[self._writer.claim(ids[wanted])]
        chosen, names = [blocks[i] for i in fresh.tolist()], ids[fresh].view(f"V{ID_BYTES}").ravel().tolist()
        steps = range(0, len(chosen), GROUP_BLOCKS)
        frames = self._writer.compress([(chosen[i : i + GROUP_BLOCKS], names[i : i + GROUP_BLOCKS]) for i in steps])
        some = int(nonzero.sum())
        return _Done(batch, ids, changed, frames, len(ids) - some, some - len(fresh))

    def _compared(
        self, readers: _Readers, base: BlockMap | None, batch: Batch
    ) -> tuple[list[memoryview], Ids, NDArray[np.bool_], NDArray[np.bool_]]:
        """(blocks, ids, which are not zero, which differ from the parent) of a batch; claims nothing."""
        area, used = self._read(readers, batch)
        count, buffer = used // self._block, memoryview(area)
        # Most blocks with data say so in their first word, where this comparison ends.
        nonzero = np.array([not area.startswith(self._zero, i * self._block) for i in range(count)], np.bool_)
        blocks = [buffer[i * self._block : (i + 1) * self._block] for i in range(count)]
        ids = np.zeros((count, ID_BYTES), np.uint8)
        some = np.flatnonzero(nonzero)
        ids[some] = np.frombuffer(self._digests(blocks[i] for i in some.tolist()), np.uint8).reshape(-1, ID_BYTES)
        changed: NDArray[np.bool_] = (ids != self._parent_ids(base, batch, count)).any(axis=1)
        return blocks, ids, nonzero, changed

    def _digests(self, blocks: Iterable[memoryview]) -> bytes:
        """The ids of blocks with data, one after the other; each thread's hasher is used again and again."""
        hasher: blake3.blake3 | None = getattr(self._local, "hasher", None)
        if hasher is None:
            hasher = self._local.hasher = blake3.blake3(key=self._key)
        found = []
        for block in blocks:
            hasher.update(block)
            found.append(hasher.digest())
            hasher.reset()
        return b"".join(found)

    def _read(self, readers: _Readers, batch: Batch) -> tuple[bytearray, int]:
        """The bytes of a batch, each run padded with zeroes to whole blocks; valid until the thread's next batch."""
        whole: bytearray | None = getattr(self._local, "area", None)
        if whole is None:
            whole = self._local.area = bytearray(BATCH_BYTES)
        area, at = memoryview(whole), 0
        self._options.pace.source(sum(length for _, length in batch))
        with readers.one() as reader:
            for offset, length in batch:
                reader.read_into(offset, area[at : at + length])
                padded = -(-length // self._block) * self._block
                area[at + length : at + padded] = bytes(padded - length)
                at += padded
        return whole, at

    def _parent_ids(self, base: BlockMap | None, batch: Batch, count: int) -> Ids:
        if base is None:
            return np.zeros((count, ID_BYTES), np.uint8)
        return np.concatenate([base.ids(first, n) for first, n in _block_runs(batch, self._block)])

    def _keep(self, editor: MapEditor, done: _Done) -> None:
        """Write the new chunks of a batch, and its ids into the map; on the thread that owns the writer."""
        figures = self._outcome.figures
        self._options.pace.store(sum(len(frame.data) for frame in done.frames))
        for frame in done.frames:
            self._writer.put_blocks(frame)
            figures.new_bytes += sum(frame.plain)
        at = 0
        for first, count in _block_runs(done.batch, self._block):
            if done.changed[at : at + count].any():
                editor.put(first, done.ids[at : at + count])
            at += count
        figures.changed_bytes += int(done.changed.sum()) * self._block
        figures.zero_blocks += done.zero_blocks
        figures.reused_blocks += done.reused_blocks


def _block_runs(batch: Batch, block: int) -> Iterator[tuple[int, int]]:
    """(first block, number of blocks) of each run of a batch."""
    return ((offset // block, -(-length // block)) for offset, length in batch)


class _Readers:
    """Connections to one frozen disk, opened when a worker needs one, closed with the stack.

    Thread safety: any thread.
    """

    def __init__(self, frozen: FrozenDisk, stack: ExitStack) -> None:
        self._frozen, self._stack = frozen, stack
        self._idle: queue.SimpleQueue[Reader] = queue.SimpleQueue()
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[Reader]:
        """A reader nobody else uses meanwhile."""
        try:
            reader = self._idle.get_nowait()
        except queue.Empty:
            with self._lock:
                reader = self._stack.enter_context(closing(self._frozen.open()))
        yield reader
        self._idle.put(reader)
