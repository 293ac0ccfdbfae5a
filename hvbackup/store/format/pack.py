"""Packs: files of many chunks, self-describing, named by their content.

    header | record | record | ... | footer rows | trailer

`PackWriter` makes one, `read_footer` lists its chunks, `scan` lists them from the records when the footer is damaged, and
`decode` turns the bytes of a record into plain chunks.  Layouts: `format.py`.

    killed after            left behind                      cleaned by
    any number of writes    a file in tmp/                   sweep() at the owner's next start
    rename (seal)           chunks no point refers to        the next run refers to them; reclaim
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import blake3
import numpy as np
import zstandard
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged, HvbackupError, StoreDamage
from hvbackup.store.backend import Backend, Upload
from hvbackup.store.format import layout as f
from hvbackup.store.format.keys import Keyring
from hvbackup.store.format.sealed import parse_header

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SUFFIX = ".pack"
NAME = re.compile("[0-9a-f]{64}")
PARITY_SUFFIX = ".parity"
WRITE_BYTES = 1024 * 1024
TAG_BYTES = 16
SCAN_PIECE_BYTES = 8 * 1024 * 1024


def path_of(pack: str) -> str:
    """Where a pack lives in the store: a pack is named by its content, a journal's segment (a pack too) by its path."""
    return pack if "/" in pack else f"packs/{pack[:2]}/{pack}{SUFFIX}"


def files_of(pack: str) -> list[str]:
    """Every file that belongs to a pack, in the order in which they are removed: nothing is left that has no pack.

    Those besides the pack itself need not be there.
    """
    return [parity_of(pack), path_of(pack)]


def parity_of(pack: str) -> str:
    """Where the parity of a pack is, if it has any."""
    return path_of(pack).removesuffix(SUFFIX) + PARITY_SUFFIX


def list_packs(backend: Backend) -> list[str]:
    """The names of all packs in the store, sorted; files that are not called as packs are none of ours."""
    folders = backend.names("packs")
    found = [n for d in folders for n in backend.names(f"packs/{d}") if n.endswith(SUFFIX) and n.startswith(d)]
    return [name for n in found if NAME.fullmatch(name := n.removesuffix(SUFFIX))]


def sort_rows(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Rows sorted by their 32-byte id."""
    words = np.ascontiguousarray(rows["id"]).view(">u8").reshape(-1, 4)
    return rows[np.lexsort((words[:, 3], words[:, 2], words[:, 1], words[:, 0]))]


class PackWriter:
    """Writes one pack, record by record.  Thread safety: one thread at a time."""

    def __init__(self, backend: Backend, ring: Keyring, kind: int, path: str = "") -> None:
        """Begin a pack; `path` names one that is not named by its content: a journal's segment."""
        self._path = path
        self._salt = os.urandom(32)
        self._cipher = ring.cipher(self._salt, kind)
        self._bind = f.bound(ring.store, kind, path)
        self._hash = None if path else blake3.blake3()
        self._out: Upload = backend.new()
        self._tag_bytes = TAG_BYTES if self._cipher else 0
        self._waiting = memoryview(bytearray(WRITE_BYTES))  # many records make one write
        self._used = 0  # bytes of it that are not yet handed to the file
        self._size = 0
        self._rows: list[tuple[bytes, int, int, int, int, int]] = []
        self._ordinal = 0
        flags = f.FLAG_ENCRYPTED if self._cipher else 0
        try:
            self._write(f.with_crc(f.HEADER.pack(f.HEADER_MAGIC, f.FORMAT, kind, flags, ring.store, self._salt, 0)))
        except BaseException:
            self.abandon()  # nobody else knows of it yet
            raise

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def _write(self, data: bytes) -> None:
        self._room(len(data))[:] = data

    def _room(self, length: int) -> memoryview:
        """Where the next bytes of the pack belong."""
        if self._used + length > len(self._waiting):
            self._flush()
            if length > len(self._waiting):
                self._waiting = memoryview(bytearray(length))
        start, self._used = self._used, self._used + length
        self._size += length
        return self._waiting[start : self._used]

    def _flush(self) -> None:
        full, self._used = self._waiting[: self._used], 0
        self._out.write(full)
        if self._hash:
            self._hash.update(full)

    def add(self, what: int, codec: int, frame: bytes | memoryview, ids: Sequence[bytes], plain: Sequence[int]) -> None:
        """Append one record: `frame` holds the chunks `ids`, of `plain` bytes each, one after the other."""
        entries = b"".join([i + n.to_bytes(4, "little") for i, n in zip(ids, plain, strict=True)])
        length = len(frame) + self._tag_bytes
        head = f.RECORD.pack(f.RECORD_MAGIC, self._ordinal, codec, what, len(ids), length, sum(plain))
        head = f.with_crc(head, entries) + entries
        offset, stored, at = self._size, len(head) + length, 0
        for chunk, n in zip(ids, plain, strict=True):
            self._rows.append((chunk, offset, stored, at, n, what))
            at += n
        room = self._room(stored)
        room[: len(head)] = head
        if self._cipher:
            self._cipher.encrypt_into(nonce(self._ordinal), frame, self._bind + head, room[len(head) :])
        else:
            room[len(head) :] = frame
        self._ordinal += 1

    def seal(self) -> tuple[str, NDArray[np.void]]:
        """The pack exists, durably, when this returns its name and its rows sorted by id."""
        rows = sort_rows(np.array(self._rows, f.ROW))
        footer, offset = rows.tobytes(), self._size
        self._write(footer)
        self._write(f.with_crc(f.TRAILER.pack(f.TRAILER_MAGIC, offset, len(rows), blake3.blake3(footer).digest())))
        self._flush()
        name = self._hash.hexdigest() if self._hash else self._path
        self._out.commit(path_of(name))
        return name, rows

    def abandon(self) -> None:
        """Remove what was written."""
        self._out.abandon()


def nonce(ordinal: int) -> bytes:
    """The AES-GCM nonce of a record: unique, because each pack has its own key and each record its own ordinal."""
    return ordinal.to_bytes(12, "little")


def read_footer(backend: Backend, pack: str) -> NDArray[np.void]:
    """The rows of a pack, sorted by id.  Raises StoreDamage when footer or trailer are not what was written."""
    offset, count, digest = _trailer(backend, pack)
    footer = backend.read_at(path_of(pack), offset, count * f.ROW.itemsize)
    if blake3.blake3(footer).digest() != digest:
        raise StoreDamage(f"Pack {pack} has a damaged footer")
    return np.frombuffer(footer, f.ROW)


def _trailer(backend: Backend, pack: str) -> tuple[int, int, bytes]:
    """Offset, number of rows and BLAKE3 of the footer."""
    path = path_of(pack)
    try:
        size = backend.size(path)
    except FileNotFoundError:
        raise StoreDamage(f"Pack {pack} is missing") from None
    trailer = backend.read_at(path, max(0, size - f.TRAILER_BYTES), f.TRAILER_BYTES)
    if (
        len(trailer) != f.TRAILER_BYTES
        or trailer[:4] != f.TRAILER_MAGIC
        or not f.crc_matches(trailer[:60], trailer[60:])
    ):
        raise StoreDamage(f"Pack {pack} has no trailer: it is cut short or damaged at its end")
    _magic, offset, count, digest = f.TRAILER.unpack(trailer[:60])
    if offset + count * f.ROW.itemsize + f.TRAILER_BYTES != size:
        raise StoreDamage(f"Pack {pack} has {size} bytes where its trailer promises others")
    return offset, count, digest


def fingerprint(backend: Backend, pack: str) -> bytes:
    """8 bytes that tell whether a pack still has the footer it had; zeroes for one that has none that can be read."""
    try:
        return _trailer(backend, pack)[2][:8]
    except (StoreDamage, HvbackupError):
        return bytes(8)


def fingerprint_of(rows: NDArray[np.void]) -> bytes:
    """The same, of a footer that is at hand."""
    return blake3.blake3(rows.tobytes()).digest(8)


def scan(backend: Backend, pack: str) -> NDArray[np.void]:
    """The rows of all records whose headers can still be read, sorted by id: for packs whose footer is damaged."""
    rows: list[tuple[bytes, int, int, int, int, int]] = []
    path = path_of(pack)
    size, at = backend.size(path), f.HEADER_BYTES
    while at + f.RECORD_BYTES <= size:
        record = _record_at(backend, path, at)
        if record is None or at + _stored(*record) > size:
            at = _next_magic(backend, path, at + 1, size)
            continue
        head, entries = record
        stored, offset = _stored(head, entries), 0
        for chunk, length in zip(entries["id"].tolist(), entries["plain"].tolist(), strict=True):
            rows.append((chunk, at, stored, offset, length, head[3]))
            offset += length
        at += stored
    return sort_rows(np.array(rows, f.ROW))


def _record_at(backend: Backend, path: str, at: int) -> tuple[tuple[int, ...], NDArray[np.void]] | None:
    head = backend.read_at(path, at, f.RECORD_BYTES)
    if len(head) < f.RECORD_BYTES or head[:4] != f.RECORD_MAGIC:
        return None
    fields = f.RECORD.unpack(head[:20])
    entries = backend.read_at(path, at + f.RECORD_BYTES, fields[4] * f.ENTRY.itemsize)
    if len(entries) < fields[4] * f.ENTRY.itemsize or not f.crc_matches(head[:20], head[20:], entries):
        return None
    rows = np.frombuffer(entries, f.ENTRY)
    whole = int(rows["plain"].sum(dtype=np.uint64)) == fields[6] <= f.RECORD_PLAIN_MAX
    return (fields, rows) if whole else None


def _stored(head: tuple[int, ...], entries: NDArray[np.void]) -> int:
    """Length of a whole record in the pack."""
    return f.RECORD_BYTES + entries.nbytes + head[5]


def _next_magic(backend: Backend, path: str, start: int, size: int) -> int:
    while start < size:
        piece = backend.read_at(path, start, SCAN_PIECE_BYTES)
        found = piece.find(f.RECORD_MAGIC)
        if found >= 0:
            return start + found
        start += max(1, len(piece) - len(f.RECORD_MAGIC) + 1)
    return size


def cipher_of(backend: Backend, ring: Keyring, pack: str) -> tuple[AESGCM | None, bytes]:
    """What `decode` needs to know of a pack: its cipher and its associated data.  Raises StoreDamage."""
    try:
        data = backend.read_at(path_of(pack), 0, f.HEADER_BYTES)
    except FileNotFoundError:
        raise StoreDamage(f"Pack {pack} is missing") from None
    kind = next((k for k in (f.KIND_META, f.KIND_SEGMENT) if data[5:6] == bytes([k])), f.KIND_DATA)
    head = parse_header(data, kind, ring.store, f"Pack {pack}")
    if bool(head.flags & f.FLAG_ENCRYPTED) != ring.encrypted:
        raise StoreDamage(f"Pack {pack} is {'' if head.flags else 'not '}encrypted, unlike its store")
    return ring.cipher(head.salt, kind), f.bound(ring.store, kind, pack if kind == f.KIND_SEGMENT else "")


def decode(data: bytes, cipher: AESGCM | None, bind: bytes, zstd: zstandard.ZstdDecompressor, where: str) -> bytes:
    """The plain chunks of one record, one after the other.  Raises ChunkDamaged naming `where`.

    The caller still compares each chunk it uses with its id.
    """
    return inflate(data, unlock(data, cipher, bind, where), zstd, where)


def unlock(data: bytes | memoryview[int], cipher: AESGCM | None, bind: bytes, where: str) -> bytes | memoryview[int]:
    """The frame of one record, decrypted: its tag is right when this returns.  Raises ChunkDamaged naming `where`."""
    if len(data) < f.RECORD_BYTES or data[:4] != f.RECORD_MAGIC:
        raise ChunkDamaged(f"{where} is missing or overwritten")
    _magic, ordinal, _codec, _what, count, stored, plain = f.RECORD.unpack_from(data)
    begin = f.RECORD_BYTES + count * f.ENTRY.itemsize
    frame = memoryview(data)[begin : begin + stored]
    if len(frame) != stored or plain > f.RECORD_PLAIN_MAX:
        raise ChunkDamaged(f"{where} is cut short")
    if cipher is None:
        return frame
    try:
        return cipher.decrypt(nonce(ordinal), frame, bind + bytes(data[:begin]))
    except _invalid_tag() as e:
        raise ChunkDamaged(f"{where} does not decode: it was changed after it was written") from e


def inflate(
    data: bytes | memoryview[int], body: bytes | memoryview[int], zstd: zstandard.ZstdDecompressor, where: str
) -> bytes:
    """The plain chunks in the decrypted frame of one record.  Raises ChunkDamaged naming `where`."""
    _magic, _ordinal, codec, _what, _count, _stored, plain = f.RECORD.unpack_from(data)
    try:
        # A frame may announce any length, and would be given that much memory.
        if codec == f.CODEC_ZSTD and zstandard.frame_content_size(body) not in (-1, plain):
            raise ChunkDamaged(f"{where} does not decode: it was changed after it was written")
        out = zstd.decompress(body, max_output_size=plain) if codec == f.CODEC_ZSTD else bytes(body)
    except zstandard.ZstdError as e:
        raise ChunkDamaged(f"{where} does not decode: it was changed after it was written") from e
    if len(out) != plain:
        raise ChunkDamaged(f"{where} has {len(out)} bytes where {plain} belong")
    return out


def _invalid_tag() -> type[Exception]:
    from cryptography.exceptions import InvalidTag

    return InvalidTag


def records(rows: NDArray[np.void]) -> Iterator[tuple[int, int]]:
    """(offset, stored length) of each record that `rows` touch, in the order of the pack, each once."""
    pairs = np.unique(np.column_stack([rows["offset"], rows["stored"]]), axis=0)
    yield from ((int(a), int(b)) for a, b in pairs)
