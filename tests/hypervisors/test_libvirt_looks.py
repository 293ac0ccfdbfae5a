"""Others may look at a machine of libvirt's whenever they like, also while a backup of ours begins."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from pathlib import Path

import pytest

from hvbackup.errors import Busy
from hvbackup.hypervisors.libvirt import LibvirtHypervisor
from hvbackup.hypervisors.libvirt_host import Domain
from hvbackup.hypervisors.qmp import Qmp
from hvbackup.model import LeaseId, MiB
from labs.libvirtd import Libvirtd
from tests.hypervisors.conformance import Cycle
from tests.hypervisors.libvirtd import LibvirtMachine, machine

pytestmark = pytest.mark.real
ROUNDS = 12


def test_whoever_looks_while_backups_begin_does_no_harm(libvirtd: Libvirtd) -> None:
    """QEMU 7.2 fails an assertion when its nodes are listed while libvirt has it format scratch, which ends the guest."""
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder, contextlib.ExitStack() as leaving:
        vm = Watched(libvirtd, Path(folder))
        leaving.callback(vm.remove)
        vm.define().start()
        begin_while_others_look(vm, vm.hypervisor())


def begin_while_others_look(vm: Watched, hypervisor: LibvirtHypervisor) -> None:
    """Backups begin again and again, and the machine outlives it."""
    pid, stop, looks = vm.qemu_pid(), threading.Event(), [0]
    strangers = [threading.Thread(target=look, args=(vm, stop, looks)) for look in (_ask_libvirt, _ask_qemu)]
    for stranger in strangers:
        stranger.start()
    try:
        [found] = hypervisor.machines()
        for number in range(ROUNDS):
            lease = LeaseId(f"l{number}")
            with hypervisor.snapshot(found, lease, {}, None) as frozen:
                assert len(frozen.disks) == 2
            hypervisor.release(found, lease, [])
    finally:
        stop.set()
        for stranger in strangers:
            stranger.join(20)
    assert vm.domain.isActive()
    assert vm.qemu_pid() == pid
    assert looks[0] > ROUNDS
    assert not vm.leftovers()


class Watched(LibvirtMachine):
    """A machine with a second monitor, which a stranger has."""

    def xml(self) -> str:
        monitor = f"<qemu:arg value='-qmp'/><qemu:arg value='unix:{self.folder}/stranger.sock,server=on,wait=off'/>"
        named = super().xml().replace("<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ")
        return named.replace("</domain>", f"<qemu:commandline>{monitor}</qemu:commandline></domain>")


def _ask_qemu(vm: LibvirtMachine, stop: threading.Event, looks: list[int]) -> None:
    with Qmp(vm.folder / "stranger.sock", timeout_seconds=15) as qmp:
        while not stop.is_set():
            qmp.command("query-named-block-nodes", flat=True)
            looks[0] += 1


def _ask_libvirt(vm: LibvirtMachine, stop: threading.Event, looks: list[int]) -> None:
    """As `virsh domblkinfo` does, again and again."""
    connection = vm.libvirtd.connection()
    domain = connection.lookupByUUIDString(vm.uuid)
    while not stop.is_set():
        domain.blockInfo("vda")
    connection.close()


def test_scratch_is_ours_and_goes_with_its_lease(libvirtd: Libvirtd) -> None:
    with machine(libvirtd) as vm:
        vm.define().start()
        found, hypervisor = Cycle(vm).machine(), vm.hypervisor()
        with hypervisor.snapshot(found, LeaseId("l"), {}, None):
            [folder] = (vm.folder / "s").iterdir()
            scratch = sorted(p.name for p in folder.glob("*.scratch"))
            assert scratch == ["vda.scratch", "vdb.scratch"]
            assert all(p.stat().st_mode & 0o077 == 0 for p in folder.glob("*.scratch"))
        hypervisor.release(found, LeaseId("l"), [])
        assert not vm.leftovers()


def test_a_disk_that_is_resized_at_the_moment_is_tried_again(
    libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(libvirtd) as vm:
        vm.define().start()
        found, hypervisor = Cycle(vm).machine(), vm.hypervisor()
        asked = Domain.capacity
        with monkeypatch.context() as patch:
            patch.setattr(Domain, "capacity", lambda domain, disk: asked(domain, disk) + MiB)
            with pytest.raises(Busy, match="resized"), hypervisor.snapshot(found, LeaseId("l"), {}, None):
                pytest.fail("A snapshot began on scratch of another size")
        hypervisor.release(found, LeaseId("l"), [])
        assert not vm.leftovers()
        with hypervisor.snapshot(found, LeaseId("m"), {}, None) as frozen:
            assert len(frozen.disks) == 2
