"""A real guest that writes all the time: a full capture and eleven more, through a killed run and a killed QEMU.

Every second capture is also compared bit for bit: the guest stands still while qemu-img copies its disks and until QEMU has the
snapshot open, and goes on writing while hvbackup reads.  The others are taken without a pause; there the guest's own records
are the reference, 1 to n without a gap over both disks, n at least what was acknowledged before, on sound file systems.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvbackup.model import MiB
from labs.guest import Console, Guest, LabDisk, make_disk, verified, verify_on_host
from tests.endtoend.rig import Installed, files_below, processes, short_folder

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

DISKS = ("vda", "vdb")
MOUNT = "mkdir -p /mnt/a /mnt/b && mount /dev/vda /mnt/a && mount /dev/vdb /mnt/b"
RATE = 100  # records a second
WAIT_SECONDS = 120


@dataclass
class Taken:
    """One point, and what it must hold."""

    point: str
    life: int
    lowest: int  # records acknowledged before
    highest: int  # and after
    reference: list[Path] = field(default_factory=list)
    hows: list[str] = field(default_factory=list)


class Story:
    """The guest, the program, and what happened so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = Installed(folder)
        self.world.done("init")
        content = folder / "content"
        content.mkdir()
        (content / "something").write_bytes(b"on the disk before\n" * 50_000)
        self.disks: list[LabDisk] = [
            make_disk(folder / "a.qcow2", 64 * MiB, content=content),
            make_disk(folder / "b.raw", 32 * MiB, "raw"),
        ]
        self.guest = Guest(folder / "g", self.disks, name="shop")
        self.life = 0
        self.taken: list[Taken] = []
        self.more = 0  # backups that came to their end before they could be killed

    @property
    def source(self) -> str:
        return f"qemu:{self.guest.qmp_path}"

    @property
    def records(self) -> list[str]:
        return [f"/mnt/{disk}/records{self.life}" for disk in "ab"]

    def begin_life(self) -> None:
        """The guest is up and writes to new files."""
        self.life += 1
        self.guest.start()
        self.guest.sh(MOUNT)
        self.guest.start_writer(*self.records, rate=RATE)
        self.guest.wait_acked(RATE // 4)

    def lasting_backup(self) -> subprocess.Popen[str]:
        """A backup that is under way.  Those that had ended before anybody saw their snapshot open are taken as well."""
        while True:
            lowest, process = self.guest.acked(), self.begin_backup()
            if process.poll() is None:
                return process
            assert self.taken_by(process, lowest, []).hows == ["incremental", "incremental"]
            self.more += 1

    def begin_backup(self) -> subprocess.Popen[str]:
        """A backup whose snapshot is open, or was."""
        process = self.world.start("backup", self.source, "--json")
        end = time.monotonic() + WAIT_SECONDS
        while len(self.jobs()) < len(DISKS) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        return process

    def jobs(self) -> list[str]:
        return [j["id"] for j in self.guest.qmp("query-jobs") if j["id"].startswith("hvb-") and "-j" in j["id"]]

    def backup(self, *, exactly: bool) -> Taken:
        """A whole backup, with a reference of every bit if that is wanted."""
        lowest, reference = self.guest.acked(), []
        if exactly:
            self.guest.pause()
            reference = [self._copied(disk) for disk in self.disks]
            process = self.begin_backup()
            self.guest.resume()
        else:
            process = self.world.start("backup", self.source, "--json")
        return self.taken_by(process, lowest, reference)

    def taken_by(self, process: subprocess.Popen[str], lowest: int, reference: list[Path]) -> Taken:
        """What a backup has taken that ends well."""
        out, err = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0, (out, err)
        point = json.loads(out)["runs"][0]["point"]
        hows = [disk["how"] for disk in point["disks"]]
        found = Taken(point["id"], self.life, lowest, self.guest.acked(), reference, hows)
        self.taken.append(found)
        return found

    def _copied(self, disk: LabDisk) -> Path:
        """The disk as it is, read without hvbackup."""
        to = self.folder / f"reference-{len(self.taken)}-{disk.path.stem}"
        command = ["qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", str(disk.path), str(to)]
        subprocess.run(command, check=True, timeout=WAIT_SECONDS)
        return to

    def prove(self, taken: Taken) -> None:
        """The point holds what it must."""
        to = self.folder / f"restored-{taken.point}"
        self.world.done("restore", "shop", "--at", taken.point, "--to", to)
        images = [to / f"{disk}.raw" for disk in DISKS]
        for image, reference in zip(images, taken.reference, strict=False):
            subprocess.run(["cmp", str(image), str(reference)], check=True, timeout=WAIT_SECONDS)
            reference.unlink()
        count = verify_on_host(*(_extracted(image, f"records{taken.life}") for image in images))
        assert taken.lowest <= count <= taken.highest + 1
        for path in to.iterdir():
            path.unlink()

    def prove_boot(self, taken: Taken) -> None:
        """The machine runs from its point and finds its records itself."""
        booted = self.world.run("boot", "shop", "--at", taken.point, "--name", "trial", "--json")
        assert booted.code == 0, booted
        try:
            console = Console(booted.json["sockets"]["serial"])
            console.wait_ready()
            console.sh(MOUNT)
            files = [f"/mnt/{disk}/records{taken.life}" for disk in "ab"]
            assert taken.lowest <= verified(console.sh(f"writer verify {' '.join(files)}")) <= taken.highest + 1
            console.sh("echo it works > /mnt/a/new && sync")
            console.close()
        finally:
            assert self.world.run("discard", "trial").code == 0

    def prove_clean(self) -> None:
        """Nothing of ours is left in QEMU or on the host but one checkpoint of each disk."""
        found = [j["id"] for j in self.guest.qmp("query-jobs")]
        found += [e["id"] for e in self.guest.qmp("query-block-exports")]
        nodes = self.guest.qmp("query-named-block-nodes", flat=True)
        found += [node["node-name"] for node in nodes]
        assert not [name for name in found if name.startswith("hvb-")]
        for node in ("disk0", "disk1"):
            [bitmaps] = [n.get("dirty-bitmaps", []) for n in nodes if n["node-name"] == node]
            assert len([b for b in bitmaps if b.get("name", "").startswith("hvb-")]) == 1
        assert not files_below(self.world.store / "leases", self.world.store / "tmp", self.world.state / "scratch")
        assert not processes(self.folder, {self.guest.pid})


def _extracted(image: Path, name: str) -> Path:
    """The record file in an ext4 image: its journal is replayed, as a mount would, and then e2fsck must find no fault."""
    to = image.with_suffix(".records")
    for options in (["-E", "journal_only", "-y"], ["-fn"]):
        command = ["e2fsck", *options, str(image)]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert checked.returncode == 0, checked.stdout
    command = ["debugfs", "-R", f"dump /{name} {to}", str(image)]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_SECONDS)
    return to


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    monkeypatch.setenv("PATH", "/usr/sbin:/sbin", prepend=":")
    with short_folder() as folder:
        found = Story(folder)
        found.begin_life()
        try:
            yield found
        finally:
            found.guest.kill()


def test_eleven_more_captures_of_a_guest_that_writes(story: Story) -> None:
    assert story.backup(exactly=True).hows == ["full", "full"]
    for number in range(1, 4):
        assert story.backup(exactly=number % 2 == 0).hows == ["incremental", "incremental"]

    process = story.lasting_backup()  # the fourth is to be killed half-way
    process.kill()
    process.communicate(timeout=WAIT_SECONDS)
    for number in range(5, 7):
        assert story.backup(exactly=number % 2 == 0).hows == ["incremental", "incremental"]
    story.prove_clean()

    process = story.lasting_backup()
    story.guest.kill()
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, "Traceback" in err) == (4, False), (out, err)
    story.begin_life()
    assert story.backup(exactly=True).hows == ["compared", "compared"]
    for number in range(8, 11):
        assert story.backup(exactly=number % 2 == 0).hows == ["incremental", "incremental"]
    story.prove_clean()
    story.guest.kill()

    for taken in story.taken:
        story.prove(taken)
    checked = story.world.done("check", "--deep", "--json").json
    count = 10 + story.more
    assert (checked["ok"], checked["points"], len(story.taken)) == (True, count, count)
    for taken in (story.taken[4], story.taken[-1]):
        story.prove_boot(taken)
