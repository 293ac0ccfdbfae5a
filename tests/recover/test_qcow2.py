"""Restoring to qcow2: the image equals the disk, as qemu-img sees it, and an interrupted restore goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.rig import PRIVATE_MOUNTS, World, make_disk

pytestmark = pytest.mark.real


def compare(raw: Path, image: Path) -> None:
    command = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(image)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    subprocess.run(["qemu-img", "check", "-q", str(image)], timeout=60, check=True)


@pytest.fixture
def stored(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.done("init")
    make_disk(tmp_path / "disk.raw", 96_000_512)
    world.done("backup", f"image:{tmp_path}/disk.raw", "--name", "web1")
    return world


def test_the_image_equals_the_disk_and_is_sparse(stored: World) -> None:
    target = stored.folder / "disk.qcow2"
    shown = stored.done("restore", "web1", "--disk", "disk", "--to", target, "--json").json
    assert shown["disks"][0]["format"] == "qcow2"
    compare(stored.folder / "disk.raw", target)
    assert target.stat().st_size < 70_000_000
    assert target.stat().st_mode & 0o777 == 0o600
    assert "exists" in stored.refused(2, "restore", "web1", "--disk", "disk", "--to", target)


def test_a_restore_that_was_killed_goes_on(stored: World) -> None:
    target = stored.folder / "disk.qcow2"
    partial = target.with_name("disk.qcow2.partial")
    words = ("restore", "web1", "--disk", "disk", "--to", target)
    process = stored.start(*words)
    end = time.monotonic() + 120
    while not partial.exists() or partial.stat().st_size < 20_000_000:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert not target.exists()
    assert "--resume" in stored.refused(2, *words)
    shown = json.loads(stored.run(*words, "--resume", "--json").out)
    assert shown["disks"][0]["kept_bytes"] > 10_000_000
    compare(stored.folder / "disk.raw", target)
    assert not partial.exists()


def test_something_else_in_the_way_is_named(stored: World) -> None:
    target = stored.folder / "disk.qcow2"
    target.with_name("disk.qcow2.partial").write_text("no image")
    words = ("restore", "web1", "--disk", "disk", "--to", target)
    assert "begin again with --replace" in stored.refused(1, *words, "--resume")
    stored.done(*words, "--replace")
    compare(stored.folder / "disk.raw", target)


def test_a_full_disk_is_named(stored: World) -> None:
    small = stored.folder / "small"
    small.mkdir()
    run = " ".join(stored.command("restore", "web1", "--json", "--disk", "disk", "--to", small / "d.qcow2"))
    script = f"mount -t tmpfs -o size=16m none {small} && {run} > {stored.folder}/said.json"
    where = [*PRIVATE_MOUNTS, "sh", "-c", script]
    ran = subprocess.run(where, env=stored.environment, capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in ran.stderr or "mount" in ran.stderr:
        pytest.skip("no small file system can be mounted here")
    assert ran.returncode == 1
    said = json.loads((stored.folder / "said.json").read_text())["error"]
    assert said["kind"] == "SpaceExhausted"
    assert f"No room left on {small}" in said["message"]
