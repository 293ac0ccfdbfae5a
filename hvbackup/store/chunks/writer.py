"""Blocks into chunks into packs: deduplicate, compress, encrypt, and write, in that order.

Workers call `claim` and `compress`; one thread calls `put_blocks` and `put_page` in the order of the disk, so that a pack
holds blocks in the order in which a restore reads them.  Nothing exists until `seal`: packs are durable when it returns.

Map pages go into two packs, and so does the copy of the point: one bad sector must not take every version of 16 GiB.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import NamedTuple

import blake3
import numpy as np
import zstandard
from numpy.typing import NDArray

from hvbackup.model import ChunkId, KiB, MiB, RecoveryPoint
from hvbackup.pipeline import in_background, result
from hvbackup.store.backend import Backend
from hvbackup.store.chunks.writers import WriterLease
from hvbackup.store.format import layout as f
from hvbackup.store.format.blockmap import Ids
from hvbackup.store.format.keys import Keyring
from hvbackup.store.format.pack import PackWriter
from hvbackup.store.format.root import roots_of
from hvbackup.store.index.index import NOWHERE, Index

PACK_BYTES = 64 * MiB  # sealed at this size: bounds what a crash wastes and what reclaim copies
LEVEL = 1  # zstd level of blocks and pages; decision 0003 has the measurements
MATCH_BYTES = 7  # no shorter match is looked for: 5 % less work than with the 6 of that level, for 1.8 % more store
META_COPIES = 2
SAMPLES, SAMPLE_BYTES = 4, KiB  # of a block amid such as do not shrink: a 15th of the work of trying it whole
WORTH_IT = 0.97  # a frame that does not shrink below this part is stored as it is: restoring it costs nothing

Sealed = tuple[str, NDArray[np.void]]  # the name of a pack, and its rows
Group = tuple[Sequence[memoryview], Sequence[bytes]]  # blocks that are compressed together, and their ids
Plains = list[bytes | bytearray | memoryview]  # what is compressed, each by itself


def compressor(length: int) -> zstandard.ZstdCompressor:
    """What compresses blocks of this length; for one thread."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, source_size=length, min_match=MATCH_BYTES, write_content_size=False
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class Frame(NamedTuple):
    """New chunks, compressed together: one record of a pack."""

    codec: int
    data: bytes | memoryview
    ids: Sequence[bytes]
    plain: Sequence[int]


class ChunkWriter:
    """Everything one capture adds to the store, under a lease that keeps reclaim away from what it refers to.

    Whoever begins one ends it: by `Store.commit`, or by `abandon`.
    Thread safety: `claim` and `compress` from any thread, everything else from one.
    """

    def __init__(self, backend: Backend, ring: Keyring, index: Index, lease: WriterLease) -> None:
        self._backend, self._ring, self._index, self.lease = backend, ring, index, lease
        self._data: PackWriter | None = None
        self._sealing: tuple[PackWriter, Future[Sealed]] | None = None  # the pack before it
        self._meta: list[PackWriter] = []
        self._claimed: set[bytes] = set()  # by this writer, in packs the index does not know yet
        self._put: set[bytes] = set()  # those of them that are in a pack already
        self._pages: dict[bytes, bytes] = {}  # put by this writer: readable before they are sealed
        self._lock = threading.Lock()
        self._local = threading.local()
        self.stored_bytes = 0  # in sealed packs

    def builds_upon(self, point: RecoveryPoint) -> None:
        """What the point needs stays until we end, when this returns; the caller then sees that the point is still there."""
        self.lease.builds_upon(roots_of(point))

    def claim(self, ids: Ids) -> NDArray[np.bool_]:
        """Which of these chunks the store does not have and nobody has claimed; the caller must put those.

        The first of equal ids is claimed, the others are not.
        """
        self.lease.renew()
        packs = self._index.lookup(ids.view("V32").ravel())["pack"]
        missing: NDArray[np.bool_] = (packs == NOWHERE) | self.lease.avoids(packs)
        wanted, places = ids[missing].view("V32").ravel().tolist(), np.flatnonzero(missing).tolist()
        with self._lock:
            for i, chunk in zip(places, wanted, strict=True):
                missing[i] = chunk not in self._claimed
                self._claimed.add(chunk)
        return missing

    def drop_claims(self) -> None:
        """Claims that nobody fulfilled are forgotten: what was read for a map that can't be made is read again."""
        with self._lock:
            self._claimed &= self._put

    def compress(self, groups: Sequence[Group]) -> list[Frame]:
        """One frame out of each group of claimed blocks; what held the blocks may be used again when this returns."""
        if not groups:
            return []
        plains: Plains = [blocks[0] if len(blocks) == 1 else b"".join(blocks) for blocks, _ in groups]
        zstd = getattr(self._local, "zstd", None)
        if zstd is None:
            zstd = self._local.zstd = compressor(max(map(len, plains)))
        tried = self._worth_trying(zstd, plains)
        packed = _all_at_once(zstd, [plains[i] for i in tried])
        found = {i: packed[n] for n, i in enumerate(tried)}
        frames = [
            _frame(group, plain, found.get(i)) for i, (group, plain) in enumerate(zip(groups, plains, strict=True))
        ]
        self._local.dense = 2 * sum(frame.codec == f.CODEC_RAW for frame in frames) > len(frames)
        return frames

    def _worth_trying(self, zstd: zstandard.ZstdCompressor, plains: Plains) -> Sequence[int]:
        """Which of them may shrink: all, unless most of this thread's last ones did not; then those of which a sample does."""
        if not getattr(self._local, "dense", False):
            return range(len(plains))
        samples: Plains = [
            b"".join([p[at : at + SAMPLE_BYTES] for at in range(0, len(p), -(-len(p) // SAMPLES))]) for p in plains
        ]
        packed = _all_at_once(zstd, samples)
        return [i for i, sample in enumerate(samples) if len(packed[i]) <= len(sample) * WORTH_IT]

    def put_blocks(self, frame: Frame) -> None:
        """Append a frame of claimed blocks to the open pack of data."""
        if self._data is None:
            self._data = PackWriter(self._backend, self._ring, f.KIND_DATA)
        self._data.add(f.CHUNK_BLOCK, frame.codec, frame.data, frame.ids, frame.plain)
        self._put.update(frame.ids)
        if self._data.size >= PACK_BYTES:
            self._seal_behind()

    def put_page(self, page: bytes) -> ChunkId:
        """The id of a map page, which is stored twice if the store did not have it in two packs."""
        chunk = ChunkId(blake3.blake3(page, key=self._ring.page_key).digest())
        if chunk not in self._pages and self._claim_page(chunk):
            self._pages[chunk] = page
            [frame] = self.compress([([memoryview(page)], [chunk])])
            self._put_meta(f.CHUNK_PAGE, frame)
        return chunk

    def _claim_page(self, chunk: ChunkId) -> bool:
        """Whether fewer than two packs hold a page, as after a run that died between the two, and nobody has claimed it."""
        self.lease.renew()
        everywhere = {(p.pack, p.offset) for p in self._index.everywhere(chunk) if self.lease.fits(p.pack)}
        places = everywhere - self._index.damaged
        with self._lock:
            if len({pack for pack, _ in places}) >= 2 or chunk in self._claimed:
                return False
            self._claimed.add(chunk)
            return True

    def put_point_copy(self, path: str, data: bytes) -> None:
        """A copy of a point file, for repair only; without its name nobody could decrypt or verify it."""
        copy = point_copy(path, data)
        self._put_meta(f.CHUNK_POINT, Frame(f.CODEC_RAW, copy, [blake3.blake3(copy).digest()], [len(copy)]))

    def _put_meta(self, what: int, frame: Frame) -> None:
        while len(self._meta) < META_COPIES:
            self._meta.append(PackWriter(self._backend, self._ring, f.KIND_META))
        self._put.update(frame.ids)
        for pack in self._meta:
            pack.add(what, frame.codec, frame.data, frame.ids, frame.plain)
        if self._meta[0].size >= PACK_BYTES:
            self._seal_meta()

    def page(self, chunk: ChunkId) -> bytes | None:
        """A page this writer has put, or None."""
        return self._pages.get(chunk)

    def _seal_behind(self) -> None:
        """The full pack is made durable while the next one is filled; one at a time, so that a slow disk slows us down."""
        self._settle_sealing()
        assert self._data is not None  # it is full
        pack, self._data = self._data, None
        self._sealing = pack, in_background(pack.seal)

    def _settle_sealing(self) -> None:
        """The pack that was being made durable is in the index when this returns."""
        if self._sealing is not None:
            pack, future = self._sealing
            result(future)
            self._sealing = None
            self._seal_one(pack, future.result)

    def _seal_data(self) -> None:
        self._settle_sealing()
        if self._data is not None:
            pack, self._data = self._data, None
            self._seal_one(pack, pack.seal)

    def _seal_meta(self) -> None:
        several, self._meta = self._meta, []
        for i, pack in enumerate(several):
            try:
                self._seal_one(pack, pack.seal)
            except BaseException:
                for rest in several[i + 1 :]:
                    rest.abandon()
                raise
        self._pages.clear()  # the index knows them from here on

    def _seal_one(self, pack: PackWriter, seal: Callable[[], Sealed]) -> None:
        try:
            name, rows = seal()
        except BaseException:
            pack.abandon()
            raise
        self.stored_bytes += pack.size
        self._index.add(name, rows)
        with self._lock:
            self._claimed.difference_update(rows["id"].tolist())
            self._put.difference_update(rows["id"].tolist())

    def seal(self) -> None:
        """Everything that was put is durable, and in the index, when this returns."""
        self._seal_data()
        self._seal_meta()

    def abandon(self) -> None:
        """Remove what is not sealed; sealed packs stay, for the next run to refer to."""
        with ExitStack() as stack:
            stack.callback(self.lease.end)
            if self._sealing is not None:
                sealing, future = self._sealing
                future.exception()  # its thread still writes it; what it sealed, nothing here takes away
                stack.callback(sealing.abandon)
            for pack in [self._data, *self._meta]:
                if pack is not None:
                    stack.callback(pack.abandon)
            self._data, self._sealing, self._meta = None, None, []


def _all_at_once(zstd: zstandard.ZstdCompressor, plains: Plains) -> Sequence[zstandard.BufferSegment]:
    """Each of them compressed, in one call, or threads wait for each other at each block."""
    return zstd.multi_compress_to_buffer(plains) if plains else ()  # type: ignore[return-value]  # it is indexed


def _frame(group: Group, plain: bytes | bytearray | memoryview, packed: zstandard.BufferSegment | None) -> Frame:
    blocks, ids = group
    lengths = [len(b) for b in blocks]
    if packed is None or len(packed) > len(plain) * WORTH_IT:
        return Frame(f.CODEC_RAW, bytes(plain), ids, lengths)
    data = memoryview(packed)  # type: ignore[arg-type]  # it has a buffer, which its stub does not say
    return Frame(f.CODEC_ZSTD, data, ids, lengths)


def point_copy(path: str, data: bytes) -> bytes:
    """The chunk that is a copy of a point: its name, without which nobody could decrypt or verify it, and its file."""
    return len(path).to_bytes(2, "little") + path.encode() + data
