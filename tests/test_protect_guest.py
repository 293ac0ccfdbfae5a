"""Continuous protection of a real guest: at every moment its file systems recover, and hold an exact prefix of its writes."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from hvbackup.capture import Options
from hvbackup.errors import HostUnreachable, JournalGap
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.model import SECOND, DiskId, Instant, MiB
from hvbackup.protect.events import Rhythm
from hvbackup.protect.protection import Protection
from hvbackup.store.history import History, Moment
from hvbackup.store.store import Store, init
from labs.guest import Guest, make_disk, verify_on_host
from tests.hypervisors.daemon import SETTINGS, only

pytestmark = [pytest.mark.real, pytest.mark.guest]

DISKS = ("vda", "vdb")
SIZE = 48 * MiB
FILES = ("/mnt/a/records", "/mnt/b/records")


@pytest.fixture
def folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as name:
        yield Path(name)


def mounted(guest: Guest) -> None:
    guest.sh("mkdir -p /mnt/a /mnt/b && mount /dev/vda /mnt/a && mount /dev/vdb /mnt/b")


def recovered(folder: Path, history: History, moment: Moment) -> int:
    """How many writes the files hold after the file systems of a moment have recovered, as after a power failure."""
    files = []
    for disk in DISKS:
        image, file = folder / f"{disk}.image", folder / f"{disk}.records"
        content = bytearray(SIZE)
        history.view(moment, DiskId(disk)).read_into(0, memoryview(content))
        image.write_bytes(content)
        journal = subprocess.run(
            [program("e2fsck"), "-p", image], capture_output=True, text=True, timeout=60, check=False
        )
        assert journal.returncode in (0, 1), journal.stdout
        again = subprocess.run(
            [program("e2fsck"), "-fn", image], capture_output=True, text=True, timeout=60, check=False
        )
        assert again.returncode == 0, again.stdout
        subprocess.run(
            [program("debugfs"), "-R", f"dump /records {file}", image], capture_output=True, timeout=60, check=True
        )
        files.append(file)
    return verify_on_host(*files)


def program(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin") or name


@pytest.mark.timeout(300)
def test_every_moment_of_a_guest_recovers_to_a_prefix_of_its_writes(folder: Path) -> None:
    init(folder / "store", None)
    disks = [make_disk(folder / "a.qcow2", SIZE), make_disk(folder / "b.raw", SIZE, "raw")]
    rng, known = random.Random(5), {}
    with (
        Guest(folder / "g", disks) as guest,
        Store.open(folder / "store", folder / "state", [], owner=True) as store,
    ):
        mounted(guest)
        guest.start_writer(*FILES, mode="overwrite", options=f"-s {4 * MiB}")
        guest.wait_acked(20)
        hypervisor = QemuHypervisor(guest.qmp_path, "00c0ffee", scratch_dir=folder / "s", settings=SETTINGS)
        protection = Protection(store, hypervisor, only(hypervisor), Options(), Rhythm(SECOND))
        life = protection.begin("a test")
        for _ in range(20):
            time.sleep(rng.random() * 0.3)
            before = guest.acked()
            cycle = life.cycle()
            known[cycle.moment.seq] = (before, guest.acked())
        guest.kill()
        acked = guest.acked()
        with pytest.raises(HostUnreachable):
            life.cycle()
        life.recorder.close()
        guest.start()  # the machine was off, and nobody saw what its disks were written to
        again = protection.begin("the machine was killed")
        mounted(guest)
        after = again.cycle()
        history = History(store, only(hypervisor).id)
        for seq, (low, high) in known.items():
            assert low <= recovered(folder, history, history.by_seq(seq)) <= high + 1
        assert acked <= recovered(folder, history, after.moment) <= acked + 1
        last = history.by_seq(max(known))
        with pytest.raises(JournalGap, match="the machine was killed"):
            history.at(Instant(last.t + 1))
        again.close()
