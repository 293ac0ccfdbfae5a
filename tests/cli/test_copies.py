"""`copy` as a person types it: which points, into which store, and what a kill or a damaged chunk leaves."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.rig import World, make_disk

pytestmark = pytest.mark.real

SIZE = 3_000_000


@pytest.fixture
def stored(tmp_path: Path) -> World:
    """Two machines, three points."""
    world = World(tmp_path)
    world.done("init")
    for seed, name in enumerate(("web1", "db1", "web1")):
        make_disk(tmp_path / f"{name}.raw", SIZE, seed=seed)
        world.done("backup", f"image:{tmp_path}/{name}.raw", "--name", name)
    return world


def points(world: World, store: Path) -> list[str]:
    return [p["id"] for p in world.done("--store", store, "points", "--json").json["points"]]


@pytest.mark.parametrize("family", [True, False])
def test_the_newest_points_some_points_and_all_points(stored: World, family: bool) -> None:
    other = stored.folder / "other"
    stored.done("init", other, *(("--family-of", stored.store) if family else ()))
    ids = points(stored, stored.store)
    said = stored.done("copy", "--to", other, "--json").json
    assert (said["family"], [p["status"] for p in said["points"]]) == (family, ["copied", "copied"])
    assert all(p["figures"]["new_bytes"] > 0 for p in said["points"])
    rest = next(i for i in ids if i not in points(stored, other))
    assert "1 point copied" in stored.done("copy", "web1", "--points", rest[:8], "--to", other).out
    assert sorted(points(stored, other)) == sorted(ids)
    said = stored.done("copy", "--all", "--to", other, "--json").json
    assert [p["status"] for p in said["points"]] == ["there"] * 3
    stored.done("--store", other, "restore", "web1", "--disk", "web1", "--to", stored.folder / "out.raw")
    assert (stored.folder / "out.raw").read_bytes() == (stored.folder / "web1.raw").read_bytes()
    stored.done("--store", other, "check", "--deep")
    names = stored.done(
        "--store", other, "sql", "select kind, count(*) from runs group by kind order by kind", "--json"
    ).json
    assert ["copy", 3] in names["rows"]


def test_what_makes_no_sense_is_refused_by_name(stored: World) -> None:
    other = stored.folder / "other"
    assert f"No hvbackup store at {other}" in stored.refused(2, "copy", "--to", other)
    assert "is the store that is copied from" in stored.refused(2, "copy", "--to", stored.store)
    stored.done("init", other, "--block", "256K")
    assert "hvbackup init --block 64K" in stored.refused(2, "copy", "--to", other)
    third = stored.folder / "third"
    assert "equal blocks" in stored.refused(2, "init", third, "--family-of", stored.store, "--block", "256K")
    assert "all encrypted" in stored.refused(2, "init", third, "--family-of", stored.store, "--no-encryption")
    assert "--family-of" in stored.refused(2, "init", third, "--family-key-file", "x")
    stored.done("init", third)
    assert "did you mean web1?" in stored.refused(2, "copy", "wbe1", "--to", third)
    assert "no point abcdef" in stored.refused(2, "copy", "--points", "abcdef", "--to", third)
    assert "journals are not copied" in stored.refused(2, "copy", "--at", "seq:4", "--to", third)
    keys = list((stored.configuration / "keys").glob("*.key"))
    for path in keys:
        if path.read_text().count(str(third)):
            path.unlink()
    assert "its key is not here" in stored.refused(2, "copy", "--to", third)


def test_a_damaged_point_is_named_and_the_others_are_copied(stored: World) -> None:
    other = stored.folder / "other"
    stored.done("init", other, "--family-of", stored.store)
    packs = sorted((stored.store / "packs").glob("*/*.pack"), key=lambda p: p.stat().st_size)
    data = bytearray(packs[-1].read_bytes())
    data[len(data) // 2] ^= 1
    packs[-1].write_bytes(data)
    ran = stored.run("copy", "--all", "--to", other, "--json")
    assert ran.code in (3, 20)
    said = json.loads(ran.out)
    failed = [p for p in said["points"] if p["status"] == "failed"]
    assert len(failed) == 1
    assert failed[0]["error"]["exit_code"] == 20
    assert f"Point {failed[0]['point']['id']} of" in failed[0]["error"]["message"]
    assert len(points(stored, other)) == 2
    stored.done("--store", other, "check", "--deep")


@pytest.mark.parametrize("family", [True, False])
def test_a_copy_that_is_killed_again_and_again_ends_whole(tmp_path: Path, family: bool) -> None:
    world, other, rng = World(tmp_path), tmp_path / "other", random.Random(family)
    world.done("init")
    make_disk(tmp_path / "web1.raw", 40_000_000)
    world.done("backup", f"image:{tmp_path}/web1.raw", "--name", "web1")
    make_disk(tmp_path / "web1.raw", 40_000_000, seed=2)
    world.done("backup", f"image:{tmp_path}/web1.raw", "--name", "web1")
    world.done("init", other, *(("--family-of", world.store) if family else ()))
    for _ in range(4):
        process = world.start("copy", "--all", "--to", other)
        try:
            process.communicate(timeout=0.3 + rng.random() * 0.8)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=120)
        world.done("--store", other, "check", "--deep")
    world.done("copy", "--all", "--to", other)
    assert points(world, other) == points(world, world.store)
    world.done("--store", other, "restore", "web1", "--disk", "web1", "--to", tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == (tmp_path / "web1.raw").read_bytes()
    assert not list((other / "leases").glob("*"))
    assert not list((other / "tmp").glob("*"))
