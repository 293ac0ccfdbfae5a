"""What the catalog tells of journals is what the journals say, however it came to know of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvbackup.model import SECOND, Disk, DiskId, MachineId, Token
from hvbackup.store.catalog import catalog as module
from hvbackup.store.catalog.catalog import STAMP, Catalog
from hvbackup.store.journal.history import History
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.store import Store
from tests.world import BLOCK, KEY, MACHINE, World

VDA = DiskId("vda")


@pytest.fixture
def world(ram: Path) -> World:
    """A machine with a journal: two sealed segments, a gap, two marks, and an open log."""
    world = World(ram, KEY).life(1)
    with world.opened() as store:
        newest = store.newest(MachineId(MACHINE))
        assert newest is not None
        base = replace(newest, t=world.clock(), seq=0, id=type(newest.id)("00000000000000aa"))
        store.commit(base, store.writer())
        record(world, store)
    return world


def record(world: World, store: Store, label: str = "before the update") -> None:
    clock, tokens = world.clock, {VDA: Token("fake", "c1")}
    recorder = Recorder(store, MachineId(MACHINE), [Disk(VDA, world.disks["vda"].size)])
    recorder.write(VDA, clock(), [(0, 1000), (500, 1000)], bytes(2000))
    recorder.barrier(clock(), tokens)
    recorder.write(VDA, clock(), [(BLOCK, 100)], bytes(100))
    recorder.barrier(clock(), tokens, mark={"label": label, "consistency": "application"})
    recorder.rotate()
    recorder.finish()
    start = clock()
    clock.now += 5 * SECOND
    recorder.barrier(clock(), tokens, gap={"from": start, "why": "the host was gone"})
    recorder.rotate()
    recorder.finish()
    recorder.write(VDA, clock(), [(0, 10)], bytes(10))
    recorder.barrier(clock(), tokens)


@pytest.fixture
def store(world: World) -> Iterator[Store]:
    with world.opened() as store:
        yield store


@pytest.fixture
def catalog(store: Store) -> Catalog:
    found = Catalog(store.state)
    assert found.reconcile(store) == []
    return found


def ask(catalog: Catalog, sql: str) -> list[list[Any]]:
    asked = {"path": str(catalog.path), "sql": sql, "seconds": 20, "rows": 1000}
    rows: list[list[Any]] = json.loads(module._answer(asked))["rows"]
    return rows


def dump(catalog: Catalog) -> list[list[list[Any]]]:
    return [ask(catalog, f"FROM {view} ORDER BY ALL") for view in ("segments", "gaps", "marks", "journals")]


def test_segments_gaps_and_marks_are_those_of_the_journal(store: Store, catalog: Catalog) -> None:
    history = History(store, MachineId(MACHINE))
    sealed = history.runs[:2]
    columns = "machine, name, epoch, first_seq, last_seq, moments, facts, changed_bytes, bytes"
    expected = [
        [MACHINE, MACHINE, r.name.epoch, r.summary.first, r.summary.last_seq, r.summary.moments, r.summary.count]
        for r in sealed
    ]
    rows = ask(catalog, f"SELECT {columns} FROM segments ORDER BY first_seq")
    assert [row[:7] for row in rows] == expected
    assert [row[7] for row in rows] == [1600, 0], "what was overwritten counts once"
    assert [row[8] for row in rows] == [
        store.files.size(row[0]) for row in ask(catalog, "SELECT path FROM segments ORDER BY ALL")
    ]
    [gap] = history.told.gaps
    assert ask(catalog, "SELECT machine, why, seconds, epoch_ns(begins) // 1000, epoch_ns(ends) // 1000 FROM gaps") == [
        [MACHINE, "the host was gone", (gap.end - gap.start) / 1e9, gap.start // 1000, gap.end // 1000]
    ]
    [mark] = history.told.marks
    assert ask(catalog, "SELECT name, seq, tag, consistency FROM marks") == [
        [MACHINE, mark.seq, "before the update", "application"]
    ]
    assert ask(catalog, "SELECT segments, moments, gaps, gap_seconds > 5 FROM journals") == [
        [2, sum(r.summary.moments for r in sealed), 1, True]
    ]


def test_step_by_step_is_the_same_as_from_empty(world: World, store: Store, catalog: Catalog) -> None:
    for number in range(2):
        record(world, store, f"again {number}")
        catalog.reconcile(store)
    before = dump(catalog)
    assert len(before[2]) == 3
    catalog.remove()
    catalog.reconcile(store)
    assert dump(catalog) == before
    shutil.rmtree(store.state.path("journal"))
    catalog.remove()
    catalog.reconcile(store)
    assert dump(catalog) == before


def test_what_passed_its_window_leaves(world: World, store: Store, catalog: Catalog) -> None:
    paths = [row[0] for row in ask(catalog, "SELECT path FROM segments ORDER BY first_seq")]
    store.files.remove(paths[0])
    catalog.reconcile(store)
    assert ask(catalog, "SELECT path FROM segments") == [[paths[1]]]
    assert ask(catalog, "SELECT count(*) FROM marks") == [[0]]
    assert ask(catalog, "SELECT count(*) FROM gaps") == [[1]]


def test_an_open_log_that_grows_does_not_touch_the_catalog(world: World, store: Store, catalog: Catalog) -> None:
    before = store.state.path(STAMP).stat().st_mtime_ns
    [log] = (world.store_path / "journals").glob("*/*.log")
    log.write_bytes(log.read_bytes() + b"more")
    catalog.reconcile(store)
    assert store.state.path(STAMP).stat().st_mtime_ns == before


def test_a_damaged_segment_is_told_of_and_costs_only_itself(world: World, store: Store, catalog: Catalog) -> None:
    first = ask(catalog, "SELECT path FROM segments ORDER BY first_seq")[0][0]
    path = world.store_path / first
    path.write_bytes(b"x" * path.stat().st_size)
    shutil.rmtree(store.state.path("journal"))
    catalog.remove()
    assert "1 points, run records or segments can't be read" in catalog.reconcile(store)[0]
    assert len(ask(catalog, "FROM segments")) == 1
