"""Which chunk of this store holds what a chunk of another store holds, where the two have different id keys.

A copy between such stores must read a block to learn its id here.  What was learnt is kept under STATE, in files like this one's
index, so that the next copy, or one that was interrupted, need not read it again.

    0   4  magic b"hvT1"
    4   4  zero
    8   8  number of rows
   16  32  BLAKE3 of the rows
   48 64n  rows: id there, id here; sorted by the first 8 bytes of the id there

It is a cache: removing it costs reading.  A row is only ever a guess at which chunk to refer to: the chunk must be in this store,
and a sample of what was referred to unread is compared with the other store before a point is committed (replicate.py).
"""

from __future__ import annotations

import struct

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.files import Files
from hvbackup.store.blockmap import Ids
from hvbackup.store.format import ID_BYTES
from hvbackup.store.generation import keys_of

FOLDER = "translations"  # under STATE
HEAD = struct.Struct("<4s4xQ32s")
MAGIC = b"hvT1"
ROW = np.dtype([("there", "V32"), ("here", "V32")])
FILES_MAX = 8  # more are merged


class Translation:
    """From the ids of one other store to ours.  Thread safety: one thread at a time (the caller has a lock)."""

    def __init__(self, state: Files, other: bytes) -> None:
        self._state, self._folder = state, f"{FOLDER}/{other.hex()}"
        self._new: dict[bytes, bytes] = {}
        self._parts = [rows for name in state.names(self._folder) if (rows := self._load(name)) is not None]
        if len(self._parts) > FILES_MAX:
            self._merge()
        self._keys = [keys_of(rows["there"]) for rows in self._parts]

    def _load(self, name: str) -> NDArray[np.void] | None:
        data = self._state.read(f"{self._folder}/{name}")
        if len(data) < HEAD.size:
            return None
        magic, count, digest = HEAD.unpack_from(data)
        rows = data[HEAD.size :]
        if magic != MAGIC or len(rows) != count * ROW.itemsize or blake3.blake3(rows).digest() != digest:
            return None
        return np.frombuffer(rows, ROW)

    def find(self, ids: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """(our id of each chunk, whether it is known)."""
        out, known = np.zeros((len(ids), ID_BYTES), np.uint8), np.zeros(len(ids), np.bool_)
        theirs = np.ascontiguousarray(ids).view("V32").ravel()
        wanted = keys_of(theirs)
        for rows, keys in zip(self._parts, self._keys, strict=True):
            at = np.minimum(keys.searchsorted(wanted), max(0, len(keys) - 1))
            hit = ~known & (rows["there"][at] == theirs) if len(keys) else np.zeros(len(ids), np.bool_)
            out[hit] = np.frombuffer(rows["here"][at[hit]].tobytes(), np.uint8).reshape(-1, ID_BYTES)
            known |= hit
        for i in np.flatnonzero(~known).tolist() if self._new else ():
            found = self._new.get(ids[i].tobytes())
            if found is not None:
                out[i], known[i] = np.frombuffer(found, np.uint8), True
        return out, known

    def add(self, there: bytes, here: bytes) -> None:
        """One more pair."""
        self._new[there] = here

    @property
    def unsaved(self) -> int:
        """How many pairs a crash would forget."""
        return len(self._new)

    def save(self) -> None:
        """Every pair is kept for the next time."""
        if self._new:
            rows = np.array(list(self._new.items()), ROW)
            self._new = {}
            self._keep(rows)

    def _keep(self, rows: NDArray[np.void]) -> None:
        rows = rows[np.argsort(keys_of(rows["there"]), kind="stable")]
        data = rows.tobytes()
        digest = blake3.blake3(data).digest()
        self._state.replace(f"{self._folder}/{digest.hex()[:32]}", HEAD.pack(MAGIC, len(rows), digest) + data)
        self._parts = [*self._parts, rows]
        self._keys = [keys_of(part["there"]) for part in self._parts]

    def _merge(self) -> None:
        old, rows = self._state.names(self._folder), np.concatenate(self._parts)
        self._parts = []
        self._keep(rows)
        kept = blake3.blake3(self._parts[0].tobytes()).digest().hex()[:32]
        for name in old:
            if name != kept:
                self._state.remove(f"{self._folder}/{name}")

    def forget(self) -> None:
        """Nothing is known any more."""
        self._new, self._parts, self._keys = {}, [], []
        for name in self._state.names(self._folder):
            self._state.remove(f"{self._folder}/{name}")
