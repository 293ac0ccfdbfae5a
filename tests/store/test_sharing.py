"""Several processes write one store: side by side while they add, alone while one removes, one at a time on a machine."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvbackup.capture import Options, capture
from hvbackup.errors import Busy
from hvbackup.files import Files
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import MachineId
from hvbackup.store.store import Store, init

FORK = multiprocessing.get_context("spawn")
BLOCK = 65536
DISK = 24 * BLOCK


def opened(folder: Path, *, owner: bool = False) -> Store:
    return Store.open(folder / "store", folder / "state", [], owner=owner)


def fake(number: int) -> FakeHypervisor:
    disk = FakeDisk(DISK)
    disk.write(0, random.Random(number // 2).randbytes(DISK))
    return FakeHypervisor([FakeMachine(f"m{number}", {"vda": disk})])


def capture_one(folder: Path, number: int) -> None:
    hypervisor = fake(number)
    with opened(folder) as store:
        for _ in range(4):
            [machine] = hypervisor.machines()
            with store.holding(machine.id), store.writing:
                capture(store, hypervisor, machine, Options())
            disk = hypervisor.machine(machine.id).disks["vda"]
            disk.write(random.Random(number).randrange(20) * BLOCK, os.urandom(BLOCK))


def in_processes(work: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
    started = [FORK.Process(target=work, args=a) for a in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0


@pytest.mark.walk
def test_captures_of_several_processes_make_one_whole_store(tmp_path: Path) -> None:
    """Of equal and different content, with one chain of records, and nothing lost between them."""
    init(tmp_path / "store", None)
    in_processes(capture_one, *((tmp_path, n) for n in range(4)))
    with opened(tmp_path, owner=True) as store:
        from hvbackup.store.check.check import check

        report = check(store, deep=True)
        assert report.problems == []
        assert report.points == 16
        kinds = [record.value["kind"] for record in store.runs]
        assert kinds.count("capture") == 16
        assert len(store.files.names("runs")) == 1


def test_who_adds_and_who_owns_exclude_each_other_and_name_each_other(tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    with opened(tmp_path) as adding, opened(tmp_path) as beside, adding.writing, beside.writing:
        with adding.writing:
            pass  # once more by the same thread
        with pytest.raises(Busy, match=f"process {os.getpid()}"), opened(tmp_path, owner=True):
            pass
    with opened(tmp_path, owner=True) as owner, opened(tmp_path) as adding:
        with owner.writing:
            pass  # the owner may add as well
        adding.writing.wait_seconds = 0.2
        with pytest.raises(Busy, match=f"process {os.getpid()}"), adding.writing:
            pass
        assert not adding.writing.held
    with opened(tmp_path, owner=True):
        pass


def test_a_pack_that_an_owner_removed_is_not_referred_to(tmp_path: Path) -> None:
    """A process that stays open between two points must not believe what its index said at the first."""
    init(tmp_path / "store", None)
    hypervisor = fake(1)
    [machine] = hypervisor.machines()
    with opened(tmp_path) as store:
        with store.writing:
            first = capture(store, hypervisor, machine, Options()).point
        assert first is not None
        with opened(tmp_path, owner=True) as owner:
            for path in sorted((tmp_path / "store/packs").rglob("*.pack")):
                path.unlink()
            owner.files.remove(owner.path_of(first))
        with store.writing:
            second = capture(store, hypervisor, machine, Options()).point
        assert second is not None
        found = bytearray(DISK)
        store.view(second.disks[0]).read_into(0, memoryview(found))
        assert found == random.Random(0).randbytes(DISK)


def test_a_machine_has_one_writer(tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    with opened(tmp_path) as one, opened(tmp_path) as other, one.holding(MachineId("m")):
        with pytest.raises(Busy, match=f"Machine m is in use by process {os.getpid()}"), other.holding(MachineId("m")):
            pass
        with other.holding(MachineId("n")):
            pass


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    files = Files(tmp_path)
    with files.new() as unfinished:
        unfinished.write(b"abc")
        assert Files(tmp_path).sweep() == 0
        unfinished.commit("whole")
    assert files.read("whole") == b"abc"
