"""Repack: the chunks of some packs are in new packs as well; the old ones are left for reclaim to remove.

    repack    live records, copied as they are: what reclaim does with packs that have become sparse
    regroup   blocks joined into frames of GROUP_BYTES and compressed harder: what `compact` does with packs gone cold

Nothing is copied on trust: a record is decrypted, decoded and compared with its ids, and encrypted again under the key of its
new pack, whose salt is random, so no nonce meets a key twice.  Records that can't be read are named and not copied; their pack
is not `replaced`, and must stay.

    killed after            left behind                            cleaned by
    1 new pack sealed       its chunks in two packs, both whole    the next run; reclaim
    2 index knows it        the same                               reclaim removes the old one, after its grace

Why removing an old pack is safe then: `replaced` asks the index, for every chunk, for enough other places in packs that stay
(one for a block; two packs for map pages and copies of points), and a place is in the index only when its pack is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
import zstandard
from numpy.typing import NDArray

from hvbackup.errors import HvbackupError, StoreDamage
from hvbackup.model import KiB
from hvbackup.store.chunks.writer import META_COPIES, PACK_BYTES, WORTH_IT, Frame
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format import records
from hvbackup.store.format.pack import PackWriter
from hvbackup.store.store import Store

GROUP_BYTES = 256 * KiB  # joined into one frame: decision 0032 has the measurements
GROUP_LEVEL = 3

Keep = Callable[[str, NDArray[np.void]], NDArray[np.bool_]]  # (pack, its rows) -> which of them live


def everything(_pack: str, rows: NDArray[np.void]) -> NDArray[np.bool_]:
    """A `keep` that keeps all."""
    return np.ones(len(rows), np.bool_)


@dataclass(slots=True)
class Repacked:
    """What became of some packs."""

    made: list[str] = field(default_factory=list)  # new packs, durable and in the index
    whole: list[str] = field(default_factory=list)  # old packs of which every live chunk was copied
    damaged: list[tuple[str, int, str]] = field(default_factory=list)  # (pack, offset of the record, why)
    read_bytes: int = 0
    made_bytes: int = 0


def repack(store: Store, names: Iterable[str], keep: Keep = everything) -> Repacked:
    """Every live chunk of these packs is in a new pack as well, with its frame unchanged, when this returns."""
    return _Copy(store, keep, 0).run(names)


def regroup(store: Store, names: Iterable[str], keep: Keep = everything, *, group_bytes: int = GROUP_BYTES) -> Repacked:
    """The same, with neighbouring blocks joined into frames of `group_bytes` at level 3.  Not for packs of pages."""
    return _Copy(store, keep, group_bytes).run(names)


def replaced(store: Store, pack: str, rows: NDArray[np.void], without: Collection[str]) -> bool:
    """Whether every chunk of `rows` is in enough packs other than `pack` and those in `without`.

    `without` must name what is condemned already: of two packs with the same chunks, one has to stay.
    """
    unfit = {pack, *without}
    damaged = store.index.damaged
    for row in rows:
        places = {
            place.pack
            for place in store.index.everywhere(row["id"].tobytes())
            if place.pack not in unfit and place[:2] not in damaged
        }
        if len(places) < (1 if row["kind"] == f.CHUNK_BLOCK else META_COPIES):
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Part:
    """The live chunks of one record, decoded and verified."""

    what: int
    plain: bytes  # of the live chunks only
    ids: Sequence[bytes]
    lengths: Sequence[int]
    same: Frame | None  # the frame as it was, when all of its chunks live


class _Copy:
    """One run over some packs."""

    def __init__(self, store: Store, keep: Keep, group_bytes: int) -> None:
        self._store, self._keep, self._group_bytes = store, keep, group_bytes
        self._zstd = zstandard.ZstdDecompressor()
        self._harder = zstandard.ZstdCompressor(level=GROUP_LEVEL, write_content_size=False)
        self._done = Repacked()

    def run(self, names: Iterable[str]) -> Repacked:
        wanted = [(kind_of(self._store, name), name) for name in names]
        for kind, several in groupby(sorted(wanted, key=itemgetter(0)), key=itemgetter(0)):
            output = _Output(self._store, kind, self._done)
            try:
                for _, name in several:
                    self._one(output, name)
                output.finish()
            except BaseException:
                output.abandon()
                raise
        return self._done

    def _one(self, output: _Output, name: str) -> None:
        before = len(self._done.damaged)
        parts = self._parts(name)
        join = self._group_bytes and output.kind == f.KIND_DATA
        for what, frame in self._grouped(parts) if join else self._copied(parts):
            output.put(what, frame)
        if len(self._done.damaged) == before:
            self._done.whole.append(name)

    def _parts(self, name: str) -> Iterator[_Part]:
        """Everything that lives in a pack; what can't be read is noted."""
        try:
            secret = packs.cipher_of(self._store.files, self._store.ring, name)
            rows = packs.read_footer(self._store.files, name)
        except StoreDamage as e:
            self._done.damaged.append((name, 0, str(e)))
            return
        for offset, data, group in records.each(self._store.files, name, rows[self._keep(name, rows)]):
            self._done.read_bytes += len(data)
            where = f"the record at {offset} of pack {name}"
            try:
                body = packs.unlock(data, *secret, where)
                plain = packs.inflate(data, body, self._zstd, where)
                records.verify(self._store.ring, plain, group)
            except StoreDamage as e:
                self._done.damaged.append((name, offset, str(e)))
                continue
            yield _part(data, bytes(body), plain, group)

    def _copied(self, parts: Iterable[_Part]) -> Iterator[tuple[int, Frame]]:
        for part in parts:
            yield part.what, part.same or self._frame([part])

    def _grouped(self, parts: Iterable[_Part]) -> Iterator[tuple[int, Frame]]:
        """Neighbours joined; what did not shrink stays alone, because joining would only make it dearer to read."""
        waiting: list[_Part] = []
        size = 0
        for part in parts:
            alone = part.what != f.CHUNK_BLOCK or (part.same and part.same.codec == f.CODEC_RAW)
            if alone:
                yield part.what, part.same or self._frame([part])
                continue
            if waiting and size + len(part.plain) > self._group_bytes:
                yield f.CHUNK_BLOCK, self._frame(waiting)
                waiting, size = [], 0
            waiting.append(part)
            size += len(part.plain)
        if waiting:
            yield f.CHUNK_BLOCK, self._frame(waiting)

    def _frame(self, parts: Sequence[_Part]) -> Frame:
        plain = b"".join(p.plain for p in parts)
        ids, lengths = [i for p in parts for i in p.ids], [n for p in parts for n in p.lengths]
        data = self._harder.compress(plain)
        if len(data) > len(plain) * WORTH_IT:
            return Frame(f.CODEC_RAW, plain, ids, lengths)
        return Frame(f.CODEC_ZSTD, data, ids, lengths)


def _part(data: memoryview, body: bytes, plain: bytes, rows: NDArray[np.void]) -> _Part:
    ids, lengths, codec = [r.tobytes() for r in rows["id"]], rows["plain"].tolist(), data[8]
    what = int(rows["kind"][0])
    if sum(lengths) == len(plain):
        return _Part(what, plain, ids, lengths, Frame(codec, body, ids, lengths))
    live = b"".join(plain[at : at + n] for at, n in zip(rows["at"].tolist(), lengths, strict=True))
    return _Part(what, live, ids, lengths, None)


def kind_of(store: Store, pack: str) -> int:
    """What a pack says it holds; one whose header is damaged is refused later, by `cipher_of`."""
    try:
        head = store.files.read_at(packs.path_of(pack), 5, 1)
    except (FileNotFoundError, HvbackupError):
        return f.KIND_DATA
    return f.KIND_META if head == bytes([f.KIND_META]) else f.KIND_DATA


class _Output:
    """New packs of one kind.  The two copies of a page never come into one pack."""

    def __init__(self, store: Store, kind: int, done: Repacked) -> None:
        self._store, self.kind, self._done = store, kind, done
        self._lanes: list[tuple[PackWriter, set[bytes]]] = []

    def put(self, what: int, frame: Frame) -> None:
        """Append a frame to the first open pack that has none of its chunks."""
        lane = next((n for n, (_, ids) in enumerate(self._lanes) if ids.isdisjoint(frame.ids)), len(self._lanes))
        if lane == len(self._lanes):
            enough = META_COPIES if self.kind == f.KIND_META else 1
            if lane >= enough and all(ids.issuperset(frame.ids) for _, ids in self._lanes[:enough]):
                return  # as many copies as there should be
            self._lanes.append((PackWriter(self._store.files, self._store.ring, self.kind), set()))
        writer, ids = self._lanes[lane]
        writer.add(what, frame.codec, frame.data, frame.ids, frame.plain)
        ids.update(frame.ids)
        if writer.size >= PACK_BYTES:
            del self._lanes[lane]
            self._seal(writer)

    def _seal(self, writer: PackWriter) -> None:
        try:
            name, rows = writer.seal()
        except BaseException:
            writer.abandon()
            raise
        self._store.index.add(name, rows)
        self._done.made.append(name)
        self._done.made_bytes += writer.size

    def finish(self) -> None:
        """Everything that was put is durable, and in the index, when this returns."""
        while self._lanes:
            self._seal(self._lanes.pop()[0])

    def abandon(self) -> None:
        """Remove what is not sealed."""
        for writer, _ in self._lanes:
            writer.abandon()
        self._lanes = []
