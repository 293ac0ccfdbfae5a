"""The records of a pack one after the other, read in large pieces: what check, repack and repair go through packs with."""

from __future__ import annotations

from collections.abc import Iterator

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged, HvbackupError
from hvbackup.model import MiB
from hvbackup.store import format as f
from hvbackup.store import pack as packs
from hvbackup.store.backend import Backend
from hvbackup.store.keys import Keyring

READ_BYTES = 8 * MiB


def each(backend: Backend, pack: str, rows: NDArray[np.void]) -> Iterator[tuple[int, bytes, NDArray[np.void]]]:
    """(offset, bytes, its rows) of each record that `rows` name, in the order of the pack.

    The bytes are fewer than they should be, or none, where the disk can't read them: decoding them then names the place.
    """
    rows = rows[np.lexsort((rows["at"], rows["offset"]))]
    starts = np.flatnonzero(np.r_[True, rows["offset"][1:] != rows["offset"][:-1]]) if len(rows) else np.zeros(0, int)
    area, base = b"", 0
    for group in np.split(rows, starts[1:]) if len(rows) else []:
        offset, stored = int(group["offset"][0]), int(group["stored"][0])
        if offset < base or offset + stored > base + len(area):
            base = offset
            area = _area(backend, pack, base, max(READ_BYTES, stored))
        yield offset, area[offset - base : offset - base + stored], group


def _area(backend: Backend, pack: str, offset: int, length: int) -> bytes:
    try:
        return backend.read_at(packs.path_of(pack), offset, length)
    except (HvbackupError, FileNotFoundError):
        return b""


def verify(ring: Keyring, plain: bytes, rows: NDArray[np.void]) -> None:
    """Every chunk of a decoded record is what its id says.  Raises ChunkDamaged."""
    keys = {f.CHUNK_BLOCK: ring.block_key, f.CHUNK_PAGE: ring.page_key}
    view = memoryview(plain)
    for chunk, at, size, kind in zip(
        rows["id"].tolist(), rows["at"].tolist(), rows["plain"].tolist(), rows["kind"].tolist(), strict=True
    ):
        key, data = keys.get(kind), view[at : at + size]
        digest = blake3.blake3(data, key=key).digest() if key else blake3.blake3(data).digest()
        if digest != bytes(chunk):
            raise ChunkDamaged(f"chunk {bytes(chunk).hex()} has other content than its id says")
