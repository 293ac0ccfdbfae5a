"""A generation of the index: where the chunks of some packs are, in one immutable file that is mapped and never read whole.

    head | names and fingerprints of the packs | rows | fan | filter | sums | digest

rows     52 bytes a chunk, sorted by the first 8 bytes of the id
fan      for each value of the first bits of an id, where its rows begin: about BUCKET_ROWS of them, on one or two pages of memory
filter   4 bits of one 64-bit word for each chunk; 3 % of what the generation does not have passes it, and less in small ones
sums     8 bytes of BLAKE3 for each 64 KiB of all that, so that a doubt costs reading the places in question, not the file

All three lie in the order of the ids.  So a generation is written in one pass over sorted pieces, whatever its size, and a
sorted batch of keys walks through each once.  Nothing here is trusted with data: a row only says where to look, and who does not
find the chunk there asks `holds`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import StoreDamage
from hvbackup.model import KiB, MiB
from hvbackup.store.format import layout as f

MAGIC = b"hvI2"
HEAD = struct.Struct("<4sIQQQ")  # magic, length of the names, rows, places in the fan less one, words of the filter
PAGE = 4096
SUM_BYTES = 64 * KiB  # one checksum for so much
BUCKET_ROWS = 32  # 1.6 KiB: on 1.4 pages on average
FILTER_BITS_PER_CHUNK = 12
FILTER_BITS_PER_CHUNK_SMALL = 32  # a capture asks many small ones about each batch, and nearly all of it is new
FILTER_SHIFTS = np.array([0, 6, 12, 18], np.uint64)  # four bits of a word, from as many parts of an id
PIECE_ROWS = 1 << 19  # held at a time while a generation is made or read whole: 27 MB
FAN_BITS_MAX = 30
LARGE_BYTES = 64 * MiB  # a smaller file is in memory after its first batches, and not worth a question
READAHEAD_BYTES = 128 * KiB  # the kernel reads no more for one call, however much is asked for
SAMPLE_PAGES = 32  # looked at before a batch: if they are all in memory, so are the others

ROW = np.dtype([("id", "V32"), ("place", "<u8"), ("stored", "<u4"), ("shape", "<u8")])
_BEHIND_ID = struct.Struct("<QIQ")  # of a row
OFFSET_BITS = 40  # of a place; the rest is the number of the pack in its generation
STRANGER = (1 << 24) - 1  # the number of a pack that a damaged file made up
AT_BITS, PLAIN_BITS = 28, 28  # of a shape; the rest is the kind

LOCATION = np.dtype(
    [
        ("id", "V32"),
        ("pack", "<u4"),
        ("stored", "<u4"),
        ("offset", "<u8"),
        ("at", "<u4"),
        ("plain", "<u4"),
        ("kind", "<u4"),
    ]
)

NOWHERE = 0xFFFFFFFF  # the pack of an id that was not found

Rows = NDArray[np.void]
Keys = NDArray[np.uint64]


def keys_of(ids: NDArray[np.void]) -> Keys:
    """The first 8 bytes of each id as a number that sorts like the id."""
    words = np.ascontiguousarray(ids).view(">u8").reshape(-1, 4)
    return words[:, 0].astype(np.uint64)


def rows_of(footer: Rows, pack: int) -> Rows:
    """The rows of one pack, in the order of its footer.  Raises StoreDamage when it says what no pack can hold."""
    plain, at = footer["plain"], footer["at"]
    if (footer["offset"] >> OFFSET_BITS).any() or max(plain.max(initial=0), at.max(initial=0)) > f.RECORD_PLAIN_MAX:
        raise StoreDamage("its footer says what can't be")
    out = np.empty(len(footer), ROW)
    out["id"], out["stored"] = footer["id"], footer["stored"]
    out["place"] = footer["offset"] | np.uint64(pack << OFFSET_BITS)
    kind = (footer["kind"] & np.uint32(0xFF)).astype(np.uint64) << np.uint64(AT_BITS + PLAIN_BITS)
    out["shape"] = kind | (plain.astype(np.uint64) << np.uint64(AT_BITS)) | at
    return out


def locations(rows: Rows) -> Rows:
    """Rows as everybody else reads them; `pack` is still the number within the generation."""
    out = np.empty(len(rows), LOCATION)
    place, shape = rows["place"], rows["shape"]
    out["id"], out["stored"] = rows["id"], rows["stored"]
    out["pack"], out["offset"] = place >> np.uint64(OFFSET_BITS), place & np.uint64((1 << OFFSET_BITS) - 1)
    out["at"] = shape & np.uint64((1 << AT_BITS) - 1)
    out["plain"] = (shape >> np.uint64(AT_BITS)) & np.uint64((1 << PLAIN_BITS) - 1)
    out["kind"] = shape >> np.uint64(AT_BITS + PLAIN_BITS)
    return out


class Place(NamedTuple):
    """One copy of a chunk: the pack, the record in it, and where in the plain content of that record."""

    pack: str
    offset: int
    stored: int
    at: int
    plain: int


class Asked(NamedTuple):
    """Ids that are looked up together, with what every generation needs of them."""

    ids: NDArray[np.void]
    keys: Keys
    bits: Keys  # in the filter

    @classmethod
    def of(cls, ids: NDArray[np.void]) -> Asked:
        """Made once, however many generations are asked."""
        return cls(ids, keys_of(ids), filter_bits(ids))

    def only(self, which: NDArray[np.int64]) -> Asked:
        """Some of them."""
        return Asked(self.ids[which], self.keys[which], self.bits[which])


class Generation:
    """One immutable set of packs and the places of their chunks.  Thread safety: immutable."""

    def __init__(self, area: mmap.mmap | bytes, fd: int = -1) -> None:
        """Over bytes that somebody vouches for: `open_at` has looked at them, or `generations.small` has just made them."""
        self._area, self._fd = area, fd
        self._large = fd >= 0 and len(area) > LARGE_BYTES
        _, length, count, fan, words = HEAD.unpack_from(area)
        self.packs, self.prints = _names(area[HEAD.size : HEAD.size + length])
        self._at = Layout.of(length, count, fan, words)
        self.rows: Rows = np.frombuffer(area, ROW, count, self._at.rows)
        self._row_keys = np.ndarray((count,), ">u8", area, self._at.rows, (ROW.itemsize,))
        self._fan = np.frombuffer(area, np.uint64, fan + 1, self._at.fan)
        self._bucket_starts = memoryview(area)[self._at.fan : self._at.filter].cast("Q")  # the same, for one at a time
        self._shift = 64 - (fan.bit_length() - 1)
        self._filter = np.frombuffer(area, np.uint64, words, self._at.filter)
        self.gone: frozenset[str] = frozenset()  # packs that are not in the store any more; their rows are passed over
        self.ordinals = np.full(
            len(self.packs) + 1, NOWHERE, np.uint32
        )  # of its packs among all packs of the index, and NOWHERE behind them

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)

    @classmethod
    def open_at(cls, path: str) -> Generation | None:
        """The generation in a file, mapped; None when the file is not one."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        return cls.open_fd(fd)

    @classmethod
    def open_fd(cls, fd: int) -> Generation | None:
        """The same of an open file, which is closed with the generation."""
        try:
            area = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            if _is_one(area):
                if len(area) > LARGE_BYTES:
                    # A fault brings in one page and not the 32 around it: what a batch needs is asked for beforehand.
                    area.madvise(mmap.MADV_RANDOM)
                return cls(area, fd)
        except (OSError, ValueError, struct.error, TypeError):
            pass
        os.close(fd)
        return None

    @property
    def content(self) -> mmap.mmap | bytes:
        """The bytes of its file."""
        return self._area

    @property
    def mapped(self) -> bool:
        """Whether it is a file."""
        return self._fd >= 0

    @property
    def row_bytes(self) -> memoryview:
        """All rows, one after the other."""
        return memoryview(self._area)[self._at.rows : self._at.rows + len(self.rows) * ROW.itemsize]

    # -- looking up ----------------------------------------------------------------------------------------------------

    def find(self, asked: Asked, damaged: set[tuple[str, int]]) -> NDArray[np.int64] | None:
        """The row of each id, or -1; rows whose place is known to be damaged are passed over.  None: it may have none of them."""
        ids, keys, _ = asked
        todo = self._pass_filter(asked)
        if len(todo) == 0:
            return None
        out = np.full(len(ids), -1, np.int64)
        at, end = self._buckets(keys[todo])
        at = self._lower_bound(keys[todo], at, end)
        while len(todo):
            inside = at < end
            todo, at, end = todo[inside], at[inside], end[inside]
            near = self._row_keys[at] == keys[todo]
            todo, at, end = todo[near], at[near], end[near]
            hit = (self.rows["id"][at] == ids[todo]) & (self.numbers(self.rows["place"][at]) != NOWHERE)
            if damaged:
                hit &= np.array([self.place(int(i))[:2] not in damaged for i in at], bool)
            out[todo[hit]] = at[hit]
            todo, at, end = todo[~hit], at[~hit] + 1, end[~hit]
        return out

    def _pass_filter(self, asked: Asked) -> NDArray[np.int64]:
        """Those that may be here, in the order of their keys where that matters."""
        _, keys, bits = asked
        word = filter_words(keys, len(self._filter))
        if self._large:
            order = np.argsort(keys)
            self._ask_for(self._at.filter + word[order].astype(np.int64) * 8, 8, self._at.filter, self._at.sums)
        passed: NDArray[np.int64] = np.flatnonzero(self._filter[word] & bits == bits)
        return passed[np.argsort(keys[passed])] if self._large else passed

    def _buckets(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        bucket = self._bucket(keys)
        self._ask_for(self._at.fan + bucket * 8, 16, self._at.fan, self._at.filter)
        # A damaged file may say anything.
        ends = np.minimum(self._fan[np.r_[bucket, bucket + 1]], len(self.rows)).astype(np.int64)
        at, end = ends[: len(bucket)], ends[len(bucket) :]
        self._ask_for(self._at.rows + at * ROW.itemsize, BUCKET_ROWS * ROW.itemsize, self._at.rows, self._at.fan)
        return at, end

    def _bucket(self, keys: Keys) -> NDArray[np.int64]:
        if self._shift == 64:
            return np.zeros(len(keys), np.int64)
        return (keys >> np.uint64(self._shift)).astype(np.int64)

    def _lower_bound(self, keys: Keys, at: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the first row with such a key or a greater one is, all at once."""
        low, high = at.copy(), end.copy()
        while (open_ := np.flatnonzero(low < high)).size:
            middle = (low[open_] + high[open_]) >> 1
            less = self._row_keys[middle] < keys[open_]
            low[open_[less]] = middle[less] + 1
            high[open_[~less]] = middle[~less]
        return low

    def _ask_for(self, offsets: NDArray[np.int64], length: int, start: int, end: int) -> None:
        """The kernel reads what these places are on, all together, unless it has them; `offsets` are sorted.

        One page fault after the other would wait for the disk as many times as there are places.
        """
        if not self._large or len(offsets) == 0:
            return
        pages = np.unique(offsets // PAGE)
        if all(self._in_memory(int(p) * PAGE) for p in pages[:: max(1, len(pages) // SAMPLE_PAGES)]):
            return
        if len(pages) * 16 > (end - start) // PAGE:
            for at in range(start, end, READAHEAD_BYTES):
                os.posix_fadvise(self._fd, at, READAHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            return
        reach = PAGE + length
        for page in pages.tolist():
            os.posix_fadvise(self._fd, page * PAGE, reach, os.POSIX_FADV_WILLNEED)

    def _in_memory(self, offset: int) -> bool:
        try:
            os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except OSError:
            return False
        return True

    def places(self, chunk: bytes) -> dict[int, Place]:
        """Every place of one chunk, by row; quicker for one than `find`, and does not let go of the interpreter lock."""
        begin, end = (self._at.rows + row * ROW.itemsize for row in self._bucket_of(int.from_bytes(chunk[:8], "big")))
        places = {}
        while (found := self._area.find(chunk, begin, end)) >= 0:
            row, inside = divmod(found - self._at.rows, ROW.itemsize)
            if inside == 0 and (place := self.place(row)).pack not in self.gone and place.pack:
                places[row] = place
            begin = found + 1
        return places

    def _bucket_of(self, key: int) -> tuple[int, int]:
        bucket, count = key >> self._shift, len(self.rows)
        return min(self._bucket_starts[bucket], count), min(self._bucket_starts[bucket + 1], count)

    def numbers(self, places: Keys) -> NDArray[np.uint32]:
        """The numbers of packs among all of the index; NOWHERE for one that is gone, or that a damaged file made up."""
        found: NDArray[np.uint32] = self.ordinals[
            np.minimum(places >> np.uint64(OFFSET_BITS), len(self.packs)).astype(int)
        ]
        return found

    def footers(self) -> dict[str, bytes]:
        """The packs of it that are in the store, and the fingerprints that their footers had."""
        return {p: self.prints[8 * i : 8 * i + 8] for i, p in enumerate(self.packs) if p not in self.gone}

    def alive(self) -> Iterable[str]:
        """The packs of it that are in the store."""
        return self.packs if not self.gone else [p for p in self.packs if p not in self.gone]

    def place(self, row: int) -> Place:
        """All that a row says; a pack without a name where a damaged file made one up."""
        place, stored, shape = _BEHIND_ID.unpack_from(self._area, self._at.rows + row * ROW.itemsize + f.ID_BYTES)
        pack, at, plain = (
            place >> OFFSET_BITS,
            shape & ((1 << AT_BITS) - 1),
            (shape >> AT_BITS) & ((1 << PLAIN_BITS) - 1),
        )
        name = self.packs[pack] if pack < len(self.packs) else ""
        return Place(name, place & ((1 << OFFSET_BITS) - 1), stored, at, plain)

    def pieces(self) -> Iterator[Rows]:
        """All rows whose packs are in the store, as LOCATION, some at a time."""
        for start in range(0, len(self.rows), PIECE_ROWS):
            rows = self.rows[start : start + PIECE_ROWS]
            yield locations(rows[self.numbers(rows["place"]) != NOWHERE])

    # -- doubts --------------------------------------------------------------------------------------------------------

    def holds(self, chunk: bytes | None = None) -> bool:
        """Whether what the file says about a chunk (or, without one, about everything) is what was written."""
        if chunk is None:
            return all(self._sum_holds(n) for n in range(-(-self._at.sums // SUM_BYTES)))
        key = int.from_bytes(chunk[:8], "big")
        word = int(filter_words(keys_of(np.frombuffer(chunk, "V32")), len(self._filter))[0])
        fan = self._at.fan + (key >> self._shift) * 8
        if not self._range_holds(fan, 16) or not self._range_holds(self._at.filter + word * 8, 8):
            return False
        low, high = self._bucket_of(key)
        return self._range_holds(self._at.rows + low * ROW.itemsize, (high - low) * ROW.itemsize)

    def _range_holds(self, offset: int, length: int) -> bool:
        return all(
            self._sum_holds(n) for n in range(offset // SUM_BYTES, (offset + max(1, length) - 1) // SUM_BYTES + 1)
        )

    def _sum_holds(self, number: int) -> bool:
        start = number * SUM_BYTES
        view = memoryview(self._area)[start : min(start + SUM_BYTES, self._at.sums)]
        return sum_of(view) == bytes(self._area[self._at.sums + 8 * number : self._at.sums + 8 * number + 8])


# -- the file ------------------------------------------------------------------------------------------------------------------


class Layout:
    """Where the parts of a file begin."""

    def __init__(self, rows: int, fan: int, filter_: int, sums: int) -> None:
        self.rows, self.fan, self.filter, self.sums = rows, fan, filter_, sums
        self.end = sums + 8 * -(-sums // SUM_BYTES) + 32

    @classmethod
    def of(cls, length: int, count: int, fan: int, words: int) -> Layout:
        rows = -(-(HEAD.size + length) // PAGE) * PAGE
        fan_at = -(-(rows + count * ROW.itemsize) // PAGE) * PAGE
        filter_at = -(-(fan_at + 8 * (fan + 1)) // PAGE) * PAGE
        return cls(rows, fan_at, filter_at, filter_at + 8 * words)


def _is_one(area: mmap.mmap) -> bool:
    """Whether the parts of a file have the sizes they should, and its head and names their checksums."""
    magic, length, count, fan, words = HEAD.unpack_from(area)
    if magic != MAGIC or fan < 1 or fan & (fan - 1) or fan > 1 << FAN_BITS_MAX or words < 1 or words >> 32:
        return False
    at = Layout.of(length, count, fan, words)
    if len(area) != at.end or blake3.blake3(area[at.sums : -32]).digest() != area[-32:]:
        return False
    for number in range(-(-at.rows // SUM_BYTES)):
        piece = area[number * SUM_BYTES : min((number + 1) * SUM_BYTES, at.sums)]
        if sum_of(piece) != area[at.sums + 8 * number : at.sums + 8 * number + 8]:
            return False
    return True


def _names(data: bytes) -> tuple[list[str], bytes]:
    value = f.parse_json(data)
    names, prints = value if isinstance(value, list) and len(value) == 2 else (None, None)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError("no list of packs")
    found = bytes.fromhex(str(prints))
    if len(found) != 8 * len(names):
        raise ValueError("not one fingerprint for each pack")
    return names, found


def sum_of(data: bytes | memoryview) -> bytes:
    return blake3.blake3(data).digest(8)


def filter_words(keys: Keys, words: int) -> Keys:
    """Which of the words of a filter is for each key; they ascend with the keys."""
    return (keys >> np.uint64(32)) * np.uint64(words) >> np.uint64(32)


def filter_bits(ids: NDArray[np.void]) -> Keys:
    """The bits in that word for each id."""
    more = np.ascontiguousarray(ids).view("<u8").reshape(-1, 4)[:, 1]
    bits: Keys = np.bitwise_or.reduce(np.uint64(1) << ((more[:, None] >> FILTER_SHIFTS) & np.uint64(63)), axis=1)
    return bits
