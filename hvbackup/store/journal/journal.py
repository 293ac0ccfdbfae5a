"""The journal of a machine: the ordered facts of all its disks, as they arrived.

    journals/MACHINE/EPOCH-SEQ.log     open: frames of facts, appended, fsynced in groups
    journals/MACHINE/EPOCH-SEQ.seg     sealed: the same facts, compressed (segment.py)
    journals/MACHINE/EPOCH-SEQ-LAST.seg    several of those in one (merging.py); they don't count any more

A moment is a durable barrier: the state after the last fact of a frame with the barrier flag, or after each of its facts where
they are single writes of a stream.  Facts behind the last barrier of a log are no part of any moment, and are dropped when the
log is taken over.  Order comes from the sequence; times label.

    killed after                left behind                           cleaned by
    1 log created               an empty log                          take_over(): removed
    2 some frames written       a log with a torn end                 take_over(): sealed up to its last barrier
    3 segment renamed           the segment, and its log              whoever takes over removes the log in its turn
    4 log removed               nothing

A log is never appended to after it was reopened: `take_over` seals what is good, and a new file begins with a new epoch.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from hvbackup.errors import HvbackupError, StoreDamage
from hvbackup.files import Files
from hvbackup.model import Instant, KiB, MiB
from hvbackup.store.format import layout as f
from hvbackup.store.format.keys import Keyring
from hvbackup.store.format.sealed import parse_header
from hvbackup.store.journal.logfile import BLOCK_BYTES, LogFile

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FOLDER = "journals"
LOG, SEGMENT = ".log", ".seg"
KEPT_BYTES = MiB  # what of a log's memory is kept from frame to frame
SMALL_BYTES = 64 * KiB  # and of one that has had small frames only
INDEX_MAX_BYTES = 8 * MiB  # of facts: a log of more has no index

Facts = NDArray[np.void]  # of format.FACT


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a file of a journal: its epoch and first sequence number order it."""

    epoch: int
    first: int
    suffix: str
    last: int | None = None  # of a merged segment: its last sequence number

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return f"{self.epoch:08d}-{self.first:020d}" + ("" if self.last is None else f"-{self.last:020d}")

    def __str__(self) -> str:
        return self.stem + self.suffix

    def covers(self, other: Name) -> bool:
        """Whether this file has all that the other one has, which therefore does not count."""
        if self.epoch != other.epoch or self == other:
            return False
        if self.last is None:
            return self.first == other.first and self.suffix == SEGMENT and other.suffix == LOG
        return self.first <= other.first and (other.last or other.first) <= self.last


def parse_name(name: str) -> Name | None:
    """The parts of a file's name, or None for a file that is none of ours."""
    stem, suffix = os.path.splitext(name)
    parts = stem.split("-")
    if suffix not in (LOG, SEGMENT) or not all(part.isdigit() for part in parts):
        return None
    if len(parts) == 3 and suffix == SEGMENT:
        return Name(int(parts[0]), int(parts[1]), suffix, int(parts[2]))
    return Name(int(parts[0]), int(parts[1]), suffix) if len(parts) == 2 else None


def list_files(files: Files, machine: str) -> list[Name]:
    """The files of a machine's journal in their order; where a log and its segment both exist, the segment alone, and where a
    merged segment and its parts, the merged one.

    Files of an old epoch that begin at the number which a newer epoch leaves out before its own, or behind it, are fenced off:
    a writer that did not know it was replaced.
    """
    return counting(all_files(files, machine))


def counting(names: Sequence[Name]) -> list[Name]:
    """As `list_files`, of these.  Pure."""
    kept = uncovered(names)
    begins: dict[int, int] = {}
    for n in kept:
        begins[n.epoch] = min(begins.get(n.epoch, n.first), n.first)
    return sorted(
        (n for n in kept if all(n.first < first - 1 for epoch, first in begins.items() if epoch > n.epoch)),
        key=lambda n: (n.first, n.epoch),
    )


def all_files(files: Files, machine: str) -> list[Name]:
    """Every file of a machine's journal, also those that do not count."""
    return [n for name in files.names(f"{FOLDER}/{machine}") if (n := parse_name(name))]


def uncovered(names: Sequence[Name]) -> list[Name]:
    """The files that count."""
    kept: list[Name] = []
    # Whoever covers another one comes before it.
    for n in sorted(names, key=lambda n: (n.epoch, n.first, -(n.last or 0), n.suffix == LOG)):
        if not (kept and kept[-1].covers(n)):
            kept.append(n)
    return kept


@dataclass(frozen=True, slots=True)
class Frame:
    """Facts that were appended together, and their bytes."""

    first: int
    facts: Facts
    data: memoryview
    t: Instant
    barrier: bool
    each: bool = False  # every fact is a barrier of its own
    end: int = 0  # where in the log the next one begins


@dataclass(frozen=True, slots=True)
class Index:
    """What a log that has ended holds, up to its last barrier."""

    facts: Facts  # `pos` is a place in the stream of all their bytes, barriers are flagged
    frames: NDArray[np.void]  # of FRAME_ROW: those that hold them
    remarks: bytes  # of the META facts, one after the other


class LogWriter:
    """Appends facts to a log that it creates.  Thread safety: one thread."""

    def __init__(self, files: Files, ring: Keyring, machine: str, epoch: int, first: int) -> None:
        self.name = Name(epoch, first, LOG)
        self.next = first  # sequence number of the next fact
        self._salt = os.urandom(32)
        self._cipher = ring.cipher(self._salt, f.KIND_LOG)
        path = f"{FOLDER}/{machine}/{self.name}"
        self._bind = f.bound(ring.store, f.KIND_LOG, path)
        self._ordinal = 0
        self._buffer = bytearray()
        self._facts: Facts | None = _room(INDEX_MAX_BYTES)  # what its index will say; None when that is too much
        self._count, self._bytes = 0, 0  # of facts so far, and of their bytes
        self._frames: list[tuple[int, int, int]] = []  # as FRAME_ROW
        self._remarks = bytearray()
        self._good = 0, 0, 0  # how many frames, facts, and bytes of remarks make up moments
        self._file = LogFile(files, path)
        flags = f.FLAG_ENCRYPTED if self._cipher else 0
        head = f.HEADER.pack(f.HEADER_MAGIC, f.FORMAT, f.KIND_LOG, flags, ring.store, self._salt, 0)
        self._file.room(f.HEADER_BYTES)[:] = f.with_crc(head)
        self._file.take(f.HEADER_BYTES)

    @property
    def size(self) -> int:
        """Bytes appended so far."""
        return self._file.size

    def append(
        self, facts: Facts, data: bytes | bytearray | memoryview, t: Instant, *, barrier: bool, each: bool = False
    ) -> int:
        """The facts are in the log when this returns the sequence number of the last one, and durable once `sync` has returned.

        `pos` of each fact says where its bytes are in `data`; `each`: all of them are barriers.
        """
        flags = f.FLAG_BARRIER | f.FLAG_EACH if each else f.FLAG_BARRIER if barrier else 0
        at = self._file.size
        self._put(f.FRAME_MAGIC, self.next, facts, data, flags, t)
        self.next += len(facts)
        self._note_frame(at, Frame(self.next, facts, memoryview(data), t, barrier, each))
        return self.next - 1

    def _put(
        self, magic: bytes, first: int, facts: Facts, data: bytes | bytearray | memoryview, flags: int, t: int
    ) -> None:
        """A frame, or what looks like one."""
        plain = len(facts) * f.FACT.itemsize + len(data)
        stored = plain + (16 if self._cipher else 0)
        head = f.FRAME.pack(magic, self._ordinal, first, len(facts), stored, plain, flags, t, time.monotonic_ns())
        frame = self._file.room(f.FRAME_BYTES + stored)
        payload = frame[f.FRAME_BYTES :]
        if self._cipher:
            nonce, bound = self._ordinal.to_bytes(12, "little"), self._bind + head
            self._cipher.encrypt_into(nonce, self._joined(facts, data, self._plain(plain)), bound, payload)
        else:
            self._joined(facts, data, payload)
        frame[: f.FRAME_BYTES] = f.with_crc(head, payload)
        self._file.take(len(frame))
        self._ordinal += 1

    def _note_frame(self, at: int, frame: Frame) -> None:
        """The index will have it."""
        if self._facts is None:
            return
        begin, self._count = self._count, self._count + len(frame.facts)
        self._remarks += remarks_of(frame)
        if self._count * f.FACT.itemsize + len(self._remarks) > INDEX_MAX_BYTES:
            self._facts = None
            return
        join(frame, self._facts[begin : self._count], self._bytes)
        self._frames.append((at, len(frame.facts), len(frame.data)))
        self._bytes += len(frame.data)
        if frame.barrier:
            self._good = len(self._frames), self._count, len(self._remarks)

    def _index(self) -> None:
        """Behind the frames: whoever reads the log finds its facts there, and reads of the frames what it needs."""
        assert self._facts is not None
        frames, facts, remarks = self._good
        rows, at = np.array(self._frames[:frames], f.FRAME_ROW).tobytes(), self._file.size
        self._put(f.INDEX_MAGIC, self.name.first, self._facts[:facts], rows + self._remarks[:remarks], frames, 0)
        end = f.LOG_END.pack(f.INDEX_MAGIC, crc32(self._salt + at.to_bytes(8, "little")), at)
        size = -(self._file.size + len(end)) % BLOCK_BYTES + len(end)
        self._file.room(size)[:] = end.rjust(size, b"\0")
        self._file.take(size)

    def _plain(self, size: int) -> memoryview:
        """Memory for a frame before it is encrypted; a small one is used again: mapping some anew costs as much as the cipher."""
        if size > KEPT_BYTES:
            return memoryview(bytearray(size))
        if len(self._buffer) < size:
            self._buffer = bytearray(KEPT_BYTES if size > SMALL_BYTES else SMALL_BYTES)
        return memoryview(self._buffer)[:size]

    @staticmethod
    def _joined(facts: Facts, data: bytes | bytearray | memoryview, into: memoryview) -> memoryview:
        into[: facts.nbytes], into[facts.nbytes :] = facts.tobytes(), data
        return into

    def note(self, t: Instant, value: dict[str, Any], *, barrier: bool) -> int:
        """Append one META fact."""
        data = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
        fact = np.zeros(1, f.FACT)
        fact["t"], fact["length"], fact["kind"] = t, len(data), f.FACT_META
        return self.append(fact, data, t, barrier=barrier)

    def past_cache(self, on: bool) -> None:
        """Write past the page cache from here on, or through it."""
        self._file.past_cache(on)

    def sync(self) -> None:
        """Everything appended before is durable when this returns."""
        self._file.sync()

    def close(self) -> None:
        """Let go of the log, whole.  When all of it is durable it has an index: no power cut takes what that speaks of."""
        if not (self._facts is not None and self._good[0] and self._file.synced):
            self._file.close()
            return
        with contextlib.suppress(HvbackupError):  # no room: whoever reads it reads all of it
            try:
                self._index()
            finally:
                self._file.close()

    def abandon(self) -> None:
        """Let go of the log as it is."""
        self._file.abandon()


class TornLog(StoreDamage):
    """A log that has ended, of which not all frames can be read."""


class LogReader:
    """The frames of a log.  Thread safety: every method from any thread."""

    def __init__(self, files: Files, ring: Keyring, machine: str, name: Name, *, held: bool = False) -> None:
        """`held`: as long as it is now, and also when it has lost its name, until `settle`.

        Raises FileNotFoundError; StoreDamage when the file has no header of ours.
        """
        self.path = path = f"{FOLDER}/{machine}/{name}"
        self._first, self._bind = name.first, f.bound(ring.store, f.KIND_LOG, path)
        self._files = files
        self._held = files.open_now(path) if held else None
        self._source: _Source = self._held or _Named(files, path, files.size(path))
        self._salt, self._cipher = b"", None
        if self._source.size >= f.HEADER_BYTES:
            head = parse_header(self._source.read_at(0, f.HEADER_BYTES), f.KIND_LOG, ring.store, path)
            self._salt, self._cipher = head.salt, ring.cipher(head.salt, f.KIND_LOG)

    def settle(self) -> None:
        """What was read is durable when this returns: no power cut takes back what a reader shows.

        From here on a file that was held is found by its name.  Raises HvbackupError.
        """
        if self._held:
            self._held.sync()  # after it was read: whoever writes it also writes its last block again
            self._source, self._held = _Named(self._files, self.path, self._source.size), None

    def frames(self) -> Iterator[Frame]:
        """All of them, until the end or the first one that is not whole.  Raises StoreDamage."""
        at, ordinal, first = f.HEADER_BYTES, 0, self._first
        while frame := self.frame(at, ordinal, first):
            yield frame
            at, ordinal, first = frame.end, ordinal + 1, first + len(frame.facts)

    def whole(self) -> Iterator[Frame]:
        """The frames that make up moments.  Raises TornLog, at their end, when there should be more of them."""
        end = f.HEADER_BYTES

        def noted() -> Iterator[Frame]:
            nonlocal end
            for frame in self.frames():
                end = frame.end
                yield frame

        yield from up_to_last_barrier(noted())
        if self._index_at() not in (None, end):
            raise TornLog(f"{self.path} is damaged at {end}, where a frame begins")

    def frame(self, at: int, ordinal: int, first: int) -> Frame | None:
        """The one at this place of the file, with this number and first fact; None when it is not whole.  Raises StoreDamage."""
        if (found := _frame_at(self._source, at)) is None:
            return None
        head, fields, payload = found
        if fields[1] != ordinal or fields[2] != first:
            return None
        opened = _opened(self._cipher, ordinal, head, payload, self._bind, self.path)
        if opened is None or len(opened) != fields[5] or len(opened) < fields[3] * f.FACT.itemsize:
            return None
        plain = memoryview(opened)
        facts = np.frombuffer(plain[: fields[3] * f.FACT.itemsize], f.FACT)
        barrier, each = bool(fields[6] & f.FLAG_BARRIER), bool(fields[6] & f.FLAG_EACH)
        end = at + f.FRAME_BYTES + len(payload)
        return Frame(first, facts, plain[facts.nbytes :], Instant(fields[7]), barrier, barrier and each, end)

    def mark(self) -> int | None:
        """What the index is known by, of a log that has ended; None when it has none."""
        at = self._index_at()
        head = b"" if at is None else self._source.read_at(at, f.FRAME_BYTES)
        return self._source.size << 32 | int.from_bytes(head[60:], "little") if len(head) == f.FRAME_BYTES else None

    def index(self) -> Index | None:
        """The index of a log that has ended; None when it has none that is whole."""
        at = self._index_at()
        if at is None or (found := _frame_at(self._source, at, f.INDEX_MAGIC)) is None or found[1][2] != self._first:
            return None
        head, fields, payload = found
        try:
            plain = _opened(self._cipher, fields[1], head, payload, self._bind, self.path)
        except StoreDamage:
            return None
        rows = fields[3] * f.FACT.itemsize
        remarks = rows + fields[6] * f.FRAME_ROW.itemsize
        if plain is None or len(plain) < remarks:
            return None
        facts, frames = np.frombuffer(plain[:rows], f.FACT), np.frombuffer(plain[rows:remarks], f.FRAME_ROW)
        return Index(facts, frames, plain[remarks:])

    def _index_at(self) -> int | None:
        end = self._source.read_at(max(0, self._source.size - f.LOG_END.size), f.LOG_END.size)
        if len(end) < f.LOG_END.size or self._source.size % BLOCK_BYTES:
            return None
        magic, crc, at = f.LOG_END.unpack(end)
        is_index = magic == f.INDEX_MAGIC and crc == crc32(self._salt + end[8:]) and at < self._source.size
        return int(at) if is_index else None


def held_moments(files: Files, machine: str, name: Name) -> bool:
    """Whether a log whose header can't be read holds a whole barrier."""
    path, at = f"{FOLDER}/{machine}/{name}", f.HEADER_BYTES
    source = _Named(files, path, files.size(path))
    while (found := _frame_at(source, at)) is not None:
        head, fields, payload = found
        if not f.crc_matches(head[:60], head[60:], payload):
            return False
        if fields[6] & f.FLAG_BARRIER:
            return True
        at += f.FRAME_BYTES + len(payload)
    return False


class _Source(Protocol):
    """The bytes of a log, a frame at a time: all of one may be more than fits into memory twice."""

    size: int

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, fewer at the end."""


class _Named:
    """A log under its name."""

    def __init__(self, files: Files, path: str, size: int) -> None:
        self._files, self._path, self.size = files, path, size

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, fewer at the end.  Raises FileNotFoundError."""
        return self._files.read_at(self._path, offset, length)


def _frame_at(source: _Source, at: int, magic: bytes = f.FRAME_MAGIC) -> tuple[bytes, tuple[Any, ...], bytes] | None:
    """Header, its fields, and what follows; nobody vouches for any of it yet."""
    head = source.read_at(at, f.FRAME_BYTES) if at < source.size else b""
    if len(head) < f.FRAME_BYTES or head[:4] != magic:
        return None
    fields = f.FRAME.unpack(head[:60])
    end = at + f.FRAME_BYTES + fields[4]
    payload = source.read_at(at + f.FRAME_BYTES, fields[4]) if end <= source.size else b""
    return (head, fields, payload) if len(payload) == fields[4] else None


def _opened(cipher: AESGCM | None, ordinal: int, head: bytes, payload: bytes, bind: bytes, path: str) -> bytes | None:
    """The facts of a frame and their bytes; None when it is torn.  What a cipher vouches for needs no checksum."""
    from cryptography.exceptions import InvalidTag

    if cipher:
        try:
            plain: bytes = cipher.decrypt(ordinal.to_bytes(12, "little"), payload, bind + head[:60])
        except InvalidTag as e:
            if f.crc_matches(head[:60], head[60:], payload):
                raise StoreDamage(f"{path}: frame {ordinal} is not what was written there") from e
            return None
        return plain
    return payload if f.crc_matches(head[:60], head[60:], payload) else None


def join(frame: Frame, into: Facts, begin: int) -> None:
    """Its facts as those of a stream are, in which their bytes begin at `begin`."""
    into[:] = frame.facts
    into["pos"] += begin
    into["flags"][0 if frame.each else -1 :] |= f.FLAG_FACT_BARRIER if frame.barrier else 0


def _room(size: int) -> Facts:
    """Memory of its own, which takes up none before it is used, and is given back as a whole."""
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), f.FACT)


class Joining:
    """The facts of frames that follow one another, with `pos` in the one stream of all their bytes."""

    def __init__(self) -> None:
        self._parts, self.bytes = [np.zeros(0, f.FACT)], 0

    def add(self, frame: Frame) -> memoryview:
        """One more frame; its bytes, which are not kept."""
        part = np.empty(len(frame.facts), f.FACT)
        join(frame, part, self.bytes)
        self._parts.append(part)
        self.bytes += len(frame.data)
        return frame.data

    @property
    def facts(self) -> Facts:
        """Of all frames so far."""
        return np.concatenate(self._parts)


def meta_of(first: int, facts: Facts, read: Callable[[int, int], bytes]) -> Iterator[tuple[int, bytes]]:
    """(sequence number, JSON) of every META fact; `read` gets bytes of the stream."""
    for i in np.flatnonzero(facts["kind"] == f.FACT_META).tolist():
        yield first + i, read(int(facts["pos"][i]), int(facts["length"][i]))


def remarks_of(frame: Frame) -> bytes:
    """The bytes of its META facts, one after the other."""
    rows = frame.facts[frame.facts["kind"] == f.FACT_META]
    spans = zip(rows["pos"].tolist(), rows["length"].tolist(), strict=True)
    return b"".join(bytes(frame.data[at : at + length]) for at, length in spans)


def up_to_last_barrier(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The frames that make up moments; what comes after the last barrier is dropped."""
    open_set: list[Frame] = []
    for frame in frames:
        open_set.append(frame)
        if frame.barrier:
            yield from open_set
            open_set = []
