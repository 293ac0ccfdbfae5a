"""The ring: a file on tmpfs between the target, which puts the guest's writes into it, and the worker, which takes them out.

It outlives both: whoever takes the journal over finds in it what was answered and is not durable yet.  It is never on a disk, so
nothing of the guest is ever on one in plain text; a power cut takes it, and that is the loss that group fsync promises.

    0      header: one page.  Magic, sizes and id by whoever makes it; heads, state and counters by the target; tails by
           the worker, and which thread of it is idle
    4096   rows_max rows, each a fact of the journal (store.format.FACT); row n is at n mod rows_max
    ..     data_max bytes: those of data rows one after the other, round and round

A row counts when `rows_head` has passed it.  The target never waits: a full ring breaks the stream, see target.c.

What both look at is read and written as whole words, which the processor never tears.  (`struct` goes byte by byte: a tail that
grew from 511 to 512 was 256 for a moment, and a target that looked just then took the ring for full.)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import SpaceExhausted, UsageError
from hvbackup.model import MiB

ROW = np.dtype(
    [
        (
            "t",
            "<i8",
        ),  # when it arrived, wall clock; never twice the same, unless that is set back by more than a minute
        ("offset", "<u8"),
        ("length", "<u8"),
        ("pos", "<u4"),
        ("disk", "<u2"),  # number of the export
        ("kind", "u1"),  # DATA, ZERO
        ("flags", "u1"),
    ]
)
Rows = NDArray[np.void]
DATA, ZERO = 1, 2

RECORDING, BROKEN = 1, 2  # states
ENDED = 4  # why
_WHY = {
    1: "its ring was full: what it held could not be made durable fast enough",
    2: "QEMU's connection to it was cut",
    3: "QEMU sent what it does not understand",
    4: "it was told to end",
}

DEFAULT_BYTES = 128 * MiB
_MAGIC = 0x31676E5262766800
_HEADER_BYTES = 4096
_ROW_PER_BYTES = 1024  # room for as many rows as there would be writes of this size
_MADE = struct.Struct("<QQQ16sQ")  # magic, rows_max, data_max, id, pid
_SMALL_BYTES = 1024  # a batch holds so many rows at most as if each had this much
LOOKED_AT_ROWS = 16384  # at once: what numpy costs a call is more than what it costs a row
# Which words of 8 bytes of the header are what: 8 of heads and state, two tails, four counters of each disk.
_PID, _IDLER, _CALLS, _HEADS, _STATE, _WHY_BROKEN, _TAILS, _DISKS = 5, 6, 7, 8, 11, 12, 16, 24


@dataclass(frozen=True, slots=True)
class Heads:
    """What the target has done so far."""

    rows: int
    data: int
    alive_ns: int  # monotonic clock of its newest sign of life
    state: int
    why: int
    broke_at: int
    lost: int
    flushes: int

    @property
    def broken(self) -> str:
        """Why nothing is kept any more; empty while everything is."""
        return _WHY.get(self.why, "it broke off") if self.state == BROKEN else ""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that were taken out, and their bytes; `pos` says where in `data` those of a row are."""

    rows: Rows
    data: bytes | memoryview  # valid until the room is given back
    row_end: int  # the ring's tail once they are durable
    data_end: int


class Ring:
    """One ring, made or found.  Thread safety: one worker; anybody may read the heads."""

    def __init__(self, fd: int) -> None:
        """Takes the descriptor.  Raises UsageError when it is no ring of ours."""
        self.fd = fd
        size = os.fstat(fd).st_size
        if size < _HEADER_BYTES:
            raise UsageError("What should be the ring of a stream is too short")
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        magic, self.rows_max, self.data_max, ident, _ = _MADE.unpack_from(self._map)
        if magic != _MAGIC or size < _HEADER_BYTES + self.rows_max * ROW.itemsize + self.data_max:
            raise UsageError("What should be the ring of a stream is none")
        self.id: str = ident.hex()
        self._words = memoryview(self._map)[:_HEADER_BYTES].cast("Q")
        self._rows: Rows = np.frombuffer(self._map, ROW, self.rows_max, _HEADER_BYTES)
        self._data = memoryview(self._map)[_HEADER_BYTES + self._rows.nbytes :][: self.data_max]

    @property
    def pid(self) -> int:
        """The target's."""
        return self._words[_PID]

    @property
    def heads(self) -> Heads:
        """What the target has done so far."""
        return Heads(*(self._words[_HEADS + i] for i in range(8)))

    @property
    def tails(self) -> tuple[int, int]:
        """Everything before these is durable elsewhere: rows, bytes."""
        return self._words[_TAILS], self._words[_TAILS + 1]

    def written(self, disk: int) -> tuple[int, int]:
        """Writes and bytes of one disk that are, or were, in the ring."""
        first = _DISKS + 4 * disk
        return self._words[first], self._words[first + 1]

    def batches(self, after: int, after_data: int, max_bytes: int, until: int | None = None) -> Iterator[Batch]:
        """What came after these rows and bytes, until now or a row, in pieces of about `max_bytes`.  The tail stays."""
        end, rows_max = self.heads.rows if until is None else until, max(1, max_bytes // _SMALL_BYTES)
        while after < end:
            rows = self._some_rows(after, min(end - after, self.rows_max, LOOKED_AT_ROWS))
            sizes = np.where(rows["kind"] == DATA, rows["length"], 0).astype(np.int64)
            ends = np.cumsum(sizes)
            starts, first = ends - sizes, 0
            while first < len(rows):
                base = int(starts[first])
                fits = int(ends.searchsorted(base + max_bytes, side="right"))
                last = max(first + 1, min(fits, first + rows_max, len(rows)))
                batch, at, total = rows[first:last], after_data + base, int(ends[last - 1]) - base
                batch["pos"] = starts[first:last] - base
                yield Batch(batch, self._bytes(at, total), after + last, at + total)
                first = last
            after, after_data = after + len(rows), after_data + int(ends[-1])

    def _some_rows(self, first: int, count: int) -> Rows:
        """A copy of so many rows, which begin again at the front of the ring when they come to its end."""
        inside = first % self.rows_max
        rows = self._rows[inside : inside + count]
        return rows.copy() if len(rows) == count else np.concatenate([rows, self._rows[: count - len(rows)]])

    def _bytes(self, at: int, length: int) -> bytes | memoryview:
        inside = at % self.data_max
        first = self._data[inside : inside + length]
        return b"".join((first, self._data[: length - len(first)])) if len(first) < length else first

    def free(self, rows: int, data: int) -> None:
        """Everything before these is durable: the target may use the room."""
        self._words[_TAILS], self._words[_TAILS + 1] = rows, data

    @property
    def idler(self) -> int:
        """The thread of the worker that is idle, of the system's numbers; 0: none."""
        return self._words[_IDLER]

    @idler.setter
    def idler(self, thread: int) -> None:
        self._words[_IDLER] = thread

    @property
    def calls(self) -> int:
        """How often the target has called it."""
        return self._words[_CALLS]

    def end(self) -> None:
        """Nothing is kept any more: the mirrors of several disks do not end at the same moment."""
        if self.heads.state == RECORDING:
            self._words[_WHY_BROKEN] = ENDED
            self._words[_STATE] = BROKEN

    def close(self) -> None:
        """Let go of it; the file stays."""
        self._data.release()
        self._words.release()
        del self._rows
        with contextlib.suppress(BufferError):  # somebody still looks at a batch: it goes with the last one
            self._map.close()
        os.close(self.fd)


def make(path: Path, size: int = DEFAULT_BYTES) -> Ring:
    """A new ring with room for `size` bytes of writes, all of it claimed at once.  Raises SpaceExhausted."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    rows_max = size // _ROW_PER_BYTES
    try:
        os.posix_fallocate(fd, 0, _HEADER_BYTES + rows_max * ROW.itemsize + size)
    except OSError as e:
        os.close(fd)
        path.unlink()
        raise SpaceExhausted(f"No {size} bytes for the ring of a stream on {path.parent}: {e.strerror}") from e
    os.pwrite(fd, _MADE.pack(_MAGIC, rows_max, size, secrets.token_bytes(16), 0), 0)
    return Ring(fd)


def find(path: Path) -> Ring | None:
    """A ring that somebody left; None when there is none."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return Ring(fd)
    except (UsageError, ValueError):
        os.close(fd)
        return None
