"""What is known of a run of facts without reading it: a cache under STATE, one file for each sealed segment, built when missing.

    STATE/STORE/journal/MACHINE/EPOCH-SEQ.tab          of one segment: its moments, what its META facts say, its pieces
    STATE/STORE/journal/MACHINE/EPOCH-SEQ.log.tab      the same of a log that has ended
    STATE/STORE/journal/MACHINE/EPOCH-SEQ+COUNT.tab    the pieces that COUNT segments leave behind together

A file is a header (magic, length, crc32, JSON), columns of numbers that are mapped, not read, and their checksums: a view of a
moment long after its point touches a few pages of each, and verifies those.  Nothing here is trusted to be there;
what does not fit its segment is built again.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from hvbackup.errors import HvbackupError
from hvbackup.files import Files
from hvbackup.model import Instant
from hvbackup.store.format import layout as f
from hvbackup.store.format.columns import Checked, Column, Numbers, sums_of
from hvbackup.store.journal.journal import Facts
from hvbackup.store.journal.overlay import COLUMNS, NOTHING, PIECE, Pieces, Table, laid

FOLDER = "journal"
SUFFIX = ".tab"
_MAGIC = b"hvT4"
_HEAD = struct.Struct("<4sII")  # magic, length of the JSON, its crc32
_PAGE = 4096
_END = 2**62  # behind every disk
MERGED_AT_ONCE = 300_000  # pieces
_EMPTY = Table(*(np.zeros(0, PIECE[name]) for name in COLUMNS))

Metas = Sequence[tuple[int, int, Any]]  # (sequence number, time, what it says)


@dataclass(slots=True)
class Summary:
    """What one run of facts holds."""

    first: int  # sequence number of its first fact
    count: int  # of facts
    moments: int
    first_moment: int
    last_moment: int
    first_t: Instant
    last_t: Instant
    metas: Metas
    disks: dict[int, str]  # number in its facts -> disk
    arrays: Arrays

    @property
    def last_seq(self) -> int:
        """Sequence number of its last fact."""
        return self.first + self.count - 1

    def seqs(self) -> NDArray[np.int64]:
        """The sequence numbers of all its moments."""
        return self.arrays.column("seqs")

    def times(self) -> NDArray[np.int64]:
        """Their times, ascending."""
        return self.arrays.column("times")

    def table(self, disk: str) -> Table:
        """The pieces it leaves behind on a disk."""
        number = next((n for n, d in self.disks.items() if d == disk), None)
        return _EMPTY if number is None else self.arrays.table(str(number))


@dataclass(slots=True)
class Arrays:
    """Named columns, in memory or in a mapped file."""

    columns: Mapping[str, tuple[int, int, str]] = field(default_factory=dict)  # name -> (offset, items, dtype)
    memory: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    path: Path | None = None
    head: int = 0  # length of the header
    size: int = 0  # of all columns
    crc: int = 0  # of their checksums
    _file: Checked | None = None

    def column(self, name: str) -> NDArray[Any]:
        """One whole column; empty when there is none of that name.  Raises StoreDamage."""
        return self.lazy(name)[:]

    def lazy(self, name: str) -> Numbers:
        """One column, of which nothing is read yet."""
        if name in self.memory:
            return self.memory[name]
        offset, items, kind = self.columns.get(name, (0, 0, "<i8"))
        if not items:
            return np.zeros(0, kind)
        if self._file is None:
            assert self.path is not None  # columns are of a file
            self._file = Checked(self.path, self.head, self.size, self.crc)
        return Column(self._file, offset, items, kind)

    def table(self, name: str) -> Table:
        """The pieces stored under a name."""
        return Table(*(self.lazy(f"{name}.{column}") for column in COLUMNS))


def summary_of(first: int, facts: Facts, metas: Metas) -> Summary:
    """The summary of a run, in memory."""
    at = np.flatnonzero(facts["flags"] & f.FLAG_FACT_BARRIER)
    times = np.maximum.accumulate(facts["t"][at])
    disks = next((_numbers(v) for _, _, v in metas if "disks" in v), {})
    memory: dict[str, NDArray[Any]] = {"seqs": (at + first).astype(np.int64), "times": times}
    for number in disks:
        memory.update(_named(str(number), pieces_of(facts, number, 0)))
    ends = [int(v[i]) for v in (memory["seqs"], times) for i in (0, -1)] if len(at) else [0, 0, 0, 0]
    return Summary(
        first, len(facts), len(at), ends[0], ends[1], Instant(ends[2]), Instant(ends[3]), _short(metas), disks,
        Arrays(memory=memory),
    )  # fmt: skip


def _numbers(value: Any) -> dict[int, str]:
    return {int(d["number"]): str(d["id"]) for d in value["disks"]}


def _short(metas: Metas) -> Metas:
    """Of barriers that say nothing but their tokens, only the last one is worth keeping."""
    plain = [i for i, (_, _, v) in enumerate(metas) if set(v) == {"tokens"}]
    dropped = set(plain[:-1])
    return [m for i, m in enumerate(metas) if i not in dropped]


def _named(name: str, pieces: Pieces) -> dict[str, NDArray[Any]]:
    return {f"{name}.{column}": np.ascontiguousarray(pieces[column]) for column in COLUMNS}


def pieces_of(facts: Facts, disk: int, source: int) -> Pieces:
    """What facts leave behind on one disk (its number in their file)."""
    mine = facts[(facts["disk"] == disk) & (facts["kind"] != f.FACT_META)]
    if not len(mine):
        return NOTHING
    out = np.zeros(len(mine), PIECE)
    out["start"] = mine["offset"]
    out["end"] = mine["offset"] + mine["length"]
    out["pos"] = np.where(mine["kind"] == f.FACT_ZERO, -1, mine["pos"].astype(np.int64))
    out["source"] = source
    return laid(out)


def merged(parts: Sequence[tuple[int, Table]]) -> Pieces:
    """What tables, oldest first, leave behind together; each comes with what its sources are raised by.

    Done a stretch of the disk at a time: bounds memory where the tables are large.
    """
    stretches = max(1, sum(len(table) for _, table in parts) // MERGED_AT_ONCE)
    largest = max((table for _, table in parts), key=len).start
    inner = [int(largest[len(largest) * i // stretches]) for i in range(1, stretches)] if len(largest) else []
    bounds = [0, *sorted(set(inner) - {0}), _END]
    found = [
        laid(np.concatenate([_cut(table, raised, lo, hi) for raised, table in parts]))
        for lo, hi in itertools.pairwise(bounds)
    ]
    return np.concatenate(found)


def _cut(table: Table, raised: int, lo: int, hi: int) -> Pieces:
    """The part of a table that is in [lo, hi)."""
    within = table.within(lo, hi)
    out = np.zeros(len(within), PIECE)
    for name in COLUMNS:
        out[name] = getattr(table, name)[within.start : within.stop]
    out["source"] += raised
    start = np.maximum(out["start"], lo)
    out["pos"] = np.where(out["pos"] < 0, -1, out["pos"] + (start - out["start"]))
    out["start"], out["end"] = start, np.minimum(out["end"], hi)
    return out


# -- files -----------------------------------------------------------------------------------------------------------------


class Cache:
    """The tables of one machine's journal.  Thread safety: any thread, any process; the last one to write a file wins."""

    def __init__(self, state: Files, machine: str) -> None:
        self._state, self._folder = state, f"{FOLDER}/{machine}"

    def load(self, name: str, of_bytes: int) -> tuple[dict[str, Any], Arrays] | None:
        """What was saved under a name for a file of that size; None when it has to be built."""
        path = self._state.path(f"{self._folder}/{name}{SUFFIX}")
        try:
            with path.open("rb") as file:
                head = file.read(_PAGE)
                size = os.fstat(file.fileno()).st_size
                magic, length, crc = _HEAD.unpack(head[: _HEAD.size])
                text = head[_HEAD.size : _HEAD.size + length]
                text += file.read(max(0, length - len(text)))
            if magic != _MAGIC or crc32(text) != crc:
                return None
            value = json.loads(text)
            if value["of"] != of_bytes or value["size"] != size:
                return None
            columns = {k: (int(v[0]), int(v[1]), str(v[2])) for k, v in value["columns"].items()}
            return value, Arrays(columns, {}, path, int(value["head"]), int(value["body"]), int(value["crc"]))
        except (OSError, struct.error, ValueError, KeyError, TypeError, IndexError):
            return None

    def save(self, name: str, of_bytes: int, value: dict[str, Any], columns: Mapping[str, NDArray[Any]]) -> None:
        """Keep it for later; without room, later does without."""
        kept = {name: a for name, a in columns.items() if len(a)}
        total = sum(-(-a.nbytes // 8) * 8 for a in kept.values())
        head, sums = 2 * _PAGE, b""
        while True:
            at, places, body = head, {}, []
            for key, array in kept.items():
                places[key] = (at, len(array), array.dtype.str)
                body.append(array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0"))
                at += len(body[-1])
            sums = sums or sums_of(b"".join(body)).tobytes()
            about = {
                "crc": crc32(sums),
                "head": head,
                "body": total,
                "of": of_bytes,
                "size": head + total + len(sums),
            }
            text = json.dumps({**value, **about, "columns": places}).encode()
            if _HEAD.size + len(text) <= head:
                break
            head = -(-(_HEAD.size + len(text) + 64) // _PAGE) * _PAGE
        try:
            with self._state.new() as file:
                file.write((_HEAD.pack(_MAGIC, len(text), crc32(text)) + text).ljust(head, b"\0"))
                for part in [*body, sums]:
                    file.write(part)
                file.commit(f"{self._folder}/{name}{SUFFIX}")
        except (HvbackupError, OSError):
            return  # no room, or an owner that has just opened the store swept what was not finished

    def forget(self, live: set[str]) -> None:
        """Tables that begin with segments that are gone go too."""
        for name in self._state.names(self._folder):
            if name.split("+")[0].removesuffix(SUFFIX) not in live:
                self._state.remove(f"{self._folder}/{name}")

    def summary(self, name: str, of_bytes: int) -> Summary | None:
        """The summary of a segment, if it is here."""
        found = self.load(name, of_bytes)
        if found is None:
            return None
        v, arrays = found
        try:
            metas = [(int(seq), int(t), said) for seq, t, said in v["metas"]]
            disks = {int(n): str(d) for n, d in v["disks"].items()}
            return Summary(
                v["first"], v["count"], v["moments"], v["first_moment"], v["last_moment"],
                Instant(v["first_t"]), Instant(v["last_t"]), metas, disks, arrays,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError):
            return None

    def keep(self, name: str, of_bytes: int, s: Summary) -> None:
        """Save the summary of a segment that was built in memory."""
        value = {
            "first": s.first, "count": s.count, "moments": s.moments, "first_moment": s.first_moment,
            "last_moment": s.last_moment, "first_t": s.first_t, "last_t": s.last_t, "metas": s.metas, "disks": s.disks,
        }  # fmt: skip
        self.save(name, of_bytes, value, s.arrays.memory)

    def merged(self, name: str, of_bytes: int, disk: str) -> Table | None:
        """The pieces of several segments on one disk, if they are here."""
        found = self.load(name, of_bytes)
        return None if found is None or found[0].get("disk") != disk else found[1].table("0")

    def keep_merged(self, name: str, of_bytes: int, disk: str, pieces: Pieces) -> None:
        """Save them."""
        self.save(name, of_bytes, {"disk": disk}, _named("0", pieces))
