"""The lab guest and its witness: what every proof about guests stands on, so it must itself be able to say no."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs.guest import Guest, GuestError, build, make_disk, verify_on_host
from labs.guest_image import HOME

pytestmark = pytest.mark.real

BLOCK = 4096


def write(mode: str, count: int, *files: Path, options: str = "-s 400000 -i 7") -> None:
    command = [str(HOME / "writer"), mode, "-n", str(count), *options.split(), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[-2] == f"ack {count}"


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("mode", ["sequence", "overwrite"])
@pytest.mark.parametrize("count", [1, 2, 500])
def test_the_witness_accepts_what_it_wrote(files: tuple[Path, Path], mode: str, count: int) -> None:
    write(mode, count, *files)
    assert verify_on_host(*files) == count


@pytest.mark.parametrize("mode", ["sequence", "overwrite"])
@pytest.mark.parametrize("damage", ["flip", "lose", "swap"])
def test_the_witness_notices_any_single_bad_block(files: tuple[Path, Path], mode: str, damage: str) -> None:
    write(mode, 300, *files)
    good = files[0].read_bytes()
    draw = random.Random(f"{mode} {damage}")
    written = [at for at in range(0, len(good), BLOCK) if any(good[at : at + BLOCK])]
    newest = max(written, key=lambda at: int.from_bytes(good[at + 16 : at + 24], "little"))
    for at in draw.sample([at for at in written if at != newest], 20):
        bad = bytearray(good)
        if damage == "flip":
            bad[at + draw.randrange(BLOCK)] ^= 1 << draw.randrange(8)
        elif damage == "lose":
            bad[at : at + BLOCK] = bytes(BLOCK)
        else:
            bad[at : at + BLOCK] = good[newest : newest + BLOCK]
        files[0].write_bytes(bad)
        with pytest.raises(GuestError, match="broken"):
            verify_on_host(*files)


def test_the_witness_notices_an_overwrite_that_was_lost(tmp_path: Path) -> None:
    """The block holds a whole record of the same run, only not the latest one: a stale block."""
    old, new = tmp_path / "old", tmp_path / "new"
    write("overwrite", 300, old)
    write("overwrite", 600, new)
    stale, fresh = old.read_bytes(), bytearray(new.read_bytes())
    changed = [at for at in range(0, len(fresh), BLOCK) if stale[at : at + BLOCK] != fresh[at : at + BLOCK]]
    assert changed
    fresh[changed[0] : changed[0] + BLOCK] = stale[changed[0] : changed[0] + BLOCK]
    new.write_bytes(fresh)
    with pytest.raises(GuestError, match="broken"):
        verify_on_host(new)


def test_the_witness_notices_files_of_different_moments(tmp_path: Path) -> None:
    for folder, count in (("early", 300), ("late", 400)):
        (tmp_path / folder).mkdir()
        write("sequence", count, tmp_path / folder / "a", tmp_path / folder / "b")
    with pytest.raises(GuestError, match="broken"):
        verify_on_host(tmp_path / "late/a", tmp_path / "early/b")


def test_the_writer_keeps_its_rate(tmp_path: Path) -> None:
    begun = time.monotonic()
    write("sequence", 50, tmp_path / "a", options="-r 100")
    assert time.monotonic() - begun >= 0.49


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("guest")
    disks = [make_disk(folder / "a.qcow2", 64 << 20), make_disk(folder / "b.raw", 64 << 20, "raw", ext4=False)]
    with Guest(folder, disks, agent=True) as guest:
        guest.sh("mount /dev/vda /mnt")
        yield guest


@pytest.mark.guest
def test_what_the_guest_acknowledged_is_there(guest: Guest) -> None:
    guest.start_writer("/mnt/sequence", rate=200)
    guest.wait_acked(50)
    acked = guest.stop_writer()
    assert acked <= guest.verify("/mnt/sequence") <= acked + 1


@pytest.mark.guest
def test_a_killed_guest_leaves_every_acknowledged_write_on_its_disk(guest: Guest, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "c.raw", 16 << 20, "raw", ext4=False)
    with Guest(tmp_path / "killed", [disk], uuid="8a1d4f6e-0000-4000-8000-000000000001") as other:
        other.start_writer("/dev/vda", mode="overwrite")
        other.wait_acked(100)
        other.kill()
        assert not other.running
        acked = other.acked()
    assert acked <= verify_on_host(disk.path) <= acked + 1


@pytest.mark.guest
def test_a_command_that_fails_is_an_error(guest: Guest) -> None:
    assert guest.sh("echo one; echo two >&2") == "one\ntwo"
    with pytest.raises(GuestError, match="status 1"):
        guest.sh("ls /absent")
    assert "absent" in guest.sh("ls /absent", check=False)


@pytest.mark.guest
def test_the_guest_agent_freezes_and_thaws(guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(120)
        line.connect(str(guest.agent_path))
        stream = line.makefile("rw")

        def ask(command: str) -> object:
            stream.write(json.dumps({"execute": command}) + "\n")
            stream.flush()
            return json.loads(stream.readline())["return"]

        assert ask("guest-fsfreeze-status") == "thawed"
        assert ask("guest-fsfreeze-freeze") == 1
        guest.console.start("echo frozen >/mnt/late; sync")
        with pytest.raises(TimeoutError):
            guest.console.finish(1)
        assert ask("guest-fsfreeze-thaw") == 1
        guest.console.finish()
    assert guest.sh("cat /mnt/late") == "frozen"
    assert [line.split()[0] for line in guest.sh("cat /tmp/fsfreeze-hook.log").splitlines()] == ["freeze", "thaw"]
