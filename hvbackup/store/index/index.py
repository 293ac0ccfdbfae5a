"""Where each chunk is: immutable, memory-mapped generations, made from the footers of packs and only from them.

A generation is a cache file under STATE (`generation.py`).  `sync` makes some for the packs that none knows yet, RUN_ROWS chunks
each, and merges small ones.  Nothing is ever held whole: making, merging and reading go piece by piece, and what is mapped is the
kernel's to drop.  Deleting any of them costs a re-read of footers.

    killed after                  left behind                        mended by
    any write of a generation     a file in tmp/                     sweep()
    generation in place           what it was merged from, as well   the next sync: it keeps one of each, and reads footers

Readers and writers use the same class; only writers write generations down (`keep=True`), a reader's large ones are files without
a name.  Several may write at once: what one removes the other has mapped, and of two generations that overlap the next reader
takes one.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import HvbackupError, StoreDamage
from hvbackup.files import Files
from hvbackup.store.backend import Backend
from hvbackup.store.format import pack as packs
from hvbackup.store.format.layout import parse_json
from hvbackup.store.index import generation as g
from hvbackup.store.index import generations as make
from hvbackup.store.index.generation import LOCATION, NOWHERE, Generation, Place, Rows

__all__ = ["LOCATION", "NOWHERE", "Index"]

GENERATIONS_MAX = 8  # more are merged: bounds the searches of one lookup
RUN_ROWS = 1 << 20  # sorted in memory: 55 MB, and five times that while it is done
MEMORY_ROWS = 1 << 16  # a generation of more is a file at once
GONE_SHARE = 8  # a large generation is written again when one part in so many of its packs is gone


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
        self._lock = threading.RLock()
        self._damaged: set[tuple[str, int]] = _load_damaged(state)
        self._compared = False  # whether the packs were found to have the footers that generations know
        self.unreadable: list[str] = []  # packs whose footer and records can't be read

    def stop_keeping(self) -> None:
        """Nothing is written down from here on: another process may be changing the store."""
        with self._lock:
            self._keep = False

    # -- keeping up with the packs -------------------------------------------------------------------------------------

    def sync(self) -> None:
        """The index knows every pack of the store, and no other, when this returns."""
        present = packs.list_packs(self._backend)
        self._load_generations(set(present))
        self.unreadable = []
        known = self.known()
        self._append(*self._learned([p for p in present if p not in known]))
        self._settle()

    def known(self) -> set[str]:
        """The packs whose chunks can be found."""
        return {p for generation in self._generations for p in generation.alive()}

    def _load_generations(self, present: set[str]) -> None:
        for name in self._state.names("index"):
            found = Generation.open_at(str(self._state.path(f"index/{name}")))
            stale = found is None
            if found is not None:
                found.gone = frozenset(p for p in found.packs if p not in present)
                if _worth_writing_again(found):
                    found, stale = self._without_gone(found), True
            if found is not None and (not found.packs or not self.known().isdisjoint(found.alive())):
                found, stale = None, True
            if found is not None:
                if not stale:
                    self._files[id(found)] = name
                self._append(found)
            if stale and self._keep and name not in self._files.values():
                self._state.remove(f"index/{name}")

    def _without_gone(self, found: Generation) -> Generation | None:
        try:
            return self._made(*make.merged([found]))
        except make.Unsorted:
            return None  # a damaged file: its packs are read instead

    def _learned(self, names: Iterable[str]) -> Iterator[Generation]:
        """Generations out of the footers of packs."""
        parts: list[Rows] = []
        found: dict[str, bytes] = {}
        count = 0
        for name in names:
            try:
                rows, fingerprint = self._rows_of(name, len(found))
            except FileNotFoundError:
                continue  # reclaimed since it was listed
            except StoreDamage:
                self.unreadable.append(name)
                continue
            parts.append(rows)
            found[name] = fingerprint
            count += len(rows)
            if count >= RUN_ROWS:
                yield self._run(found, parts)
                parts, found, count = [], {}, 0
        if found:
            yield self._run(found, parts)

    def _rows_of(self, pack: str, number: int) -> tuple[Rows, bytes]:
        try:
            footer = packs.read_footer(self._backend, pack)
            return g.rows_of(footer, number), packs.fingerprint_of(footer)
        except StoreDamage:
            rows = packs.scan(self._backend, pack)
            if len(rows) == 0:
                raise
            return g.rows_of(rows, number), bytes(8)

    def _run(self, footers: make.Footers, parts: list[Rows]) -> Generation:
        rows = np.concatenate(parts)
        parts.clear()
        return self._made(footers, len(rows), [make.sort(rows)])

    def _made(self, footers: make.Footers, count: int, pieces: Iterable[Rows]) -> Generation:
        """A new generation: small ones in memory, large ones in a file, which has a name if it is kept."""
        if count <= MEMORY_ROWS:
            return make.small(footers, np.concatenate([np.zeros(0, g.ROW), *pieces]))
        if not self._keep:
            return self._spilled(footers, count, pieces)
        with self._state.new() as file:
            make.write(file, footers, count, pieces, str(self._state.path("tmp")))
            return self._named(footers, file.commit)

    def _spilled(self, footers: make.Footers, count: int, pieces: Iterable[Rows]) -> Generation:
        root = self._state.root
        folder = str(root) if os.access(root, os.W_OK) else None  # /tmp is often memory
        with tempfile.TemporaryFile(dir=folder) as file:
            make.write(file, footers, count, pieces, folder)
            file.flush()
            made = Generation.open_fd(os.dup(file.fileno()))
        if made is None:
            raise HvbackupError(f"What was written below {folder or tempfile.gettempdir()} reads differently")
        return made

    def _append(self, *several: Generation) -> None:
        for generation in several:
            with self._lock:
                self._number(generation)
                self._generations = [*self._generations, generation]

    def _number(self, generation: Generation) -> None:
        numbers = np.full(len(generation.packs) + 1, NOWHERE, np.uint32)
        for i, name in enumerate(generation.packs):
            if name in generation.gone:
                continue
            if name not in self._numbers:
                self._numbers[name] = len(self.packs)
                self.packs.append(name)
            numbers[i] = self._numbers[name]
        generation.ordinals = numbers

    def add(self, pack: str, rows: NDArray[np.void]) -> None:
        """Chunks of a pack that was just sealed can be found when this returns."""
        self._append(make.small({pack: packs.fingerprint_of(rows)}, g.rows_of(rows, 0)))
        if len(self._generations) > 4 * GENERATIONS_MAX:
            self._settle()

    def catch_up(self) -> bool:
        """Packs that were sealed since this index was opened are in it when this returns; False when there were none.

        A reader may be handed a point that is younger than its index: another process has committed it meanwhile.
        """
        with self._lock:
            known = self.known().union(self.unreadable)
            fresh = list(self._learned([p for p in packs.list_packs(self._backend) if p not in known]))
            self._append(*fresh)
            return bool(fresh)

    # -- doubts --------------------------------------------------------------------------------------------------------

    def reread(self, chunk: bytes | None = None) -> bool:
        """What cache files say about a chunk (without one: about everything) is what the packs say, when this returns.

        Files are verified by their checksums, and packs, once, by the fingerprints of their footers; what does not hold is made
        again from the packs.  False when all did.  Who can't find a chunk where a row says it is asks for this.
        """
        with self._lock:
            doubtful = [x for x in self._generations if x.mapped and not x.holds(chunk)]
            if doubtful:
                self._replace(doubtful, [p for x in doubtful for p in x.alive()])
            return self._reread_changed() or bool(doubtful)

    def _reread_changed(self) -> bool:
        """Packs that have another footer than when they were read, as when somebody mixed up files, are read again."""
        if self._compared:
            return False
        self._compared = True
        changed = set()
        for x in self._generations:
            mine = {p for p, print_ in x.footers().items() if packs.fingerprint(self._backend, p) != print_}
            if mine:
                x.gone |= mine
                self._number(x)
                changed |= mine
        if changed:
            fresh = list(self._learned(sorted(p for p in changed if self._backend.exists(packs.path_of(p)))))
            self._append(*fresh)
            self._settle()
        return bool(changed)

    def rebuild(self) -> None:
        """Every row comes from a pack as it is now, and none from a cache file, when this returns."""
        with self._lock:
            self.unreadable = []
            self._replace(self._generations, packs.list_packs(self._backend))

    def _replace(self, old: Sequence[Generation], names: Sequence[str]) -> None:
        """Read these packs instead of believing some generations."""
        self._forget_files(old)
        fresh = list(self._learned([p for p in names if self._backend.exists(packs.path_of(p))]))
        for x in fresh:
            self._number(x)
        self._generations = [x for x in self._generations if x not in old] + fresh
        self._settle()

    # -- few generations -----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Merge small generations, and write down those that are in memory only."""
        with self._lock:
            if len(self._generations) > GENERATIONS_MAX:
                several = sorted(self._generations, key=lambda x: len(x.rows), reverse=True)
                self._merge(several[: GENERATIONS_MAX // 2], several[GENERATIONS_MAX // 2 :])
            self._write_down()

    def _merge(self, keep: list[Generation], small: list[Generation]) -> None:
        try:
            merged = self._made(*make.merged(small))
        except make.Unsorted:
            self.reread()
            return
        self._number(merged)
        self._generations = [*keep, merged]
        self._write_down()
        self._forget_files(small)

    def _write_down(self) -> None:
        """Generations that are in memory become files."""
        for x in self._generations if self._keep else []:
            if id(x) not in self._files:
                with self._state.new() as file:
                    file.write(x.content)
                    made = self._named(x.packs, file.commit)
                self._number(made)
                self._generations = [made if y is x else y for y in self._generations]

    def _named(self, names: Iterable[str], commit: Callable[[str], None]) -> Generation:
        """A finished file gets its name, and is mapped."""
        name = f"{blake3.blake3(json.dumps(sorted(names)).encode()).hexdigest()[:32]}.idx"
        commit(f"index/{name}")
        made = Generation.open_at(str(self._state.path(f"index/{name}")))
        if made is None:
            raise HvbackupError(
                f"{self._state.path(f'index/{name}')} is not what was just written there; is the disk well?"
            )
        self._files[id(made)] = name
        return made

    def _forget_files(self, several: Sequence[Generation]) -> None:
        """The cache files of these are gone, unless another generation has taken the name."""
        names = {self._files.pop(id(x)) for x in several if id(x) in self._files}
        for name in names.difference(self._files.values()) if self._keep else ():
            self._state.remove(f"index/{name}")

    # -- asking --------------------------------------------------------------------------------------------------------

    def lookup(self, ids: NDArray[np.void]) -> NDArray[np.void]:
        """A LOCATION for each id; its pack is NOWHERE when the store does not have the chunk."""
        out = np.zeros(len(ids), LOCATION)
        out["pack"] = NOWHERE
        todo, asked = np.arange(len(ids)), g.Asked.of(ids)
        for generation in self._generations:
            if len(todo) == 0:
                break
            rows = generation.find(asked, self._damaged)
            if rows is None or not (hit := rows >= 0).any():
                continue
            found, at = generation.rows[rows[hit]], todo[hit]
            out[at] = g.locations(found)
            out["pack"][at] = generation.numbers(found["place"])
            left = np.flatnonzero(~hit)
            todo, asked = todo[left], asked.only(left)
        return out

    def everywhere(self, chunk: bytes) -> list[Place]:
        """Every place that claims to hold a chunk, damaged ones too: where a reader looks for another copy."""
        return [place for generation in self._generations for place in generation.places(chunk).values()]

    @property
    def damaged(self) -> set[tuple[str, int]]:
        """The (pack, offset) places that are known to be damaged and still in the store."""
        return {place for place in self._damaged if place[0] in self._numbers}

    def set_damaged(self, places: set[tuple[str, int]]) -> None:
        """Chunks at these (pack, offset) places, and no others, are not offered: the next capture stores them again."""
        if places != self._damaged:
            self._damaged = set(places)
            self._state.replace("damaged.json", json.dumps(sorted(places)).encode())

    def suspect(self, places: set[tuple[str, int]]) -> None:
        """The same as long as this index lives, and for nobody else: nothing is written down."""
        self._damaged = set(places)

    @property
    def chunks(self) -> int:
        """How many rows the index has; a chunk stored twice counts twice, and one in a pack that is gone perhaps still."""
        return sum(len(x.rows) for x in self._generations)

    @property
    def generations(self) -> Sequence[Generation]:
        """All of them, as they are now: for who marks rows."""
        return list(self._generations)

    def rows(self) -> Iterable[tuple[list[str], NDArray[np.void]]]:
        """Everything, as (packs of a generation, some of its rows as LOCATION): for who must see all of it."""
        return ((x.packs, piece) for x in self._generations for piece in x.pieces())


def _worth_writing_again(found: Generation) -> bool:
    return bool(found.gone) and (len(found.rows) <= RUN_ROWS or len(found.gone) * GONE_SHARE > len(found.packs))


def _load_damaged(state: Files) -> set[tuple[str, int]]:
    try:
        return {(str(p), int(o)) for p, o in parse_json(state.read("damaged.json"))}
    except (FileNotFoundError, ValueError, TypeError):
        return set()
