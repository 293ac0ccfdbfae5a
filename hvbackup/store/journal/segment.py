"""Sealed segments of a journal: the facts of a log up to its last barrier, compressed and indexed.

A segment is a pack (pack.py) with a name of its own, `journals/MACHINE/EPOCH-SEQ.seg`: records of CHUNK_FACTS hold the bytes of
the facts as one stream cut every SEGMENT_PIECE_BYTES, records of CHUNK_FACT_INDEX the rows of FACT, cut likewise; the order is
that of the records.  Nothing of it is shared with other files.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any

import blake3
import numpy as np
import zstandard
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged, StoreDamage
from hvbackup.model import MiB
from hvbackup.store.backend import Backend
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format.keys import Keyring
from hvbackup.store.journal.journal import FOLDER, SEGMENT, Facts, Frame, Joining, Name, meta_of

CACHED_BYTES = 16 * MiB  # of decoded pieces: bounds memory
LEVEL = 1


def path_of(machine: str, name: Name) -> str:
    """Where a segment lives in the store."""
    return f"{FOLDER}/{machine}/{Name(name.epoch, name.first, SEGMENT, name.last)}"


def write_segment(backend: Backend, ring: Keyring, machine: str, name: Name, frames: Iterable[Frame]) -> None:
    """The segment of a log exists, durably, when this returns, unless there are no frames.  The last of them is a barrier.

    They are looked at one after the other: memory is bounded by the facts, whose bytes are on their way already.
    """
    following = iter(frames)
    if (first := next(following, None)) is None:
        return
    joining = Joining()
    data = (joining.add(frame) for frame in chain([first], following))
    _write(backend, ring, path_of(machine, name), data, lambda: joining.facts)


def write_facts(
    backend: Backend, ring: Keyring, machine: str, name: Name, facts: Facts, stream: bytes | bytearray
) -> None:
    """The segment of these facts exists, durably, when this returns; `pos` of each says where its bytes are in the stream."""
    _write(backend, ring, path_of(machine, name), [memoryview(stream)], lambda: facts)


def _write(
    backend: Backend, ring: Keyring, path: str, stream: Iterable[memoryview], facts: Callable[[], Facts]
) -> None:
    """`facts` is asked when all of the stream has been taken."""
    pack = packs.PackWriter(backend, ring, f.KIND_SEGMENT, path)
    try:
        zstd = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False)
        for piece in _cut(stream):
            _add(pack, ring, zstd, f.CHUNK_FACTS, piece)
        for piece in _cut([memoryview(facts().tobytes())]):
            _add(pack, ring, zstd, f.CHUNK_FACT_INDEX, piece)
        pack.seal()
    except BaseException:
        pack.abandon()
        raise


def _cut(stream: Iterable[memoryview]) -> Iterator[bytes]:
    """Pieces of SEGMENT_PIECE_BYTES, and a last one."""
    waiting: list[memoryview] = []
    room = f.SEGMENT_PIECE_BYTES
    for part in stream:
        rest = part
        while len(rest) >= room:
            yield b"".join([*waiting, rest[:room]])
            waiting, rest, room = [], rest[room:], f.SEGMENT_PIECE_BYTES
        if len(rest):
            waiting.append(rest)
            room -= len(rest)
    if waiting:
        yield b"".join(waiting)


def _add(pack: packs.PackWriter, ring: Keyring, zstd: zstandard.ZstdCompressor, what: int, piece: bytes) -> None:
    chunk = blake3.blake3(piece, key=ring.block_key).digest()
    frame = zstd.compress(piece)
    if len(frame) < len(piece):
        pack.add(what, f.CODEC_ZSTD, frame, [chunk], [len(piece)])
    else:
        pack.add(what, f.CODEC_RAW, piece, [chunk], [len(piece)])


class PieceCache:
    """Decoded pieces of the streams of any number of segments and logs, the newest used ones.  Thread safety: any thread."""

    def __init__(self) -> None:
        self._pieces: OrderedDict[tuple[str, int], bytes | memoryview] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, key: tuple[str, int], decode: Callable[[], bytes | memoryview]) -> bytes | memoryview:
        """A piece, decoded unless it is here."""
        with self._lock:
            found = self._taken(key)
        if found is None:
            found = decode()
        with self._lock:
            self._taken(key)  # another thread may have decoded it as well
            self._pieces[key] = found
            self._bytes += len(found)
            while self._bytes > CACHED_BYTES and len(self._pieces) > 1:
                self._bytes -= len(self._pieces.popitem(last=False)[1])
        return found

    def _taken(self, key: tuple[str, int]) -> bytes | memoryview | None:
        found = self._pieces.pop(key, None)
        self._bytes -= len(found or b"")
        return found


class Segment:
    """A sealed segment, open for reading.  Thread safety: every method from any thread."""

    def __init__(
        self, backend: Backend, ring: Keyring, machine: str, name: Name, cache: PieceCache | None = None
    ) -> None:
        self.name, self._path = name, path_of(machine, name)
        self._backend, self._ring = backend, ring
        self._cache = cache or PieceCache()

    # What a view never reads of a segment is never looked at, so all of it waits until it is asked for.

    @cached_property
    def _secret(self) -> tuple[Any, bytes]:
        return packs.cipher_of(self._backend, self._ring, self._path)

    @cached_property
    def _rows(self) -> NDArray[np.void]:
        rows = packs.read_footer(self._backend, self._path)
        return rows[np.argsort(rows["offset"], kind="stable")]

    @cached_property
    def _stream(self) -> NDArray[np.void]:
        rows: NDArray[np.void] = self._rows[self._rows["kind"] == f.CHUNK_FACTS]
        return rows

    @cached_property
    def _index(self) -> NDArray[np.void]:
        rows: NDArray[np.void] = self._rows[self._rows["kind"] == f.CHUNK_FACT_INDEX]
        return rows

    @property
    def facts(self) -> Facts:
        """All facts; the sequence number of row i is `name.first + i`.  Raises ChunkDamaged."""
        data = b"".join(self._decode(row, i) for i, row in enumerate(self._index, len(self._stream)))
        if len(data) % f.FACT.itemsize:  # nobody vouches for what the footer calls an index
            raise ChunkDamaged(f"{self._path} has {len(data)} bytes where whole facts belong")
        return np.frombuffer(data, f.FACT)

    @property
    def decoded_bytes(self) -> int:
        """How large its facts and their bytes are."""
        return int(self._rows["plain"].sum())

    @property
    def stream(self) -> bytes:
        """The bytes of all facts.  Raises ChunkDamaged."""
        return b"".join(self._decode(row, i) for i, row in enumerate(self._stream))

    def read(self, pos: int, length: int) -> bytes:
        """Bytes of the stream.  Raises ChunkDamaged."""
        parts = []
        while length:
            number, inside = divmod(pos, f.SEGMENT_PIECE_BYTES)
            part = self._piece(number)[inside : inside + length]
            if not part:
                raise StoreDamage(f"{self._path} ends before the bytes of its facts")
            parts.append(part)
            pos, length = pos + len(part), length - len(part)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def _piece(self, number: int) -> bytes | memoryview:
        if number >= len(self._stream):
            return b""
        return self._cache.get((self._path, number), lambda: self._decode(self._stream[number], number))

    def _decode(self, row: np.void, ordinal: int) -> bytes:
        where = f"the record at {row['offset']} of {self._path}"
        data = self._backend.read_at(self._path, int(row["offset"]), int(row["stored"]))
        if int.from_bytes(data[4:8], "little") != ordinal:
            # Pieces are known by their order alone, and nobody vouches for the footer.
            raise ChunkDamaged(f"{where} is not the one that belongs there")
        plain = packs.decode(data, *self._secret, zstandard.ZstdDecompressor(), where)
        if blake3.blake3(plain, key=self._ring.block_key).digest() != row["id"].tobytes():
            raise ChunkDamaged(f"{where} has other content than its id says")
        return plain

    def meta(self) -> Iterator[tuple[int, bytes]]:
        """(sequence number, JSON) of every META fact."""
        return meta_of(self.name.first, self.facts, self.read)
