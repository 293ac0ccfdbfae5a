"""prune, forget, hold, approve and settings, as people and programs meet them."""

from __future__ import annotations

import json
import shutil
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvbackup.store.reclaim.reserve import RESERVE_BYTES
from tests.cli.rig import World, make_disk


@pytest.fixture
def three(world: World) -> tuple[World, list[str]]:
    """A store with three points of a machine called vm, and their ids, oldest first."""
    world.done("init", world.store)
    ids = []
    for seed in range(3):
        make_disk(world.folder / "vm.raw", 300_000, seed=seed)
        tags = ["--tag", "gold"] if seed == 0 else []
        run = world.done("backup", f"image:{world.folder / 'vm.raw'}", "--name", "vm", "--json", *tags).json
        ids.append(run["runs"][0]["point"]["id"])
    return world, ids


def there(world: World) -> list[str]:
    return [p["id"] for p in world.done("points", "--json").json["points"]]


def test_a_dry_run_says_what_would_go_and_why_and_does_nothing(three: tuple[World, list[str]]) -> None:
    world, ids = three
    ran = world.done("prune", "--keep-last", "1", "--keep-tag", "gold", "--dry-run", "--zone", "Europe/Berlin")
    lines = {i: line for i in ids for line in ran.out.splitlines() if i in line}
    assert lines[ids[0]].split(ids[0])[1].split() == ["keep", "tag", "gold"]
    assert lines[ids[1]].split(ids[1])[1].split() == ["forget", "no", "rule", "keeps", "it"]
    assert lines[ids[2]].endswith("keep    the newest point, last 1/1")
    [plan] = world.done("prune", "vm", "--keep-last", "1", "--dry-run", "--json").json["plans"]
    assert [(p["id"], p["keep"]) for p in plan["points"]] == [(ids[2], True), (ids[1], False), (ids[0], False)]
    assert there(world) == ids


def test_prune_forgets_and_forget_undo_has_back(three: tuple[World, list[str]]) -> None:
    world, ids = three
    zone = "Etc/GMT+12" if datetime.now(UTC).hour in (23, 0) else "UTC"  # the three are of one day there
    done = world.done("prune", "--keep-daily", "7", "--count", "proxmox", "--zone", zone, "--json").json
    assert sorted(done["forgotten"]["points"]) == sorted(ids[:2])
    assert there(world) == ids[2:]
    assert "2 points" not in world.done("check").out.replace("1 point", "")
    assert {t["id"] for t in world.done("forget", "--list", "--json").json["trash"]} == set(ids[:2])
    assert "back" in world.done("forget", "--undo", ids[0]).out
    assert there(world) == [ids[0], ids[2]]
    world.done("check")
    world.done("restore", "vm", "--at", "tag:gold", "--to", world.folder / "out")
    assert world.done("prune", "--keep-last", "2", "--json").json["forgotten"]["points"] == []


def test_forget_by_id_spares_the_newest_unless_told(three: tuple[World, list[str]]) -> None:
    world, ids = three
    world.done("forget", ids[1][:8])
    assert there(world) == [ids[0], ids[2]]
    assert "--even-newest" in world.refused(2, "forget", ids[2])
    world.done("forget", ids[2], ids[0], "--even-newest")
    assert there(world) == []
    world.done("check")
    assert "--keep-daily" in world.refused(2, "prune")
    assert "No point" in world.refused(2, "forget", "ffffffff")
    assert "too short" in world.refused(2, "forget", "ff")
    assert "no number of points" in world.refused(2, "prune", "--keep-last", "many")
    assert "time zone" in world.refused(2, "prune", "--keep-last", "1", "--zone", "Mars/Base")
    assert "mo or min" in world.refused(2, "prune", "--keep-within", "3m")


def test_holds_keep_points_until_they_are_released(three: tuple[World, list[str]]) -> None:
    world, ids = three
    [made] = world.done("hold", ids[0], "--until", "2127-01-01", "--why", "the auditors", "--json").json["holds"]
    assert made["point"] == ids[0]
    assert made["until"].startswith("2127-01-01T")
    assert "the auditors" in world.refused(2, "forget", ids[0])
    assert world.done("prune", "--keep-last", "1", "--json").json["forgotten"]["points"] == [ids[1]]
    assert "No point" in world.refused(2, "hold", ids[1]), "it is in the trash"
    shown = world.done("holds").out
    assert made["id"] in shown
    assert "the auditors" in shown
    assert "in the past" in world.refused(2, "hold", ids[0], "--until", "2001-01-01")
    world.done("release", made["id"])
    assert world.done("holds", "--json").json == {"holds": [], "pins": [], "requests": []}
    world.done("forget", ids[0])
    world.done("check")
    assert "No hold" in world.refused(2, "release", made["id"])


def test_what_is_mapped_is_pinned_and_stays(three: tuple[World, list[str]]) -> None:
    world, ids = three
    process = world.start("map", "vm", "--at", ids[0], "--socket", world.folder / "s.sock", "--json")
    assert process.stdout
    process.stdout.readline()
    [pin] = world.done("holds", "--json").json["pins"]
    assert pin["points"] == [ids[0]]
    assert f"process {process.pid}" in pin["what"]
    assert world.done("prune", "--keep-last", "1", "--json").json["forgotten"]["points"] == [ids[1]]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert world.done("holds", "--json").json["pins"] == []
    assert world.done("prune", "--keep-last", "1", "--json").json["forgotten"]["points"] == [ids[0]]


def test_young_points_stay_where_the_store_asks_for_an_age(three: tuple[World, list[str]]) -> None:
    world, ids = three
    world.done("settings", "--min-age", "14d", "--trash", "48h")
    assert world.done("settings", "--json").json["settings"] == {
        "min_age_seconds": 14 * 86400, "trash_seconds": 48 * 3600, "two_person": False, "immutable": False,
    }  # fmt: skip
    assert "minimum age (14 days)" in world.refused(2, "forget", ids[0])
    assert world.done("prune", "--keep-last", "1", "--json").json["forgotten"]["points"] == []
    newest = sorted((world.store / "settings").iterdir())[-1]
    kept = newest.read_bytes()
    newest.unlink()
    assert "settings/00000000" in world.run("check").out, "an older setting must not come back unnoticed"
    newest.write_bytes(kept)
    world.done("check")


def test_two_operators_have_to_agree(three: tuple[World, list[str]], tmp_path: Path) -> None:
    world, ids = three
    other = world.folder / "other.key"
    world.done("key", "add", "--new-key-file", other, "--label", "second operator")
    world.done("settings", "--two-person", "on")
    request = world.done("prune", "--keep-last", "1", "--json").json["request"]
    assert there(world) == ids, "nothing is forgotten by one alone"
    assert "somebody else has to approve" in world.refused(2, "approve", request["id"])
    assert "No request" in world.refused(2, "approve", "0123456789abcdef")
    done = world.done("approve", request["id"], "--key-file", other, "--json").json
    assert sorted(done["forgotten"]["points"]) == sorted(ids[:2])
    assert there(world) == ids[2:]
    assert "No request" in world.refused(2, "approve", request["id"], "--key-file", other)
    [held] = world.done("hold", ids[2], "--json").json["holds"]
    asked = world.done("release", held["id"], "--json").json["request"]
    assert len(world.done("holds", "--json").json["holds"]) == 1
    world.done("approve", asked["id"], "--key-file", other)
    assert world.done("holds", "--json").json["holds"] == []
    off = world.done("settings", "--two-person", "off", "--json").json
    assert off["settings"]["two_person"]
    assert not world.done("settings", "--min-age", "1d", "--json").json["request"], "stricter is free"
    world.done("approve", off["request"]["id"], "--key-file", other)
    assert not world.done("settings", "--json").json["settings"]["two_person"]
    world.done("check")


def test_reclaim_frees_what_nobody_needs(three: tuple[World, list[str]]) -> None:
    world, ids = three
    assert (world.store / "reserve").stat().st_size == RESERVE_BYTES
    empty = world.done("reclaim", "--dry-run", "--json").json
    assert (empty["live"], empty["dead_packs"]) == (empty["total"], 0)
    world.done("prune", "--keep-last", "1")
    assert world.done("reclaim", "--json").json["removed_packs"] == 0, "it is in the trash"
    done = world.done("reclaim", "--empty-trash", "--json").json
    assert sorted(done["emptied"]) == sorted(ids[:2])
    assert done["condemned_packs"] > 0
    assert done["until"]
    assert done["removed_packs"] == 0
    said = world.done("reclaim", "--grace", "0", "--rate", "100M").out
    assert "freed, in" in said
    assert world.done("reclaim", "--dry-run", "--json").json["dead_packs"] == 0
    world.done("check", "--deep")
    world.done("restore", "vm", "--to", world.folder / "out")
    assert (world.folder / "out" / "vm.raw").read_bytes() == (world.folder / "vm.raw").read_bytes()
    assert "from 0 to 100" in world.refused(2, "reclaim", "--garbage", "101")


def test_a_store_may_be_born_with_a_minimum_age(world: World) -> None:
    world.done("init", "--min-age", "2w")
    assert world.done("settings", "--json").json["settings"]["min_age_seconds"] == 14 * 86400


def test_who_did_what_is_written_down_and_an_old_copy_of_the_store_is_noticed(three: tuple[World, list[str]]) -> None:
    world, ids = three
    shutil.copytree(world.store, world.folder / "old")
    shutil.copytree(world.state, world.folder / "old-state")
    world.done("hold", ids[0], "--why", "audit")
    world.done("forget", ids[1], "--why", "not needed")
    records = world.done("audit", "list", "--json").json["records"]
    assert [r["kind"] for r in records] == ["hold", "forget"]
    assert records[1]["forgotten"][0].endswith(ids[1])
    assert "@" in records[1]["by"]
    assert "not needed" in json.dumps(records[1])
    assert len(world.done("audit", "list", "--all", "--json").json["records"]) == 5
    assert "Every record is there" in world.done("audit", "verify").out
    away = world.folder / "usb" / "heads"
    world.done("audit", "keep", "--to", away)
    world.done("audit", "keep")
    world.done("hold", ids[2])  # renews what the configuration directory keeps
    assert world.done("audit", "verify", "--head", away, "--json").json["heads"] == 2
    shutil.rmtree(world.store)
    shutil.rmtree(world.state)
    shutil.copytree(world.folder / "old", world.store)
    shutil.copytree(world.folder / "old-state", world.state)
    ran = world.run("audit", "verify", "--head", away)
    assert (ran.code, "put back from an older copy" in ran.out) == (20, True)
    ran = world.run("check")
    assert ran.code == 20
    assert "put back from an older copy" in ran.out
    assert "is in doubt" in world.refused(20, "reclaim")
    next(world.configuration.glob("heads/*")).write_text("{}")
    assert "no file of heads" in world.run("check").out
    world.done("points")
    assert "can't be read" in world.refused(2, "audit", "verify", "--head", world.folder / "nothing")
