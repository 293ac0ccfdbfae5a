"""Drills: a recovery is rehearsed through the pipeline of restores, and what came of it is told; and what counts as odd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvbackup.model import SECOND, MiB
from hvbackup.recover.drill import holds
from hvbackup.service.oddities import Oddities, rise
from hvbackup.store.store import Store
from tests.cli.rig import World, make_disk

SIZE = 5 * MiB
HOUR = 3600 * SECOND


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.run("init", "--no-encryption")
    make_disk(tmp_path / "a.raw", SIZE)
    made.done("backup", f"image:{tmp_path / 'a.raw'}", "--name", "web1")
    return made


def told(world: World) -> Oddities:
    return Oddities(Store.open(world.folder / "store", world.state, []))


def machine(world: World) -> str:
    return str(world.run("points", "--json").json["points"][0]["machine"]["id"])


def files(world: World) -> set[Path]:
    return {p for p in world.folder.rglob("*") if p.is_file() and not {"runs", "state"} & set(p.parts)}


def test_a_drill_reads_everything_and_keeps_nothing(world: World) -> None:
    before = files(world)
    done = world.done("drill", "web1", "--json").json
    [disk] = done["disks"]
    assert done["ok"]
    assert disk["error"] is None
    restored = world.done("restore", "web1", "--to", world.folder / "out", "--json").json["disks"][0]
    assert disk["read_bytes"] == restored["written_bytes"] > 0
    after = files(world)
    assert {p for p in after - before if "out" not in p.parts} == set()
    [drill], odd = told(world).of(machine(world))
    assert (drill.at, drill.error) == (done["at"], "")
    assert odd == []


def test_a_drill_finds_what_a_restore_would_stumble_over(world: World) -> None:
    [largest] = sorted((world.folder / "store/packs").rglob("*.pack"), key=lambda p: p.stat().st_size)[-1:]
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.chmod(0o600)
    largest.write_bytes(data)
    ran = world.run("drill", "web1", "--json")
    assert ran.code == 20
    assert json.loads(ran.out.splitlines()[0])["ok"] is False
    [drill], _ = told(world).of(machine(world))
    assert "chunk" in drill.error.lower()


def test_records_are_read_once_and_then_only_new_ones(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(world)
    assert found.of(machine(world)) == ([], [])
    read: list[str] = []
    one = found.store.runs._one
    monkeypatch.setattr(found.store.runs, "_one", lambda path: read.append(path) or one(path))
    world.done("drill", "web1", "--at", "latest")
    drills, _ = found.of(machine(world))
    assert len(drills) == len(read) == 1


def test_a_rise_is_what_is_out_of_the_ordinary() -> None:
    usual = [(n * HOUR, 20 * MiB) for n in range(12)]
    assert rise(usual) is None
    odd = rise([*usual, (12 * HOUR, 900 * MiB)])
    assert odd is not None
    assert (odd.kind, odd.t) == ("change", 12 * HOUR)
    assert "45 times" in odd.text
    assert rise([*usual, (12 * HOUR, 150 * MiB)]) is None, "a busy hour"
    assert rise([*usual, (60 * HOUR, 900 * MiB)]) is None, "after two days without a capture"
    assert rise([*usual[:5], (5 * HOUR, 900 * MiB)]) is None, "nobody knows yet what is usual"
    assert rise([*((t, 1024) for t, _ in usual), (12 * HOUR, 40 * MiB)]) is None, "little is no reason"


@pytest.mark.parametrize(
    ("at", "mark", "what"),
    [(512, b"EFI PART", "GPT"), (1080, b"\x53\xef", "ext"), (3, b"NTFS    ", "NTFS"), (0, b"", "")],
)
def test_what_a_disk_begins_with(at: int, mark: bytes, what: str) -> None:
    head = bytearray(4096)
    head[at : at + len(mark)] = mark
    assert holds(bytes(head)) == what
    assert holds(b"") == ""
