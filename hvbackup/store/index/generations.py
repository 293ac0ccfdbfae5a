"""Makes generations: small ones in memory, large ones in one pass over sorted pieces, and one out of several by merging."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, overload

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.model import MiB
from hvbackup.store.index.generation import (
    BUCKET_ROWS,
    FAN_BITS_MAX,
    FILTER_BITS_PER_CHUNK,
    FILTER_BITS_PER_CHUNK_SMALL,
    HEAD,
    MAGIC,
    OFFSET_BITS,
    PIECE_ROWS,
    ROW,
    STRANGER,
    SUM_BYTES,
    Generation,
    Keys,
    Layout,
    Rows,
    filter_bits,
    filter_words,
    keys_of,
    sum_of,
)

Footers = Mapping[
    str, bytes
]  # the packs of a generation, in the order of their numbers, and fingerprints of their footers


class Unsorted(ValueError):
    """The rows of a cache file are not in order, so the file is damaged."""


class Sink(Protocol):
    """Where a generation is written."""

    def write(self, data: bytes, /) -> Any:
        """Append `data`."""


def small(footers: Footers, rows: Rows) -> Generation:
    """A generation in memory, out of rows in any order."""
    out = _Memory()
    write(out, footers, len(rows), [sort(rows)], None, FILTER_BITS_PER_CHUNK_SMALL)
    return Generation(bytes(out))


class _Memory(bytearray):
    """A sink in memory."""

    def write(self, data: bytes) -> None:
        """Append `data`."""
        self += data


class _Summed:
    """Hands bytes on, and keeps the checksum of each SUM_BYTES of them."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._waiting, self._sums = sink, bytearray(), bytearray()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._waiting += data
        self.size += len(data)
        if len(self._waiting) >= MiB:
            whole = len(self._waiting) // SUM_BYTES * SUM_BYTES
            self._hand_on(whole)

    def _hand_on(self, length: int) -> None:
        piece = bytes(self._waiting[:length])
        del self._waiting[:length]
        for at in range(0, length, SUM_BYTES):
            self._sums += sum_of(memoryview(piece)[at : at + SUM_BYTES])
        self._sink.write(piece)

    def pad(self, to: int) -> None:
        """Zeroes up to a place."""
        self.write(bytes(to - self.size))

    def finish(self) -> None:
        """The sums follow."""
        self._hand_on(len(self._waiting))
        self._sink.write(bytes(self._sums) + blake3.blake3(self._sums).digest())


def write(
    sink: Sink,
    footers: Footers,
    count: int,
    pieces: Iterable[Rows],
    folder: str | None,
    filter_bits_per_chunk: int = FILTER_BITS_PER_CHUNK,
) -> None:
    """A generation of `count` rows, which come in sorted pieces, is in the sink when this returns.

    `folder` is for a temporary file when there are many of them.
    """
    fan = 1 << min(FAN_BITS_MAX, max(0, (count // BUCKET_ROWS).bit_length()))
    words = max(1, count * filter_bits_per_chunk // 64)
    text = json.dumps([list(footers), b"".join(footers.values()).hex()]).encode()
    at, out = Layout.of(len(text), count, fan, words), _Summed(sink)
    out.write(HEAD.pack(MAGIC, len(text), count, fan, words) + text)
    out.pad(at.rows)
    starts = np.zeros(fan + 1, np.uint64)
    with tempfile.SpooledTemporaryFile(4 * MiB, dir=folder) as spool:
        filter_ = _FilterWriter(spool, words)
        last = 0
        for piece in pieces:
            if len(piece) == 0:
                continue
            keys = keys_of(piece["id"])
            if int(keys[0]) < last or (keys[1:] < keys[:-1]).any():
                raise Unsorted("rows are out of order")
            last = int(keys[-1])
            _count_into(starts, keys, 64 - (fan.bit_length() - 1))
            filter_.add(piece["id"], keys)
            out.write(piece.tobytes())
        filter_.finish()
        out.pad(at.fan)
        for begin in range(0, fan + 1, PIECE_ROWS):  # cumulative, in place: the fan is the largest thing held
            part = starts[begin : begin + PIECE_ROWS]
            part[0] += starts[begin - 1] if begin else 0
            np.cumsum(part, out=part)
            out.write(part.tobytes())
        out.pad(at.filter)
        spool.seek(0)
        while data := spool.read(MiB):
            out.write(data)
    if out.size != at.sums:
        raise Unsorted(f"a generation of {count} rows got others")
    out.finish()


def _count_into(starts: Keys, keys: Keys, shift: int) -> None:
    """Count each key at the place behind its bucket: the running total is then where the next one begins."""
    bucket = (keys >> np.uint64(shift)).astype(np.int64) if shift < 64 else np.zeros(len(keys), np.int64)
    which = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
    starts[bucket[which] + 1] += np.diff(np.r_[which, len(bucket)]).astype(np.uint64)


class _FilterWriter:
    """Makes the words of a filter in their order."""

    def __init__(self, sink: Any, words: int) -> None:
        self._sink, self._words = sink, words
        self._next, self._open = 0, 0  # the first word that is not written, and what is known of it

    def add(self, ids: NDArray[np.void], keys: Keys) -> None:
        """Ids that follow those before."""
        word, mask = filter_words(keys, self._words), filter_bits(ids)
        first = np.flatnonzero(np.r_[True, word[1:] != word[:-1]])
        several, values = word[first].astype(np.int64), np.bitwise_or.reduceat(mask, first)
        last = int(several[-1])
        for begin in range(self._next, last + 1, PIECE_ROWS):
            end = min(begin + PIECE_ROWS, last + 1)
            part = np.zeros(end - begin, np.uint64)
            part[0] = self._open
            here = slice(*np.searchsorted(several, [begin, end]))
            part[several[here] - begin] |= values[here]
            self._open = int(part[-1]) if end == last + 1 else 0
            self._sink.write((part[:-1] if end == last + 1 else part).tobytes())
        self._next = last

    def finish(self) -> None:
        """The words that are left are empty."""
        self._sink.write(self._open.to_bytes(8, "little"))
        for begin in range(self._next + 1, self._words, PIECE_ROWS):
            self._sink.write(bytes(8 * min(PIECE_ROWS, self._words - begin)))


# -- sorting and merging -------------------------------------------------------------------------------------------------------


def sort(rows: Rows) -> Rows:
    """Rows in the order of their ids' first 8 bytes."""
    return rows[np.argsort(keys_of(rows["id"]), kind="stable")]


def merged(several: Sequence[Generation]) -> tuple[Footers, int, Iterator[Rows]]:
    """(packs, number of rows, sorted pieces) of one generation out of several, without packs that are gone."""
    footers: dict[str, bytes] = {}
    numbers = []
    for generation in several:
        alive = generation.footers()
        footers.update(alive)
        place = {name: i for i, name in enumerate(footers)}
        numbers.append(np.array([place[p] if p in alive else -1 for p in generation.packs], np.int64))
    changes = [_renumber(number) for number in numbers]
    count = sum(_count(g, n) for g, n in zip(several, numbers, strict=True))
    return footers, count, _merge([Keyed(g) for g in several], [g.rows for g in several], changes)


def _count(generation: Generation, number: NDArray[np.int64]) -> int:
    if (number >= 0).all():
        return len(generation.rows)
    change = _renumber(number)
    starts = range(0, len(generation.rows), PIECE_ROWS)
    return sum(len(change(generation.rows[s : s + PIECE_ROWS])) for s in starts)


def _renumber(number: NDArray[np.int64]) -> Callable[[Rows], Rows]:
    """Rows with the numbers their packs have in the new generation, without those that are gone."""
    offsets, table = np.uint64((1 << OFFSET_BITS) - 1), np.r_[number, STRANGER]

    def change(rows: Rows) -> Rows:
        new = table[np.minimum(rows["place"] >> np.uint64(OFFSET_BITS), len(number)).astype(np.int64)]
        kept: Rows = rows[new >= 0]
        kept["place"] = (kept["place"] & offsets) | (new[new >= 0].astype(np.uint64) << np.uint64(OFFSET_BITS))
        return kept

    return change


class Keyed(Sequence[int]):
    """The keys of sorted rows, for `bisect`: numpy would copy them all to search in them."""

    def __init__(self, of: Generation) -> None:
        self._ids = of.row_bytes

    def __len__(self) -> int:
        return len(self._ids) // ROW.itemsize

    @overload
    def __getitem__(self, i: int) -> int: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[int]: ...
    def __getitem__(self, i: Any) -> Any:
        return int.from_bytes(self._ids[i * ROW.itemsize : i * ROW.itemsize + 8], "big")


def _merge(keys: Sequence[Keyed], sources: Sequence[Rows], changes: Sequence[Callable[[Rows], Rows]]) -> Iterator[Rows]:
    """All rows in order, about PIECE_ROWS at a time: of each source what is not greater than the smallest of their limits."""
    at, ends = [0] * len(sources), [len(rows) for rows in sources]
    while left := sum(ends) - sum(at):
        reach = [min(e, a + max(1, PIECE_ROWS * (e - a) // left)) for a, e in zip(at, ends, strict=True)]
        limit = min(k[r - 1] for k, a, r in zip(keys, at, reach, strict=True) if r > a)
        stop = [bisect_right(k, limit, a, e) for k, a, e in zip(keys, at, ends, strict=True)]
        if stop == at:
            raise Unsorted("rows are out of order")
        parts = [c(rows[a:b]) for c, rows, a, b in zip(changes, sources, at, stop, strict=True) if b > a]
        yield sort(np.concatenate(parts))
        at = stop
