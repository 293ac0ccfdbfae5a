"""A guest that was writing comes back from its disk at a moment, with the command line it had, beside the original."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.model import (
    ZERO_CHUNK,
    Consistency,
    Disk,
    DiskId,
    DiskRoot,
    Instant,
    Machine,
    MachineConfig,
    MachineId,
    PointId,
    RecoveryPoint,
)
from hvbackup.processes import Process
from hvbackup.recover.boot import Boots, Options
from labs.guest import Console, Guest, make_disk
from tests.recover.test_boot import Exports

pytestmark = pytest.mark.guest
SIZE = 64 << 20


def point_of(guest: Guest, folder: Path, config: MachineConfig) -> RecoveryPoint:
    """The disks as they are now; `folder` has one raw file for each."""
    folder.mkdir(exist_ok=True)
    guest.pause()
    for name, disk in zip(("vda", "vdb"), guest.disks, strict=True):
        subprocess.run(
            ["qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", disk.path, folder / name],
            check=True,
            timeout=60,
        )
    guest.resume()
    machine = Machine(MachineId(guest.uuid), guest.name, "qemu")
    roots = tuple(DiskRoot(Disk(DiskId(name), SIZE), ZERO_CHUNK) for name in ("vda", "vdb"))
    return RecoveryPoint(PointId("00c0ffee00c0ffee"), machine, Instant(1), Consistency.CRASH, roots, config)


def sums(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    disks = [make_disk(tmp_path / "a.qcow2", SIZE), make_disk(tmp_path / "b.raw", SIZE, "raw")]
    with Guest(tmp_path / "guest", disks, agent=True) as guest:
        guest.sh("mkdir /mnt/a /mnt/b; mount /dev/vda /mnt/a; mount /dev/vdb /mnt/b")
        yield guest


def test_a_writing_guest_boots_from_a_moment_beside_itself(guest: Guest, tmp_path: Path) -> None:
    guest.start_writer("/mnt/a/s", "/mnt/b/s", rate=100)
    guest.wait_acked(80)
    line = Path(f"/proc/{guest.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    config = MachineConfig("qemu-argv", json.dumps({"argv": line, "cwd": os.getcwd()}), {"disks": []})
    before = guest.acked()
    point = point_of(guest, tmp_path / "disks", config)
    after = guest.acked()
    exports = Exports(tmp_path / "disks")
    boots, reference = Boots(tmp_path / "state", tmp_path / "run", lambda: Instant(1)), sums(tmp_path / "disks")
    boot = boots.boot(point, exports, Options(name="copy"))
    try:
        assert boot.notes == ()
        assert set(boot.sockets) == {"qmp", "serial", "agent"}
        console = Console(boot.sockets["serial"])
        console.wait_ready()
        console.sh("mkdir /mnt/a /mnt/b; mount /dev/vda /mnt/a; mount /dev/vdb /mnt/b")
        count = int(console.sh("writer verify /mnt/a/s /mnt/b/s").removeprefix("verified "))
        assert before <= count <= after + 1
        assert console.sh("cat /sys/class/dmi/id/product_uuid") == guest.uuid
        reads_survive_a_new_export(console, exports, point, boot.run / "export.sock", boot.folder)
        console.sh("echo new >/mnt/a/new; sync; rm /mnt/b/s; sync")  # it may write
        console.close()
        assert guest.wait_acked(after + 50) > after  # the original goes on
    finally:
        boots.discard("copy")
    assert sums(tmp_path / "disks") == reference  # and the point is what it was
    acked = guest.stop_writer()
    assert acked <= guest.verify("/mnt/a/s", "/mnt/b/s") <= acked + 1


def reads_survive_a_new_export(
    console: Console, exports: Exports, point: RecoveryPoint, socket: Path, folder: Path
) -> None:
    """The export dies and comes back a little later; the guest's reads wait for it."""
    console.sh("echo 3 >/proc/sys/vm/drop_caches")
    process = Process.of(exports.last)
    assert process is not None
    os.kill(process.pid, 9)
    assert process.wait(120)
    console.start("md5sum /dev/vdb")
    time.sleep(1)
    socket.unlink()
    exports(point, point.disks, socket, folder)
    assert "/dev/vdb" in console.finish(120)
    assert "error" not in console.sh("dmesg | grep -i 'i/o' || true")
