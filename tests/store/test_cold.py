"""Packs that have gone cold: what is joined, what is left alone, and that a crash at any point loses nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvbackup.model import Instant
from hvbackup.store.check.check import check
from hvbackup.store.chunks.condemned import CONDEMNED
from hvbackup.store.format import pack as packs
from hvbackup.store.format import parity
from hvbackup.store.reclaim import cold
from hvbackup.store.reclaim.cold import AGE_NS, regroup_cold
from hvbackup.store.reclaim.reclaim import Options, reclaim
from hvbackup.store.store import Store
from tests.store.mortal import Dies, Mortal
from tests.store.test_check import data_packs
from tests.store.test_repack import world_of
from tests.world import BLOCK, KEY, World

NOW = Instant(2_000_000_000 * 10**9)  # long after the files were written


def condemned_packs(store: Store) -> set[str]:
    return {p for one in CONDEMNED.all(store.files, store.ring) for p in one.packs}


def remove_condemned(store: Store) -> None:
    for name in condemned_packs(store):
        for path in packs.files_of(name):
            store.files.remove(path)


def test_cold_packs_are_joined_and_condemned_and_everything_reads_without_them(tmp_path: Path) -> None:
    world = world_of(tmp_path, KEY)
    with world.opened() as store:
        old = set(data_packs(store))
        done = regroup_cold(store, NOW)
        assert condemned_packs(store) == old
        assert (done.packs, done.damaged) == (len(old), [])
        assert done.new_bytes < done.old_bytes
        world.check_all(store)
        remove_condemned(store)
    with world.opened() as store:
        world.check_all(store)
        assert check(store, deep=True).problems == []
        assert regroup_cold(store, NOW).packs == 0, "what was joined stays"


def test_captures_keep_their_room_and_the_disk_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(tmp_path, None)
    with world.opened() as store:
        old, read = set(data_packs(store)), list[int]()
        monkeypatch.setattr(cold, "SPARE", 1.0)  # more than any disk has
        done = regroup_cold(store, NOW)
        assert (done.packs, done.no_room) == (0, len(old))
        assert condemned_packs(store) == set()
        monkeypatch.undo()
        assert regroup_cold(store, NOW, pause=read.append).packs == len(old)
        assert sum(read) > 0
        world.check_all(store)


def test_young_packs_and_pages_are_left_alone(tmp_path: Path) -> None:
    world = world_of(tmp_path, None)
    with world.opened() as store:
        every = packs.list_packs(store.files)
        newest = max(os.stat(store.files.path(packs.path_of(p))).st_mtime_ns for p in every)
        assert regroup_cold(store, Instant(newest + AGE_NS - 10**9 * 3600)).packs == 0
        assert packs.list_packs(store.files) == every


def test_a_pack_with_a_damaged_record_is_not_condemned(tmp_path: Path) -> None:
    world = world_of(tmp_path, KEY)
    with world.opened() as store:
        bad, *others = data_packs(store)
        offset, stored = next(packs.records(packs.read_footer(store.files, bad)))
        path = store.files.path(packs.path_of(bad))
        data = bytearray(path.read_bytes())
        data[offset + stored - 20] ^= 1
        path.write_bytes(data)
        store.files.forget(packs.path_of(bad))
        done = regroup_cold(store, NOW)
        assert condemned_packs(store) == set(others)
        assert [bad in line for line in done.damaged] == [True]


def regroup_until(world: World, step: int) -> bool:
    """Whether the run came to its end."""
    kernel = Mortal()
    with Store.open(world.store_path, world.state_path, [KEY], owner=True, kernel=kernel) as store:
        kernel.left = step
        try:
            regroup_cold(store, NOW)
        except Dies:
            return False
    return True


@pytest.mark.walk
@pytest.mark.parametrize("removes", [False, True], ids=["kept", "condemned ones gone"])
def test_killed_at_every_step_nothing_is_lost_and_the_next_run_ends_it(
    tmp_path: Path, removes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "BATCH_PACKS", 1)
    for step in range(100):
        world = world_of(tmp_path / str(step), KEY)
        ended = regroup_until(world, step)
        with world.opened() as store:
            world.check_all(store)
            if removes:
                remove_condemned(store)
        with world.opened() as store:
            world.check_all(store)
            regroup_cold(store, NOW)
            remove_condemned(store)
        with world.opened() as store:
            world.check_all(store)
            assert check(store, deep=True).problems == []
        if ended:
            break
    else:
        pytest.fail("it never came to its end")
    assert step > 10


@pytest.mark.parametrize("covered", [False, True], ids=["plain", "with parity"])
def test_reclaim_removes_what_was_joined_and_nothing_else(tmp_path: Path, covered: bool) -> None:
    world = world_of(tmp_path, KEY)
    with world.opened() as store:
        if covered:
            parity.cover(store.files)
        old = set(data_packs(store))
        regroup_cold(store, NOW)
        done = reclaim(store, Options(grace_ns=0, clock=world.clock))
        assert done.removed_packs >= len(old)
        assert done.copied_bytes < BLOCK, "pages of sparse packs at most: blocks are in other packs already"
        assert old.isdisjoint(packs.list_packs(store.files))
        assert old.isdisjoint(parity.sidecars(store.files))
        assert condemned_packs(store) == set()
    with world.opened() as store:
        world.check_all(store)
        assert check(store, deep=True).problems == []
        world.scribble()
        world.capture(store)
        world.check_all(store)
