"""The QEMU adapter passes what every adapter must pass, on qcow2, raw and both; a storage daemon is the machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.model import Continuity, DiskId
from hvbackup.nbd.client import NbdClient
from tests.hypervisors.conformance import BLOCK, Conformance, Cycle
from tests.hypervisors.daemon import Daemon, make_image, node

pytestmark = pytest.mark.real

SIZES = {"vda": 32 * BLOCK, "vdb": 17 * BLOCK + 512}  # the second ends inside a block


class DaemonRig:
    """A storage daemon from behind."""

    def __init__(self, folder: Path, drivers: Sequence[str]) -> None:
        self.disks: Sequence[str] = list(SIZES)
        nodes = []
        for (name, size), driver in zip(SIZES.items(), drivers, strict=True):
            nodes.append(node(name, make_image(folder / f"{name}.{driver}", size, driver), driver))
        self.daemon = Daemon(folder, nodes).start()
        self._guests: dict[str, NbdClient] = {}

    def hypervisor(self) -> QemuHypervisor:
        return self.daemon.hypervisor()

    def guest(self, disk: str) -> NbdClient:
        if disk not in self._guests:
            self._guests[disk] = self.daemon.guest(disk)
        return self._guests[disk]

    def write(self, disk: str, offset: int, data: bytes) -> None:
        self.guest(disk).write(offset, data)

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.guest(disk).write_zeroes(offset, length)

    def content(self, disk: str) -> bytes:
        guest = self.guest(disk)
        buffer = bytearray(guest.size)
        guest.read_into(0, memoryview(buffer))
        return bytes(buffer)

    def resize(self, disk: str, size: int) -> None:
        self.hang_up()
        with self.daemon.qmp() as qmp:
            self.daemon.unplug(qmp, disk)
            qmp.command("block_resize", node_name=disk, size=size)
            self.daemon.plug(qmp, disk)

    def new_life(self) -> None:
        self.hang_up()
        self.daemon.kill()
        self.daemon.start()

    def add_foreign(self, disk: str) -> Callable[[], bool]:
        with self.daemon.qmp() as qmp:
            qmp.command("block-dirty-bitmap-add", node=disk, name="libvirt-1")
        return lambda: bool(self.daemon.bitmaps(disk)["libvirt-1"]["recording"])

    def leftovers(self) -> Sequence[str]:
        bitmaps = [f"{disk}/{name}" for disk in self.disks for name in self.daemon.bitmaps(disk)]
        return [*self.daemon.leftovers(), *(b for b in bitmaps if "/hvb-" in b)]

    def hang_up(self) -> None:
        for guest in self._guests.values():
            guest.close()
        self._guests.clear()

    def close(self) -> None:
        self.hang_up()
        self.daemon.stop()
        shutil.rmtree(self.daemon.folder / "s", ignore_errors=True)


class Daemons(Conformance):
    DRIVERS: ClassVar[Sequence[str]]
    SECTOR_STEP = 512

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Generator[DaemonRig]:
        rig = DaemonRig(tmp_path, self.DRIVERS)
        yield rig
        rig.close()

    def test_a_fine_checkpoint_tells_small_writes_apart(self, rig: DaemonRig) -> None:
        cycle, grains = Cycle(rig), []
        rig.write("vda", 0, b"first" * 100_000)
        for fine in (True, False, True):
            for offset in (0, 5 * 4096, 20 * 4096):
                rig.write("vda", offset, os.urandom(4096))
            cycle.capture(fine=fine)
            assert cycle.equal()
            [name] = {t.value for t in cycle.tokens.values()}
            grains.append({rig.daemon.bitmaps(disk)[name]["granularity"] for disk in rig.disks})
            if grains[1:]:
                assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
                assert cycle.read[DiskId("vda")] == (3 * 4096 if not fine else 2 * 65536)
        assert grains == [{4096}, {65536}, {4096}]


class TestQcow2(Daemons):
    DRIVERS = ("qcow2", "qcow2")


class TestRaw(Daemons):
    DRIVERS = ("raw", "raw")


class TestQcow2AndRaw(Daemons):
    DRIVERS = ("qcow2", "raw")
