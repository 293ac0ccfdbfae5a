"""The records of a pack one after the other, read in large pieces: what check, repack and repair go through packs with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged, HvbackupError
from hvbackup.model import MiB
from hvbackup.store.backend import Backend
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format.keys import Keyring

READ_BYTES = (
    2 * MiB
)  # what was read is decrypted while it is in the cache of the processor: twice as fast as with 8 MiB
RECORD_MAX = 64 * MiB  # no record is larger, whatever a footer says


def each(
    backend: Backend,
    pack: str,
    rows: NDArray[np.void],
    before: Callable[[int], None] = lambda _length: None,
    *,
    grouped: bool = True,
) -> Iterator[tuple[int, memoryview, NDArray[np.void]]]:
    """(offset, bytes, its rows) of each record that `rows` name, in the order of the pack; without the rows unless `grouped`.

    The bytes are fewer than they should be, or none, where the disk can't read them: decoding them then names the place.
    `before` is called with the length of each read.
    """
    rows = rows[np.lexsort((rows["at"], rows["offset"]))]
    starts = np.flatnonzero(np.r_[True, rows["offset"][1:] != rows["offset"][:-1]]) if len(rows) else np.zeros(0, int)
    firsts = rows[starts]
    ends = np.r_[starts[1:], len(rows)].tolist()
    area, base, none = memoryview(b""), 0, rows[:0]
    for first, end, offset, stored in zip(
        starts.tolist(), ends, firsts["offset"].tolist(), firsts["stored"].tolist(), strict=True
    ):
        if offset < base or offset + stored > base + len(area):
            base, length = offset, max(READ_BYTES, stored)
            before(length)
            area = memoryview(_area(backend, pack, base, length))
        yield offset, area[offset - base : offset - base + stored], rows[first:end] if grouped else none


def _area(backend: Backend, pack: str, offset: int, length: int) -> bytes:
    if length > RECORD_MAX or offset >> 48:
        return b""  # a footer nobody vouches for
    try:
        return backend.read_at(packs.path_of(pack), offset, length)
    except (HvbackupError, FileNotFoundError):
        return b""


def verify(ring: Keyring, plain: bytes, rows: NDArray[np.void]) -> None:
    """Every chunk of a decoded record is what its id says.  Raises ChunkDamaged."""
    keys = dict.fromkeys((f.CHUNK_BLOCK, f.CHUNK_FACTS, f.CHUNK_FACT_INDEX), ring.block_key)
    keys[f.CHUNK_PAGE] = ring.page_key
    view = memoryview(plain)
    for chunk, at, size, kind in zip(
        rows["id"].tolist(), rows["at"].tolist(), rows["plain"].tolist(), rows["kind"].tolist(), strict=True
    ):
        key, data = keys.get(kind), view[at : at + size]
        digest = blake3.blake3(data, key=key).digest() if key else blake3.blake3(data).digest()
        if digest != bytes(chunk):
            raise ChunkDamaged(f"chunk {bytes(chunk).hex()} has other content than its id says")
