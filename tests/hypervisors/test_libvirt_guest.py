"""Real guests under a real libvirtd: a witness that writes, and an agent that freezes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import libvirt
import pytest

from hvbackup.errors import Busy, UsageError
from hvbackup.hypervisors import Frozen
from hvbackup.hypervisors.libvirt_host import Domain
from hvbackup.hypervisors.qemu_freeze import LIMIT_SECONDS, Freezing
from hvbackup.model import Consistency, Continuity, DiskId, LeaseId, MiB
from labs.guest import verify_on_host
from labs.libvirtd import Libvirtd
from tests.hypervisors.conformance import Cycle
from tests.hypervisors.libvirtd import LibvirtGuest, guest, wait_until

pytestmark = [pytest.mark.real, pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def vm(libvirtd: Libvirtd) -> Iterator[LibvirtGuest]:
    with guest(libvirtd, formats=["qcow2"] * 4, size=32 * MiB, file_systems=["vdc", "vdd"]) as made:
        wait_until(lambda: "state='connected'" in made.domain.XMLDesc(), 240)
        yield made


@pytest.fixture
def mounted(vm: LibvirtGuest) -> Iterator[LibvirtGuest]:
    """Two file systems, and nothing frozen in the end."""
    vm.sh("for d in vdc vdd; do mkdir -p /mnt/$d && mount /dev/$d /mnt/$d; done")
    yield vm
    vm.sh("umount /mnt/vdc /mnt/vdd")
    vm.hypervisor().release(Cycle(vm).machine(), None, [])


def witnessed(folder: Path, images: Mapping[DiskId, bytearray]) -> int:
    paths = []
    for disk, image in ((d, images[d]) for d in (DiskId("vda"), DiskId("vdb"))):
        paths.append(folder / f"{disk}.image")
        paths[-1].write_bytes(image)
    return verify_on_host(*paths)


def test_every_snapshot_holds_exactly_the_first_writes(vm: LibvirtGuest) -> None:
    cycle = Cycle(vm)
    vm.start_writer("/dev/vda", "/dev/vdb", options=f"-s {24 * MiB}")
    numbers = []
    for _ in range(4):
        before = vm.wait_acked(vm.acked() + 20)
        after: list[int] = []

        def note_acked(frozen: Frozen, after: list[int] = after) -> None:
            after.append(vm.acked())
            vm.wait_acked(after[0] + 20)  # so much is written while the snapshot is read

        cycle.capture(note_acked)
        numbers.append(witnessed(vm.folder, cycle.images))
        assert before <= numbers[-1] <= after[0] + 1
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
    assert numbers == sorted(set(numbers))
    vm.sh("kill $(cat /tmp/writer.pid)")
    vm.hypervisor().release(cycle.machine(), None, [])


def test_a_guest_stands_still_for_the_moment_and_no_longer(mounted: LibvirtGuest) -> None:
    hypervisor, found = mounted.hypervisor(), Cycle(mounted).machine()
    with hypervisor.snapshot(found, LeaseId("l"), {}, None) as frozen:
        assert frozen.consistency is Consistency.FILESYSTEM
        assert frozen.standstill.filesystems == 2
        assert 0 < frozen.standstill.frozen_seconds < LIMIT_SECONDS  # less than one, where the host has time
        assert "--consistency application" in frozen.standstill.remark
        assert not frozen.notes
        mounted.sh("echo goes on >/mnt/vdc/f && sync")
    some = mounted.hypervisor(freezing=Freezing(excluded=["/mnt/vdd"]))
    hypervisor.release(found, None, [])
    with some.snapshot(found, LeaseId("l2"), {}, Consistency.FILESYSTEM) as frozen:
        assert frozen.standstill.filesystems == 1
        assert frozen.notes == ["Mountpoint /mnt/vdd was not frozen, as asked"]


def test_application_consistency_takes_a_hook_in_the_guest(mounted: LibvirtGuest) -> None:
    """The lab guest has one of its own."""
    with mounted.hypervisor().snapshot(Cycle(mounted).machine(), LeaseId("l"), {}, Consistency.APPLICATION) as frozen:
        assert frozen.consistency is Consistency.APPLICATION
    excluding = mounted.hypervisor(freezing=Freezing(excluded=["/mnt/vdd"]))
    with (
        pytest.raises(UsageError, match="filesystem-consistent"),
        excluding.snapshot(Cycle(mounted).machine(), LeaseId("l2"), {}, Consistency.APPLICATION),
    ):
        pytest.fail("An application-consistent snapshot began")


def test_a_guest_that_somebody_else_froze_is_theirs(mounted: LibvirtGuest) -> None:
    mounted.domain.fsFreeze()
    try:
        found = Cycle(mounted).machine()
        with (
            pytest.raises(Busy, match="frozen already"),
            mounted.hypervisor().snapshot(found, LeaseId("l"), {}, Consistency.FILESYSTEM),
        ):
            pytest.fail("A snapshot began")
        with mounted.hypervisor().snapshot(found, LeaseId("l2"), {}, None) as frozen:
            assert frozen.consistency is Consistency.CRASH
            assert "frozen already" in frozen.notes[0]
    finally:
        assert mounted.domain.fsThaw() == 2  # we did not


def test_the_guard_thaws_when_we_die(mounted: LibvirtGuest) -> None:
    guard = [sys.executable, "-m", "hvbackup.hypervisors.libvirt_guard", mounted.libvirtd.uri, mounted.uuid, "30"]
    marker = mounted.folder / "frozen"
    process = subprocess.Popen([*guard, str(marker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    assert b"ready" in process.stdout.readline()
    process.stdin.write(b"f")
    process.stdin.flush()
    assert b'"frozen": 2' in process.stdout.readline()
    assert marker.exists()
    process.stdin.close()  # as if we had been killed
    assert process.wait(120) == 0
    assert not marker.exists()
    mounted.sh("echo goes on >/mnt/vdc/f && sync")


def test_release_thaws_what_a_guard_that_was_killed_left_frozen(mounted: LibvirtGuest) -> None:
    hypervisor, found = mounted.hypervisor(), Cycle(mounted).machine()
    snapshot = hypervisor.snapshot(found, LeaseId("dead"), {}, Consistency.CRASH)
    snapshot.__enter__()
    [folder] = (mounted.folder / "s").iterdir()
    (folder / "frozen").touch()
    mounted.domain.fsFreeze()
    hypervisor.release(found, LeaseId("dead"), [])
    assert mounted.domain.fsThaw() == 0  # nothing was frozen any more
    mounted.sh("echo goes on >/mnt/vdc/f && sync")
    del snapshot


def test_an_agent_that_hangs_costs_little_and_is_said(mounted: LibvirtGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Domain.filesystems

    def hasty(domain: Domain) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(domain.host, "_reply_seconds", 4.0)
            return asked(domain)

    monkeypatch.setattr(Domain, "filesystems", hasty)
    mounted.sh("kill -STOP $(pidof qemu-ga)")
    try:
        found = Cycle(mounted).machine()
        with mounted.hypervisor().snapshot(found, LeaseId("l"), {}, None) as frozen:
            assert frozen.consistency is Consistency.CRASH
            assert "No answer within" in frozen.notes[0] or "agent" in frozen.notes[0]
    finally:
        mounted.sh("kill -CONT $(pidof qemu-ga)")
        wait_until(lambda: _answers(mounted), 240)


def _answers(vm: LibvirtGuest) -> bool:
    try:
        return bool(vm.domain.fsInfo() is not None)
    except libvirt.libvirtError:
        return False
