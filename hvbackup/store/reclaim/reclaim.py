"""Reclaim: the only thing that removes data.  Packs that nobody needs go; sparse ones go after what lives in them was copied.

    1 choose      packs of which a good part is needed by nobody: by counts (`counts.py`), and if those know of any, by a mark
    2 condemn     they are listed: writers that begin take nothing from them
    3 wait        for writers that began before, and so may not know (`writers.py`)
    4 mark        everything that any root needs, again, whatever step 1 thought (`mark.py`)
    5 copy        what lives in condemned packs, into new ones; they are durable when this returns
    6 grace       readers that looked a chunk up before may still be on their way to it
    7 remove      each pack of which every needed chunk has enough places in packs that are not condemned

    killed after                left behind                              cleaned by
    2 list written              condemned packs that hold what they did  the next run goes on with step 3
    5 new packs sealed          chunks in two packs, both whole          the next run: homes are in packs not condemned
      list says: copied         the same                                 the next run waits for the rest of the grace
    7 some packs removed        the others, still condemned              the next run
      list removed              nothing

Why no needed chunk is lost.  A pack is removed only in step 7, in a run whose step 4 came after a wait in which every writer that
could have taken something from it without being seen has ended.  So whoever needs a chunk of it then is a root of the mark, or
takes it from the map of one (`writers.py`, `pins.py`, `mark.py` say why).  The mark never counts a condemned pack, of this run or
any other, nor one that is gone, as a place where a chunk is safe; so each needed chunk is in a pack that stays, or was copied to
one in step 5, which decrypts, decodes and compares it with its id first and leaves the pack alone if that fails.  Two runs at a
time, on two hosts, only do work twice: each writes its list, then reads the lists of others, then lists the packs.  So of two at
least one knows that the other's packs are condemned, or gone.

Nothing is removed at the first doubt: a point, page, list, hold or pin that can't be read, a chain of records that is broken or
shows that the store was put back from an older copy, a file that is gone without a record.

Each run goes on where the last one was, so it may be killed at any time; `wait=False` makes it return instead of waiting.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import StoreDamage
from hvbackup.model import SECOND, Instant, MiB
from hvbackup.store.chunks import condemned, writers
from hvbackup.store.chunks.condemned import CONDEMNED, Condemned
from hvbackup.store.format import pack as packs
from hvbackup.store.reclaim import counts, repack, reserve
from hvbackup.store.reclaim.mark import Marks, Pause, Share, mark
from hvbackup.store.store import Store

GARBAGE_SHARE = 0.2  # a pack is worth copying when so much of it is needed by nobody
GRACE_NS = 15 * 60 * SECOND
POLL_SECONDS = 1.0
RECLAIM_LOCK = "reclaim.lock"  # under STATE
ROOM_LEFT_BYTES = 64 * MiB  # never used for copies
TOLD_PROBLEMS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """How a run goes about it."""

    garbage_share: float = GARBAGE_SHARE
    grace_ns: int = GRACE_NS
    counts_age_ns: int = 0  # for so long, counts may say that there is nothing to do; 0: a mark always looks
    wait: bool = False  # for writers and for the grace to pass; else return, and the next run goes on
    clock: Callable[[], Instant] = lambda: Instant(time.time_ns())
    steady: Callable[[], float] = time.monotonic  # never steps
    sleep: Callable[[float], None] = time.sleep
    pause: Pause = lambda _: None  # throttles what is read
    say: Callable[[str], None] = lambda _: None  # told of each step


@dataclass(slots=True)
class Reclaimed:
    """What a run did, and what is left for the next."""

    condemned: int = 0  # packs that were listed by this run
    copied_bytes: int = 0
    removed_packs: int = 0
    removed_bytes: int = 0
    waiting_for: list[str] = field(default_factory=list)  # writers that may need what is condemned
    until: Instant | None = None  # the grace of what is copied ends
    kept: list[str] = field(default_factory=list)  # why condemned packs stay
    seconds: dict[str, float] = field(default_factory=dict)  # of each step


def reclaim(store: Store, options: Options) -> Reclaimed:
    """One run.  Raises Busy (another one on this machine), StoreDamage, SpaceExhausted."""
    with store.state.owner(RECLAIM_LOCK, "Reclaim of this store"):
        return _Run(store, options).go()


def choose(store: Store, shares: Mapping[str, Share], garbage_share: float) -> list[str]:
    """The packs that are worth condemning: dead ones, and as many sparse ones as there is room to copy, sparsest first."""
    room = shutil.disk_usage(store.files.root).free - ROOM_LEFT_BYTES
    if store.files.exists(reserve.NAME):
        room = max(room, reserve.RESERVE_BYTES)
    chosen = []
    for pack, share in sorted(
        shares.items(), key=lambda item: (item[1].live > 0, item[1].live / max(1, item[1].total))
    ):
        if share.live and (share.live == share.total or share.garbage < garbage_share):
            break
        room -= share.live  # more than it takes: it is compressed
        if room < 0 and share.live:
            break
        chosen.append(pack)
    return chosen


def shares(store: Store, options: Options) -> dict[str, Share]:
    """How much of each pack is needed now; nothing is changed.  Raises StoreDamage."""
    _refuse_doubts(store)
    return mark(store, options.clock(), *_unfit(store, _lists(store)), options.pause).shares()


def _lists(store: Store) -> list[Condemned]:
    """What earlier runs, or others, have condemned."""
    try:
        return list(CONDEMNED.all(store.files, store.ring))
    except StoreDamage as e:
        raise StoreDamage(f"{e}; when no reclaim runs on any host, remove that file") from e


def _unfit(store: Store, lists: Sequence[Condemned]) -> tuple[set[str], set[str]]:
    """(packs that are condemned, packs of the index that are gone)."""
    return {p for one in lists for p in one.packs}, set(store.index.packs).difference(packs.list_packs(store.files))


def _refuse_doubts(store: Store) -> None:
    """Raises StoreDamage when anything suggests that the store is not what it was."""
    store.index.reread()
    found = store.runs.problems(store.heads)
    if found:
        more = f"; and {len(found) - TOLD_PROBLEMS} more" if len(found) > TOLD_PROBLEMS else ""
        raise StoreDamage(
            f"Nothing is reclaimed while the store is in doubt: {'; '.join(found[:TOLD_PROBLEMS])}{more}; see `hvbackup check`"
        )


class _Run:
    """One run over one store."""

    def __init__(self, store: Store, options: Options) -> None:
        self._store, self._options = store, options
        self._done = Reclaimed()

    def go(self) -> Reclaimed:
        with self._timed("look"):
            _refuse_doubts(self._store)
            lists = _lists(self._store)
        fresh = self._condemn(lists)
        lists += [fresh] if fresh else []
        if lists:
            self._finish(lists)
        return self._done

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        self._options.say(step)
        began = time.monotonic()
        try:
            yield
        finally:
            self._done.seconds[step] = round(self._done.seconds.get(step, 0.0) + time.monotonic() - began, 3)

    def _condemn(self, lists: Sequence[Condemned]) -> Condemned | None:
        """A new list of what is worth it now, if anything is."""
        unfit, gone = _unfit(self._store, lists)
        with self._timed("choose"):
            chosen = self._chosen(self._guessed(), unfit | gone)
        if chosen is None or chosen:
            with self._timed("look through"):
                marks = mark(self._store, self._options.clock(), unfit, gone, self._options.pause)
                chosen = self._chosen(self._keep(marks), unfit | gone)
        if not chosen:
            return None
        made = condemned.new(frozenset(chosen), self._options.clock())
        CONDEMNED.put(self._store.files, self._store.ring, made.id, made)
        self._done.condemned = len(chosen)
        return made

    def _chosen(self, shares: Mapping[str, Share] | None, without: set[str]) -> list[str] | None:
        if shares is None:
            return None
        return choose(self._store, {p: s for p, s in shares.items() if p not in without}, self._options.garbage_share)

    def _guessed(self) -> Mapping[str, Share] | None:
        """How much of each pack is needed, by what the last mark found; None when that was too long ago, or can't be told."""
        now, age = self._options.clock(), self._options.counts_age_ns
        known = counts.load(self._store)
        if known is None or not known.t <= now < known.t + age:
            return None
        found = counts.guess(self._store, known, self._options.pause)
        if found is None:
            return None
        counts.save(self._store, replace(known, points=found.points))
        return found.shares

    def _keep(self, marks: Marks) -> Mapping[str, Share]:
        """What a mark found, also for the next run to choose by."""
        shares = marks.shares()
        counts.save(self._store, counts.Counts(self._options.clock(), shares, marks.points))
        return shares

    def _finish(self, lists: list[Condemned]) -> None:
        with self._timed("wait"):
            if not self._writers_have_ended(lists):
                return
        # Others may have condemned more meanwhile: those packs are no safe places either, nor for us to remove.
        unfit, gone = _unfit(self._store, _lists(self._store))
        with self._timed("mark"):
            self._store.index.catch_up()
            marks = mark(self._store, self._options.clock(), unfit, gone, self._options.pause)
            self._keep(marks)
        with self._timed("copy"):
            lists = self._copy(lists, marks)
        with self._timed("remove"):
            ready = [one for one in lists if self._grace_has_passed(one)]
            self._remove(ready, marks, unfit | gone)

    # -- step 3 --------------------------------------------------------------------------------------------------------

    def _writers_have_ended(self, lists: Sequence[Condemned]) -> bool:
        store = self._store
        waits = [writers.Wait(store.files, store.state, store.ring, store.runs.writer, one.id) for one in lists]
        while True:
            left = sorted({lease for wait in waits for lease in wait.rest(self._options.steady())})
            self._done.waiting_for = left
            if not left or not self._options.wait:
                return not left
            self._options.sleep(POLL_SECONDS)

    # -- step 5 --------------------------------------------------------------------------------------------------------

    def _copy(self, lists: Sequence[Condemned], marks: Marks) -> list[Condemned]:
        """Everything that lives in condemned packs is in others as well, and the lists say so."""
        living = marks.homes_in({p for one in lists for p in one.packs})
        made = repack.Repacked()
        if living:

            def keep(pack: str, rows: NDArray[np.void]) -> NDArray[np.bool_]:
                wanted = living.get(pack, set())
                self._options.pause(int(rows["stored"].sum()))
                return np.array([i.tobytes() in wanted for i in rows["id"]], np.bool_)

            made = repack.repack(self._store, sorted(living), keep)
            self._done.copied_bytes += made.made_bytes
            self._done.kept += [f"Pack {pack} stays: {why}" for pack, _, why in made.damaged]
        now = self._options.clock()
        told = []
        for one in lists:
            if one.copied is None or (made.made and not living.keys().isdisjoint(one.packs)):
                one = replace(one, copied=now)
                CONDEMNED.put(self._store.files, self._store.ring, one.id, one)
            told.append(one)
        return told

    # -- steps 6 and 7 -------------------------------------------------------------------------------------------------

    def _grace_has_passed(self, one: Condemned) -> bool:
        assert one.copied is not None  # `_copy` has just seen to it
        end = Instant(one.copied + self._options.grace_ns)
        while self._options.clock() < end:
            if not self._options.wait:
                self._done.until = max(end, self._done.until or end)
                return False
            self._options.sleep(POLL_SECONDS)
        return True

    def _remove(self, lists: Sequence[Condemned], marks: Marks, unfit: set[str]) -> None:
        living = marks.homes_in({p for one in lists for p in one.packs})
        for one in lists:
            stays = [p for p in sorted(one.packs) if not self._remove_pack(p, living.get(p, set()), unfit)]
            if stays:
                CONDEMNED.put(self._store.files, self._store.ring, one.id, replace(one, packs=frozenset(stays)))
            else:
                CONDEMNED.remove(self._store.files, one.id)
        if self._done.removed_packs:
            figures = {"removed_packs": self._done.removed_packs, "removed_bytes": self._done.removed_bytes}
            self._store.tell("reclaim", self._options.clock(), **figures, copied_bytes=self._done.copied_bytes)

    def _remove_pack(self, pack: str, living: set[bytes], unfit: set[str]) -> bool:
        """Whether the pack is gone; it stays when anything that lives in it has too few places elsewhere."""
        store = self._store
        try:
            size = store.files.size(packs.path_of(pack))
        except FileNotFoundError:
            return True
        if living:
            rows = packs.read_footer(store.files, pack)
            needed = rows[np.array([i.tobytes() in living for i in rows["id"]], np.bool_)]
            if len(needed) != len(living) or not repack.replaced(store, pack, needed, unfit):
                return False
        for name in packs.files_of(pack):
            store.files.remove(name)
        self._done.removed_packs += 1
        self._done.removed_bytes += size
        return True
