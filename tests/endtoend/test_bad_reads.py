"""Disks, servers and stores that can't be read, are slow, hang or die: named, with the right exit code, and nothing is harmed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.model import KiB, MiB
from tests.cli.rig import make_disk
from tests.endtoend.mounts import needs_mount
from tests.endtoend.rig import Installed, Machine, files_below, processes, short_folder
from tests.endtoend.servers import failing, file_of, loop_device, nbdkit, wait

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

DISK_BYTES = 6 * MiB


@pytest.fixture
def world() -> Iterator[Installed]:
    """A store with one point of the machine `web`."""
    with short_folder() as folder:
        found = Installed(folder)
        found.done("init")
        make_disk(folder / "disk.raw", DISK_BYTES)
        found.done("backup", f"image:{folder}/disk.raw", "--name", "web")
        yield found
        assert not processes(folder, set())


def points(world: Installed) -> list[str]:
    return [p["id"] for p in world.done("points", "--json").json["points"]]


def prove(world: Installed, *, machine: str = "web", disk: str = "disk") -> None:
    """The newest point of the machine is the disk, and the store is sound."""
    to = world.folder / "proof.raw"
    world.done("restore", machine, "--disk", disk, "--to", to)
    assert to.read_bytes() == (world.folder / "disk.raw").read_bytes()
    to.unlink()
    assert world.done("check", "--deep", "--json").json["ok"]
    assert not files_below(world.store / "leases", world.store / "tmp")


def reading(world: Installed) -> bool:
    """Whether a capture has begun."""
    return bool(list((world.store / "leases").glob("*")))


def taken_in(pid: int) -> int:
    """Bytes a process has read, by whatever call."""
    fields = Path(f"/proc/{pid}/io").read_text().split()
    return int(fields[fields.index("rchar:") + 1])


# -- NBD servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["20%", "100%"])  # of pieces of 64 KiB
def test_some_reads_fail(world: Installed, rate: str) -> None:
    disk = str(world.folder / "disk.raw")
    words = ("--filter=blocksize", "--filter=error", "file", disk, "maxdata=65536", "error=EIO")
    with nbdkit(world.folder, *words, f"error-pread-rate={rate}") as server:
        message = world.refused(4, "backup", server.uri)
        assert server.uri in message
        assert "Input/output error" in message
    assert len(points(world)) == 1
    with nbdkit(world.folder, "file", disk) as server:
        assert world.run("backup", server.uri, "--name", "net").code == 0
    prove(world, machine="net", disk=disk_of(world, "net"))


def disk_of(world: Installed, machine: str) -> str:
    shown = world.done("points", machine, "--json").json["points"]
    return str(shown[-1]["disks"][0]["id"])


def test_slow_reads_are_waited_for(world: Installed) -> None:
    delay = ("--filter=delay", "file", str(world.folder / "disk.raw"), "delay-read=150ms")
    with nbdkit(world.folder, *delay) as server:
        world.run("backup", server.uri, "--name", "net")
    prove(world, machine="net", disk=disk_of(world, "net"))


def test_a_server_that_dies_while_it_is_read(world: Installed) -> None:
    delay = ("--filter=delay", "--filter=noextents", "file", str(world.folder / "disk.raw"), "delay-read=700ms")
    with nbdkit(world.folder, *delay) as server:
        process = world.start("backup", server.uri, "--json")
        wait(lambda: reading(world))
        server.process.kill()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 4, (out, err)
    assert server.uri in json.loads(out)["error"]["message"]
    assert len(points(world)) == 1
    prove(world)


@pytest.mark.soak
def test_a_server_that_hangs_in_the_middle_of_a_reply(world: Installed) -> None:
    delay = ("--filter=delay", "--filter=noextents", "file", str(world.folder / "disk.raw"), "delay-read=500ms")
    with nbdkit(world.folder, *delay) as server:
        process = world.start("backup", server.uri, "--json")
        wait(lambda: reading(world))
        server.process.send_signal(signal.SIGSTOP)
        out, err = process.communicate(timeout=150)
        assert process.returncode == 4, (out, err)
        message = json.loads(out)["error"]["message"]
        assert server.uri in message
        assert "60" in message, "the limit is said"
    prove(world)


@pytest.mark.soak
def test_a_qemu_that_hangs_while_it_is_read(world: Installed) -> None:
    """Nobody waits for ever, and when it wakes up its guest is let go and the next run works."""
    machine = Machine(world.folder / "vm", random.Random(1))
    try:
        process = world.start("backup", machine.source, "--json")
        wait(lambda: reading(world))
        assert machine.daemon.process is not None
        machine.daemon.process.send_signal(signal.SIGSTOP)
        out, err = process.communicate(timeout=190)
        assert process.returncode == 4, (out, err)
        assert "No answer" in json.loads(out)["error"]["message"], out
        machine.daemon.process.send_signal(signal.SIGCONT)
        assert world.run("backup", machine.source).code == 0
        assert not machine.daemon.leftovers()
    finally:
        machine.close()


# -- images ----------------------------------------------------------------------------------------------------------------


def test_an_image_that_shrinks_while_it_is_read(world: Installed) -> None:
    path = world.folder / "long.raw"
    with path.open("wb") as file:
        for number in range(6400):
            file.write(number.to_bytes(4, "big") * (16 * KiB))
    process = world.start("backup", f"image:{path}", "--json")
    wait(lambda: taken_in(process.pid) > 64 * MiB)  # more than the program itself is
    process.send_signal(signal.SIGSTOP)
    os.truncate(path, 1 * MiB)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, (out, err)
    assert str(path) in json.loads(out)["error"]["message"]
    assert len(points(world)) == 1
    prove(world)


@needs_mount
def test_a_block_device_with_read_errors(world: Installed) -> None:
    trigger = world.folder / "trigger"
    with (
        nbdkit(world.folder, *failing(world.folder / "disk.raw", trigger)) as server,
        file_of(server, world.folder) as file,
        loop_device(file, "--direct-io=on") as device,
    ):
        trigger.touch()
        message = world.refused(4, "backup", f"image:{device}")
        assert str(device) in message
        assert len(points(world)) == 1
        trigger.unlink()
        assert world.run("backup", f"image:{device}", "--name", "dev").code == 0
    assert len(points(world)) == 2
    prove(world, machine="dev", disk=disk_of(world, "dev"))


# -- stores ----------------------------------------------------------------------------------------------------------------


@needs_mount
def test_a_store_whose_disk_fails(world: Installed) -> None:
    """What can't be read is named, by the code for damage or for failure; the disk well again, all is as it was."""
    trigger, image = world.folder / "trigger", world.folder / "fs"
    with image.open("wb") as file:
        file.truncate(48 * MiB)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-d", world.folder / "store", image], check=True, env=environment, timeout=120
    )
    with (
        nbdkit(world.folder, *failing(image, trigger)) as server,
        file_of(server, world.folder) as file,
        loop_device(file, "--direct-io=on") as device,
    ):
        mounted = world.folder / "m"
        mounted.mkdir()
        subprocess.run(["mount", device, mounted], check=True, env=environment, timeout=120)
        try:
            judge_failing_store(world, mounted, trigger)
        finally:
            subprocess.run(["umount", "-l", mounted], check=False, env=environment, timeout=120)


def judge_failing_store(world: Installed, mounted: Path, trigger: Path) -> None:
    store = ("--store", str(mounted))
    assert len(world.done("points", *store, "--json").json["points"]) == 1
    trigger.touch()
    to = world.folder / "out.raw"
    for words in (
        ("restore", "web", "--disk", "disk", "--to", to),
        ("check", "--deep"),
        ("backup", f"image:{world.folder}/disk.raw", "--full"),
    ):
        ran = world.run(*words, *store, "--json")
        assert "Traceback" not in ran.err, ran.err
        assert ran.code in (1, 4, 20), (words, ran)
        assert not to.exists()
    trigger.unlink()
    assert world.done("check", "--deep", *store, "--json").json["ok"]
    world.done("restore", "web", "--disk", "disk", "--to", to, "--replace", *store)
    assert to.read_bytes() == (world.folder / "disk.raw").read_bytes()
