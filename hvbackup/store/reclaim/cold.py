"""Cold packs: blocks that were stored long ago are joined into larger frames and compressed harder, and take less room.

    killed after              left behind                                cleaned by
    1 new packs sealed        blocks in two packs, both whole            the next run: an old pack whose blocks are all in
                                                                         others is condemned without another copy
    2 old packs condemned     packs that nothing new refers to           reclaim, which marks again before it removes them

Why nothing is lost: a pack is condemned only when every chunk of it has enough places in packs that are not (`repack.replaced`),
and being condemned takes nothing away; reclaim removes it after its own mark.  Until then readers find either place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import StoreDamage
from hvbackup.model import SECOND, Instant
from hvbackup.store.chunks import condemned
from hvbackup.store.chunks.condemned import CONDEMNED
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.reclaim.mark import Pause
from hvbackup.store.reclaim.repack import GROUP_BYTES, Repacked, everything, kind_of, regroup, replaced
from hvbackup.store.store import Store

AGE_NS = 7 * 24 * 3600 * SECOND  # what was stored so long ago and is read seldom enough
BATCH_PACKS = 16  # joined together: a gigabyte, and what a crash makes be done again
SPARE = 0.1  # of the disk: room that captures may need before reclaim has removed the old packs
GROUPED_SHARE = 0.5  # of the bytes that frames could have: packs above are left as they are


@dataclass(slots=True)
class Regrouped:
    """What a run did."""

    packs: int = 0  # old ones, condemned
    made_packs: int = 0
    old_bytes: int = 0
    new_bytes: int = 0
    no_room: int = 0  # packs that wait until reclaim has freed the room of earlier ones
    damaged: list[str] = field(default_factory=list)


def regroup_cold(
    store: Store,
    now: Instant,
    age_ns: int = AGE_NS,
    group_bytes: int = GROUP_BYTES,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    pause: Pause = lambda _: None,
) -> Regrouped:
    """Packs of small frames that are older than `age_ns` are replaced by packs of large ones, when this returns.

    Inside `store.writing`.  Their room comes back with the next reclaim; until then both are there, so captures keep SPARE of it.
    """

    def keep(pack: str, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        pause(int(rows["stored"].sum()))
        return everything(pack, rows)

    done = Regrouped()
    unfit = {p for one in CONDEMNED.all(store.files, store.ring) for p in one.packs}
    chosen = [p for p in packs.list_packs(store.files) if p not in unfit and _is_cold(store, p, now - age_ns)]
    chosen = sorted((p for p in chosen if _has_small_frames(store, p, group_bytes)), key=lambda p: _stored(store, p))
    rest, total = iter(chosen), sum(store.files.size(packs.path_of(p)) for p in chosen)
    while batch := list(islice(rest, BATCH_PACKS)):
        if not _has_room(store, batch):
            done.no_room = len(batch) + sum(1 for _ in rest)
            break
        todo = [p for p in batch if not _is_replaced(store, p, unfit | set(chosen))]
        made = regroup(store, todo, keep, group_bytes=group_bytes) if todo else Repacked()
        done.damaged += [f"Pack {pack} stays as it is: {why}" for pack, _, why in made.damaged]
        done.made_packs += len(made.made)
        done.new_bytes += made.made_bytes
        _condemn(store, [p for p in batch if p in made.whole or p not in todo], unfit, now, done)
        progress(done.old_bytes, total)
    return done


def _has_room(store: Store, batch: list[str]) -> bool:
    disk = shutil.disk_usage(store.files.root)
    return disk.free - sum(store.files.size(packs.path_of(p)) for p in batch) > SPARE * disk.total


def _condemn(store: Store, old: list[str], unfit: set[str], now: Instant, done: Regrouped) -> None:
    fit = frozenset(p for p in old if _is_replaced(store, p, unfit.union(old)))
    unfit |= fit
    if not fit:
        return
    made = condemned.new(fit, now)
    CONDEMNED.put(store.files, store.ring, made.id, made)
    done.packs += len(fit)
    done.old_bytes += sum(store.files.size(packs.path_of(p)) for p in fit)


def _is_replaced(store: Store, pack: str, without: set[str]) -> bool:
    try:
        return replaced(store, pack, packs.read_footer(store.files, pack), without)
    except StoreDamage:
        return False


def _is_cold(store: Store, pack: str, before: int) -> bool:
    return kind_of(store, pack) == f.KIND_DATA and _stored(store, pack) < before


def _stored(store: Store, pack: str) -> int:
    """When the file was written, as the file system says; a copy of a store that does not keep times is as old as itself."""
    try:
        return store.files.modified(packs.path_of(pack))
    except FileNotFoundError:
        return 1 << 62  # removed meanwhile


def _has_small_frames(store: Store, pack: str, group_bytes: int) -> bool:
    """Whether there is something to join: frames that shrank, and hold much less than they could."""
    try:
        rows = packs.read_footer(store.files, pack)
    except StoreDamage:
        return False
    _, first, inverse = np.unique(rows["offset"], return_index=True, return_inverse=True)
    plain = np.bincount(inverse, rows["plain"])
    shrank = rows["stored"][first] < plain
    joined = plain[shrank]
    return bool(len(joined) > 1 and joined.mean() < GROUPED_SHARE * group_bytes)
