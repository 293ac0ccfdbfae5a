"""Where each chunk is: immutable, memory-mapped generations, made from the footers of packs and only from them.

A generation is a cache file under STATE: the names of its packs, a sorted array of 8-byte prefixes, the rows in the same order,
and a filter that answers most misses from memory.  `sync` makes one for the packs no generation knows yet; small ones merge.
Deleting any of them costs a re-read of footers.  A prefix only finds candidates: a hit is a full 32-byte id.

Readers and writers use the same class; only writers write generations down (`keep=True`).  Several may at once: what one
removes the other has mapped, and of two generations that overlap the next reader takes one.
"""

from __future__ import annotations

import json
import mmap
import struct
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import StoreDamage
from hvbackup.files import Files
from hvbackup.store import pack as packs
from hvbackup.store.backend import Backend
from hvbackup.store.format import parse_json

MAGIC = b"hvI1"
GENERATIONS_MAX = 8  # more are merged: bounds the searches of one lookup
FILTER_BITS_PER_CHUNK = 8  # two probes: about 5 % of misses look further
HEAD = struct.Struct("<4sIQQ")  # magic, length of the JSON list of packs, rows, bits of the filter (a power of two)
PAGE = 4096

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


def prefixes(ids: NDArray[np.void]) -> NDArray[np.uint64]:
    """The first 8 bytes of each id as a number that sorts like the id."""
    words = np.ascontiguousarray(ids).view(">u8").reshape(-1, 4)
    return words[:, 0].astype(np.uint64)


class Generation:
    """One immutable set of packs and the places of their chunks.  Thread safety: immutable."""

    def __init__(
        self, names: list[str], keys: NDArray[np.uint64], rows: NDArray[np.void], bits: NDArray[np.uint8]
    ) -> None:
        self.packs, self.keys, self.rows, self._bits = names, keys, rows, bits
        self.ordinals = np.zeros(0, np.uint32)  # of its packs among all packs of the index, set by the index

    @classmethod
    def of(cls, found: dict[str, NDArray[np.void]]) -> Generation:
        """A generation over the footers of packs."""
        parts = []
        for number, rows in enumerate(found.values()):
            part = np.zeros(len(rows), LOCATION)
            for name in ("id", "stored", "offset", "at", "plain", "kind"):
                part[name] = rows[name]
            part["pack"] = number
            parts.append(part)
        return cls._sorted(list(found), np.concatenate(parts) if parts else np.zeros(0, LOCATION))

    @classmethod
    def merged(cls, several: Iterable[Generation], gone: set[str]) -> Generation:
        """One generation out of several, without the packs in `gone`."""
        names: list[str] = []
        parts = []
        for generation in several:
            numbers = np.full(len(generation.packs), NOWHERE, np.uint32)
            for i, name in enumerate(generation.packs):
                if name not in gone:
                    numbers[i] = len(names)
                    names.append(name)
            part = generation.rows[generation.rows["pack"] < len(numbers)]
            part["pack"] = numbers[part["pack"]]
            parts.append(part[part["pack"] != NOWHERE])
        return cls._sorted(names, np.concatenate(parts))

    @classmethod
    def _sorted(cls, names: list[str], rows: NDArray[np.void]) -> Generation:
        keys = prefixes(rows["id"])
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        bits = np.zeros(_filter_bits(len(rows)) // 8, np.uint8)
        for probe in _probes(rows["id"], len(bits) * 8):
            np.bitwise_or.at(bits, probe >> 3, (1 << (probe & 7)).astype(np.uint8))
        return cls(names, keys, rows, bits)

    def find(self, ids: NDArray[np.void], keys: NDArray[np.uint64], damaged: set[tuple[str, int]]) -> NDArray[np.int64]:
        """The row of each id, or -1; rows whose place is known to be damaged are passed over."""
        out = np.full(len(ids), -1, np.int64)
        todo = np.arange(len(ids))
        for probe in _probes(ids, len(self._bits) * 8):
            todo = todo[(self._bits[probe[todo] >> 3] >> (probe[todo] & 7)) & 1 == 1]
        at = np.searchsorted(self.keys, keys[todo])
        while len(todo):
            inside = at < len(self.keys)
            todo, at = todo[inside], at[inside]
            near = self.keys[at] == keys[todo]
            todo, at = todo[near], at[near]
            hit = self.rows["id"][at] == ids[todo]
            if damaged:
                hit &= np.array([self.place(int(i)) not in damaged for i in at], bool)
            out[todo[hit]] = at[hit]
            todo, at = todo[~hit], at[~hit] + 1
        return out

    def place(self, row: int) -> tuple[str, int]:
        """(pack, offset of the record) of a row."""
        pack = int(self.rows["pack"][row])
        return self.packs[pack] if pack < len(self.packs) else "", int(self.rows["offset"][row])

    def dump(self) -> bytes:
        """The bytes of the cache file."""
        names = json.dumps(self.packs).encode()
        head = HEAD.pack(MAGIC, len(names), len(self.rows), len(self._bits) * 8) + names
        head += bytes(-len(head) % PAGE)
        return b"".join([head, self.keys.tobytes(), self.rows.tobytes(), self._bits.tobytes()])

    @classmethod
    def load(cls, path: str) -> Generation | None:
        """The generation in a cache file, mapped; None when the file is not one."""
        try:
            with open(path, "rb") as file:
                area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            magic, length, count, bits = HEAD.unpack_from(area)
            begin = -(-(HEAD.size + length) // PAGE) * PAGE
            if magic != MAGIC or len(area) != begin + count * (8 + LOCATION.itemsize) + bits // 8:
                return None
            if bits < 8 or bits & (bits - 1):
                return None
            names = parse_json(area[HEAD.size : HEAD.size + length])
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                return None
        except (OSError, ValueError, struct.error):
            return None
        keys = np.frombuffer(area, np.uint64, count, begin)
        rows = np.frombuffer(area, LOCATION, count, begin + 8 * count)
        return cls(names, keys, rows, np.frombuffer(area, np.uint8, bits // 8, begin + count * (8 + LOCATION.itemsize)))


def _filter_bits(count: int) -> int:
    bits = 1024
    while bits < count * FILTER_BITS_PER_CHUNK:
        bits *= 2
    return bits


def _probes(ids: NDArray[np.void], bits: int) -> list[NDArray[np.uint64]]:
    words = np.ascontiguousarray(ids).view("<u8").reshape(-1, 4)
    return [words[:, 1] & np.uint64(bits - 1), words[:, 2] & np.uint64(bits - 1)]


class Index:
    """All generations of a store.

    Thread safety: `lookup` and `everywhere` from any thread; `add`, `sync` and `set_damaged` from one.
    """

    def __init__(self, backend: Backend, state: Files, *, keep: bool) -> None:
        self._backend, self._state, self._keep = backend, state, keep
        self._generations: list[Generation] = []
        self.packs: list[str] = []  # only ever grows, so that a location stays true after a merge
        self._numbers: dict[str, int] = {}
        self._files: dict[int, str] = {}  # id() of a generation -> its cache file
        self._believed = False  # whether any generation came out of a cache file
        self._lock = threading.RLock()
        self._damaged: set[tuple[str, int]] = _load_damaged(state)
        self.unreadable: list[str] = []  # packs whose footer and records can't be read

    def stop_keeping(self) -> None:
        """Nothing is written down from here on: another process may be changing the store."""
        with self._lock:
            self._keep = False

    def sync(self) -> None:
        """The index knows every pack of the store, and no other, when this returns."""
        present = packs.list_packs(self._backend)
        self._load_generations(set(present))
        known = {p for g in self._generations for p in g.packs}
        fresh = self._fresh([p for p in present if p not in known])
        if fresh.packs:
            self._append(fresh)
        self._settle()

    def _load_generations(self, present: set[str]) -> None:
        for name in self._state.names("index"):
            generation = Generation.load(str(self._state.path(f"index/{name}")))
            stale = generation is None or not present.issuperset(generation.packs)
            if generation is not None and stale:
                generation = Generation.merged([generation], set(generation.packs) - present)
            if generation is not None and len(generation.packs):
                covered = {p for g in self._generations for p in g.packs}
                if not covered.isdisjoint(generation.packs):
                    generation, stale = None, True
            if stale and self._keep:
                self._state.remove(f"index/{name}")
            if generation is not None:
                self._append(generation, None if stale else name)

    def _rows_of(self, pack: str) -> NDArray[np.void] | None:
        try:
            return packs.read_footer(self._backend, pack)
        except StoreDamage:
            rows = packs.scan(self._backend, pack)
            if len(rows) == 0:
                self.unreadable.append(pack)
                return None
            return rows

    def _append(self, generation: Generation, file: str | None = None) -> None:
        with self._lock:
            self._number(generation)
            if file:
                self._files[id(generation)] = file
                self._believed = True
            self._generations = [*self._generations, generation]

    def reread(self) -> bool:
        """Every row comes from a pack, and none from a cache file, when this returns; False when that was so before.

        Cache files carry no checksum of their rows, which would be read whole at each start.  So who can't find a chunk where a
        row says it is asks for this, once.
        """
        with self._lock:
            if not self._believed:
                return False
            self._believed = False
            fresh = self._fresh(packs.list_packs(self._backend))
            self._number(fresh)
            old, self._files, self._generations = list(self._files.values()), {}, [fresh]
            for name in old if self._keep else []:
                self._state.remove(f"index/{name}")
            self._write_down()
            return True

    def catch_up(self) -> bool:
        """Packs that were sealed since this index was opened are in it when this returns; False when there were none.

        A reader may be handed a point that is younger than its index: another process has committed it meanwhile.
        """
        with self._lock:
            known = {p for g in self._generations for p in g.packs}
            unreadable = self.unreadable
            fresh = self._fresh([p for p in packs.list_packs(self._backend) if p not in known])
            self.unreadable = [*unreadable, *(p for p in self.unreadable if p not in unreadable)]
            if fresh.packs:
                self._append(fresh)
            return bool(fresh.packs)

    def _fresh(self, present: Sequence[str]) -> Generation:
        self.unreadable = []
        return Generation.of({p: rows for p in present if (rows := self._rows_of(p)) is not None})

    def _number(self, generation: Generation) -> None:
        for name in generation.packs:
            if name not in self._numbers:
                self._numbers[name] = len(self.packs)
                self.packs.append(name)
        generation.ordinals = np.array([self._numbers[p] for p in generation.packs], np.uint32)

    def add(self, pack: str, rows: NDArray[np.void]) -> None:
        """Chunks of a pack that was just sealed can be found when this returns."""
        self._append(Generation.of({pack: rows}))
        if len(self._generations) > 4 * GENERATIONS_MAX:
            self._settle()

    def _settle(self) -> None:
        """Merge small generations, and write down those that are in memory only."""
        with self._lock:
            self._settle_locked()

    def _settle_locked(self) -> None:
        old: list[str] = []
        if len(self._generations) > GENERATIONS_MAX:
            several = sorted(self._generations, key=lambda g: len(g.rows), reverse=True)
            keep, small = several[: GENERATIONS_MAX // 2], several[GENERATIONS_MAX // 2 :]
            merged = Generation.merged(small, set())
            self._number(merged)
            old = [self._files.pop(id(g)) for g in small if id(g) in self._files]
            self._generations = [*keep, merged]
        self._write_down()
        for name in old if self._keep else []:
            self._state.remove(f"index/{name}")

    def _write_down(self) -> None:
        for g in self._generations if self._keep else []:
            if id(g) not in self._files:
                name = f"{blake3.blake3(json.dumps(sorted(g.packs)).encode()).hexdigest()[:32]}.idx"
                self._state.replace(f"index/{name}", g.dump())
                self._files[id(g)] = name

    def lookup(self, ids: NDArray[np.void]) -> NDArray[np.void]:
        """A LOCATION for each id; its pack is NOWHERE when the store does not have the chunk."""
        out = np.zeros(len(ids), LOCATION)
        out["pack"] = NOWHERE
        keys = prefixes(ids)
        for generation in self._generations:
            todo = np.flatnonzero(out["pack"] == NOWHERE)
            if len(todo) == 0:
                break
            rows = generation.find(ids[todo], keys[todo], self._damaged)
            hit = rows >= 0
            part = generation.rows[rows[hit]]
            sane = part["pack"] < len(generation.ordinals)  # a damaged cache file may say anything
            part, at = part[sane], todo[hit][sane]
            out[at] = part
            out["pack"][at] = generation.ordinals[part["pack"]]
        return out

    def everywhere(self, chunk: bytes) -> list[tuple[str, NDArray[np.void]]]:
        """Every (pack, location) that claims to hold a chunk, damaged ones too: where a reader looks for another copy."""
        key = int.from_bytes(chunk[:8], "big")
        found = []
        for g in self._generations:
            # One key at a time: bisect is quicker than searchsorted, and does not let go of the interpreter lock.
            keys = memoryview(g.keys)  # type: ignore[arg-type]
            for i in range(bisect_left(keys, key), bisect_right(keys, key)):
                if g.rows["id"][i].tobytes() == chunk and g.rows["pack"][i] < len(g.packs):
                    found.append((g.packs[int(g.rows["pack"][i])], g.rows[i : i + 1]))
        return found

    @property
    def damaged(self) -> set[tuple[str, int]]:
        """The (pack, offset) places that are known to be damaged and still in the store."""
        return {place for place in self._damaged if place[0] in self._numbers}

    def set_damaged(self, places: set[tuple[str, int]]) -> None:
        """Chunks at these (pack, offset) places, and no others, are not offered: the next capture stores them again."""
        if places != self._damaged:
            self._damaged = set(places)
            self._state.replace("damaged.json", json.dumps(sorted(places)).encode())

    @property
    def chunks(self) -> int:
        """How many rows the index has; a chunk stored twice counts twice."""
        return sum(len(g.rows) for g in self._generations)

    def rows(self) -> Iterable[tuple[list[str], NDArray[np.void]]]:
        """Every generation as (its packs, its rows): for the catalog."""
        return ((g.packs, g.rows) for g in self._generations)


def _load_damaged(state: Files) -> set[tuple[str, int]]:
    try:
        return {(str(p), int(o)) for p, o in parse_json(state.read("damaged.json"))}
    except (FileNotFoundError, ValueError, TypeError):
        return set()
