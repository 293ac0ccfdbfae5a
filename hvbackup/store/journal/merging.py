"""Merging: what many small segments hold is put into one, so that a day of moments is some dozens of files, not 1,440.

    killed after                   left behind                       cleaned by
    1 the merged segment renamed   it and its parts                  readers: the parts don't count; a later merge removes them
    2 some parts removed           it and the other parts            the same

Only neighbours of one epoch are merged, with the same disks, between two points and of one hour: a segment goes as a whole, and
only where a point holds what it ends with.  In a merged segment the facts keep their numbers; their bytes are sorted by their
place on the disks, so what is read together lies together.  Parts stay for a while: somebody may be reading them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence

import numpy as np

from hvbackup.errors import StoreDamage
from hvbackup.model import SECOND, MachineId, MiB
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal, readers
from hvbackup.store.journal.history import History
from hvbackup.store.journal.journal import FOLDER, SEGMENT, Facts, Name
from hvbackup.store.journal.runs import SealedRun
from hvbackup.store.journal.segment import PieceCache, path_of, write_facts
from hvbackup.store.journal.tables import Summary
from hvbackup.store.store import Store

MERGED_MAX_BYTES = 32 * MiB  # of facts and their bytes: merging holds as much in memory, twice
HOUR_NS = 3600 * SECOND
READERS_SECONDS = 600.0  # parts stay as long: who lists a journal reads it soon, and who reads for long has a pin


def mergeable(summaries: Sequence[tuple[Name, Summary, int]], covered: Collection[int]) -> list[list[Name]]:
    """Neighbours that belong into one file, oldest first.  Pure.  Each comes with how many bytes it has when decoded.

    `covered` are the sequence numbers of committed points; what none of them holds is left alone.
    """
    groups: list[list[Name]] = []
    total, before = 0, None
    for name, summary, size in summaries:
        if name.suffix != SEGMENT or not any(p >= summary.last_seq for p in covered):
            break
        joins = before is not None and _belong(before, (name, summary), covered) and total + size <= MERGED_MAX_BYTES
        if joins:
            groups[-1].append(name)
        else:
            groups.append([name])
        total, before = (total if joins else 0) + size, (name, summary)
    return [group for group in groups if len(group) > 1]


def _belong(before: tuple[Name, Summary], after: tuple[Name, Summary], covered: Collection[int]) -> bool:
    """Whether two neighbours may be in one file."""
    (name, summary), (next_name, next_summary) = before, after
    return (
        name.epoch == next_name.epoch
        and next_name.first == summary.last_seq + 1
        and summary.disks == next_summary.disks
        and summary.first_t // HOUR_NS == next_summary.last_t // HOUR_NS
        and not any(summary.last_seq <= p < next_name.first for p in covered)
    )


def merge(store: Store, machine: MachineId) -> int:
    """What may be merged is, and parts that nobody reads any more are gone; how many files were merged.

    Only for whoever holds the machine.  What is damaged stays as it is: `check` tells of it.  Raises SpaceExhausted.
    """
    folder = store.ring.machine_name(machine)
    _remove_parts(store, folder)
    if readers.pinned_from(store, machine) is not None:
        return 0  # somebody reads for long; there is always a next time
    runs = {run.name: run for run in History(store, machine, whole=True).runs if isinstance(run, SealedRun)}
    covered = {p.seq for p in store.points(machine) if p.seq is not None}
    sizes, merged = [], 0
    for name, run in runs.items():
        with contextlib.suppress(StoreDamage):
            sizes.append((name, run.summary, run.decoded_bytes))
    for group in mergeable(sizes, covered):
        with contextlib.suppress(StoreDamage):
            _write(store, folder, [runs[name] for name in group])
            merged += len(group)
    return merged


def _write(store: Store, folder: str, runs: Sequence[SealedRun]) -> None:
    """The merged segment of neighbours exists, durably, when this returns."""
    facts = np.concatenate([run.facts for run in runs])
    source = np.repeat(np.arange(len(runs)), [len(run.facts) for run in runs])
    order = np.lexsort((np.arange(len(facts)), facts["offset"], facts["disk"], facts["kind"] != f.FACT_META))
    order = order[facts["kind"][order] != f.FACT_ZERO]
    lengths = facts["length"].astype(np.int64)
    stream = _gathered(runs, facts, source, order, int(lengths[order].sum()))
    ends = np.cumsum(lengths[order])
    facts["pos"][order] = ends - lengths[order]
    first, last = runs[0].name, runs[-1].summary.last_seq
    name = Name(first.epoch, first.first, SEGMENT, last)
    write_facts(store.files, store.ring, folder, name, facts, stream)


def _gathered(runs: Sequence[SealedRun], facts: Facts, source: np.ndarray, order: np.ndarray, size: int) -> bytearray:
    """The bytes of facts, in another order."""
    streams = [memoryview(run.stream) for run in runs]
    out, at = bytearray(size), 0
    rows = zip(source[order].tolist(), facts["pos"][order].tolist(), facts["length"][order].tolist(), strict=True)
    for number, pos, length in rows:
        out[at : at + length] = streams[number][pos : pos + length]
        at += length
    return out


def parts_of(store: Store, folder: str, merged: Name) -> list[Name]:
    """The files that don't count because of a merged one."""
    return [n for n in journal.all_files(store.files, folder) if merged.covers(n)]


def _remove_parts(store: Store, folder: str) -> None:
    """Parts that were merged a while ago are gone."""
    for merged in journal.list_files(store.files, folder):
        if merged.last is None:
            continue
        age = time.time() - store.files.path(path_of(folder, merged)).stat().st_mtime
        if age >= READERS_SECONDS or age < 0:
            parts = parts_of(store, folder, merged)
            if parts and _is_whole(SealedRun(store, folder, merged, PieceCache())):
                for part in parts:
                    store.files.remove(f"{FOLDER}/{folder}/{part}")


def _is_whole(run: SealedRun) -> bool:
    try:
        _ = run.facts, run.stream
    except StoreDamage:
        return False
    return True
