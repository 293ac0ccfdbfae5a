"""Logical volumes, in guests: their kernel has a device-mapper, this machine's need not have one.

From outside a volume is part of its disks, and striped over two of them it is right only if both are of one moment.
From inside, where hvbackup runs in the guest itself, it is a block device as any other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from labs.guest import Guest, LabDisk, make_disk
from labs.guest_root import add_hvbackup, add_lvm, enter, lvm
from tests.cli.rig import World

pytestmark = [pytest.mark.real, pytest.mark.guest, pytest.mark.timeout(600)]

SIZE = 48 << 20
VDA, VDB = ("/dev/vda", "/dev/vdb"), ("/dev/vdc", "/dev/vdd")


@pytest.fixture
def folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as name:
        yield Path(name)


def tools(folder: Path, size_bytes: int, *, hvbackup: bool = False) -> LabDisk:
    root = folder / "root"
    root.mkdir()
    add_lvm(root)
    if hvbackup:
        add_hvbackup(root)
    return make_disk(folder / "tools.raw", size_bytes, "raw", content=root)


def with_volume(guest: Guest, device: str) -> None:
    """The guest has a volume striped over its first two disks."""
    guest.sh("insmod /modules/dm_mod.ko")
    enter(guest, device)
    lvm(guest, "pvcreate /dev/vda /dev/vdb", *VDA)
    lvm(guest, "vgcreate vg /dev/vda /dev/vdb", *VDA)
    lvm(guest, "lvcreate -i2 -I64k -L 64M -n data vg", *VDA)


def test_a_striped_volume_in_use_comes_back_from_its_disks(folder: Path) -> None:
    world = World(folder)
    world.done("init")
    utensils = tools(folder, 64 << 20)
    disks = [make_disk(folder / "a.qcow2", SIZE, ext4=False), make_disk(folder / "b.raw", SIZE, "raw", ext4=False)]
    restored: list[LabDisk] = []
    seen: list[tuple[int, int]] = []
    with Guest(folder / "g", [*disks, utensils], name="lvm", agent=True) as guest:
        with_volume(guest, "/dev/vdc")
        guest.sh(
            "chroot /root /sbin/mkfs.ext4 -q -E lazy_itable_init=0,nodiscard /dev/vg/data; mount /dev/vg/data /mnt"
        )
        guest.start_writer("/mnt/sequence", rate=200)
        for wanted in ("crash", "filesystem"):
            before = guest.wait_acked(guest.acked() + 100)
            source = (f"qemu:{guest.qmp_path}", "--disk", "vda", "--disk", "vdb", "--consistency", wanted)
            [run] = world.run("backup", *source, "--json").json["runs"]
            seen.append((before, guest.acked()))
            assert (run["point"]["consistency"] == "crash") == (wanted == "crash")
            assert (run["figures"]["frozen_seconds"] > 0) == (wanted != "crash")
            to = folder / wanted
            done = world.done("restore", "lvm", "--at", run["point"]["id"], "--to", to, "--json").json
            restored += [LabDisk(Path(disk["file"]), "raw") for disk in done["disks"]]
        guest.stop_writer()
    assert len(restored) == 4
    with Guest(folder / "h", [*restored, utensils], name="back") as guest:
        guest.sh("insmod /modules/dm_mod.ko")
        enter(guest, "/dev/vde")
        for devices, (before, after) in zip((VDA, VDB), seen, strict=True):
            lvm(guest, "vgchange -ay vg", *devices)
            guest.sh("mount /dev/vg/data /mnt")
            number = guest.verify("/mnt/sequence")
            guest.sh("umount /mnt")
            lvm(guest, "vgchange -an vg", *devices)
            assert number <= after
            assert number >= before or devices == VDA  # what was not synchronised may be lost in a crash


@pytest.mark.soak  # every command of ours takes ten seconds in a guest without KVM
def test_hvbackup_in_the_guest_reads_the_volume_as_a_device(folder: Path) -> None:
    """The only place here where /dev/vg/data is one: everything of ours runs in the guest, its store too."""
    utensils = tools(folder, 512 << 20, hvbackup=True)
    disks = [make_disk(folder / f"{name}.raw", SIZE, "raw", ext4=False) for name in "ab"]
    with Guest(folder / "g", [*disks, utensils], memory_mib=768) as guest:
        with_volume(guest, "/dev/vdc")
        guest.sh(
            "chroot /root /sbin/mkfs.ext4 -q /dev/vg/data; mount /dev/vg/data /mnt; sha256sum /root/sbin/* >/mnt/a"
        )
        guest.sh("cp /root/sbin/lvm /mnt; umount /mnt; sha256sum </dev/vg/data >/tmp/first")

        def ours(command: str) -> str:
            return guest.sh(f"HVBACKUP_STORE=/tmp/store HOME=/tmp chroot /root /bin/hvbackup {command}", 300)

        def backup() -> dict[str, Any]:
            [run] = json.loads(ours("backup image:/dev/vg/data --name volume --json").splitlines()[-1])["runs"]
            assert run["point"]["size_bytes"] == 64 << 20
            return dict(run["point"])

        ours("init")
        first = backup()
        guest.sh(
            "mount /dev/vg/data /mnt; echo more >/mnt/b; rm /mnt/a; umount /mnt; sha256sum </dev/vg/data >/tmp/second"
        )
        second = backup()
        assert (first["disks"][0]["how"], second["disks"][0]["how"]) == ("full", "compared")
        assert guest.sh("cat /tmp/first") != guest.sh("cat /tmp/second")
        ours("restore volume --disk data --to /tmp/now.raw")
        assert guest.sh("sha256sum </root/tmp/now.raw") == guest.sh("cat /tmp/second")
        guest.sh("rm /root/tmp/now.raw")
        ours(f"restore volume --at {first['id']} --disk data --to /dev/vg/data --replace")
        assert guest.sh("sha256sum </dev/vg/data") == guest.sh("cat /tmp/first")
        assert "/mnt/lvm" in guest.sh("mount /dev/vg/data /mnt; ls /mnt/lvm")
