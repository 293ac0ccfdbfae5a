"""Restore: a view, written to a raw file, a qcow2 file, a block device or an NBD export.

Every block is verified against its id before it is written.  A target that holds something already (a restore that was
interrupted, a device) is compared by hash first, and only blocks that differ are decoded and
written: a restore never starts over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import blake3
import numpy as np

from hvbackup.errors import UsageError
from hvbackup.files import PARTIAL, RawTarget
from hvbackup.pipeline import ordered
from hvbackup.store.blockmap import Ids
from hvbackup.store.format import ID_BYTES, PAGE_IDS
from hvbackup.store.view import DiskView

THREADS = 2
LEAVES_AHEAD = 4  # bounds memory: a leaf of 64 KiB blocks is 16 MiB


class Target(Protocol):
    """Where a disk goes.  Thread safety: every method from any thread."""

    resumed: bool  # it may hold something else than zeroes

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


def check_target(path: Path, *, resume: bool, replace: bool) -> None:
    """Refuse what would overwrite something.  Raises UsageError naming the option that allows it."""
    partial = path.with_name(path.name + PARTIAL)
    if path.is_block_device():
        if not replace:
            raise UsageError(f"{path} is a device and will be overwritten; say --replace to allow that")
        return
    if path.exists() and not replace:
        raise UsageError(f"{path} exists; say --replace to overwrite it, or choose another name")
    if partial.exists() and not resume and not replace:
        raise UsageError(
            f"{partial} is left from a restore that did not end; say --resume to go on, --replace to start over"
        )
    if partial.exists() and not resume:
        partial.unlink()
    if not path.parent.is_dir():
        raise UsageError(f"There is no directory {path.parent}")


def restore(view: DiskView, target: Target, key: bytes, progress: Callable[[int, int], None]) -> Restored:
    """The target holds the disk, durably, when this returns.  `key` is the store's block key; `progress` gets done and total.

    Raises ChunkDamaged, SpaceExhausted, HostUnreachable; then what was written stays for the next try.
    """
    work = _Work(view, target, key)
    done = Restored(size=view.size)
    leaves = work.all_leaves() if target.resumed else view.leaves()
    with closing(ordered(leaves, work.leaf, threads=THREADS, depth=LEAVES_AHEAD)) as results:
        for end, written, kept in results:
            done.written_bytes += written
            done.kept_bytes += kept
            progress(end, view.size)
    target.finish()
    progress(view.size, view.size)
    return done


def to_file(view: DiskView, path: Path, key: bytes, progress: Callable[[int, int], None]) -> Restored:
    """A raw file or block device holds the disk when this returns."""
    with closing(RawTarget(path, view.size)) as target:
        return restore(view, target, key, progress)


class _Work:
    """Leaves of a map, written to a target."""

    def __init__(self, view: DiskView, target: Target, key: bytes) -> None:
        self._view, self._target, self._key = view, target, key
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

    def leaf(self, item: tuple[int, Ids]) -> tuple[int, int, int]:
        """Write what differs of one leaf; (end on the disk, bytes written, bytes kept)."""
        first, ids = item
        view = self._view
        end = min((first + PAGE_IDS) * view.block, view.size)
        kept = 0
        if self._target.resumed:
            ids, kept = self._differing(first, ids, end)
        written = 0
        for offset, data in view.contents(first, ids):
            self._target.write(offset, data)
            written += len(data)
        return end, written, kept

    def _differing(self, first: int, ids: Ids, end: int) -> tuple[Ids, int]:
        """The ids whose blocks the target does not hold (zero for those it does); zero blocks are written here."""
        block, start = self._view.block, first * self._view.block
        area = self._area(PAGE_IDS * block)
        area[end - start :] = bytes(len(area) - (end - start))
        self._target.read_into(start, area[: end - start])
        some = np.frombuffer(area, np.uint64).reshape(PAGE_IDS, -1).any(axis=1)
        empty = np.logical_not(some).tolist()
        wanted, kept = ids.copy(), 0
        for i in range(min(PAGE_IDS, -(-(end - start) // block))):
            length = min(block, end - start - i * block)
            if not ids[i].any():
                if not empty[i]:
                    self._target.zero(start + i * block, length)
            elif not empty[i] and self._holds(area[i * block : (i + 1) * block], ids[i].tobytes()):
                wanted[i] = 0
                kept += length
        return wanted, kept

    def _holds(self, data: memoryview, chunk: bytes) -> bool:
        return blake3.blake3(data, key=self._key).digest() == chunk

    def _area(self, size: int) -> memoryview:
        area: memoryview | None = getattr(self._local, "area", None)
        if area is None:
            area = self._local.area = memoryview(bytearray(size))
        return area
