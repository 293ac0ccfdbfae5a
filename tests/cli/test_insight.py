"""`stats` and `size` as a person types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.rig import World, make_disk

pytestmark = pytest.mark.real


def test_what_machines_cost_and_what_a_policy_needs(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.done("init")
    make_disk(tmp_path / "web1.raw", 3_000_000)
    world.done("backup", f"image:{tmp_path}/web1.raw", "--name", "web1")
    assert "web1 has been captured once at most" in world.refused(2, "size", "--keep-daily", "30")
    make_disk(tmp_path / "web1.raw", 3_000_000, seed=2)
    world.done("backup", f"image:{tmp_path}/web1.raw", "--name", "web1")
    [machine] = world.done("stats", "--json").json["machines"]
    assert (machine["points"], machine["size_bytes"]) == (2, 3_000_000)
    assert machine["changed_bytes_per_day"] > 2_000_000
    assert "full on" in world.done("stats", "web1").out or "lifetime" in world.done("stats", "web1").out
    shown = world.done("size", "--keep-daily", "30", "--every", "1d", "--json").json
    [need] = shown["machines"]
    assert need["points"] == 30
    assert shown["total_bytes"] == need["total_bytes"] >= 1.1 * (need["base_bytes"] + need["points_bytes"]) - 1
    assert shown["fits"] is (shown["total_bytes"] <= shown["used_bytes"] + shown["free_bytes"])
    ran = world.run("size", "--keep-daily", "30", "--every", "1d", "--window", "24h")
    assert ran.code == 0
    assert "In total" in ran.out
    assert "has no journal to measure" in ran.err
    assert "for ever" in world.refused(2, "size", "--keep-daily", "all")
    assert "No rule" in world.refused(2, "size")
    assert "--days" in world.refused(2, "stats", "--days", "0")
    assert "did you mean web1?" in world.refused(2, "stats", "wbe1")
