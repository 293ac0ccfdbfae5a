"""Machines that move from one host to another while they run: two daemons, each of which takes the other for another host."""

from __future__ import annotations

from collections.abc import Iterator

import libvirt
import pytest

from hvbackup.model import Continuity, LeaseId
from labs.libvirtd import Libvirtd, daemon
from tests.hypervisors.conformance import BLOCK, Cycle
from tests.hypervisors.libvirtd import LibvirtMachine, machine

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def other() -> Iterator[Libvirtd]:
    with daemon(hostname="other.example.org") as made:
        yield made


@pytest.fixture
def vm(libvirtd: Libvirtd) -> Iterator[LibvirtMachine]:
    with machine(libvirtd) as made:
        yield made.define().start()


def move(vm: LibvirtMachine, to: Libvirtd) -> None:
    """Its QEMU on the other host goes on with the same images."""
    there = to.connection()
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_UNSAFE | libvirt.VIR_MIGRATE_PERSIST_DEST
    vm.domain.migrate3(
        there, {libvirt.VIR_MIGRATE_PARAM_URI: "tcp:127.0.0.1"}, flags | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    )
    vm.connection.close()
    vm.libvirtd, vm.connection = to, there


def test_a_machine_that_moved_is_the_same_and_nothing_of_it_is_missed(
    libvirtd: Libvirtd, other: Libvirtd, vm: LibvirtMachine
) -> None:
    vm.domain.resume()
    here, cycle = vm.hypervisor(), Cycle(vm)
    vm.write("vda", 0, b"first" * BLOCK)
    cycle.capture()
    vm.write("vda", BLOCK, b"second" * 1000)
    move(vm, other)
    vm.write("vdb", 0, b"third" * 1000)
    assert [m.id for m in vm.hypervisor().machines()] == [vm.uuid]
    here.release(cycle.machine(), LeaseId("gone"), [])
    cycle.capture()
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}, (
        "bitmaps go along in the images, and libvirt is told of them"
    )
    assert cycle.equal()
    vm.write("vda", 2 * BLOCK, b"fourth" * 1000)
    cycle.capture()
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}, "and from then on only what changes is read"
    assert cycle.equal()
    move(vm, libvirtd)
    vm.write("vda", 0, b"fifth" * 1000)
    cycle.capture()
    assert cycle.equal()
    assert len(vm.leftovers()) == len(vm.disks)


def test_a_machine_that_moved_while_it_was_paused(other: Libvirtd, vm: LibvirtMachine) -> None:
    """QEMU leaves its images alone until it goes on; what they hold is read all the same."""
    cycle = Cycle(vm)
    vm.write("vda", 0, b"first" * BLOCK)
    cycle.capture()
    vm.write("vda", BLOCK, b"second" * 1000)
    held = {disk: vm.content(disk) for disk in vm.disks}
    move(vm, other)
    cycle.capture()
    assert set(cycle.how.values()) == {Continuity.UNKNOWN}, "QEMU has not loaded the bitmaps yet"
    assert {str(disk): bytes(image) for disk, image in cycle.images.items()} == held
    vm.domain.resume()
    vm.write("vda", 2 * BLOCK, b"third" * 1000)
    cycle.capture()
    assert len(vm.leftovers()) == len(vm.disks)
    assert cycle.equal()


def test_a_machine_stays_while_it_is_read(other: Libvirtd, vm: LibvirtMachine) -> None:
    hypervisor = vm.hypervisor()
    [found] = hypervisor.machines()
    with hypervisor.snapshot(found, LeaseId("l"), {}, None) as frozen:
        with pytest.raises(libvirt.libvirtError, match="state change lock"):
            move(vm, other)
        frozen.verify()
    hypervisor.release(found, LeaseId("l"), [])
    move(vm, other)
    assert not vm.leftovers()
