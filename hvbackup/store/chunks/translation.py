"""Which chunk of this store holds what a chunk of another store holds, where the two have different id keys.

A copy between such stores must read a block to learn its id here.  What was learnt is kept under STATE, in files like this one's
index, so that the next copy, or one that was interrupted, need not read it again.

    0   4  magic b"hvT1"
    4   4  zero
    8   8  number of rows
   16  32  BLAKE3 of all that follows
   48  8n  the first 8 bytes of each id there, as numbers, ascending
   .. 64n  rows in the same order: id there, id here

Files are mapped, not read into memory.  They are a cache: removing them costs reading.  A row is only ever a guess at which
chunk to refer to: the chunk must be in this store, and a sample of what was referred to unread is compared with the other store
before a point is committed (replicate.py).
"""

from __future__ import annotations

import mmap
import os
import struct

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.files import Files
from hvbackup.store.format.blockmap import Ids
from hvbackup.store.format.layout import ID_BYTES
from hvbackup.store.index.generation import keys_of

FOLDER = "translations"  # under STATE
HEAD = struct.Struct("<4s4xQ32s")
MAGIC = b"hvT1"
ROW = np.dtype([("there", "V32"), ("here", "V32")])
FILES_MAX = 8  # more are merged
Part = tuple[NDArray[np.uint64], NDArray[np.void]]


class Translation:
    """From the ids of one other store to ours.  Thread safety: one thread at a time (the caller has a lock)."""

    def __init__(self, state: Files, other: bytes) -> None:
        self._state, self._folder = state, f"{FOLDER}/{other.hex()}"
        self._new: dict[bytes, bytes] = {}
        self._parts = [part for name in state.names(self._folder) if (part := self._load(name)) is not None]
        if len(self._parts) > FILES_MAX:
            self._merge()

    def _load(self, name: str) -> Part | None:
        """The (keys, rows) of a file, mapped; None when it is not what was written."""
        with self._state.path(f"{self._folder}/{name}").open("rb") as file:
            if os.fstat(file.fileno()).st_size < HEAD.size:
                return None
            area = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        magic, count, digest = HEAD.unpack_from(area)
        body = area[HEAD.size :]
        if magic != MAGIC or len(body) != count * (8 + ROW.itemsize) or blake3.blake3(body).digest() != digest:
            return None
        return np.frombuffer(body, np.uint64, count), np.frombuffer(body, ROW, count, 8 * count)

    def find(self, ids: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """(our id of each chunk, whether it is known)."""
        out, known = np.zeros((len(ids), ID_BYTES), np.uint8), np.zeros(len(ids), np.bool_)
        theirs = np.ascontiguousarray(ids).view("V32").ravel()
        wanted = keys_of(theirs)
        for keys, rows in self._parts:
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

    def _keep(self, rows: NDArray[np.void]) -> str:
        """Write a file; its name."""
        keys = keys_of(rows["there"])
        order = np.argsort(keys, kind="stable")
        body = keys[order].tobytes() + rows[order].tobytes()
        digest = blake3.blake3(body).digest()
        name = digest.hex()[:32]
        self._state.replace(f"{self._folder}/{name}", HEAD.pack(MAGIC, len(rows), digest) + body)
        if (part := self._load(name)) is not None:
            self._parts = [*self._parts, part]
        return name

    def _merge(self) -> None:
        """All but the largest files become one; what could not be read goes too."""
        self._parts.sort(key=lambda part: len(part[0]), reverse=True)
        large, small = self._parts[: FILES_MAX // 2], self._parts[FILES_MAX // 2 :]
        kept = {self._name(part) for part in large}
        self._parts = large
        kept.add(self._keep(np.concatenate([rows for _, rows in small])))
        for name in self._state.names(self._folder):
            if name not in kept:
                self._state.remove(f"{self._folder}/{name}")

    @staticmethod
    def _name(part: Part) -> str:
        hashed = blake3.blake3(part[0].tobytes())
        return hashed.update(part[1].tobytes()).digest().hex()[:32]

    def forget(self) -> None:
        """Nothing is known any more."""
        self._new, self._parts = {}, []
        for name in self._state.names(self._folder):
            self._state.remove(f"{self._folder}/{name}")
