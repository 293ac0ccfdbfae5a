"""The files of a journal as readers see them: runs of facts that follow one another, sealed or not.

Only what is durable is shown: a log is fsynced by whoever reads it, before it is believed.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np

from hvbackup.errors import ChunkDamaged
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal, tables
from hvbackup.store.journal.journal import LOG, SEGMENT, Facts, Index, Joining, LogReader, Name, TornLog
from hvbackup.store.journal.segment import PieceCache, Segment
from hvbackup.store.journal.tables import Summary, summary_of
from hvbackup.store.store import Store


class Run(Protocol):
    """A file of the journal: its facts, and their bytes."""

    name: Name
    torn: str  # why not all of it can be read; empty: it can, or nobody has tried

    @property
    def facts(self) -> Facts:
        """All facts up to the last barrier; the sequence number of row i is `name.first + i`."""

    def read(self, pos: int, length: int) -> bytes:
        """Bytes of facts, by their `pos`."""

    def meta(self) -> Iterator[tuple[int, bytes]]:
        """(sequence number, JSON) of every META fact."""

    @property
    def summary(self) -> Summary:
        """What it holds, without reading it where that is known."""


class OpenRun:
    """A log up to its last barrier, durable.  The bytes of its facts are read when they are asked for, and of one that has ended
    so are its facts, which its index has.

    From its segment, when it has become one meanwhile: that has the same facts and the same stream of bytes.
    """

    def __init__(self, store: Store, machine: str, name: Name, pieces: PieceCache) -> None:
        """Raises FileNotFoundError, StoreDamage."""
        self.name, self._pieces = name, pieces
        self._sealed = SealedRun(store, machine, replace(name, suffix=SEGMENT), pieces)
        self._tables = tables.Cache(store.state, machine)
        self._kept: Index | None = None  # of a log without an index that can be read
        self.torn = ""
        self._log = LogReader(store.files, store.ring, machine, name, held=True)
        self._mark = self._log.mark()
        if not self._is_known() and self._log.index() is None:
            self._kept, self._mark = self._read(), None
        self._log.settle()

    def _is_known(self) -> bool:
        return self._mark is not None and self._tables.summary(str(self.name), self._mark) is not None

    def _read(self) -> Index:
        joining, rows, remarks, at = Joining(), [], b"", f.HEADER_BYTES
        try:
            for frame in self._log.whole():
                joining.add(frame)
                rows.append((at, len(frame.facts), len(frame.data)))
                remarks += journal.remarks_of(frame)
                at = frame.end
        except TornLog as e:
            self.torn = str(e)
        return Index(joining.facts, np.array(rows, f.FRAME_ROW), remarks)

    def _index(self) -> Index:
        return self._kept or self._log.index() or self._read()

    @property
    def facts(self) -> Facts:
        """All facts up to the last barrier; the sequence number of row i is `name.first + i`."""
        try:
            return self._index().facts
        except FileNotFoundError:
            return self._sealed.facts

    @cached_property
    def _frames(self) -> tuple[list[int], list[int], list[int]]:
        """Where in the log each frame is, the number of its first fact, and where in the stream its bytes end."""
        rows = self._index().frames
        firsts = self.name.first + np.cumsum(rows["facts"], dtype=np.int64) - rows["facts"]
        return rows["at"].tolist(), firsts.tolist(), np.cumsum(rows["bytes"], dtype=np.int64).tolist()

    def read(self, pos: int, length: int) -> bytes:
        """Bytes of facts, by their `pos`; a fact lies in one frame.  Raises StoreDamage."""
        try:
            ends = self._frames[2]
            i = bisect.bisect_right(ends, pos)
            data = self._pieces.get((self._log.path, i), lambda: self._bytes_of(i))
            at = pos - (ends[i] - len(data))
            if len(data) < at + length:  # nobody vouches for an index that is not encrypted
                raise ChunkDamaged(f"{self._log.path}: frame {i} ends before the bytes of its facts")
            return bytes(data[at : at + length])
        except FileNotFoundError:
            return self._sealed.read(pos, length)

    def _bytes_of(self, i: int) -> memoryview:
        ats, firsts, ends = self._frames
        frame = self._log.frame(ats[i], i, firsts[i]) if i < len(ats) else None
        if frame is None or len(frame.data) != ends[i] - (ends[i - 1] if i else 0):
            raise ChunkDamaged(f"{self._log.path}: frame {i} is not what was written there")
        return frame.data

    def meta(self) -> Iterator[tuple[int, bytes]]:
        """(sequence number, JSON) of every META fact."""
        try:
            index = self._index()
        except FileNotFoundError:
            yield from self._sealed.meta()
            return
        at = 0
        for i in np.flatnonzero(index.facts["kind"] == f.FACT_META).tolist():
            end = at + int(index.facts["length"][i])
            yield self.name.first + i, index.remarks[at:end]
            at = end

    @cached_property
    def summary(self) -> Summary:
        """What it holds; that of a log which has ended is kept under STATE."""
        return _summary(self) if self._mark is None else _kept_summary(self._tables, self, str(self.name), self._mark)


class SealedRun(Segment):
    """A sealed segment whose summary is kept under STATE."""

    torn = ""

    def __init__(self, store: Store, machine: str, name: Name, pieces: PieceCache) -> None:
        super().__init__(store.files, store.ring, machine, name, pieces)
        self._files, self._tables = store.files, tables.Cache(store.state, machine)

    @cached_property
    def bytes(self) -> int:
        """How large the file is."""
        return self._files.size(self._path)

    @cached_property
    def summary(self) -> Summary:
        """What it holds; built by reading its facts once."""
        return _kept_summary(self._tables, self, self.name.stem, self.bytes)


def open_run(store: Store, machine: str, name: Name, pieces: PieceCache) -> Run:
    """A file of the journal.  Raises FileNotFoundError; a damaged segment raises when it is read."""
    return (OpenRun if name.suffix == LOG else SealedRun)(store, machine, name, pieces)


def _kept_summary(cache: tables.Cache, run: Run, key: str, of: int) -> Summary:
    """From the cache, where it belongs to a file that is known by `of`; else made, and put there."""
    if (found := cache.summary(key, of)) is None:
        made = _summary(run)
        cache.keep(key, of, made)
        found = cache.summary(key, of) or made  # mapped, where it can be
    return found


def _summary(run: Run) -> Summary:
    facts = run.facts
    metas = [(seq, int(facts["t"][seq - run.name.first]), json.loads(data)) for seq, data in run.meta()]
    return summary_of(run.name.first, facts, metas)
