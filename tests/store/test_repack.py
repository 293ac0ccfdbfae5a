"""Repack and regroup: everything reads as before, from the new packs alone once the old ones are gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.store.check.check import check
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format.keys import Secret
from hvbackup.store.reclaim.repack import everything, kind_of, regroup, repack, replaced
from hvbackup.store.store import Store
from tests.store.test_damage import flip, needs
from tests.world import BLOCK, KEY, World

SECRETS = pytest.mark.parametrize("secret", [None, KEY], ids=["plain", "encrypted"])
ZERO = bytes(f.ID_BYTES)


def world_of(path: Path, secret: Secret | None) -> World:
    """Blocks that shrink and blocks that don't, in several packs."""
    world = World(path, secret, disks={"vda": FakeDisk(24 * BLOCK + 512), "vdb": FakeDisk(6 * BLOCK)}).init()
    shared = world.rng.randbytes(20_000)  # that neighbours have in common, as files of one kind do
    with world.opened() as store:
        for turn in range(3):
            for i in range(turn, 24, 2):
                world.disks["vda"].write(i * BLOCK, b"%d line %d" % (turn, i) + shared)
            world.scribble()
            world.capture(store)
    return world


def of_kind(store: Store, kind: int) -> list[str]:
    return [n for n in packs.list_packs(store.files) if kind_of(store, n) == kind]


def remove(store: Store, names: list[str]) -> None:
    for name in names:
        store.files.remove(packs.path_of(name))


@SECRETS
@pytest.mark.parametrize("way", [repack, regroup])
def test_the_new_packs_hold_everything_the_old_ones_held(tmp_path: Path, secret: Secret | None, way: object) -> None:
    world = world_of(tmp_path, secret)
    with world.opened() as store:
        old = packs.list_packs(store.files)
        rows = {name: packs.read_footer(store.files, name) for name in old}
        assert not any(replaced(store, name, rows[name], without=set(old)) for name in old)
        done = way(store, old)  # type: ignore[operator]
        assert sorted(done.whole) == old
        assert done.damaged == []
        assert all(replaced(store, name, rows[name], without=set(old)) for name in old)
        world.check_all(store)
        remove(store, old)
    with world.opened() as store:
        world.check_all(store)
        assert check(store, deep=True).problems == []
        world.scribble()
        world.capture(store)
        world.check_all(store)


def test_groups_are_frames_of_several_blocks_and_smaller(tmp_path: Path) -> None:
    world = world_of(tmp_path, KEY)
    with world.opened() as store:
        old = of_kind(store, f.KIND_DATA)
        done = regroup(store, old)
        rows = np.concatenate([packs.read_footer(store.files, n) for n in done.made])
        _, sizes = np.unique(rows["offset"], return_counts=True)
        assert sizes.max() == 4
        assert done.made_bytes < sum(store.files.size(packs.path_of(n)) for n in old)


def test_pages_stay_in_two_packs(tmp_path: Path) -> None:
    world = world_of(tmp_path, None)
    with world.opened() as store:
        old = of_kind(store, f.KIND_META)
        before = {r.tobytes() for n in old for r in packs.read_footer(store.files, n)["id"]}
        done = repack(store, old)
        for chunk in before:
            assert len([n for n in done.made if chunk in ids_of(store, n)]) == 2
        remove(store, old)
        for name in done.made:
            content = store.files.read(packs.path_of(name))
            store.files.remove(packs.path_of(name))
            with world.opened(owner=False) as reader:
                world.check_all(reader)
            store.files.replace(packs.path_of(name), content)


def ids_of(store: Store, name: str) -> set[bytes]:
    return {r.tobytes() for r in packs.read_footer(store.files, name)["id"]}


@pytest.mark.parametrize("grouped", [False, True])
def test_what_does_not_live_is_left_behind(tmp_path: Path, grouped: bool) -> None:
    world = world_of(tmp_path, KEY)
    with world.opened() as store:
        old = of_kind(store, f.KIND_DATA)
        if grouped:
            done = regroup(store, old)
            remove(store, old)
            old = done.made
    with world.opened() as store:
        newest = list(store.points())[-1]
        live = {chunk for chunk, who in needs(store).items() if any(p == newest.id for p, _ in who)} - {ZERO}

        def keep(_pack: str, rows: NDArray[np.void]) -> NDArray[np.bool_]:
            return np.array([r.tobytes() in live for r in rows["id"]], np.bool_)

        done = repack(store, old, keep)
        assert {i for n in done.made for i in ids_of(store, n)} == live
        remove(store, old)
    with world.opened() as store:
        world.check_point(store, newest)


@SECRETS
def test_a_damaged_record_is_named_and_not_copied(tmp_path: Path, secret: Secret | None) -> None:
    world = world_of(tmp_path, secret)
    with world.opened() as store:
        name = of_kind(store, f.KIND_DATA)[0]
        row = packs.read_footer(store.files, name)[0]
        flip(store.files.path(packs.path_of(name)), int(row["offset"]) + int(row["stored"]) - 20)
        store.files.forget(packs.path_of(name))
        done = regroup(store, [name], everything)
        assert [(n, o) for n, o, _ in done.damaged] == [(name, int(row["offset"]))]
        assert done.whole == []
        assert row["id"].tobytes() not in {i for n in done.made for i in ids_of(store, n)}
        assert not replaced(store, name, packs.read_footer(store.files, name), without=())


def test_one_of_two_equal_packs_has_to_stay(tmp_path: Path) -> None:
    world = world_of(tmp_path, None)
    with world.opened() as store:
        name = of_kind(store, f.KIND_DATA)[0]
        [copy] = repack(store, [name]).made
        rows = packs.read_footer(store.files, name)
        assert replaced(store, name, rows, without=())
        assert replaced(store, copy, rows, without=())
        assert not replaced(store, copy, rows, without={name})
