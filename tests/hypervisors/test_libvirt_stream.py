"""The write stream of a machine of libvirt: through the QMP that a real libvirtd hands on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from hvbackup.capture import Options
from hvbackup.errors import Busy, StreamBroken, UsageError
from hvbackup.model import SECOND, DiskId, Instant, LeaseId
from hvbackup.protect.events import Rhythm
from hvbackup.protect.protection import Protection
from hvbackup.protect.streaming import StreamLife
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.store import Store, init
from labs.libvirtd import Libvirtd
from tests.hypervisors.conformance import BLOCK
from tests.hypervisors.libvirtd import SIZE, LibvirtMachine, machine
from tests.hypervisors.test_libvirt_cycles import ours
from tests.protecting import in_memory

pytestmark = pytest.mark.real


@pytest.fixture
def vm(libvirtd: Libvirtd) -> Iterator[LibvirtMachine]:
    with machine(libvirtd) as made:
        yield made.define().start()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(tmp_path / "store", None)
    with in_memory(tmp_path / "rings"), Store.open(tmp_path / "store", tmp_path / "state", []) as found:
        yield found


def protection_of(store: Store, vm: LibvirtMachine, folder: Path) -> Protection:
    hypervisor = vm.hypervisor()
    [found] = hypervisor.machines()
    rhythm = Rhythm(SECOND // 10, 3600 * SECOND, stream=True, rings=(folder / "rings").resolve())
    return Protection(store, hypervisor, found, Options(), rhythm)


def begun(protection: Protection) -> StreamLife:
    life = protection.begin("a test")
    assert isinstance(life, StreamLife)
    return life


def image(history: History, moment: Moment, disk: str) -> bytes:
    view = history.view(moment, DiskId(disk))
    found = bytearray(view.disk.size)
    view.read_into(0, memoryview(found))
    return bytes(found)


def newest(store: Store, protection: Protection) -> tuple[History, Moment]:
    history = History(store, protection.setting.machine.id)
    assert history.last
    return history, history.last


def assert_is_the_disk(vm: LibvirtMachine, store: Store, protection: Protection) -> None:
    history, last = newest(store, protection)
    for disk in vm.disks:
        assert image(history, last, disk) == vm.content(disk), disk


def test_each_write_is_a_moment_and_the_next_life_goes_on(vm: LibvirtMachine, store: Store, tmp_path: Path) -> None:
    vm.write("vda", 0, b"before" * BLOCK)
    protection = protection_of(store, vm, tmp_path)
    life = begun(protection)
    assert life.how == "captured"
    first = life.newest.seq
    for number in range(6):
        vm.write(("vda", "vdb")[number % 2], number * 8192, bytes([65 + number]) * 4096)
    life.step()
    life.close()
    history, _ = newest(store, protection)
    seqs = [int(s) for s in history.moments[0] if s > first]
    held = []
    for seq in seqs[:6]:
        disks = {d: image(history, history.by_seq(seq), d) for d in vm.disks}
        held.append(sum(disks[("vda", "vdb")[n % 2]][n * 8192 :][:4096] == bytes([65 + n]) * 4096 for n in range(6)))
    assert held == [1, 2, 3, 4, 5, 6], "one more write at each moment, in their order over both disks"
    assert_is_the_disk(vm, store, protection)
    assert not ours(vm)
    assert vm.domain.listAllCheckpoints(), "libvirt was told of what is kept"
    vm.write("vda", BLOCK, b"between two lives" * 1000)
    again = begun(protection)
    assert again.how == "resumed"
    vm.write("vdb", BLOCK, b"in the second one" * 1000)
    again.step()
    again.close()
    assert_is_the_disk(vm, store, protection)
    assert not ours(vm)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "is killed"])
def test_a_target_that_hangs_or_is_killed_frees_the_guest(
    vm: LibvirtMachine, store: Store, tmp_path: Path, number: int
) -> None:
    protection = protection_of(store, vm, tmp_path)
    life = begun(protection)
    assert life.target
    vm.write("vda", 0, b"1" * 4096)
    life.step()
    os.kill(life.target.pid, number)
    vm.write("vda", 4096, b"2" * 4096)  # returns, although nobody answers
    end = time.monotonic() + 60
    with pytest.raises(StreamBroken):
        while time.monotonic() < end:
            life.step()
            time.sleep(0.05)
    with contextlib.suppress(StreamBroken):
        life.close()
    again = begun(protection)
    again.close()
    history, _ = newest(store, protection)
    gap = history.told.gaps[-1]
    before = history.newest_at(Instant(gap.start))
    assert before
    assert image(history, before, "vda")[:8192] == b"1" * 4096 + bytes(4096)
    assert_is_the_disk(vm, store, protection)
    assert not ours(vm)


def test_what_no_mirror_sends_is_refused_by_name(libvirtd: Libvirtd) -> None:
    with machine(libvirtd, formats=("qcow2",)) as vm:
        loader = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
        nvram = f"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{vm.folder}/vars.fd</nvram>"
        vm.connection.defineXML(
            vm.xml().replace("</type></os>", f"</type>{loader}{nvram}</os><features><acpi/></features>")
        )
        vm.start()
        hypervisor = vm.hypervisor()
        [found] = hypervisor.machines()
        with pytest.raises(UsageError, match=r"nvram.*--disk"):
            hypervisor.stream(found, LeaseId("l"))
        assert not vm.leftovers()


def test_jobs_of_libvirt_and_a_stream_exclude_each_other(vm: LibvirtMachine, store: Store, tmp_path: Path) -> None:
    protection = protection_of(store, vm, tmp_path)
    life = begun(protection)
    vm.write("vda", 0, b"1" * 4096)
    server = f"<server transport='unix' socket='{vm.folder / 'other.sock'}'/>"
    disk = "<disk name='vda' backup='yes' type='file'><scratch file='SCRATCH'/></disk>".replace(
        "SCRATCH", str(tmp_path / "scratch")
    )
    others = "<disk name='vdb' backup='no'/>"
    snapshot = f"<disk name='vda' snapshot='external'><source file='{tmp_path / 'above'}'/></disk>"
    no = "<disk name='vdb' snapshot='no'/>"
    for refused in (
        lambda: vm.domain.backupBegin(
            f"<domainbackup mode='pull'>{server}<disks>{disk}{others}</disks></domainbackup>", None
        ),
        lambda: vm.domain.snapshotCreateXML(
            f"<domainsnapshot><disks>{snapshot}{no}</disks></domainsnapshot>",
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY,
        ),
        lambda: vm.resize("vda", 2 * SIZE),
    ):
        with pytest.raises(libvirt.libvirtError, match=r"busy|in use|already running"):
            refused()
        vm.write("vda", 4096, b"2" * 4096)
        life.step()
    life.close()
    assert_is_the_disk(vm, store, protection)
    copy = f"<disk type='file'><source file='{tmp_path / 'copy'}'/><driver type='qcow2'/></disk>"
    vm.domain.blockCopy("vda", copy, {}, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    with pytest.raises(Busy):
        begun(protection)
    vm.domain.blockJobAbort("vda")
    vm.write("vda", 8192, b"3" * 4096)
    again = begun(protection)
    again.close()
    assert_is_the_disk(vm, store, protection)
    assert not ours(vm)
