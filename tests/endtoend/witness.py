"""A witness for disks that are written to while they are captured: every write is remembered in its order.

A capture of all disks at one moment holds the first n writes and no other, for some n that is not smaller than what was
acknowledged before the capture began.  Which n is looked up in the content itself, for every 4 KiB that are written begin with
the write's number; then the disks as they were after n writes are the reference, byte for byte.  A write of zeroes or a
discard carries no number and may hide the last ones, so the states from the highest number that is seen are tried in turn.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from hvbackup.errors import HostUnreachable
from hvbackup.model import KiB
from hvbackup.nbd.client import NbdClient

CELL_BYTES = 4 * KiB
TRIM_BYTES = 64 * KiB  # QEMU ignores discards of less than a cluster
HEAD = struct.Struct("<QQ")
MAGIC = 0x7373656E74697768
PAUSE_SECONDS = 0.002

Content = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Write:
    """One write of the guest; without data it is zeroes, or a discard that should read as zeroes."""

    disk: str
    offset: int
    length: int
    data: bytes | None
    trim: bool = False

    def apply(self, state: Mapping[str, bytearray]) -> None:
        state[self.disk][self.offset : self.offset + self.length] = self.data or bytes(self.length)


class History:
    """All writes to the disks of one machine.  Thread safety: one thread writes, another may match meanwhile."""

    def __init__(self, content: Content) -> None:
        self._base = {disk: bytearray(data) for disk, data in content.items()}
        self._first = 0  # writes that are in the base already
        self._log: list[Write] = []
        self.acked = 0

    @property
    def begun(self) -> int:
        return self._first + len(self._log)

    def begin(self, write: Write) -> None:
        """The write may be on the disk from now on."""
        self._log.append(write)

    def end(self, found: bytes | None = None) -> None:
        """The newest write is on the disk; `found` is what it left there, where that was not certain."""
        if found is not None:
            self._log[-1] = replace(self._log[-1], data=found)
        self.acked = self.begun

    def rebase(self, content: Content) -> None:
        """A crash decided what of the last writes is on the disks; from now on this is the truth."""
        self._first, self._log = self.begun, []
        self._base = {disk: bytearray(data) for disk, data in content.items()}
        self.acked = self.begun

    def match(self, content: Content, lowest: int) -> int:
        """How many writes the content holds, exactly these and nothing else; at least `lowest`."""
        newest = max(_newest(data) for data in content.values())
        state = {disk: bytearray(data) for disk, data in self._base.items()}
        for number in range(self._first, self.begun + 1):
            if number > self._first:
                self._log[number - self._first - 1].apply(state)
            if number >= max(newest, lowest) and all(state[d] == content[d] for d in state):
                return self._advance(number, state)
        raise AssertionError(self._explained(content, newest, lowest))

    def _advance(self, number: int, state: dict[str, bytearray]) -> int:
        """Later points hold at least as many writes: forget the others."""
        del self._log[: number - self._first]
        self._first, self._base = number, state
        return number

    def _explained(self, content: Content, newest: int, lowest: int) -> str:
        state = {disk: bytearray(data) for disk, data in self._base.items()}
        for write in self._log[: max(0, max(newest, lowest) - self._first)]:
            write.apply(state)
        wrong = {d: _differences(state[d], content[d]) for d in state}
        return (
            f"The content has writes up to {newest} (acknowledged before: {lowest}, begun: {self.begun}, remembered from "
            f"{self._first}) and is no state of the disks; near the state after {max(newest, lowest)} differ: {wrong}"
        )


def _newest(data: bytes) -> int:
    """The highest number of a write that can be seen."""
    whole = len(data) // CELL_BYTES * CELL_BYTES
    cells = np.frombuffer(data[:whole], np.uint64).reshape(-1, CELL_BYTES // 8)[:, :2]
    heads = cells[cells[:, 0] == MAGIC]
    tail = HEAD.unpack_from(data, whole) if len(data) - whole >= HEAD.size else (0, 0)
    return max(int(heads[:, 1].max(initial=0)), tail[1] if tail[0] == MAGIC else 0)


def _differences(one: bytes | bytearray, other: bytes) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} bytes"
    places = [at for at in range(0, len(one), CELL_BYTES) if one[at : at + CELL_BYTES] != other[at : at + CELL_BYTES]]
    return f"{len(places)} cells, at {places[:5]}"


class Guest:
    """Writes to the disks without a pause, over connections of its own, until it is stopped or its machine is gone.

    with Guest(connect, sizes, history, rng):
        ...
    """

    def __init__(
        self,
        connect: Callable[[str], NbdClient],
        sizes: Mapping[str, int],
        history: History,
        rng: random.Random,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._disks = {disk: connect(disk) for disk in sizes}
        self._sizes, self._history, self._rng, self._pause = sizes, history, rng, pause_seconds
        self._stop = threading.Event()
        self.error: HostUnreachable | None = None
        self._thread = threading.Thread(target=self._write_on, name="guest", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The guest writes no more."""
        self._stop.set()
        self._thread.join(120)
        for client in self._disks.values():
            client.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _write_on(self) -> None:
        while not self._stop.is_set():
            try:
                self.write()
            except HostUnreachable as error:
                self.error = error
                return
            time.sleep(self._pause)

    def write(self) -> None:
        """One write, acknowledged when this returns."""
        write = self._drawn(self._history.begun + 1)
        self._history.begin(write)
        client = self._disks[write.disk]
        if write.trim:
            # QEMU may do nothing, and does (7.2) as long as a snapshot is open, so what it did has to be looked at.
            client.trim(write.offset, write.length)
            found = bytearray(write.length)
            client.read_into(write.offset, memoryview(found))
            self._history.end(bytes(found))
            return
        if write.data is not None:
            client.write(write.offset, write.data)
        else:
            client.write_zeroes(write.offset, write.length)
        self._history.end()

    def _drawn(self, number: int) -> Write:
        disk = self._rng.choice(list(self._sizes))
        size, kind = self._sizes[disk], self._rng.random()
        if kind < 0.1:
            offset = self._rng.randrange(size // TRIM_BYTES) * TRIM_BYTES
            return Write(disk, offset, TRIM_BYTES, None, trim=True)
        offset = self._rng.randrange(-(-size // CELL_BYTES)) * CELL_BYTES
        length = min(self._rng.randrange(1, 9) * CELL_BYTES, size - offset)
        if kind < 0.25:
            return Write(disk, offset, length, None)
        head = HEAD.pack(MAGIC, number)
        cells = (head + self._rng.randbytes(CELL_BYTES - len(head)) for _ in range(-(-length // CELL_BYTES)))
        return Write(disk, offset, length, b"".join(cells)[:length])
