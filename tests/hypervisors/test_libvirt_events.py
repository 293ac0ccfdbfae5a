"""What a real libvirtd tells of its machines while they live."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from hvbackup.hypervisors.libvirt_events import Event, Kind, watching
from hvbackup.hypervisors.libvirt_host import Host
from labs.libvirtd import Libvirtd, daemon, disk_xml, run
from tests.hypervisors.libvirtd import machine, wait_until

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def own() -> Iterator[Libvirtd]:
    with daemon() as made:
        yield made


def test_the_life_of_a_machine_is_told(own: Libvirtd) -> None:
    seen: list[Event] = []
    lost: list[bool] = []
    with machine(own, formats=("qcow2",)) as vm, watching(Host(own.uri), seen.append, lambda: lost.append(True)):

        def told(kind: Kind) -> Event:
            wait_until(lambda: any(e.kind is kind for e in seen))
            found = next(e for e in seen if e.kind is kind)
            assert (found.machine, found.name) == (vm.uuid, vm.name)
            seen.clear()
            return found

        vm.define()
        assert not told(Kind.DEFINED).breaks_tracking
        vm.start()
        told(Kind.STARTED)
        vm.domain.resume()
        told(Kind.RESUMED)
        vm.domain.suspend()
        told(Kind.PAUSED)
        extra = vm.folder / "extra.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", extra, "1M")
        vm.domain.attachDevice(disk_xml("vdz", extra))
        assert told(Kind.DISKS).breaks_tracking
        os.kill(vm.qemu_pid(), signal.SIGKILL)
        assert told(Kind.CRASHED).breaks_tracking
        vm.domain.undefine()
        told(Kind.REMOVED)
        assert not lost
        own.kill()
        wait_until(lambda: bool(lost))
