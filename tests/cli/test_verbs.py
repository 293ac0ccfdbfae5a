"""Every verb does what it says, in text and in JSON."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from hvbackup.model import MiB
from tests.cli.rig import World, dead, make_disk
from tests.hypervisors.daemon import Daemon, make_image


def test_a_store_is_made_with_a_key_outside_of_the_state(world: World) -> None:
    made = world.done("init", "--json").json
    key = Path(made["key_file"])
    assert key == world.configuration / "keys" / f"{made['store']['id']}.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert made["store"] == {"path": str(world.store), "id": key.stem, "block_bytes": 65536, "encrypted": True}
    assert not world.state.exists() or not [
        p for p in world.state.rglob("*") if p.is_file() and b"HVB1" in p.read_bytes()
    ]


def test_what_to_do_with_the_key_is_said(world: World) -> None:
    said = world.done("init", world.store, "--block", "256K").out
    assert str(world.key_file) in said
    assert "Copy that file to a safe place" in said


def test_a_store_without_encryption_is_said_aloud(world: World) -> None:
    ran = world.run("init", "--no-encryption")
    assert ran.code == 0
    assert "NOT encrypted" in ran.err
    assert not world.configuration.exists()
    assert world.run("init", world.folder / "two", "--no-encryption", "--strict").code == 3


def test_the_whole_way_from_a_disk_to_its_restored_bytes(world: World) -> None:
    world.done("init")
    first = make_disk(world.folder / "disk.raw", 1_000_448)
    source = f"image:{world.folder}/disk.raw"
    run = world.done("backup", source, "--name", "web1", "--json").json["runs"][0]
    assert run["status"] == "ok"
    assert run["point"]["machine"]["name"] == "web1"
    assert run["point"]["disks"][0]["how"] == "full"
    second = make_disk(world.folder / "disk.raw", 1_000_448, seed=2)
    world.done("backup", source)

    points = world.done("points", "web1", "--json").json["points"]
    assert [p["machine"]["name"] for p in points] == ["web1", "web1"], "a name once given stays"
    assert [p["size_bytes"] for p in points] == [1_000_448] * 2
    for point, content in zip(points, (first, second), strict=True):
        target = world.folder / f"{point['id']}.img"
        world.done("restore", "web1", "--at", point["id"][:10], "--disk", "disk", "--to", target)
        assert target.read_bytes() == content
    seconds = points[0]["time"][:19].replace("T", " ")
    if points[1]["time"][:19] != points[0]["time"][:19]:
        answer = world.done("restore", "web1", "--at", seconds, "--to", world.folder / "out", "--json").json
        assert answer["point"]["id"] == points[0]["id"], "what `points` prints finds its point"


def test_a_restored_folder_has_the_disks_and_their_machine(stored: World) -> None:
    shown = stored.done("restore", "web1", "--to", stored.folder / "out", "--json").json
    assert sorted(p.name for p in (stored.folder / "out").iterdir()) == ["disk.raw", "machine.json"]
    assert (stored.folder / "out/disk.raw").read_bytes() == (stored.folder / "disk.raw").read_bytes()
    described = json.loads((stored.folder / "out/machine.json").read_text())
    assert described["point"] == shown["point"]["id"]
    assert described["disks"] == [{"id": "disk", "file": "disk.raw", "format": "raw"}]


def test_nothing_is_overwritten_without_leave(stored: World) -> None:
    target = stored.folder / "x.raw"
    target.write_text("mine")
    words = ("restore", "web1", "--disk", "disk", "--to", target)
    assert "--replace" in stored.refused(2, *words)
    assert target.read_text() == "mine"
    stored.done(*words, "--replace")
    assert target.read_bytes() == (stored.folder / "disk.raw").read_bytes()


def test_several_sources_fail_one_by_one(stored: World) -> None:
    good, bad = f"image:{stored.folder}/disk.raw", f"image:{stored.folder}/gone.raw"
    ran = stored.run("backup", good, bad, "--json")
    assert ran.code == 3
    assert ran.json["status"] == "partly"
    assert [r["status"] for r in ran.json["runs"]] == ["ok", "failed"]
    assert ran.json["runs"][1]["error"]["kind"] == "NotFound"
    assert stored.run("backup", bad, bad).code == 2


def test_a_dry_run_makes_nothing(stored: World) -> None:
    before = sorted(stored.store.rglob("*"))
    plan = stored.done("backup", "--dry-run", f"image:{stored.folder}/disk.raw", "--json").json
    assert plan["status"] == "planned"
    assert plan["runs"][0]["newest"]["machine"]["name"] == "web1"
    assert sorted(stored.store.rglob("*")) == before


def test_a_chosen_disk_is_captured_alone(world: World) -> None:
    world.done("init")
    for name in ("a", "b"):
        make_disk(world.folder / f"{name}.raw", 200_192)
    source = f"image:{world.folder}/a.raw,{world.folder}/b.raw"
    assert "It has: a, b" in world.refused(2, "backup", source, "--disk", "c")
    ran = world.run("backup", source, "--disk", "b", "--json")
    assert ran.code == 0
    assert [d["id"] for d in ran.json["runs"][0]["point"]["disks"]] == ["b"]
    assert "Disk a was left out" in ran.err


def test_status_tells_of_machines_and_the_store(stored: World) -> None:
    shown = stored.done("status", "--json").json
    assert shown["machines"][0]["name"] == "web1"
    assert shown["machines"][0]["points"] == 1
    assert 0 <= shown["machines"][0]["age_seconds"] < 600
    assert shown["store"]["cipher"] == "aes-256-gcm"
    assert shown["store"]["used_bytes"] > 1_000_000
    assert shown["leases"] == []
    assert "web1" in stored.done("status").out


def test_sql_asks_the_index(stored: World) -> None:
    answer = stored.done("sql", "select name, size from points", "--json").json
    assert answer == {"columns": ["name", "size"], "rows": [["web1", 2_000_384]], "notes": []}
    assert "read-only" in stored.refused(2, "sql", "drop table points")


def test_check_is_silent_about_a_good_store_and_names_damage(stored: World) -> None:
    assert stored.done("check", "--deep", "--json").json["ok"] is True
    biggest = max((stored.store / "packs").rglob("*.pack"), key=lambda p: p.stat().st_size)
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(data)
    ran = stored.run("check", "--deep", "--json")
    shown = json.loads(ran.out)
    assert ran.code == 20
    assert shown["ok"] is False
    assert any(p["lost"] and "web1" in p["what"] for p in shown["problems"])


@pytest.mark.real
def test_a_map_serves_until_it_is_told_to_end(stored: World) -> None:
    process = stored.start("map", "web1", "--json")
    assert process.stdout is not None
    shown = json.loads(process.stdout.readline())
    [disk] = shown["disks"]
    found = subprocess.run(["nbdinfo", "--size", disk["uri"]], capture_output=True, text=True, timeout=120, check=True)
    assert int(found.stdout) == disk["size_bytes"] == 2_000_384
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert not Path(disk["uri"].partition("socket=")[2]).exists()


@pytest.mark.real
def test_a_booted_machine_is_listed_and_discarded(stored: World) -> None:
    booted = stored.run("boot", "web1", "--name", "trial", "--memory", "64M", "--json")
    assert booted.code == 0, booted
    try:
        assert booted.json["state"] == "running"
        assert [b["name"] for b in stored.done("discard", "--list", "--json").json["boots"]] == ["trial"]
        assert [b["name"] for b in stored.done("status", "--json").json["boots"]] == ["trial"]
        assert "did you mean trial?" in stored.refused(2, "discard", "trail")
    finally:
        stored.done("discard", "trial")
    for pid in booted.json["processes"].values():
        assert dead(pid)


def test_an_answer_that_cannot_be_written_is_a_failure(stored: World) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            stored.command("points"),
            env=stored.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (ran.returncode, ran.stderr) == (1, b"hvbackup: error: Cannot write the answer: No space left on device\n")


def test_points_are_listed_from_the_newest_on_and_no_others_are_read(stored: World) -> None:
    """A list that grows for years costs what is shown of it."""
    source = f"image:{stored.folder}/disk.raw"
    for name in ("web1", "db1", "web1", "db1"):
        make_disk(stored.folder / f"{name}.raw", 65536)
        stored.done("backup", source if name == "web1" else f"image:{stored.folder}/db1.raw", "--name", name)
    every = stored.done("points", "--last", "all", "--json").json
    assert (len(every["points"]), every["total"]) == (5, 5)
    times = sorted(p["time"] for p in every["points"])
    oldest = next(p["id"] for p in every["points"] if p["time"] == times[0])
    [path] = [p for p in (stored.store / "points").rglob("*") if p.name.endswith(oldest)]
    path.write_bytes(b"")
    few = stored.done("points", "--last", "3", "--json").json
    assert [p["machine"]["name"] for p in few["points"]] == ["db1", "db1", "web1"], "by machine, as ever"
    assert sorted(p["time"] for p in few["points"]) == times[-3:]
    assert (few["total"], few["notes"]) == (5, []), "what is not shown is not read either"
    assert "and 2 older points" in stored.done("points", "--last", "3").out
    one = stored.done("points", "web1", "--last", "1", "--json").json
    assert (len(one["points"]), one["total"]) == (1, 3)
    ran = stored.run("points")
    assert "older point" not in ran.out, "one that can't be read is no older one"
    assert "can't be read" in ran.err or path.name in ran.err
    for wrong in ("0", "-1", "some"):
        assert "is no number of points" in stored.refused(2, "points", f"--last={wrong}")


def test_names_are_shown_whatever_they_hold(stored: World) -> None:
    nasty = "w\x1b[31mé☃"
    stored.done("backup", f"image:{stored.folder}/disk.raw", "--name", nasty)
    assert stored.done("points", "--json").json["points"][1]["machine"]["name"] == nasty
    shown = stored.done("points").out
    assert "w?[31mé☃" in shown
    plain = stored.done("points", PYTHONIOENCODING="ascii").out
    assert "\\u2603" in plain


def test_an_answer_nobody_reads_is_no_failure(stored: World) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        stored.command("points"), env=stored.environment, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_a_benchmark_measures_every_step_and_leaves_nothing(world: World) -> None:
    shown = world.done("benchmark", "--in", world.folder / "here", "--size", "16M", "--json").json
    assert [s["name"] for s in shown["ceilings"]] == ["hash", "compress", "encrypt", "decompress", "write", "read"]
    assert [s["name"] for s in shown["pipeline"]] == ["backup", "again", "restore"]
    assert all(s["bytes_per_second"] > 0 for s in shown["ceilings"] + shown["pipeline"])
    assert 0.2 < shown["compressed_share"] < 0.7
    assert list((world.folder / "here").iterdir()) == []


@pytest.mark.real
def test_a_running_machine_is_captured_by_its_changes(world: World) -> None:
    image = make_image(world.folder / "vda.qcow2", 64 * MiB)
    node = {"driver": "qcow2", "node-name": "vda", "file": {"driver": "file", "filename": str(image)}}
    world.done("init")
    daemon = Daemon(world.folder, [node]).start()
    try:
        runs = []
        for n in range(3):
            write = f"write -P {n + 1} {n}M 1M"
            guest = f"nbd+unix:///vda?socket={world.folder}/guest.sock"
            subprocess.run(
                ["qemu-io", "-f", "raw", "-c", write, guest], stdout=subprocess.DEVNULL, timeout=120, check=True
            )
            runs += world.done("backup", f"qemu:{daemon.qmp_path}", "--name", "web1", "--json").json["runs"]
    finally:
        daemon.stop()
    assert [r["point"]["disks"][0]["how"] for r in runs] == ["full", "incremental", "incremental"]
    assert runs[2]["figures"]["read_bytes"] == MiB
    assert list((world.state / "scratch").iterdir()) == []
    at = runs[1]["point"]["id"]
    world.done("restore", "web1", "--at", at, "--disk", "vda", "--to", world.folder / "out.raw")
    content = (world.folder / "out.raw").read_bytes()
    assert content == b"\1" * MiB + b"\2" * MiB + bytes(62 * MiB)
