"""Immutable files on a real ext4, and the loud failure where a file system has none."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.config import Places
from hvbackup.errors import HvbackupError, UsageError
from hvbackup.files import Files
from hvbackup.service import parity, upkeep
from hvbackup.service.session import Session
from hvbackup.store.check.check import check
from hvbackup.store.format import pack as packs
from hvbackup.store.keep import forget
from hvbackup.store.reclaim import reclaim
from hvbackup.store.reclaim.reclaim import Options
from hvbackup.store.shelves import immutable, settings
from hvbackup.store.shelves.settings import Settings
from hvbackup.store.store import Store
from tests.endtoend.mounts import needs_mount, small_disk
from tests.world import World

pytestmark = [pytest.mark.real, needs_mount]
SEALED = Settings(trash_ns=0, immutable=True)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 of its own."""
    with small_disk(tmp_path, "ext4") as disk:
        yield disk.path
        subprocess.run(["chattr", "-R", "-f", "-i", str(disk.path)], timeout=120, check=False)


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that knows no flags."""
    place = tmp_path / "ramfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(place)], check=True, timeout=120)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=120)


def sealed(world: World, store: Store) -> None:
    immutable.change(store, on=True)
    settings.change(store, SEALED, world.clock(), by="test")


def test_nobody_changes_or_removes_what_was_written(ext4: Path) -> None:
    world = World(ext4).life(1)
    with world.opened() as store:
        sealed(world, store)
    with world.opened() as store:
        world.scribble()
        world.capture(store)
        assert immutable.missing(store) == []
        there = list(immutable.names(store))
        assert {name.split("/")[0] for name in there} == {"packs", "points", "runs", "settings"}
        for name in there:
            with pytest.raises(PermissionError):
                store.files.path(name).unlink()
            with pytest.raises(PermissionError):
                store.files.path(name).write_bytes(b"")
            with pytest.raises(PermissionError):
                store.files.path(name).rename(store.files.path("elsewhere"))
        assert check(store).problems == []
        world.check_all(store)


def test_forgetting_and_reclaiming_in_order_work(ext4: Path) -> None:
    world = World(ext4).life(3)
    with world.opened() as store:
        sealed(world, store)
        points = list(store.points())
        with forget.alone(store):
            forget.forget(store, [store.path_of(points[0])], SEALED, world.clock(), why="", by="")
        del world.oracle[points[0].id]
        done = reclaim.reclaim(store, Options(grace_ns=0, garbage_share=0.0, clock=world.clock))
        assert done.removed_packs > 0
    with world.opened() as store:
        assert immutable.missing(store) == []
        world.check_all(store)
        assert check(store).problems == []
        store.files.kernel.set_immutable(str(store.files.path(store.path_of(points[1]))), False)
        assert immutable.missing(store) == [store.path_of(points[1])]
        assert "is not immutable" in check(store).problems[0].what
        assert immutable.change(store, on=True) == 1
        immutable.change(store, on=False)
        settings.change(store, Settings(), world.clock(), by="test")
        assert not any(store.files.is_immutable(name) for name in immutable.names(store))


def test_immutable_packs_and_points_are_repaired_and_immutable_again(ext4: Path) -> None:
    world = World(ext4).life(2)
    session = Session(Places(world.store_path, world.state_path, ext4 / "configuration", ext4 / "run"))
    with world.opened() as store:
        sealed(world, store)
    parity.cover(session, lambda *_: None)
    with world.opened() as store:
        world.scribble()
        world.capture(store)
    assert parity.keep_covered(session) == []
    with world.opened() as store:
        assert immutable.missing(store) == []
        assert {name for name in immutable.names(store) if name.endswith(".parity")}
        files, point = store.files, store.path_of(next(store.points()))
        damaged = [*map(packs.path_of, packs.list_packs(files)), point]
        for name in damaged:
            flip(files, name)
    found = upkeep.check(session, upkeep.CheckOrder(upkeep.Level.DEEP, repair=True), lambda *_: None)
    assert found.report.problems == []
    assert len(found.repaired) >= len(damaged)
    with world.opened() as store:
        assert immutable.missing(store) == []
        world.check_all(store)
        with pytest.raises(PermissionError):
            store.files.path(point).unlink()


def flip(files: Files, name: str) -> None:
    """As a disk does it, which asks no flag."""
    path = files.path(name)
    files.kernel.set_immutable(str(path), False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    files.kernel.set_immutable(str(path), True)


def test_where_there_are_no_immutable_files_that_is_said_aloud(ramfs: Path, ext4: Path) -> None:
    world = World(ramfs).life(1)
    with world.opened() as store:
        with pytest.raises(UsageError, match="must know `chattr"):
            immutable.change(store, on=True)
        assert store.files.immutable == ()
        settings.change(store, SEALED, world.clock(), by="test")  # as in a store that was copied here
    with pytest.raises(HvbackupError, match="must know `chattr"):
        world.open()
    with world.opened(owner=False) as store:
        world.check_all(store)  # it can be read all the same
        assert len(immutable.missing(store)) == len(list(immutable.names(store)))
