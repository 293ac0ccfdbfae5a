"""Worlds for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.rig import World, make_disk

DISK_BYTES = 2_000_384


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A machine with hvbackup and without a store."""
    return World(tmp_path)


@pytest.fixture
def stored(world: World) -> World:
    """One with an encrypted store, and a point of the machine `web1` in it."""
    world.done("init")
    make_disk(world.folder / "disk.raw", DISK_BYTES)
    world.done("backup", f"image:{world.folder}/disk.raw", "--name", "web1")
    return world
