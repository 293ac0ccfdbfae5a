"""Restoring to real devices and images: what is in use, too small or read-only is refused by name; kills cost nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.rig import World, make_disk
from tests.hypervisors.imagerig import serves, wait_for
from tests.recover.test_qcow2 import compare

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has loop devices"),
]
SIZE = 60_000_256


def tool(*words: str | Path) -> str:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    return subprocess.run(
        [str(w) for w in words], env=environment, check=True, timeout=60, capture_output=True, text=True
    ).stdout.strip()


@contextmanager
def loop(path: Path, size: int, *options: str) -> Iterator[str]:
    """A block device of `size` bytes."""
    with path.open("ab") as file:
        file.truncate(size)
    device = tool("losetup", "--find", "--show", *options, path)
    try:
        yield device
    finally:
        tool("losetup", "--detach", device)


@pytest.fixture
def stored(tmp_path: Path) -> World:
    """Two points of one disk."""
    world = World(tmp_path)
    world.done("init")
    content = bytearray(make_disk(tmp_path / "disk.raw", SIZE))
    world.done("backup", f"image:{tmp_path}/disk.raw", "--name", "web1")
    rng = random.Random(5)
    for _ in range(40):
        at = rng.randrange(SIZE - 5000)
        content[at : at + 5000] = rng.randbytes(5000)
    (tmp_path / "older.raw").write_bytes((tmp_path / "disk.raw").read_bytes())
    (tmp_path / "disk.raw").write_bytes(content)
    world.done("backup", f"image:{tmp_path}/disk.raw", "--name", "web1")
    return world


def holds(world: World, path: str | Path) -> bool:
    """Whether a device or file begins with the disk."""
    with open(path, "rb") as file:
        return file.read(SIZE) == (world.folder / "disk.raw").read_bytes()


def restore(world: World, target: str | Path, *more: str) -> tuple[str | Path, ...]:
    return ("restore", "web1", "--disk", "disk", "--to", target, *more)


def test_a_device_is_written_whole_or_only_where_it_differs(stored: World) -> None:
    backing = stored.folder / "backing"
    backing.write_bytes(random.Random(9).randbytes(SIZE + 4096))
    with loop(backing, 64 << 20) as device:
        assert "--replace" in stored.refused(2, *restore(stored, device))
        whole = stored.done(*restore(stored, device, "--replace", "--json")).json["disks"][0]
        assert (whole["kept_bytes"], holds(stored, device)) == (0, True)
        tool("dd", f"if={stored.folder}/older.raw", f"of={device}", "conv=notrunc,fsync", "bs=1M")
        again = stored.done(*restore(stored, device, "--differential", "--json")).json["disks"][0]
        assert holds(stored, device)
        assert 0 < again["written_bytes"] < whole["written_bytes"] // 4
        assert again["kept_bytes"] == whole["written_bytes"] - again["written_bytes"]
        assert "were there already" in stored.done(*restore(stored, device, "--differential")).out


def test_devices_that_cannot_take_the_disk_are_refused_by_name(stored: World) -> None:
    with loop(stored.folder / "small", 32 << 20) as device:
        said = stored.refused(2, *restore(stored, device, "--replace"))
        assert said.startswith(f"{device} has {32 << 20} bytes, and the disk has {SIZE}")
        assert "takes a raw disk" in stored.refused(2, *restore(stored, device, "--replace", "--format", "qcow2"))
    with loop(stored.folder / "locked", 64 << 20, "--read-only") as device:
        assert stored.refused(2, *restore(stored, device, "--replace")).startswith(f"{device} is read-only")


@pytest.mark.parametrize("mode", ["--replace", "--differential", "--resume"])
def test_a_device_in_use_is_refused_by_name(stored: World, mode: str) -> None:
    with loop(stored.folder / "backing", 64 << 20) as device:
        tool("mkfs.ext4", "-q", device)
        mount = stored.folder / "mnt"
        mount.mkdir()
        tool("mount", device, mount)
        try:
            said = stored.refused(5, *restore(stored, device, mode))
            assert said.startswith(f"{device} is in use (mounted at {mount})")
        finally:
            tool("umount", mount)
        alone = opened_alone(device)
        try:
            assert "in use by another program" in stored.refused(5, *restore(stored, device, mode))
        finally:
            os.close(alone)


def opened_alone(device: str, seconds: float = 120) -> int:
    """Nobody else opens it; the file system was mounted a moment ago, and may be a moment longer in another mount namespace."""
    end = time.monotonic() + seconds
    while True:
        try:
            return os.open(device, os.O_RDWR | os.O_EXCL)
        except OSError:
            assert time.monotonic() < end, f"{device} stays in use"
            time.sleep(0.05)


def test_an_image_that_a_machine_or_a_loop_device_uses_is_refused_by_name(stored: World) -> None:
    target = stored.folder / "target.raw"
    with loop(target, SIZE) as device:
        said = stored.refused(5, *restore(stored, target, "--replace"))
        assert said.startswith(f"{target} is in use: {device} stands on it")
    socket = stored.folder / "nbd.sock"
    with subprocess.Popen(["qemu-nbd", "-f", "raw", "-t", "-k", str(socket), str(target)]) as server:
        wait_for(lambda: serves(socket))  # the socket is there before the image is open
        for mode in ("--replace", "--differential"):
            said = stored.refused(5, *restore(stored, target, mode))
            assert said.startswith(f"{target} is in use by a virtual machine")
        server.terminate()
    stored.done(*restore(stored, target, "--differential"))
    assert holds(stored, target)


def test_a_place_that_cannot_be_written_is_named(stored: World) -> None:
    there = stored.folder / "readonly"
    there.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "ro", "none", there)
    try:
        said = stored.refused(1, *restore(stored, there / "disk.raw"))
        assert f"{there}/disk.raw.partial: Read-only file system" in said
        assert f"{there}/new" in stored.refused(2, "restore", "web1", "--to", there / "new")
    finally:
        tool("umount", there)


def killed(world: World, rng: random.Random, *words: str | Path) -> bool:
    """Whether a restore was killed before it ended."""
    process = world.start(*words)
    try:
        process.communicate(timeout=0.3 + rng.random() * 0.7)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
        return True
    return False


@pytest.mark.parametrize("kind", ["raw", "device", "qcow2", "folder"])
def test_a_restore_that_is_killed_again_and_again_ends_whole(stored: World, kind: str) -> None:
    kill_until_whole(stored, kind, random.Random(kind), kills=3)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["raw", "device", "qcow2", "folder"])
def test_many_kills(stored: World, kind: str, seed: int) -> None:
    kill_until_whole(stored, kind, random.Random(seed), kills=8)


def kill_until_whole(stored: World, kind: str, rng: random.Random, kills: int) -> None:
    with loop(stored.folder / "backing", 64 << 20) as device:
        target = {"raw": stored.folder / "out.raw", "qcow2": stored.folder / "out.qcow2", "device": Path(device)}.get(
            kind
        )
        words = restore(stored, target) if target else ("restore", "web1", "--to", stored.folder / "out")
        first = ("--replace",) if kind == "device" else ()
        for number in range(kills):
            # --resume takes what there is, nothing too, and never what is whole.
            if not killed(stored, rng, *words, *(first if number == 0 else ("--resume",))):
                break
            if target and kind != "device" and target.exists():
                break  # it was whole already, as is seen below: only the last word was still to be said
        else:
            ran = stored.run(*words, "--resume", "--json")
            assert ran.code == 0, ran
            disk = json.loads(ran.out)["disks"][0]
            assert disk["kept_bytes"] + disk["written_bytes"] > SIZE // 2
        if kind == "qcow2":
            compare(stored.folder / "disk.raw", stored.folder / "out.qcow2")
        else:
            assert holds(stored, target or stored.folder / "out" / "disk.raw")
        assert not list(stored.folder.rglob("*.partial"))


def test_a_folder_of_disks_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Also when some of its disks are whole already."""
    world = World(tmp_path)
    world.done("init")
    contents = {name: make_disk(tmp_path / f"{name}.raw", 3_000_000, seed=i) for i, name in enumerate(("a", "b"))}
    world.done("backup", f"image:{tmp_path}/a.raw,{tmp_path}/b.raw", "--name", "web1")
    out = tmp_path / "out"
    words = ("restore", "web1", "--to", out)
    world.done(*words)
    assert "exists" in world.refused(2, *words, "--resume"), "what is whole is not overwritten without leave"
    names = sorted(p.name for p in out.glob("*.raw"))
    assert len(names) == 2
    (out / names[1]).rename(out / f"{names[1]}.partial")  # as a restore leaves it that was killed in the second disk
    (out / "machine.json").rename(out / "machine.json.partial")
    shown = world.done(*words, "--resume", "--json").json
    assert all(d["written_bytes"] == 0 for d in shown["disks"])
    assert sorted(p.read_bytes() for p in out.glob("*.raw")) == sorted(contents.values())
    assert not list(out.glob("*.partial"))
