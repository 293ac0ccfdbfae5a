"""The write stream of a booted guest under a real libvirtd, whose worker is killed, and whose QEMU is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from hvbackup.errors import JournalGap
from hvbackup.model import SECOND, DiskId, Instant, MiB
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.store import Store, init
from labs.libvirtd import Libvirtd
from tests.hypervisors.libvirtd import LibvirtGuest, guest, wait_until
from tests.hypervisors.test_libvirt_cycles import ours
from tests.hypervisors.test_libvirt_guest import witnessed
from tests.hypervisors.test_libvirt_stream import image
from tests.test_stream_kills import StreamWorker, gap_of_the_last_life, last_recorded

pytestmark = [pytest.mark.real, pytest.mark.guest, pytest.mark.timeout(600)]
FSYNC_NS = SECOND // 5  # twice as long as what `--fsync` promises by default


@pytest.fixture
def vm(libvirtd: Libvirtd) -> Iterator[LibvirtGuest]:
    with guest(libvirtd, formats=["qcow2", "qcow2"], size=32 * MiB) as made:
        yield made


def held(vm: LibvirtGuest, history: History, moment: Moment) -> int:
    """How many of the guest's writes a moment holds; an exact prefix over both disks, or an assertion fails."""
    return witnessed(vm.folder, {DiskId(d): bytearray(image(history, moment, d)) for d in vm.disks})


def test_a_killed_worker_costs_a_gap_and_nothing_that_was_answered(vm: LibvirtGuest) -> None:
    init(vm.folder / "store", None)
    vm.start_writer("/dev/vda", "/dev/vdb", options=f"-s {24 * MiB}")
    vm.wait_acked(20)
    worker = StreamWorker(vm.folder, vm.source())
    worker.wait_for("begun")
    acked = vm.wait_acked(vm.acked() + 50)
    known_at = time.time_ns()
    time.sleep(2.5 * FSYNC_NS / SECOND)
    at_the_end = vm.wait_acked(vm.acked() + 2)
    worker.end(signal.SIGKILL)
    vm.wait_acked(vm.acked() + 50)  # nobody of ours is there, and the guest goes on
    again = StreamWorker(vm.folder, vm.source())
    again.wait_for("begun")
    vm.wait_acked(vm.acked() + 20)
    vm.sh("kill $(cat /tmp/writer.pid); sync")
    vm.domain.suspend()
    again.wait_for("moment", 2 + sum(e["event"] == "moment" for e in again.events))
    shown = again.run("timeline", "m1", "--json").stdout
    assert again.end(signal.SIGTERM) == 0
    assert not ours(vm)
    with Store.open(vm.folder / "store", vm.folder / "state2", []) as store:
        history = History(store, next(iter(store.points())).machine.id)
        gap, before = gap_of_the_last_life(history), last_recorded(history)
        assert gap.why in shown
        with pytest.raises(JournalGap):
            history.at(Instant((gap.start + gap.end) // 2))
        moment = history.newest_at(Instant(known_at + FSYNC_NS))
        assert moment
        assert moment.seq < before.seq
        assert acked <= held(vm, history, moment) <= held(vm, history, before)
        assert at_the_end <= held(vm, history, before), "the ring outlived the worker"
        assert history.last
        assert held(vm, history, history.last) >= vm.acked()
        for disk in vm.disks:
            assert image(history, history.last, disk) == vm.content(disk), disk


def test_a_killed_machine_is_protected_again_once_somebody_starts_it(vm: LibvirtGuest) -> None:
    """The same worker waits for it.  Everything that QEMU had answered is there, and what nobody recorded is a gap."""
    init(vm.folder / "store", None)
    vm.start_writer("/dev/vda", "/dev/vdb", options=f"-s {24 * MiB}")
    worker = StreamWorker(vm.folder, vm.source())
    worker.wait_for("begun", seconds=90)
    vm.wait_acked(vm.acked() + 50)
    os.kill(vm.qemu_pid(), signal.SIGKILL)
    wait_until(lambda: not vm.domain.isActive())
    acked = vm.acked()
    worker.wait_for("trouble", 2)  # one when it died, one while it is off
    vm.start()
    worker.wait_for("begun", 2, seconds=90)
    vm.sh("for d in vda vdb; do dd if=/dev/zero of=/dev/$d bs=1M count=32 conv=fsync 2>/dev/null; done")
    vm.start_writer("/dev/vda", "/dev/vdb", options=f"-s {24 * MiB}")
    vm.wait_acked(30)
    vm.sh("kill $(cat /tmp/writer.pid); sync")
    vm.domain.suspend()
    worker.wait_for("moment", 2 + sum(e["event"] == "moment" for e in worker.events))
    shown = worker.run("timeline", "m1", "--json").stdout
    assert worker.end(signal.SIGTERM) == 0
    assert not ours(vm)
    begun = worker.of("begun")
    assert [e["how"] for e in begun] == ["captured", "captured"], "its bitmaps died with it: everything was compared"
    with Store.open(vm.folder / "store", vm.folder / "state2", []) as store:
        history = History(store, next(iter(store.points())).machine.id)
        gap, before = gap_of_the_last_life(history), last_recorded(history)
        assert gap.why in shown
        assert acked <= held(vm, history, before) <= acked + 1, (
            "whatever was answered, and one write that may not have been"
        )
        for one in history.told.gaps[-2:]:
            with pytest.raises(JournalGap):
                history.at(Instant((one.start + one.end) // 2))
        assert history.last
        assert held(vm, history, history.last) >= vm.acked() >= 30
        for disk in vm.disks:
            assert image(history, history.last, disk) == vm.content(disk), disk
