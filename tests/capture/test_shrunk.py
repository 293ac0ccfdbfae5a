"""A disk that was shrunk and grown back between two captures: its bitmap says nothing of that, and its point is right."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hvbackup.capture import Options, capture
from hvbackup.hypervisors import Hypervisor
from hvbackup.hypervisors.image import ImageSource, ImageSpec
from hvbackup.model import DiskId, Outcome, RecoveryPoint, Status
from hvbackup.store.store import Store, init
from tests.hypervisors.imagerig import run
from tests.hypervisors.test_qemu import SIZES, DaemonRig
from tests.world import BLOCK, CarelessKernel, contents

pytestmark = pytest.mark.real
LOST = "called unchanged had changed"


def captured(store: Store, hypervisor: Hypervisor) -> tuple[Outcome, RecoveryPoint]:
    """A capture that draws no sample: what it finds, it looked for."""
    [machine] = hypervisor.machines()
    outcome = capture(store, hypervisor, machine, Options(sample_blocks=0, rng=random.Random(1)))
    assert outcome.point is not None
    return outcome, outcome.point


def opened(folder: Path) -> Store:
    init(folder / "store", None, BLOCK, CarelessKernel())
    return Store.open(folder / "store", folder / "state", [], owner=True, kernel=CarelessKernel())


@pytest.mark.parametrize("shrunk_to", [512, BLOCK - 512, 5 * BLOCK + 512, 11 * BLOCK])
def test_a_disk_of_a_running_qemu(tmp_path: Path, shrunk_to: int) -> None:
    rig = DaemonRig(tmp_path, ("qcow2", "raw"))
    try:
        with opened(tmp_path) as store:
            for disk in rig.disks:
                rig.write(disk, 0, random.Random(2).randbytes(12 * BLOCK))  # and nothing behind that
            captured(store, rig.hypervisor())
            for disk in rig.disks:
                rig.resize(disk, shrunk_to)
                rig.resize(disk, SIZES[disk])
                rig.write(disk, 14 * BLOCK, b"behind what was lost")
            outcome, point = captured(store, rig.hypervisor())
            assert outcome.status is Status.DEGRADED
            assert sum(LOST in note for note in outcome.notes) == len(rig.disks), outcome.notes
            assert contents(store, point) == {DiskId(disk): rig.content(disk) for disk in rig.disks}
            outcome, point = captured(store, rig.hypervisor())
            assert [d.how for d in point.disks] == ["incremental"] * len(rig.disks)
            assert outcome.status is Status.OK
    finally:
        rig.close()


def test_a_disk_that_lost_nothing_is_not_compared(tmp_path: Path) -> None:
    rig = DaemonRig(tmp_path, ("qcow2", "raw"))
    try:
        with opened(tmp_path) as store:
            for disk in rig.disks:
                rig.write(disk, 0, b"data" * BLOCK)
            captured(store, rig.hypervisor())
            for disk in rig.disks:
                rig.resize(disk, 4 * BLOCK)
                rig.resize(disk, SIZES[disk])
            outcome, point = captured(store, rig.hypervisor())
            assert (outcome.status, [d.how for d in point.disks]) == (Status.OK, ["incremental", "incremental"])
            assert contents(store, point) == {DiskId(disk): rig.content(disk) for disk in rig.disks}
    finally:
        rig.close()


def test_an_image_with_a_bitmap(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    write: Callable[[str], object] = lambda what: run("qemu-io", "-f", "qcow2", "-c", what, path)  # noqa: E731
    write("write -P 7 0 2M")
    with opened(tmp_path) as store:
        source = ImageSource([ImageSpec(path)], store.id.hex()[:8])
        captured(store, source)
        run("qemu-img", "resize", "-q", "--shrink", path, "1M")
        run("qemu-img", "resize", "-q", path, "4M")
        outcome, point = captured(store, source)
        assert any(LOST in note for note in outcome.notes), outcome.notes
        assert contents(store, point) == {point.disks[0].disk.id: b"\7" * (1 << 20) + bytes(3 << 20)}
