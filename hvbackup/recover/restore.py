"""Restore: a view, written to a raw file, a qcow2 file or a block device.

    leaves of the map  ->  what the target lacks  ->  batches in the order of the packs  ->  read, decode, verify, write
                           (threads: read, hash)                                             (threads)

Every block is verified against its id before it is written.  A target that holds something (a restore that was interrupted, an
older state of the disk) is compared by hash first when `compare` says so: nothing that it holds is believed, and only blocks
that differ are decoded and written.  Blocks are read as the packs have them, not as the disk has them: many small captures
scatter a disk over many packs.
"""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import UsageError
from hvbackup.files import PARTIAL
from hvbackup.model import MiB
from hvbackup.pipeline import Take, at_once, ordered
from hvbackup.recover import inuse
from hvbackup.recover.rawtarget import RawTarget
from hvbackup.store.chunks.view import DiskView
from hvbackup.store.format.blockmap import Ids
from hvbackup.store.format.layout import ID_BYTES, PAGE_IDS

THREADS = max(2, min(8, os.cpu_count() or 1))  # decoding a block releases the interpreter lock; a core does 300 MB/s
WINDOW_BLOCKS = 16 * 1024  # put into the order of the packs together: 1 GiB of a disk
WINDOW_LEAVES = 1024  # and at most so many leaves, so that progress is seen where nothing has to be written
BATCH_BLOCKS = 64  # read, decoded and written by one thread at a time
COMPARE_BYTES = 4 * MiB  # read back at a time by one thread: bounds memory


class Mode(enum.StrEnum):
    """What a restore does with what is there."""

    NEW = "new"  # nothing may be there
    RESUME = "resume"  # go on with a restore that did not end
    REPLACE = "replace"  # what is there goes, whatever it is
    DIFFERENTIAL = "differential"  # what is there stays where it is right, and is overwritten where it differs

    @property
    def compares(self) -> bool:
        """Whether what the target holds is looked at."""
        return self in (Mode.RESUME, Mode.DIFFERENTIAL)


class Target(Protocol):
    """Where a disk goes.  Thread safety: every method from any thread."""

    blank: bool  # it reads as zeroes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what the target holds now."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`."""

    def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes."""

    def finish(self) -> None:
        """What was written is durable when this returns."""

    def close(self) -> None:
        """Let go; what was written stays."""


@dataclass(slots=True)
class Restored:
    """What a restore did."""

    size: int = 0
    written_bytes: int = 0
    kept_bytes: int = 0  # the target held them already


def check_target(path: Path, mode: Mode, form: str) -> None:
    """Refuse what would overwrite something, or what is in use.  Raises UsageError naming the option that allows it, Busy."""
    if path.is_block_device():
        _check_device(path, mode, form)
        return
    partial = path.with_name(path.name + PARTIAL)
    if not path.parent.is_dir():
        raise UsageError(f"There is no directory {path.parent}")
    for there in (path, partial):
        if there.exists() and not there.is_file():
            raise UsageError(f"{there} is neither a file nor a block device; choose another name")
    if path.exists():
        inuse.refuse_file(path)
    if path.exists() and mode in (Mode.NEW, Mode.RESUME):
        raise UsageError(
            f"{path} exists; say --replace to overwrite it, --differential to change only what differs, or choose another name"
        )
    if partial.exists() and mode is Mode.NEW:
        raise UsageError(
            f"{partial} is left from a restore that did not end; say --resume to go on, --replace to start over"
        )


def _check_device(path: Path, mode: Mode, form: str) -> None:
    if form != "raw":
        raise UsageError(f"{path} is a device: it takes a raw disk, no {form} image; say --format raw")
    if mode is Mode.NEW:
        raise UsageError(
            f"{path} is a device and will be overwritten; say --replace to allow that, "
            "or --differential to write only what differs"
        )
    inuse.refuse_device(path)


def restore(
    view: DiskView,
    target: Target,
    key: bytes,
    progress: Callable[[int, int], None],
    *,
    compare: bool,
    take: Take = at_once,
) -> Restored:
    """The target holds the disk, durably, when this returns.  `key` is the store's block key; `progress` gets done and total.

    Raises ChunkDamaged, SpaceExhausted, HostUnreachable; then what was written stays for the next try.
    """
    work = _Work(view, target, key, take, compare=compare)
    done = Restored(size=view.size)
    leaves = view.leaves() if target.blank else work.all_leaves()
    with (
        closing(ordered(leaves, work.lacking, threads=THREADS, depth=2 * THREADS)) as lacking,
        closing(ordered(work.batches(lacking), work.write, threads=THREADS, depth=2 * THREADS)) as results,
    ):
        for batch, written in results:
            done.written_bytes += written
            done.kept_bytes += batch.kept_bytes
            progress(batch.end, view.size)
    target.finish()
    progress(view.size, view.size)
    return done


def to_file(
    view: DiskView, path: Path, key: bytes, progress: Callable[[int, int], None], mode: Mode, take: Take = at_once
) -> Restored:
    """A raw file or block device holds the disk when this returns."""
    with closing(RawTarget(path, view.size, keep=mode is not Mode.REPLACE, in_place=mode is Mode.DIFFERENTIAL)) as t:
        return restore(view, t, key, progress, compare=mode.compares, take=take)


@dataclass(frozen=True, slots=True)
class _Lacking:
    """A leaf, with zero for every block that need not be written."""

    first: int
    ids: Ids
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Blocks that lie near each other in the store."""

    blocks: NDArray[np.int64]
    ids: Ids
    end: int  # how far on the disk all is done, when this batch and those before it are
    kept_bytes: int


class _Work:
    """The stages of one restore.  Thread safety: `lacking` and `write` from any thread."""

    def __init__(self, view: DiskView, target: Target, key: bytes, take: Take, *, compare: bool) -> None:
        self._view, self._target, self._key, self._take, self._compare = view, target, key, take, compare
        self._local = threading.local()

    def all_leaves(self) -> Iterator[tuple[int, Ids]]:
        """Every leaf of the disk, the zero ones too: a target that holds something must be told of zeroes."""
        zero = np.zeros((PAGE_IDS, ID_BYTES), np.uint8)
        next_first = 0
        for first, ids in self._view.leaves():
            yield from ((n, zero) for n in range(next_first, first, PAGE_IDS))
            yield first, ids
            next_first = first + PAGE_IDS
        yield from ((n, zero) for n in range(next_first, self._view.blocks, PAGE_IDS))

    # -- what the target lacks -----------------------------------------------------------------------------------------

    def lacking(self, leaf: tuple[int, Ids]) -> _Lacking:
        """What must be written of a leaf; what must be zero is, when this returns."""
        first, ids = leaf
        if self._target.blank:
            return _Lacking(first, ids, 0)
        if not self._compare:
            self._zero_blocks(first, ids)
            return _Lacking(first, ids, 0)
        return self._compared(first, ids)

    def _zero_blocks(self, first: int, ids: Ids) -> None:
        """Every zero block of a leaf is zero on the target."""
        block, size = self._view.block, self._view.size
        edges = np.flatnonzero(np.diff(np.r_[False, ~ids.any(axis=1), False].astype(np.int8)))
        for lo, hi in edges.reshape(-1, 2).tolist():
            start, end = (first + lo) * block, min((first + hi) * block, size)
            if end > start:
                self._target.zero(start, end - start)

    def _compared(self, first: int, ids: Ids) -> _Lacking:
        """Nothing is taken for granted but what the target gives back now."""
        block, wanted, kept = self._view.block, ids.copy(), 0
        step = COMPARE_BYTES // block
        for i in range(0, min(PAGE_IDS, self._view.blocks - first), step):
            for at in self._right(first + i, ids[i : i + step]):
                wanted[i + at] = 0
                kept += self._length(first + i + at)
        return _Lacking(first, wanted, kept)

    def _right(self, first: int, ids: Ids) -> Iterator[int]:
        """Which of these blocks the target holds; blocks that must be zero are made so here."""
        block = self._view.block
        data = self._read_back(first * block, len(ids) * block)
        words: NDArray[np.uint64] = np.frombuffer(data, np.uint64).reshape(len(ids), -1)
        has: NDArray[np.bool_] = np.asarray(words.any(axis=1), np.bool_)
        wants: NDArray[np.bool_] = np.asarray(ids.any(axis=1), np.bool_)
        for i in range(len(ids)):
            if has[i] and not wants[i]:
                self._target.zero((first + i) * block, self._length(first + i))
            elif has[i] and self._holds(data[i * block : (i + 1) * block], ids[i].tobytes()):
                yield i

    def _length(self, number: int) -> int:
        """How many bytes of a block are on the disk."""
        return max(0, min(self._view.block, self._view.size - number * self._view.block))

    def _read_back(self, start: int, length: int) -> memoryview:
        """What the target holds, with zeroes behind the end of the disk; valid until the thread's next call."""
        area: memoryview | None = getattr(self._local, "area", None)
        if area is None:
            area = self._local.area = memoryview(bytearray(COMPARE_BYTES))
        inside = min(length, self._view.size - start)
        self._target.read_into(start, area[:inside])
        area[inside:length] = bytes(length - inside)
        return area[:length]

    def _holds(self, data: memoryview, chunk: bytes) -> bool:
        return blake3.blake3(data, key=self._key).digest() == chunk

    # -- writing -------------------------------------------------------------------------------------------------------

    def batches(self, leaves: Iterable[_Lacking]) -> Iterator[_Batch]:
        """What is lacking, window by window, in the order in which it is read best."""
        window: list[_Lacking] = []
        count = 0
        for leaf in leaves:
            window.append(leaf)
            count += int(leaf.ids.any(axis=1).sum())
            if count >= WINDOW_BLOCKS or len(window) >= WINDOW_LEAVES:
                yield from self._cut(window)
                window, count = [], 0
        if window:
            yield from self._cut(window)

    def _cut(self, window: list[_Lacking]) -> Iterator[_Batch]:
        """A window as batches; at least one, which tells of what was kept."""
        ids = np.concatenate([leaf.ids for leaf in window])
        blocks = np.concatenate([leaf.first + np.arange(PAGE_IDS) for leaf in window])
        some = ids.any(axis=1)
        ids, blocks = np.ascontiguousarray(ids[some]), blocks[some]
        order = self._view.reading_order(ids)
        kept = sum(leaf.kept_bytes for leaf in window)
        start = window[0].first * self._view.block
        end = min((window[-1].first + PAGE_IDS) * self._view.block, self._view.size)
        for at in range(0, max(1, len(order)), BATCH_BLOCKS):
            part = order[at : at + BATCH_BLOCKS]
            done = (at + len(part)) / len(order) if len(order) else 1.0
            yield _Batch(blocks[part], ids[part], start + int((end - start) * done), kept if at == 0 else 0)

    def write(self, batch: _Batch) -> tuple[_Batch, int]:
        """(the batch, how many bytes of it were written)."""
        written = 0
        self._take(len(batch.blocks) * self._view.block)
        for offset, data in self._view.contents_of(batch.blocks, batch.ids):
            self._target.write(offset, data)
            written += len(data)
        return batch, written
