"""From a frozen disk into a journal: what changed is read in portions, and appended as facts of one set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from hvbackup import extents
from hvbackup.extents import Spans
from hvbackup.hypervisors import Reader
from hvbackup.model import DiskId, Instant, MiB
from hvbackup.nbd.client import NbdClient
from hvbackup.pipeline import Pace

AT_ONCE = Pace()
PIECE_BYTES = 1 * MiB  # read and appended at a time: bounds memory
ZERO_TEST_BYTES = (
    64 * 1024
)  # ranges at least this long are looked at for zeroes: the others cost more to look at than to keep


class Facts(Protocol):
    """Where facts go: a recorder, or what stands before one."""

    def write(self, disk: DiskId, t: Instant, extents: Sequence[tuple[int, int]], data: bytes | bytearray, /) -> None:
        """These extents, whose bytes follow each other in `data`."""

    def zero(self, disk: DiskId, t: Instant, extents: Sequence[tuple[int, int]], /) -> None:
        """These extents read as zeroes."""


def copy(recorder: Facts, disk: DiskId, t: Instant, reader: Reader, data: Spans, pace: Pace = AT_ONCE) -> None:
    """What a reader has in these ranges is appended when this returns.  Raises ReadFailed, SpaceExhausted."""
    for runs in portions(data):
        content = bytearray(sum(length for _, length in runs))
        pace.source(len(content))
        read_all(reader, runs, memoryview(content))
        zero, kept = _split(runs, content)
        if zero:
            recorder.zero(disk, t, zero)
        if kept:
            pace.store(sum(len(part) for _, part in kept))
            recorder.write(disk, t, [run for run, _ in kept], b"".join(part for _, part in kept) if zero else content)


def read_all(reader: Reader, runs: Sequence[tuple[int, int]], target: memoryview) -> None:
    """Fill `target` with the runs, one after the other; all in flight at once where the reader can."""
    wanted, at = [], 0
    for offset, length in runs:
        wanted.append((offset, target[at : at + length]))
        at += length
    if isinstance(reader, NbdClient):
        reader.read_many(wanted)
        return
    for offset, part in wanted:
        reader.read_into(offset, part)


def _split(
    runs: Sequence[tuple[int, int]], content: bytearray
) -> tuple[list[tuple[int, int]], list[tuple[tuple[int, int], memoryview]]]:
    """(long runs that are all zero, the others with their bytes)."""
    zero, kept, at = [], [], 0
    view = memoryview(content)
    for offset, length in runs:
        part = view[at : at + length]
        at += length
        if length >= ZERO_TEST_BYTES and not np.frombuffer(part, np.uint8).any():
            zero.append((offset, length))
        else:
            kept.append(((offset, length), part))
    return zero, kept


def portions(data: Spans) -> Iterator[list[tuple[int, int]]]:
    """Ranges cut and gathered so that each portion has at most PIECE_BYTES."""
    portion: list[tuple[int, int]] = []
    room = PIECE_BYTES
    for offset, length in extents.pieces(data, PIECE_BYTES):
        if length > room:
            yield portion
            portion, room = [], PIECE_BYTES
        portion.append((offset, length))
        room -= length
    if portion:
        yield portion
