"""Real guests: a witness writes to two disks without a pause, and every snapshot holds exactly its first n writes."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hvbackup.hypervisors import Frozen
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.model import Continuity, DiskId, LeaseId, MiB
from labs.guest import Guest, make_disk, verify_on_host
from tests.hypervisors.conformance import Cycle
from tests.hypervisors.daemon import SETTINGS, STORE

pytestmark = [pytest.mark.real, pytest.mark.guest]

DISKS = ("vda", "vdb")
SIZE = 48 * MiB


class GuestRig:
    """A running guest, for `Cycle`."""

    disks: Sequence[str] = DISKS

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest, self.folder = guest, folder

    def hypervisor(self) -> QemuHypervisor:
        return QemuHypervisor(self.guest.qmp_path, STORE, scratch_dir=self.folder / "s", settings=SETTINGS)


@pytest.fixture
def rig() -> Generator[GuestRig]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as name:
        folder = Path(name)
        disks = [make_disk(folder / "a.qcow2", SIZE, ext4=False), make_disk(folder / "b.raw", SIZE, "raw", ext4=False)]
        with Guest(folder / "g", disks) as guest:
            yield GuestRig(guest, folder)


def witnessed(folder: Path, images: Mapping[DiskId, bytearray]) -> int:
    """How many of the witness's writes these disks hold, exactly and together."""
    paths = [folder / f"{disk}.image" for disk in DISKS]
    for disk, path in zip(DISKS, paths, strict=True):
        path.write_bytes(images[DiskId(disk)])
    return verify_on_host(*paths)


def test_every_snapshot_holds_exactly_the_first_writes(rig: GuestRig) -> None:
    guest, cycle = rig.guest, Cycle(rig)  # type: ignore[arg-type]
    guest.start_writer("/dev/vda", "/dev/vdb", mode="overwrite", options=f"-s {40 * MiB}")
    numbers, read = [], []
    for _ in range(10):
        before = guest.wait_acked(guest.acked() + 20)
        after: list[int] = []

        def note_acked(frozen: Frozen, after: list[int] = after) -> None:
            after.append(guest.acked())
            guest.wait_acked(after[0] + 20)  # so much is written while the snapshot is read

        cycle.capture(note_acked)
        numbers.append(witnessed(rig.folder, cycle.images))
        read.append(sum(cycle.read.values()))
        assert before <= numbers[-1] <= after[0] + 1
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
    assert numbers == sorted(set(numbers))
    assert max(read[1:]) < SIZE  # of both disks, which have twice that
    last = guest.stop_writer()
    cycle.capture()
    assert last <= witnessed(rig.folder, cycle.images) <= last + 1  # it may be stopped before it says so
    guest.quit()
    assert converted(rig.folder / "a.qcow2") == cycle.images[DiskId("vda")]
    assert (rig.folder / "b.raw").read_bytes() == cycle.images[DiskId("vdb")]


def converted(image: Path) -> bytes:
    raw = image.with_suffix(".converted")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True, timeout=60)
    return raw.read_bytes()


def test_qemu_killed_among_its_writes(rig: GuestRig) -> None:
    guest, cycle = rig.guest, Cycle(rig)  # type: ignore[arg-type]
    guest.start_writer("/dev/vda", "/dev/vdb", mode="overwrite", options=f"-s {40 * MiB}")
    guest.wait_acked(50)
    cycle.capture()
    machine = cycle.machine()
    with rig.hypervisor().snapshot(machine, LeaseId("doomed"), cycle.tokens, None):
        guest.wait_acked(guest.acked() + 50)
        guest.kill()
    acked = guest.acked()
    guest.start()
    rig.hypervisor().release(machine, LeaseId("doomed"), list(cycle.tokens.values()))
    cycle.capture()
    assert set(cycle.how.values()) == {Continuity.UNKNOWN}
    assert acked <= witnessed(rig.folder, cycle.images) <= acked + 1


def test_a_machine_that_a_full_scratch_stopped_goes_on_after_release(
    rig: GuestRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of defence: our process and its watchdog are both dead, and the room runs out."""
    monkeypatch.setattr("hvbackup.hypervisors.qemu.Watch", NoWatch)
    guest, scratch = rig.guest, rig.folder / "s"
    guest.sh("dd if=/dev/zero bs=1M count=30 | tr '\\0' x | dd of=/dev/vdb bs=1M iflag=fullblock; sync")
    scratch.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(scratch)], check=True, timeout=120)
    try:
        machine = Cycle(rig).machine()  # type: ignore[arg-type]
        rig.hypervisor().snapshot(machine, LeaseId("dead"), {}, None).__enter__()
        guest.console.start("dd if=/dev/zero of=/dev/vdb bs=1M count=30 oflag=direct conv=fsync")
        end = time.monotonic() + 60
        while guest.qmp("query-status")["status"] != "io-error":
            assert time.monotonic() < end
            time.sleep(0.1)
        rig.hypervisor().release(machine, LeaseId("dead"), [])
        assert "30+0 records out" in guest.console.finish(60)
        assert guest.qmp("query-status")["status"] == "running"
        assert not list(scratch.iterdir())
    finally:
        guest.kill()
        subprocess.run(["umount", str(scratch)], check=True, timeout=120)


class NoWatch:
    """A watchdog that was killed as well."""

    reason = ""

    def __init__(self, *_: Any) -> None:
        pass

    def stop(self) -> None:
        pass

    abandon = stop
