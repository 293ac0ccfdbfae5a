"""Chunks back out of packs: locate, read, decrypt, decompress, verify.

Every chunk handed out has been compared with its full 32-byte id.  A chunk that is damaged at one place is looked for at every
other place the index knows (map pages are stored twice) before ChunkDamaged is raised.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import blake3
import numpy as np
import zstandard
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged, HvbackupError, StoreDamage
from hvbackup.model import ChunkId, MiB
from hvbackup.store.backend import Backend
from hvbackup.store.format import pack as packs
from hvbackup.store.format.blockmap import Ids
from hvbackup.store.format.keys import Keyring
from hvbackup.store.index.index import NOWHERE, Index

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

READ_BYTES = 4 * MiB  # neighbouring records are read together up to this size
GAP_BYTES = 64 * 1024  # and over gaps up to this one
READ_MAX = 64 * MiB  # no record is larger, whatever a row of the index says
OFFSET_MAX = 1 << 48
CACHE_BYTES = 64 * MiB
FRAME_CACHE = 32  # decoded frames of several blocks, 256 KiB each
PAGE_CACHE = 4096  # map pages, 8 KiB each


class ChunkReader:
    """Reads chunks of one store.  Thread safety: every method from any thread."""

    def __init__(self, backend: Backend, ring: Keyring, index: Index, cache_bytes: int = CACHE_BYTES) -> None:
        self._backend, self._ring, self.index = backend, ring, index
        self._ciphers: dict[str, tuple[AESGCM | None, bytes]] = {}
        self._cache: OrderedDict[bytes, bytes] = OrderedDict()
        self._pages: OrderedDict[bytes, bytes] = OrderedDict()
        self._frames: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._lock = threading.Lock()
        self._local = threading.local()

    def page(self, chunk: ChunkId) -> bytes:
        """A map page.  Raises ChunkDamaged."""
        page = self._pages.get(chunk)
        if page is None:
            page = self._one(chunk, self._ring.page_key)
            with self._lock:
                self._pages[chunk] = page
                if len(self._pages) > PAGE_CACHE:
                    self._pages.popitem(last=False)
        return page

    def cached(self, chunk: bytes) -> bytes | None:
        """A block that is in the cache, or None."""
        return self._cache.get(chunk)

    def block(self, chunk: bytes) -> bytes:
        """One block, from the cache if it is there.  Raises ChunkDamaged."""
        data = self._cache.get(chunk)
        if data is None:
            data = self._one(chunk, self._ring.block_key)
            with self._lock:
                if chunk not in self._cache:
                    self._cache[chunk] = data
                    self._cached_bytes += len(data)
                while self._cached_bytes > self._cache_bytes:
                    self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return data

    def forget(self) -> None:
        """Decoded blocks are let go: after work that read each of them once.  Map pages stay, every reading begins with them."""
        with self._lock:
            self._cache.clear()
            self._frames.clear()
            self._cached_bytes = 0

    def blocks(self, ids: Ids) -> Iterable[tuple[int, memoryview]]:
        """(position in `ids`, content) of each id, in the order of the packs; read in large pieces, not cached.

        The ids must not be zero.  Raises ChunkDamaged.
        """
        where = self.index.lookup(ids.view("V32").ravel())
        order = _by_place(where)
        for run in _runs(where[order]):
            yield from self._read_run(ids, order[run], where)

    def expect(self, chunks: Sequence[bytes]) -> None:
        """These are read soon: disks with many heads or none find them at once, where one read after the other would wait."""
        wanted = [c for c in chunks if c not in self._cache and c not in self._pages]
        if not wanted:
            return
        where = self.index.lookup(np.frombuffer(b"".join(wanted), "V32"))
        for place in where[_by_place(where)].tolist():
            _, number, stored, offset, _, _, _ = place
            if number != NOWHERE and stored <= READ_MAX and offset <= OFFSET_MAX:
                self._backend.will_read(packs.path_of(self.index.packs[number]), offset, stored)

    def reading_order(self, ids: Ids) -> NDArray[np.int64]:
        """The ids, which must not be zero, as the packs have them one after the other; those found nowhere at the end."""
        return _by_place(self.index.lookup(ids.view("V32").ravel()))

    def _read_run(self, ids: Ids, rows: NDArray[np.int64], where: NDArray[np.void]) -> Iterable[tuple[int, memoryview]]:
        places = where[rows]
        start = int(places["offset"][0])
        length = int((places["offset"] + places["stored"]).max()) - start
        data = b""
        if places["pack"][0] != NOWHERE:
            pack = self.index.packs[int(places["pack"][0])]
            data = self._read(pack, start, length)
        at, plain = -1, b""
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            _, number, stored, offset, inside, size, _ = place
            chunk = ids[row].tobytes()
            try:
                if number == NOWHERE:
                    raise ChunkDamaged("nowhere")
                if offset != at:
                    plain = self._decode(pack, offset, data[offset - start : offset - start + stored])
                    at = offset
                found = memoryview(plain)[inside : inside + size]
                self._verify(chunk, found, self._ring.block_key)
            except StoreDamage:
                at, found = -1, memoryview(self._one(chunk, self._ring.block_key))
            yield row, found

    def _one(self, chunk: bytes, key: bytes) -> bytes:
        """A chunk from the first place that has it whole."""
        problems: list[str] = []
        found = self._anywhere(chunk, key, problems)
        for look_again in (self.index.catch_up, lambda: self.index.reread(chunk)):
            if found is None and look_again():
                problems.clear()
                found = self._anywhere(chunk, key, problems)
        if found is None:
            why = "; ".join(problems) or "no pack holds it"
            raise ChunkDamaged(f"Chunk {chunk.hex()} is lost: {why}; run `hvbackup check` to see what needs it")
        return found

    def _anywhere(self, chunk: bytes, key: bytes, problems: list[str]) -> bytes | None:
        for pack, offset, stored, at, size in self.index.everywhere(chunk):
            try:
                plain = self._frame(pack, offset, stored, size)
                if len(plain) != size:
                    plain = plain[at : at + size]
                self._verify(chunk, plain, key)
                return plain
            except StoreDamage as e:
                problems.append(str(e))
        return None

    def _frame(self, pack: str, offset: int, stored: int, size: int) -> bytes:
        """A decoded frame.  One of several chunks is kept for a while: its neighbours are often wanted next."""
        plain = self._frames.get((pack, offset))
        if plain is None:
            plain = self._decode(pack, offset, self._read(pack, offset, stored))
            if len(plain) > size:
                with self._lock:
                    self._frames[(pack, offset)] = plain
                    if len(self._frames) > FRAME_CACHE:
                        self._frames.popitem(last=False)
        return plain

    def _read(self, pack: str, offset: int, length: int) -> bytes:
        if not 0 <= length <= READ_MAX or offset > OFFSET_MAX:
            return b""  # a row of a damaged cache file
        try:
            return self._backend.read_at(packs.path_of(pack), offset, length)
        except (FileNotFoundError, HvbackupError):
            return b""  # decoding it names the place

    def _decode(self, pack: str, offset: int, data: bytes) -> bytes:
        cipher, bind = self._cipher(pack)
        zstd = getattr(self._local, "zstd", None)
        if zstd is None:
            zstd = self._local.zstd = zstandard.ZstdDecompressor()
        return packs.decode(data, cipher, bind, zstd, f"the record at {offset} of pack {pack}")

    def _cipher(self, pack: str) -> tuple[AESGCM | None, bytes]:
        found = self._ciphers.get(pack)
        if found is None:
            found = self._ciphers[pack] = packs.cipher_of(self._backend, self._ring, pack)
        return found

    @staticmethod
    def _verify(chunk: bytes, data: bytes | memoryview, key: bytes) -> None:
        if blake3.blake3(data, key=key).digest() != chunk:
            raise ChunkDamaged(f"chunk {chunk.hex()} has other content than its id says")


def _by_place(places: NDArray[np.void]) -> NDArray[np.int64]:
    return np.lexsort((places["offset"], places["pack"]))


def _runs(places: NDArray[np.void]) -> Iterable[NDArray[np.int64]]:
    """Cut places, sorted by pack and offset, into runs that are worth one read each."""
    if len(places) == 0:
        return
    offset, ends = places["offset"].astype(np.int64), (places["offset"] + places["stored"]).astype(np.int64)
    first = 0
    for i in range(1, len(places) + 1):
        if (
            i == len(places)
            or places["pack"][i] != places["pack"][first]
            or offset[i] > ends[i - 1] + GAP_BYTES
            or ends[i] - offset[first] > READ_BYTES
        ):
            yield np.arange(first, i)
            first = i
