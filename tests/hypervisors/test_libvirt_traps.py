"""What goes wrong with libvirt's checkpoints, with a real libvirtd: each trap is found, and read and compared at worst."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import pytest

from hvbackup.errors import Busy, HostUnreachable, NotFound, ReadFailed, SpaceExhausted, UsageError
from hvbackup.hypervisors.libvirt import LibvirtHypervisor, Settings
from hvbackup.hypervisors.libvirt_host import Host
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.model import Consistency, Continuity, DiskId, LeaseId, MiB
from labs.libvirtd import Libvirtd, daemon, run
from tests.hypervisors.conformance import BLOCK, Cycle
from tests.hypervisors.libvirtd import SIZE, STORE, LibvirtMachine, machine, wait_until

pytestmark = pytest.mark.real

INCREMENTAL, UNKNOWN = Continuity.INCREMENTAL, Continuity.UNKNOWN


@pytest.fixture
def vm(libvirtd: Libvirtd) -> Iterator[LibvirtMachine]:
    with machine(libvirtd, formats=("qcow2",)) as made:
        yield made


def compared(cycle: Cycle) -> bool:
    return cycle.how[DiskId("vda")] is UNKNOWN


# --- off and on --------------------------------------------------------------------------------------------------------


def test_a_machine_may_be_off_one_night_and_run_the_next(vm: LibvirtMachine) -> None:
    vm.define()
    cycle = Cycle(vm)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 200k", vm.path("vda"))
    cycle.capture()  # off: libvirt refuses a backup of it (error 84)
    assert compared(cycle)
    assert cycle.equal()
    vm.start()
    vm.write("vda", BLOCK, b"while it runs" * 100)
    cycle.capture()  # libvirt never heard of that checkpoint, and is told
    assert not compared(cycle)
    assert cycle.equal()
    assert 0 < cycle.read[DiskId("vda")] <= BLOCK
    vm.write("vda", 2 * BLOCK, b"before it was stopped" * 100)
    vm.stop()
    cycle.capture()
    assert not compared(cycle)
    assert cycle.equal()
    assert 0 < cycle.read[DiskId("vda")] <= BLOCK
    assert len(vm.leftovers()) == 1
    vm.start()
    cycle.capture()
    assert not compared(cycle)
    assert [c.getName() for c in vm.domain.listAllCheckpoints()] == [cycle.tokens[DiskId("vda")].value]


def test_a_machine_that_is_off_is_released_and_keeps_out_a_second_run(vm: LibvirtMachine) -> None:
    vm.define()
    hypervisor = vm.hypervisor()
    [found] = hypervisor.machines()
    hypervisor.snapshot(found, LeaseId("dead"), {}, None).__enter__()
    with pytest.raises(Busy), vm.hypervisor().snapshot(found, LeaseId("next"), {}, None):
        pytest.fail("A second snapshot began")
    vm.hypervisor().release(found, LeaseId("dead"), [])
    assert not vm.leftovers()
    with pytest.raises(UsageError, match="off"), hypervisor.snapshot(found, LeaseId("l"), {}, Consistency.FILESYSTEM):
        pytest.fail("A machine that is off was frozen")


def test_a_machine_killed_while_off_backups_are_made_is_compared(vm: LibvirtMachine) -> None:
    vm.define().start()
    cycle = Cycle(vm)
    cycle.capture()
    vm.stop()  # the bitmap is in the image
    vm.start()
    vm.write("vda", 0, b"unsaved bitmap" * 100)
    os.kill(vm.qemu_pid(), signal.SIGKILL)
    wait_until(lambda: not vm.domain.isActive())
    cycle.capture()
    assert compared(cycle)
    assert cycle.equal()


# --- kinds of machines and disks ---------------------------------------------------------------------------------------


def test_raw_disks_are_read_whole_beside_disks_that_record(libvirtd: Libvirtd) -> None:
    with machine(libvirtd, formats=("qcow2", "raw")) as vm:
        vm.define().start()  # a checkpoint of a raw disk is refused (error 67)
        cycle = Cycle(vm, explained=False)
        for _ in range(2):
            vm.write("vdb", 0, b"raw" * BLOCK)
            cycle.capture()
            assert cycle.equal()
        assert cycle.how == {"vda": INCREMENTAL, "vdb": UNKNOWN}
        assert set(cycle.tokens) == {"vda"}
        vm.stop()
        cycle.capture()
        assert cycle.equal()
        assert set(cycle.tokens) == {"vda"}


def test_an_old_qcow2_that_can_hold_no_bitmaps(vm: LibvirtMachine) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", vm.path("vda"), str(SIZE))
    vm.define().start()
    cycle = Cycle(vm, explained=False)
    vm.write("vda", 0, b"old" * BLOCK)
    cycle.capture()
    assert cycle.equal()
    assert not cycle.tokens
    assert not vm.leftovers()


def test_a_transient_machine_keeps_its_continuity(vm: LibvirtMachine) -> None:
    vm.create()
    cycle = Cycle(vm)
    cycle.capture()
    vm.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)  # libvirt forgets machine and checkpoints
    vm.create()
    assert not vm.domain.listAllCheckpoints()
    vm.write("vda", 0, b"second life" * 100)
    cycle.capture()
    assert not compared(cycle)
    assert cycle.equal()
    assert len(vm.leftovers()) == 1


def test_every_machine_is_found(libvirtd: Libvirtd) -> None:
    extra = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>"
    with machine(libvirtd, extra=extra) as off, machine(libvirtd) as runs, machine(libvirtd) as transient:
        off.define()
        runs.define().start()
        transient.create()
        found = LibvirtHypervisor(LibvirtUri.parse(libvirtd.uri), STORE, scratch_dir=off.folder / "s").machines()
        names = {m.name: m for m in found}
        for each in (off, runs, transient):
            assert names[each.name].id == each.uuid
            assert [(d.id, d.size) for d in names[each.name].disks] == [("vda", SIZE), ("vdb", SIZE)]
        with pytest.raises(NotFound, match=f"did you mean {off.name}"):
            wanted = LibvirtUri.parse(f"{libvirtd.uri}&domain={off.name[:-1]}")
            LibvirtHypervisor(wanted, STORE, scratch_dir=off.folder / "s").machines()


# --- lost and broken checkpoints ---------------------------------------------------------------------------------------


def test_checkpoints_that_libvirt_lost_are_redefined(vm: LibvirtMachine) -> None:
    vm.define().start()
    cycle = Cycle(vm)
    cycle.capture()
    for checkpoint in vm.domain.listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    vm.write("vda", 0, b"after the loss" * 100)
    cycle.capture()
    assert not compared(cycle)
    assert cycle.equal()
    assert len(vm.leftovers()) == 1


def test_a_bitmap_that_libvirt_lost_is_removed_with_what_is_not_kept(vm: LibvirtMachine) -> None:
    vm.define().start()
    cycle = Cycle(vm)
    cycle.capture()
    vm.stop()
    vm.start()  # the bitmap is in the image now
    for checkpoint in vm.domain.listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    vm.hypervisor().release(cycle.machine(), None, [])
    assert not vm.leftovers()


def test_a_checkpoint_without_its_bitmap_is_compared_and_removed(vm: LibvirtMachine) -> None:
    vm.define().start()
    cycle = Cycle(vm)
    cycle.capture()
    vm.stop()
    run("qemu-img", "bitmap", "--remove", vm.path("vda"), cycle.tokens[DiskId("vda")].value)
    vm.start()
    vm.write("vda", 0, b"unrecorded" * 100)
    cycle.capture()  # error 109
    assert compared(cycle)
    assert cycle.equal()
    assert len(vm.domain.listAllCheckpoints()) == 1


# --- snapshots ---------------------------------------------------------------------------------------------------------


def snapshot(vm: LibvirtMachine, name: str, *, external: bool = False) -> libvirt.virDomainSnapshot:
    where = f"<disks><disk name='vda' snapshot='external'><source file='{vm.folder}/{name}.qcow2'/></disk></disks>"
    xml = f"<domainsnapshot><name>{name}</name>{where if external else ''}</domainsnapshot>"
    return vm.domain.snapshotCreateXML(xml, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY if external else 0)


class Overlaid(LibvirtMachine):
    """Its disk is in the newest overlay."""

    overlay = ""

    def path(self, disk: str):  # type: ignore[no-untyped-def]
        return self.folder / f"{self.overlay}.qcow2" if self.overlay else super().path(disk)


def test_an_external_snapshot_is_compared(vm: LibvirtMachine) -> None:
    vm.define().start()
    vm.__class__ = Overlaid
    cycle = Cycle(vm)
    vm.write("vda", 0, b"below" * 100)
    cycle.capture()
    snapshot(vm, "s1", external=True)
    vm.overlay = "s1"
    vm.write("vda", BLOCK, b"above" * 100)
    cycle.capture()
    assert compared(cycle)
    assert cycle.equal()
    cycle.capture()  # with the old checkpoint a bitmap went from the file below, which is therefore in doubt once more
    vm.write("vda", 2 * BLOCK, b"above" * 100)
    cycle.capture()
    assert not compared(cycle)
    assert cycle.equal()


def test_a_file_below_a_disk_that_was_written_to_is_noticed(vm: LibvirtMachine) -> None:
    base = vm.folder / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, str(SIZE))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, vm.path("vda"), str(SIZE))
    vm.define().start()
    cycle = Cycle(vm)
    cycle.capture()
    vm.stop()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", base)
    vm.start()
    cycle.capture()
    assert compared(cycle)
    assert cycle.equal()


@pytest.mark.parametrize("by", ["libvirt", "qemu-img"])
def test_a_revert_is_not_possible_with_our_bitmap_and_compared_without(vm: LibvirtMachine, by: str) -> None:
    vm.define()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", vm.path("vda"))
    taken = snapshot(vm, "s1")
    vm.start()
    cycle = Cycle(vm)
    vm.write("vda", 0, b"newer" * 100)
    cycle.capture()
    vm.stop()

    def revert() -> None:
        if by == "libvirt":
            vm.domain.revertToSnapshot(taken)
        else:
            run("qemu-img", "snapshot", "-a", "s1", vm.path("vda"))

    with pytest.raises((libvirt.libvirtError, AssertionError), match="active dirty bitmaps"):
        revert()
    run("qemu-img", "bitmap", "--remove", vm.path("vda"), cycle.tokens[DiskId("vda")].value)
    revert()
    vm.start()
    cycle.capture()
    assert compared(cycle)
    assert cycle.equal()


def test_a_disk_that_was_resized_while_it_was_off(vm: LibvirtMachine) -> None:
    vm.define().start()
    cycle = Cycle(vm)
    vm.write("vda", 0, b"small" * BLOCK)
    cycle.capture()
    vm.stop()
    run("qemu-img", "resize", "-q", vm.path("vda"), str(2 * SIZE))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {SIZE + BLOCK} 64k", vm.path("vda"))
    vm.start()
    cycle.capture()
    assert cycle.equal()
    assert len(cycle.images[DiskId("vda")]) == 2 * SIZE


# --- others, hangs and crashes -----------------------------------------------------------------------------------------


def test_somebody_elses_backup_is_busy_at_once(vm: LibvirtMachine) -> None:
    """libvirt itself would wait for thirty seconds, and then fail with other words."""
    vm.define().start()
    socket, scratch = vm.folder / "theirs.sock", vm.folder / "theirs.scratch"
    disk = f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk>"
    server = f"<server transport='unix' socket='{socket}'/>"
    vm.domain.backupBegin(f"<domainbackup mode='pull'>{server}<disks>{disk}</disks></domainbackup>", None)
    found = Cycle(vm).machine()
    with pytest.raises(Busy, match="another job"), vm.hypervisor().snapshot(found, LeaseId("l"), {}, None):
        pytest.fail("A second backup began")
    vm.hypervisor().release(found, None, [])
    assert "theirs" in vm.domain.backupGetXMLDesc()  # it is not ours to end
    vm.domain.abortJob()


def test_a_daemon_that_hangs_costs_a_few_seconds(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    with daemon() as own, machine(own, formats=("qcow2",)) as vm:
        vm.define().start()
        hypervisor = vm.hypervisor()
        [found] = hypervisor.machines()
        os.kill(own.pid, signal.SIGSTOP)
        try:
            with monkeypatch.context() as patch, pytest.raises(HostUnreachable, match="No answer within 5 s"):
                patch.setattr(hypervisor.host, "_reply_seconds", 5.0)
                hypervisor.machines()
        finally:
            os.kill(own.pid, signal.SIGCONT)
        assert hypervisor.machines() == [found]


def test_a_daemon_that_was_restarted_is_found_again(libvirtd: Libvirtd) -> None:
    with daemon() as own, machine(own, formats=("qcow2",)) as vm:
        vm.define().start()
        cycle, hypervisor = Cycle(vm), vm.hypervisor()
        cycle.capture()
        [found] = hypervisor.machines()
        frozen = hypervisor.snapshot(found, LeaseId("over a restart"), cycle.tokens, None).__enter__()
        own.kill()
        with pytest.raises(HostUnreachable, match="Cannot reach"):
            hypervisor.machines()
        own.start()
        vm.connection = own.connection()
        assert hypervisor.machines() == [found]
        hypervisor.release(found, LeaseId("over a restart"), list(cycle.tokens.values()))
        assert len(vm.leftovers()) == 1
        vm.write("vda", 0, b"later" * 100)
        cycle.capture()
        assert not compared(cycle)
        assert cycle.equal()
        del frozen


def test_a_daemon_that_dies_is_unreachable_whoever_notices_it(libvirtd: Libvirtd) -> None:
    with daemon() as own, events_held() as (hold, let_go):
        host = Host(own.uri)
        host.domains()
        hold()  # what reads the end of the socket, before a call writes
        own.kill()
        with pytest.raises(HostUnreachable, match="Cannot reach the daemon"):
            host.domains()
        let_go()
        own.start()
        host.domains()
        os.kill(own.pid, signal.SIGSTOP)
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(host.domains)
            time.sleep(0.5)
            own.kill()  # while a call waits for its answer
            with pytest.raises(HostUnreachable, match="Cannot reach the daemon"):
                asked.result(60)
        with pytest.raises(HostUnreachable, match="Cannot reach the daemon"):
            host.domains()
        own.start()
        host.domains()


@contextlib.contextmanager
def events_held() -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """libvirt's event loop can be made to stand still, and to go on."""
    stands, goes = threading.Event(), threading.Event()

    def stand(timer: int, _: object) -> None:
        libvirt.virEventRemoveTimeout(timer)
        stands.set()
        goes.wait()

    def hold() -> None:
        libvirt.virEventAddTimeout(0, stand, None)
        assert stands.wait(60)

    try:
        yield hold, goes.set
    finally:
        goes.set()


def test_no_daemon_is_unreachable_and_says_so(vm: LibvirtMachine) -> None:
    where = LibvirtUri.parse(f"qemu:///system?socket={vm.folder}/none")
    with pytest.raises(HostUnreachable, match="is libvirtd running"):
        LibvirtHypervisor(where, STORE, scratch_dir=vm.folder).machines()


def test_a_scratch_without_room_is_refused(vm: LibvirtMachine) -> None:
    vm.define().start()
    found, settings = Cycle(vm).machine(), Settings(scratch_reserve_bytes=1 << 60)
    with (
        pytest.raises(SpaceExhausted),
        vm.hypervisor(settings=settings).snapshot(found, LeaseId("l"), {}, None),
    ):
        pytest.fail("A snapshot began without room")
    vm.hypervisor().release(found, LeaseId("l"), [])
    assert not vm.leftovers()


def test_a_scratch_that_runs_full_costs_the_snapshot_and_not_the_guest(tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "size=8m", "none", tmp_path)
    try:
        with daemon() as own, machine(own, formats=("qcow2",)) as vm:
            vm.define().start()
            _run_full(vm, tmp_path)
    finally:
        run("umount", "-l", tmp_path)


def _run_full(vm: LibvirtMachine, scratch: Path) -> None:
    vm.write("vda", 0, b"old" * MiB)
    hypervisor, found = (
        vm.hypervisor(scratch_dir=scratch, settings=Settings(scratch_reserve_bytes=6 * MiB)),
        Cycle(vm).machine(),
    )
    with hypervisor.snapshot(found, LeaseId("l"), {}, None) as frozen:
        vm.write("vda", 0, b"new" * MiB)
        wait_until(lambda: vm.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)
        with pytest.raises(ReadFailed, match="ran full"):
            frozen.verify()
    vm.write("vda", 0, b"yet newer" * 1000)
    hypervisor.release(found, LeaseId("l"), [])
    assert not vm.leftovers()
    assert not list(scratch.iterdir())


def test_a_backup_whose_process_was_killed_is_ended_by_its_watchdog(vm: LibvirtMachine) -> None:
    vm.define().start()
    code = (
        "import os; from tests.hypervisors.libvirtd import *; from pathlib import Path\n"
        "from hvbackup.hypervisors.libvirt import *; from hvbackup.model import LeaseId\n"
        f"h = LibvirtHypervisor(LibvirtUri.parse({vm.source().removeprefix('libvirt:')!r}), {STORE!r}, "
        f"scratch_dir=Path({str(vm.folder / 's')!r}), runtime=Path({str(vm.folder / 'r')!r}))\n"
        "f = h.snapshot(h.machines()[0], LeaseId('dead'), {}, None).__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: vm.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)
    wait_until(lambda: not list((vm.folder / "s").rglob("*.scratch")))  # whoever died needs no room
    assert vm.leftovers()
    vm.hypervisor().release(Cycle(vm).machine(), LeaseId("dead"), [])
    assert not vm.leftovers()


def test_a_machine_whose_image_is_gone_is_not_left_out_silently(vm: LibvirtMachine) -> None:
    vm.define()
    vm.path("vda").unlink()
    hypervisor = vm.hypervisor()
    [found] = hypervisor.machines()  # the others of its host are still found
    with pytest.raises(HostUnreachable, match="vda"), hypervisor.snapshot(found, LeaseId("l"), {}, None):
        pytest.fail("A snapshot of nothing began")
    hypervisor.release(found, LeaseId("l"), [])
    assert not list((vm.folder / "s").glob("*"))
