"""Cycles of a machine of libvirt: through the QMP that a real libvirtd hands on."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup import extents
from hvbackup.capture import Options
from hvbackup.errors import HostUnreachable, ReadFailed, UsageError
from hvbackup.hypervisors import libvirt_cycles
from hvbackup.hypervisors.qemu_names import StoreNames
from hvbackup.model import SECOND, Continuity, DiskId, Instant, LeaseId
from hvbackup.protect.events import Rhythm
from hvbackup.protect.protection import Protection
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.store import Store, init
from labs.libvirtd import Libvirtd
from tests.hypervisors.conformance import BLOCK, Cycle
from tests.hypervisors.libvirtd import STORE, LibvirtMachine, machine, wait_until

pytestmark = pytest.mark.real


@pytest.fixture
def vm(libvirtd: Libvirtd) -> Iterator[LibvirtMachine]:
    with machine(libvirtd) as made:
        yield made.define().start()


def ours(vm: LibvirtMachine) -> list[str]:
    """What is ours inside QEMU, but for checkpoints."""
    found = [n["node-name"] for n in vm.monitor("query-named-block-nodes", flat=True)]
    found += [j["id"] for j in vm.monitor("query-jobs")] + [e["id"] for e in vm.monitor("query-block-exports")]
    return [name for name in found if name.startswith("hvb-")]


def test_points_and_moments_follow_one_another(vm: LibvirtMachine) -> None:
    cycle, hypervisor = Cycle(vm), vm.hypervisor()
    vm.write("vda", 0, b"point" * BLOCK)
    cycle.capture()
    [found] = hypervisor.machines()
    cycles = hypervisor.cycles(found, LeaseId("cycles"))
    for number in range(4):
        vm.write("vda", number * BLOCK, b"%d" % number * 1000)
        vm.write("vdb", number * 4096, b"%d" % number * 4096)
        moment = {d: vm.content(d) for d in vm.disks}
        with cycles.snapshot(cycle.tokens) as frozen:
            vm.write("vda", 20 * BLOCK, b"during" * 1000)
            cycle.images = {d.disk.id: cycle.fold(d) for d in frozen.disks}
            cycle.tokens = {d.disk.id: d.token for d in frozen.disks if d.token}
            frozen.verify()
        assert {str(d): bytes(image) for d, image in cycle.images.items()} == moment
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        assert cycle.read[DiskId("vdb")] <= (BLOCK if number == 0 else 4096)  # the first one is since a point
        cycles.keep(list(cycle.tokens.values()))
    cycles.close()
    assert not ours(vm)
    assert len(vm.leftovers()) == len(vm.disks)
    assert len(vm.domain.listAllCheckpoints()) == 1  # libvirt was told
    vm.write("vda", 5 * BLOCK, b"after" * 1000)
    cycle.capture()  # by libvirt's own means again
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
    assert cycle.equal()
    assert len(vm.leftovers()) == len(vm.disks)


def test_a_point_for_a_protection_has_a_fine_checkpoint_that_libvirt_is_told_of(vm: LibvirtMachine) -> None:
    cycle, hypervisor = Cycle(vm), vm.hypervisor()
    vm.write("vda", 0, b"point" * BLOCK)
    cycle.capture(fine=True)
    names = {t.value for t in cycle.tokens.values()}
    assert len(vm.leftovers()) == len(vm.disks)
    for number in range(3):
        vm.write("vda", number * BLOCK, b"%d" % number * 4096)
    [found] = hypervisor.machines()
    cycles = hypervisor.cycles(found, LeaseId("cycles"))
    cycles.keep(list(cycle.tokens.values()))
    with cycles.snapshot(cycle.tokens) as frozen:
        changed = {d.disk.id: extents.total(d.changes(cycle.tokens[d.disk.id]).data) for d in frozen.disks}
    assert changed == {"vda": 3 * 4096, "vdb": 0}
    cycles.close()
    assert {c.getName() for c in vm.domain.listAllCheckpoints()} == names
    cycle.capture()  # by libvirt's own means, since that checkpoint
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
    assert cycle.equal()
    assert len(vm.leftovers()) == len(vm.disks)
    with pytest.raises(ReadFailed), hypervisor.snapshot(found, LeaseId("broken"), cycle.tokens, None, fine=True):
        raise ReadFailed("a disk is bad")
    assert len(vm.leftovers()) == 2 * len(vm.disks) + 1, "with its folder, until it is released"
    hypervisor.release(found, LeaseId("broken"), list(cycle.tokens.values()))
    assert len(vm.leftovers()) == len(vm.disks)


def test_what_a_killed_process_left_is_let_go_and_released(vm: LibvirtMachine) -> None:
    code = (
        "import os; from pathlib import Path\n"
        "from hvbackup.hypervisors.libvirt import *; from hvbackup.model import LeaseId\n"
        f"h = LibvirtHypervisor(LibvirtUri.parse({vm.source().removeprefix('libvirt:')!r}), {STORE!r}, "
        f"scratch_dir=Path({str(vm.folder / 's')!r}), runtime=Path({str(vm.folder / 'r')!r}))\n"
        "c = h.cycles(h.machines()[0], LeaseId('dead')); s = c.snapshot({}); s.__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    hypervisor, found = vm.hypervisor(), Cycle(vm).machine()
    done = subprocess.run([sys.executable, "-c", code], timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL
    folders = list(Path(tempfile.gettempdir()).glob(StoreNames(STORE).folder_prefix(found.id) + "*-qmp"))
    assert folders
    wait_until(lambda: all(j["status"] == "concluded" for j in vm.monitor("query-jobs")))
    assert ours(vm)
    vm.write("vda", 0, b"the guest goes on" * 1000)
    wait_until(lambda: not any(f.exists() for f in folders), 40)  # the monitor of the dead process ends by itself
    for _ in range(2):
        hypervisor.release(found, LeaseId("dead"), [])
        assert not ours(vm)
        assert not vm.leftovers()
    Cycle(vm).capture()


def test_cycles_that_can_not_end_leave_their_watchdog_and_its_monitor(
    vm: LibvirtMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise HostUnreachable("libvirtd does not answer")

    hypervisor, found = vm.hypervisor(), Cycle(vm).machine()
    with monkeypatch.context() as patched:
        patched.setattr(hypervisor, "release", refused)
        cycles = hypervisor.cycles(found, LeaseId("cycles"))
    cycles.keep([])
    snapshot = cycles.snapshot({})
    snapshot.__enter__()
    with pytest.raises(HostUnreachable):
        cycles.close()
    wait_until(lambda: all(j["status"] == "concluded" for j in vm.monitor("query-jobs")), 120)
    cycles.monitor.close()
    hypervisor.release(found, LeaseId("cycles"), [])
    assert not ours(vm)
    assert not vm.leftovers()


def test_a_machine_whose_disk_was_just_unplugged_is_not_taken_for_gone(
    vm: LibvirtMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is inside its QEMU would stay there: the server that listens, and everybody after us would be refused."""
    hypervisor, found, attached = vm.hypervisor(), Cycle(vm).machine(), libvirt_cycles.attached_devices
    hypervisor.cycles(found, LeaseId("first")).monitor.close()
    with monkeypatch.context() as patched:
        patched.setattr(libvirt_cycles, "attached_devices", lambda qmp, skipped: attached(qmp, skipped)[1:])
        with pytest.raises(HostUnreachable, match="not in its QEMU: vda"):
            hypervisor.release(found, LeaseId("first"), [])
    assert vm.leftovers()
    hypervisor.release(found, LeaseId("first"), [])
    assert not vm.leftovers()
    cycles = hypervisor.cycles(found, LeaseId("second"))
    cycles.keep([])
    cycles.close()
    assert not vm.leftovers()


def test_cycles_of_disks_that_record_nothing_are_refused_by_name(libvirtd: Libvirtd) -> None:
    with machine(libvirtd, formats=("qcow2", "raw")) as vm:
        vm.define()
        hypervisor = vm.hypervisor()
        [found] = hypervisor.machines()
        with pytest.raises(HostUnreachable, match="is off"):
            hypervisor.cycles(found, LeaseId("l"))
        vm.start()
        with pytest.raises(UsageError, match="vdb; only qcow2"):
            hypervisor.cycles(found, LeaseId("l"))
        assert not vm.leftovers()


def test_a_machine_that_is_off_leaves_the_journal_alone(vm: LibvirtMachine, tmp_path: Path) -> None:
    """After a live migration it is still defined where it was: nothing is taken over, and no point made of its images."""
    vm.stop()
    init(tmp_path / "store", None)
    with Store.open(tmp_path / "store", tmp_path / "state", []) as store:
        hypervisor = vm.hypervisor()
        [found] = hypervisor.machines()
        protection = Protection(store, hypervisor, found, Options(), Rhythm(SECOND))
        there = Recorder(store, found.id, found.disks)
        there.barrier(Instant(1), {})
        with pytest.raises(HostUnreachable, match="is off: nothing of it can be protected"):
            protection.begin("a test")
        there.barrier(Instant(2), {})
        there.close()
        assert not list(store.points())


def test_variables_of_the_firmware_are_in_every_moment(libvirtd: Libvirtd) -> None:
    with machine(libvirtd, formats=("qcow2",)) as vm:
        loader = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
        nvram = f"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{vm.folder}/vars.fd</nvram>"
        text = vm.xml().replace("</type></os>", f"</type>{loader}{nvram}</os><features><acpi/></features>")
        vm.connection.defineXML(text)
        vm.start()
        hypervisor = vm.hypervisor()
        [found] = hypervisor.machines()
        assert [d.id for d in found.disks] == ["vda", "nvram"]
        cycle = Cycle(vm)
        with hypervisor.snapshot(found, LeaseId("point"), {}, None) as frozen:
            tokens = {d.disk.id: d.token for d in frozen.disks if d.token}
        hypervisor.release(found, LeaseId("point"), list(tokens.values()))
        cycles = hypervisor.cycles(found, cycle.lease())
        for expected in (0, 1, 0):
            if expected:
                _flip(Path(vm.folder / "vars.fd"))
            with cycles.snapshot(tokens) as frozen:
                changes = {d.disk.id: d.changes(tokens.get(d.disk.id)) for d in frozen.disks}
                tokens = {d.disk.id: d.token for d in frozen.disks if d.token}
            assert changes[DiskId("nvram")].continuity is Continuity.INCREMENTAL
            assert len(changes[DiskId("nvram")].data) == expected
            cycles.keep(list(tokens.values()))
        cycles.close()


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
