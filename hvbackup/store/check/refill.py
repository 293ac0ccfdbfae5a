"""Refill: what check found lost or stored once is stored again, from another copy that can still be read.

pages     from the twin in this store
blocks    from another store: by id where both stores have the same secrets, else from its points of the same machine and
          disk, at the same place; whatever it says, only content that hashes to our id is taken

killed after            left behind                       mended by
any pack sealed         part of what was lost is back     the next refill does the rest
"""

from __future__ import annotations

from collections.abc import Iterator

import blake3
import numpy as np

from hvbackup.errors import ChunkDamaged, StoreDamage
from hvbackup.model import ChunkId, DiskRoot, RecoveryPoint
from hvbackup.store.check.walk import Walk
from hvbackup.store.chunks.writer import META_COPIES, ChunkWriter
from hvbackup.store.format import layout as f
from hvbackup.store.store import Store


def refill(store: Store, other: Store | None) -> list[str]:
    """All that has a good copy somewhere is stored as often as it should be; what was done, a sentence each.  For the owner."""
    writer = store.writer()
    try:
        done = [*_pages(store, writer), *(_blocks(store, other, writer) if other else ())]
        writer.seal()
    finally:
        writer.abandon()
    return done


def _pages(store: Store, writer: ChunkWriter) -> Iterator[str]:
    """Map pages of which one copy is left get another."""
    count = 0
    for chunk in _lonely(store):
        try:
            writer.put_page(store.chunks.page(ChunkId(chunk)))
        except ChunkDamaged:
            continue  # named by check
        count += 1
    if count:
        yield f"{count} map page{'s' if count != 1 else ''} had one good copy and have two again"


def _lonely(store: Store) -> Iterator[bytes]:
    """Pages that fewer than two packs hold whole."""
    damaged = store.index.damaged
    for _, rows in store.index.rows():
        for chunk in np.unique(rows["id"][rows["kind"] == f.CHUNK_PAGE]).tolist():
            places = {place[:2] for place in store.index.everywhere(bytes(chunk))} - damaged
            if len({p for p, _ in places}) < META_COPIES:
                yield bytes(chunk)


def _blocks(store: Store, other: Store, writer: ChunkWriter) -> Iterator[str]:
    """Blocks that points need and nobody here has, from another store."""
    count = 0
    walk, same = Walk(store), other.ring.ids == store.ring.ids
    for point in store.points():
        for root in point.disks:
            for first, length in walk.lost_blocks(root):
                count += _range(store, other, writer, point, root, first, length, same=same)
    if count:
        yield f"{count} block{'s' if count != 1 else ''} came back from the store at {other.files.root}"


def _range(
    store: Store,
    other: Store,
    writer: ChunkWriter,
    point: RecoveryPoint,
    root: DiskRoot,
    first: int,
    length: int,
    *,
    same: bool,
) -> int:
    """How many blocks of a range came back."""
    try:
        ids = store.view(root).map.ids(first, length)
    except ChunkDamaged:
        return 0  # a page is lost: nobody knows what was there
    missing, count = np.flatnonzero(writer.claim(ids)), 0
    for i in missing.tolist():
        chunk = ids[i].tobytes()
        data = _by_id(other, chunk) if same else _by_place(store, other, point, root, first + i, chunk)
        if data is not None:
            [frame] = writer.compress([([memoryview(data)], [chunk])])
            writer.put_blocks(frame)
            count += 1
    writer.drop_claims()
    return count


def _by_id(other: Store, chunk: bytes) -> bytes | None:
    try:
        return bytes(other.chunks.block(chunk))
    except ChunkDamaged:
        return None


def _by_place(
    store: Store, other: Store, point: RecoveryPoint, root: DiskRoot, block: int, chunk: bytes
) -> bytes | None:
    """The content of a block as one of the other store's points has it, nearest in time first."""
    data, offset = bytearray(store.block), block * store.block
    for candidate in sorted(other.points(point.machine.id), key=lambda p: abs(p.t - point.t)):
        for its in candidate.disks:
            if its.disk.id != root.disk.id or its.disk.size <= offset:
                continue
            data[:] = bytes(store.block)
            try:
                other.view(its).read_into(offset, memoryview(data)[: its.disk.size - offset])
            except StoreDamage:
                continue
            if blake3.blake3(data, key=store.ring.block_key).digest() == chunk:
                return bytes(data)
    return None
