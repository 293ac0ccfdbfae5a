"""check, parity and regroup as people run them: damage that heals from parity, from the live disk, from another store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import DISK_BYTES
from tests.cli.rig import World, make_disk


def data_pack(world: World) -> Path:
    """The largest: that of the blocks."""
    return max(world.store.glob("packs/*/*.pack"), key=lambda p: p.stat().st_size)


def spoil(path: Path, offset: int = 70_000, length: int = 9_000) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = bytes(length)
    path.write_bytes(data)


def restored(world: World) -> bytes:
    target = world.folder / "back.raw"
    target.unlink(missing_ok=True)
    world.done("restore", "web1", "--disk", "disk", "--to", target)
    return target.read_bytes()


def test_parity_mends_what_was_damaged(world: World) -> None:
    world.done("init", "--parity")
    content = make_disk(world.folder / "disk.raw", DISK_BYTES)
    world.done("backup", f"image:{world.folder}/disk.raw", "--name", "web1")
    packs = sorted(p.stem for p in world.store.glob("packs/*/*.pack"))
    assert sorted(p.stem for p in world.store.glob("packs/*/*.parity")) == packs
    spoil(data_pack(world))
    lost = world.run("check", "--deep", "--json")
    assert lost.code == 20
    [disk] = [p for p in lost.json["problems"] if p["kind"] == "disk"]
    assert (disk["machine"], disk["disk"]) == ("web1", "disk")
    assert disk["extents"]
    mended = world.done("check", "--deep", "--repair", "--json").json
    assert mended["ok"]
    assert len(mended["repaired"]) == 1
    assert "mended with its parity" in mended["repaired"][0]
    assert world.done("check", "--deep", "--json").json["ok"]
    assert restored(world) == content
    spoil(next(world.store.glob("packs/*/*.parity")), 10, 5)
    assert world.run("check", "--authenticate").code == 20
    assert world.done("check", "--authenticate", "--repair", "--json").json["ok"]
    assert world.done("parity", "--off", "--json").json == {"removed": len(packs)}
    assert not list(world.store.glob("packs/*/*.parity"))


def test_what_is_lost_is_stored_again_from_the_live_disk(stored: World) -> None:
    content = (stored.folder / "disk.raw").read_bytes()
    spoil(data_pack(stored))
    assert stored.run("check", "--authenticate").code == 20
    assert stored.run("restore", "web1", "--disk", "disk", "--to", stored.folder / "x.raw").code != 0
    again = stored.run("backup", f"image:{stored.folder}/disk.raw")
    assert (again.code, "lost chunks; it was read whole" in again.err) == (0, True)
    assert restored(stored) == content
    report = stored.run("check", "--deep", "--json").json
    assert not any(p["lost"] for p in report["problems"]), "the old point has its blocks again as well"


def test_what_is_lost_comes_back_from_another_store(stored: World) -> None:
    content = (stored.folder / "disk.raw").read_bytes()
    other = World(stored.folder / "elsewhere")
    other.folder.mkdir()
    other.environment["HVBACKUP_CONFIG"] = stored.environment["HVBACKUP_CONFIG"]
    other.done("init")
    other.done("backup", f"image:{stored.folder}/disk.raw", "--name", "web1")
    (stored.folder / "disk.raw").unlink()
    shutil.rmtree(data_pack(stored).parent)
    words = ("check", "--repair", "--from", other.store, "--json")
    assert "--repair" in stored.refused(2, *(w for w in words[:-1] if w != "--repair"))
    found = stored.done(*words).json
    assert found["ok"]
    assert "came back from" in found["repaired"][-1]
    assert restored(stored) == content


def test_samples_rates_and_debts(stored: World) -> None:
    first = stored.done("check", "--json").json
    assert first["debt_bytes"] == first["total_bytes"] > 0
    assert "not verified" in stored.done("status").out
    sampled = stored.done("check", "--sample", "1%", "--bandwidth", "500M", "--json").json
    assert (sampled["level"], sampled["ok"]) == ("deep", True)
    assert 0 < sampled["read_bytes"] < first["total_bytes"]
    point = json.loads(stored.done("points", "--json").out)["points"][0]["id"]
    assert stored.done("check", "--deep", "--point", point[:8], "--json").json["points"] == 1
    assert stored.done("check", "--deep", "--machine", "web1", "--json").json["read_bytes"] > 0
    done = stored.done("check", "--authenticate", "--resume", "--json").json
    assert done["debt_bytes"] == 0
    assert stored.done("status", "--json").json["store"]["debt_bytes"] == 0
    for bad in (
        ("--sample", "0%"),
        ("--sample", "x"),
        ("--point", "ffff"),
        ("--machine", "no"),
        ("--deep", "--authenticate"),
    ):
        assert stored.run("check", *bad).code == 2
    assert "whole store" in stored.refused(2, "check", "--deep", "--resume", "--machine", "web1")


@pytest.mark.parametrize("group", ["256K", "1M"])
def test_regrouping_changes_nothing_that_can_be_recovered(world: World, group: str) -> None:
    world.done("init")
    text = b"".join(b"line %d of a file that shrinks\n" % i for i in range(60_000))
    (world.folder / "disk.raw").write_bytes(text.ljust(2 << 20, b"\0"))
    world.done("backup", f"image:{world.folder}/disk.raw", "--name", "web1")
    assert world.done("regroup", "--json").json["packs"] == 0, "it is too young"
    done = world.done("regroup", "--older-than", "0d", "--group", group, "--json").json
    assert done["packs"] == 1
    assert done["new_bytes"] < done["old_bytes"]
    assert restored(world) == (world.folder / "disk.raw").read_bytes()
    assert world.done("check", "--deep", "--json").json["ok"]
