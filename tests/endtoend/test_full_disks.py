"""Disks that are really full: nothing that was promised is lost, the message names the place, and with room again all is well."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.model import KiB, MiB
from tests.cli.rig import make_disk
from tests.endtoend.mounts import SmallDisk, needs_mount, small_disk
from tests.endtoend.rig import Installed, Machine, files_below, short_folder
from tests.endtoend.servers import wait

pytestmark = [pytest.mark.real, needs_mount, pytest.mark.timeout(600)]

DISK_BYTES = 3 * MiB + 512
ROOMS = (0, 70 * KiB, 1000 * KiB, 2 * MiB)  # full at the lease, in a pack, at its end, at the point


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as found:
        yield found


def image(world: Installed, seed: int) -> tuple[str, bytes]:
    path = world.folder / "disk.raw"
    return f"image:{path}", make_disk(path, DISK_BYTES, seed=seed)


def points(world: Installed) -> list[str]:
    return [p["id"] for p in world.done("points", "--json").json["points"]]


def prove(world: Installed, point: str, content: bytes) -> None:
    to = world.folder / "proof.raw"
    ran = world.run("restore", "web", "--disk", "disk", "--at", point, "--to", to)
    assert ran.code == 0, ran
    assert ran.err == "" or "Nobody knows that the point is read" in ran.err, ran  # a full store takes no pin
    assert to.read_bytes() == content
    to.unlink()


@pytest.mark.parametrize("left", ROOMS)
def test_the_store_is_full(folder: Path, left: int) -> None:
    world = Installed(folder)
    with small_disk(folder, "s") as disk:
        world.environment["HVBACKUP_STORE"] = str(disk.path / "store")
        world.store = disk.path / "store"
        world.done("init")
        source, old = image(world, 1)
        world.done("backup", source, "--name", "web")
        before = points(world)
        _, new = image(world, 2)
        disk.fill(left)
        message = world.refused(1, "backup", source)
        assert str(world.store) in message
        assert "room" in message or "space" in message
        assert points(world) == before
        prove(world, before[0], old)
        disk.empty()
        world.run("backup", source)
        [_, last] = points(world)
        prove(world, last, new)
        prove(world, before[0], old)
        assert world.done("check", "--deep", "--json").json["ok"]
        assert not files_below(world.store / "tmp", world.store / "leases")


def test_the_store_can_only_be_read(folder: Path) -> None:
    """Recovery needs nothing else, not even with the state lost; writing says what is wrong."""
    world = Installed(folder)
    with small_disk(folder, "s") as disk:
        world.environment["HVBACKUP_STORE"] = str(disk.path / "store")
        world.store = disk.path / "store"
        world.done("init")
        source, content = image(world, 1)
        world.done("backup", source, "--name", "web")
        command = ["mount", "-o", "remount,ro", str(disk.path)]
        subprocess.run(command, check=True, timeout=120)
        assert "Read-only" in world.refused(1, "backup", source)
        shutil.rmtree(world.state)
        [point] = points(world)
        prove(world, point, content)
        assert world.done("check", "--deep", "--json").json["ok"]


@pytest.mark.parametrize("left", [0, 20 * KiB, 300 * KiB])
def test_the_state_is_full(folder: Path, left: int) -> None:
    """It is a cache: a capture may do without, or fail and say so; nothing is harmed."""
    world = Installed(folder)
    with small_disk(folder, "s") as disk:
        world.environment["HVBACKUP_STATE"] = str(disk.path / "state")
        world.state = disk.path / "state"
        world.done("init")
        source, old = image(world, 1)
        world.done("backup", source, "--name", "web")
        _, new = image(world, 2)
        disk.fill(left)
        ran = world.run("backup", source, "--json")
        assert "Traceback" not in ran.err
        assert ran.code in (0, 1), ran
        if ran.code:
            assert str(world.state) in ran.error
        listed = world.run("points", "--json")
        assert (listed.code, len(listed.json["points"])) == (0, 2 - ran.code), listed
        prove(world, listed.json["points"][0]["id"], old)
        disk.empty()
        world.run("backup", source)
        prove(world, points(world)[-1], new)
        assert world.done("check", "--deep", "--json").json["ok"]


def test_the_scratch_is_full_from_the_beginning(folder: Path) -> None:
    world = Installed(folder)
    world.done("init")
    with small_disk(folder, "state") as disk:
        machine = Machine(folder / "vm", random.Random(1))
        try:
            message = world.refused(1, "backup", machine.source)
            assert str(disk.path) in message
            assert not machine.daemon.leftovers()
            assert machine.checkpoints() == {"vda": [], "vdb": []}
            assert machine.guest.error is None
        finally:
            machine.close()
        assert points(world) == []


def test_the_scratch_runs_full_while_the_guest_writes(folder: Path) -> None:
    """The guest is let go before its own writes fail; the snapshot is given up, and the next run works."""
    world = Installed(folder)
    world.done("init")
    with small_disk(folder, "state", 400 * MiB) as disk:
        machine = Machine(folder / "vm", random.Random(1))
        try:
            world.done("backup", machine.source)
            disk.fill(258 * MiB)
            process = world.start("backup", machine.source, "--full", "--json")
            wait_for_snapshot(machine)
            process.send_signal(signal.SIGSTOP)
            scribble(machine, 6 * MiB)
            wait_until_let_go(machine)
            process.send_signal(signal.SIGCONT)
            out, err = process.communicate(timeout=60)
            assert process.returncode in (1, 4), (out, err)
            assert "ran full" in json.loads(out)["error"]["message"], out
            assert machine.guest.error is None, "the guest's own writes failed"
            assert len(points(world)) == 1
            disk.empty()
            assert world.run("backup", machine.source).code == 0
            assert not machine.daemon.leftovers()
            assert not files_below(world.state / "scratch")
        finally:
            machine.close()


def wait_for_snapshot(machine: Machine) -> None:
    wait(lambda: [s for s in job_states(machine) if s == "running"] == ["running"] * 2)


def wait_until_let_go(machine: Machine) -> None:
    wait(lambda: "running" not in job_states(machine))


def job_states(machine: Machine) -> list[str]:
    with machine.daemon.qmp() as qmp:
        return [job["status"] for job in qmp.command("query-jobs") if "-j" in job["id"]]


def scribble(machine: Machine, size: int) -> None:
    """A guest that writes much and quickly, beside the other one."""
    with machine.daemon.guest("vda") as client:
        for at in range(0, size, 64 * KiB):
            client.write(at, bytes([1]) * 64 * KiB)


@pytest.mark.parametrize("name", ["out.raw", "out.qcow2"])
def test_the_target_of_a_restore_is_full(folder: Path, name: str) -> None:
    world = Installed(folder)
    world.done("init")
    source, content = image(world, 1)
    world.done("backup", source, "--name", "web")
    with small_disk(folder, "t", 16 * MiB) as disk:
        disk.fill(1 * MiB)
        words = ("restore", "web", "--disk", "disk", "--to", disk.path / name)
        message = world.refused(1, *words)
        assert str(disk.path) in message
        assert not (disk.path / name).exists(), "a file of this name is a whole restore"
        disk.empty()
        world.done(*words, "--resume")
        raw = disk.path / name
        if name.endswith("qcow2"):
            raw = folder / "converted"
            command = ["qemu-img", "convert", "-O", "raw", str(disk.path / name), str(raw)]
            subprocess.run(command, check=True, timeout=120)
        assert raw.read_bytes()[: len(content)] == content
        assert len(content) <= raw.stat().st_size <= len(content) + 64 * KiB


def test_there_is_no_room_for_an_overlay(folder: Path) -> None:
    world = Installed(folder)
    with small_disk(folder, "state") as disk:
        world.done("init")
        source, _ = image(world, 1)
        world.done("backup", source, "--name", "web")
        disk.fill(0)
        ran = world.run("boot", "web", "--generic", "--name", "trial", "--json")
        assert ran.code == 1, ran
        assert str(disk.path) in ran.error
        assert world.done("discard", "--list", "--json").json["boots"] == []
        disk.empty()
        ran = world.run("boot", "web", "--generic", "--name", "trial", "--json")
        assert ran.code == 0, ran
        assert world.run("discard", "trial").code == 0


def test_there_is_no_room_for_a_key(folder: Path) -> None:
    world = Installed(folder)
    with small_disk(folder, "k") as disk:
        full(disk)
        key = disk.path / "my.key"
        assert str(disk.path) in world.refused(1, "init", "--key-file", key)
        assert not key.exists(), "half a key"
        assert not (world.store / "HVBACKUP").exists(), "a store without a key"
        world.environment["HVBACKUP_CONFIG"] = str(disk.path / "conf")
        assert str(disk.path) in world.refused(1, "init")
        assert not (world.store / "HVBACKUP").exists(), "a store without a key"
        disk.empty()
        world.done("init")
        source, _ = image(world, 1)
        world.done("backup", source)


def full(disk: SmallDisk) -> None:
    """Not even an empty file of one block."""
    disk.fill(0)
