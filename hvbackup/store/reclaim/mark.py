"""Mark: which rows of the index are needed by any point, pin, or point in the trash.

Memory is one byte for each row and a batch of ids; the index itself is mapped.  A page of a map that several points share is
visited once: it is marked when it was.

A row that is marked is a *home*: the place where a needed chunk stays.  A block has one, a map page and a copy of a point have
two, in different packs.  Places in packs that are `unfit` (condemned) become homes only where there are not enough others, so
what is marked in a condemned pack is exactly what has to be copied before the pack may go.

Segments of journals carry their bytes themselves and refer to no chunk; what they are laid over are points, which prune keeps.

Nothing is guessed: a point or a page that can't be read may need anything, so then there is no mark at all, and StoreDamage says
which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged, PointDamaged, StoreDamage
from hvbackup.model import ChunkId, Instant, RecoveryPoint
from hvbackup.store.chunks import writers
from hvbackup.store.chunks.writer import META_COPIES, point_copy
from hvbackup.store.format import layout as f
from hvbackup.store.format.blockmap import Ids, depth_of
from hvbackup.store.format.root import Disks, Root, disks_of, roots_of
from hvbackup.store.index.generation import OFFSET_BITS, PIECE_ROWS, Asked, Generation, locations
from hvbackup.store.keep import forget
from hvbackup.store.shelves import pins
from hvbackup.store.store import Store

BATCH_IDS = 1 << 16  # looked up together: 2 MB
Pause = Callable[[int], object]  # told of so many bytes read; may take its time


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a pack is needed, in bytes of plain chunks."""

    live: int
    total: int

    @property
    def garbage(self) -> float:
        """The part that nobody needs."""
        return 1 - self.live / self.total if self.total else 1.0


class Marks:
    """Homes of chunks in the index of a store, as it is when this is made.  Thread safety: one thread."""

    def __init__(self, store: Store, unfit: Collection[str] = (), gone: Collection[str] = ()) -> None:
        """`unfit` packs are condemned; those that are `gone` are no place for anything, whatever the index says."""
        self._store, self._damaged = store, store.index.damaged
        self._unfit, self._gone = frozenset(unfit), frozenset(gone)
        self._generations: list[Generation] = []
        self._marked: list[NDArray[np.bool_]] = []
        self._unfit_in: list[NDArray[np.bool_]] = []
        self._learn()
        self._waiting: list[Ids] = []
        self._waiting_count = 0
        self.points: dict[str, Disks] = {}  # those that were walked, in the trash or not, by path
        self.lost_blocks = 0  # needed, and nowhere: that is damage, which `check` names

    def _learn(self) -> bool:
        """What the index has learned meanwhile is here too; False when that is nothing."""
        known = {p for g in self._generations for p in g.alive()}
        fresh = [g for g in self._store.index.generations if known.isdisjoint(g.alive())]
        for g in fresh:
            self._generations.append(g)
            self._marked.append(np.zeros(len(g.rows), np.bool_))
            no = self._unfit | self._gone
            self._unfit_in.append(np.array([p in no for p in (*g.packs, "")], np.bool_))
        return bool(fresh)

    def _catch_up(self) -> bool:
        """A point may be younger than our index: whether there are packs that we did not know of."""
        return self._store.index.catch_up() and self._learn()

    # -- marking -------------------------------------------------------------------------------------------------------

    def blocks(self, ids: Ids) -> None:
        """These blocks are needed; `settle` makes sure of the last ones."""
        self._waiting.append(ids)
        self._waiting_count += len(ids)
        if self._waiting_count >= BATCH_IDS:
            self.settle()

    def settle(self) -> None:
        """Everything that was said is marked when this returns."""
        if not self._waiting:
            return
        ids = np.ascontiguousarray(np.concatenate(self._waiting)).view("V32").ravel()
        self._waiting, self._waiting_count = [], 0
        todo, asked = np.arange(len(ids)), Asked.of(ids)
        for g, marked, unfit in zip(self._generations, self._marked, self._unfit_in, strict=True):
            rows = g.find(asked, self._damaged)
            if rows is None:
                continue
            hit = rows >= 0
            hit[hit] = ~unfit[self._numbers(g, rows[hit])]
            marked[rows[hit]] = True
            left = np.flatnonzero(~hit)
            todo, asked = todo[left], asked.only(left)
            if len(todo) == 0:
                return
        for i in todo.tolist():
            chunk = ids[i].tobytes()
            self.lost_blocks += not (self._home(chunk, 1) or (self._catch_up() and self._home(chunk, 1)))

    @staticmethod
    def _numbers(g: Generation, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        places = g.rows["place"][rows] >> np.uint64(OFFSET_BITS)
        return np.minimum(places.astype(np.int64), len(g.packs))

    def _home(self, chunk: bytes, copies: int) -> bool:
        """Whether the chunk has any place; as many of them as it needs, the best ones, are marked."""
        there = sorted((self._rank(n, row), n, row) for n, g in enumerate(self._generations) for row in g.places(chunk))
        packs: set[str] = set()
        for _, n, row in there:
            pack = self._generations[n].place(row).pack
            if len(packs) < copies and pack not in packs and pack not in self._gone:
                packs.add(pack)
                self._marked[n][row] = True
        return bool(packs)

    def _rank(self, n: int, row: int) -> int:
        """Good places first, then condemned ones, and damaged ones last: their pack stays, for somebody to look at."""
        place = self._generations[n].place(row)
        return 2 if place[:2] in self._damaged else int(place.pack in self._unfit)

    def page(self, chunk: bytes) -> bool:
        """The page is needed; whether this is the first time that somebody says so.  Raises ChunkDamaged when it is nowhere."""
        if any(self._marked[n][row] for n, g in enumerate(self._generations) for row in g.places(chunk)):
            return False
        if not self._home(chunk, META_COPIES) and not (self._catch_up() and self._home(chunk, META_COPIES)):
            raise ChunkDamaged(f"Map page {chunk.hex()} is lost")
        return True

    def copy_of_point(self, path: str, data: bytes) -> None:
        """The copies of a point that are in packs are needed, if there are any."""
        self._home(blake3.blake3(point_copy(path, data)).digest(), META_COPIES)

    # -- what came of it -----------------------------------------------------------------------------------------------

    def shares(self) -> dict[str, Share]:
        """How much of each pack is needed."""
        live: dict[str, int] = {}
        total: dict[str, int] = {}
        for g, marked in zip(self._generations, self._marked, strict=True):
            for start in range(0, len(g.rows), PIECE_ROWS):
                rows = locations(g.rows[start : start + PIECE_ROWS])
                number = np.minimum(rows["pack"].astype(np.int64), len(g.packs))
                plain = rows["plain"].astype(np.float64)
                alive = marked[start : start + PIECE_ROWS]
                for into, weight in ((total, plain), (live, plain * alive)):
                    sums = np.bincount(number, weight, minlength=len(g.packs) + 1).astype(np.int64)
                    for i in np.flatnonzero(sums[:-1]).tolist():
                        into[g.packs[i]] = into.get(g.packs[i], 0) + int(sums[i])
        return {pack: Share(live.get(pack, 0), n) for pack, n in total.items()}

    def homes_in(self, packs: Collection[str]) -> dict[str, set[bytes]]:
        """The needed chunks of each of these packs that has any."""
        found: dict[str, set[bytes]] = {}
        wanted = frozenset(packs)
        for g, marked in zip(self._generations, self._marked, strict=True):
            asked = np.array([p in wanted for p in (*g.packs, "")], np.bool_)
            for start in range(0, len(g.rows), PIECE_ROWS) if asked.any() else ():
                at = start + np.flatnonzero(marked[start : start + PIECE_ROWS])
                numbers = self._numbers(g, at)
                for row, number in zip(at[asked[numbers]].tolist(), numbers[asked[numbers]].tolist(), strict=True):
                    found.setdefault(g.packs[number], set()).add(g.rows["id"][row].tobytes())
        return found


def mark(
    store: Store, now: Instant, unfit: Collection[str] = (), gone: Collection[str] = (), pause: Pause = lambda _: None
) -> Marks:
    """Everything that anybody needs is marked when this returns.  Raises StoreDamage when that can't be known.

    Points are looked for until there are no others: one may be on its way into the trash or out of it.  What pins and leases
    name was a point when they were written, and pins and leases are read after the points; so whatever is not a point any more
    when we look is in one of them by then, if anybody uses it.
    """
    marks = Marks(store, unfit, gone)
    walk = _Walk(store, marks, pause)
    walked = marks.points
    while True:
        before = len(walked)
        for path, data, point in chain(points(store, walked), trashed(store, walked)):
            marks.copy_of_point(path, data)
            walk.point(point)
            walked[path] = disks_of(point)
        for pin in pins.every(store, now):
            for root in pin.roots:
                walk.root(root, f"what is pinned by {pin.what}")
        for lease in writers.leases(store.files, store.ring):
            for root in lease.roots:
                walk.root(root, f"writer {lease.id}")
        if len(walked) == before:
            marks.settle()
            return marks


def points(store: Store, known: Collection[str] = ()) -> Iterator[tuple[str, bytes, RecoveryPoint]]:
    """(path, content, point) of every other point.  Raises StoreDamage naming one that can't be read."""
    for folder in store.machine_folders():
        for path in store.point_paths(folder):
            if path in known:
                continue
            try:
                yield path, store.files.read(path), store.load_point(path)
            except FileNotFoundError:
                continue  # forgotten since it was listed: it is in the trash
            except PointDamaged as e:
                if not store.files.exists(path):
                    continue
                raise StoreDamage(
                    f"{e}; nothing is reclaimed while nobody knows what that point needs: "
                    "`hvbackup check --repair` may mend it, or forget it by its id"
                ) from e


def trashed(store: Store, known: Collection[str] = ()) -> Iterator[tuple[str, bytes, RecoveryPoint]]:
    """The same of the trash; one that can't be read can't be had back either."""
    for path in forget.trash_paths(store):
        if path in known:
            continue
        try:
            yield path, store.files.read(f"{forget.TRASH}/{path}"), forget.load_trashed(store, path)
        except (FileNotFoundError, StoreDamage):
            continue


class _Walk:
    """Walks maps from their roots, and marks."""

    def __init__(self, store: Store, marks: Marks, pause: Pause) -> None:
        self._store, self._marks, self._pause = store, marks, pause

    def point(self, point: RecoveryPoint) -> None:
        """Everything a point needs is marked."""
        for root in roots_of(point):
            self.root(root, f"point {point.id} of {point.machine.name}")

    def root(self, root: Root, whose: str) -> None:
        """Everything below a root is marked."""
        depth = depth_of(-(-root.size // self._store.block))
        try:
            for leaf in self._leaves(root.id, depth - 1):
                self._marks.blocks(leaf[leaf.any(axis=1)])
        except ChunkDamaged as e:
            raise StoreDamage(
                f"{e}, and {whose} needs what it leads to; nothing is reclaimed while nobody knows what that is: "
                "a capture may bring it back, or forget the point"
            ) from e

    def _leaves(self, at: ChunkId, level: int) -> Iterator[Ids]:
        """Every leaf below a page that nobody has visited."""
        stack: list[tuple[bytes, int]] = [(at, level)]
        while stack:
            page, level = stack.pop()
            if not any(page) or not self._marks.page(page):
                continue
            data = self._store.chunks.page(ChunkId(page))
            self._pause(len(data))
            ids = np.frombuffer(data, np.uint8).reshape(f.PAGE_IDS, f.ID_BYTES)
            if level == 0:
                yield ids
            else:
                some: Iterable[int] = np.flatnonzero(ids.any(axis=1)).tolist()
                stack += [(ids[i].tobytes(), level - 1) for i in some]
