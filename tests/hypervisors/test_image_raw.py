"""Raw files and block devices, read directly."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from hvbackup import extents
from hvbackup.errors import Busy, HostUnreachable, NotFound, ReadFailed, UsageError
from hvbackup.hypervisors import rawfile
from hvbackup.hypervisors.changedlist import MARK
from hvbackup.hypervisors.image import ImageSpec
from hvbackup.hypervisors.rawfile import RawFile
from hvbackup.model import Consistency, Continuity, DiskId, LeaseId, Machine, MachineId, MiB
from tests.hypervisors.imagerig import content, frozen, loop_device, poke, run, running_machine, runtime, source

ODD_SIZES = [0, 1, 511, 513, 4097, 65535, 65537, 3 * MiB + 123]


@pytest.fixture
def run_folder() -> Generator[Path]:
    with runtime() as folder:
        yield folder


def filled(path: Path, size: int) -> bytes:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    path.write_bytes(data)
    return data


def sparse(path: Path, size: int, *pieces: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path


@pytest.mark.parametrize("size", ODD_SIZES)
def test_every_size_is_read_to_its_last_byte(tmp_path: Path, run_folder: Path, size: int) -> None:
    data = filled(tmp_path / "vm.raw", size)
    with frozen(source(run_folder, tmp_path / "vm.raw")) as found:
        [disk] = found.disks
        assert (disk.disk.size, disk.disk.sector, disk.disk.id) == (size, 512, "vm")
        changes = disk.changes(None)
        assert changes.continuity is Continuity.UNKNOWN
        assert np.array_equal(extents.union(changes.data, changes.zero), extents.whole(size))
        assert content(disk) == content(disk, changes.data) == data
        assert found.verify() == []
    assert not run_folder.exists()  # a raw disk needs no server


def test_holes_are_not_read(tmp_path: Path, run_folder: Path) -> None:
    path = sparse(tmp_path / "vm.raw", 8 * MiB + 5, (MiB, b"a" * 65536), (8 * MiB, b"tail!"))
    with frozen(source(run_folder, path)) as found:
        changes = found.disks[0].changes(None)
        assert extents.total(changes.data) <= 3 * 65536
        assert content(found.disks[0], changes.data) == path.read_bytes()


def test_preallocated_space_is_correct_whatever_the_file_system_calls_it(tmp_path: Path, run_folder: Path) -> None:
    path = tmp_path / "vm.raw"
    run("fallocate", "-l", str(4 * MiB), path)
    with path.open("r+b") as file:
        file.seek(2 * MiB)
        file.write(b"x" * 5000)
    with frozen(source(run_folder, path)) as found:
        changes = found.disks[0].changes(None)
        assert content(found.disks[0], changes.data) == path.read_bytes()


def test_64_tib_of_nothing_take_no_time(run_folder: Path) -> None:
    size = 64 << 40
    path = sparse(Path("/dev/shm") / f"hvb-{os.getpid()}.raw", size, (size - 4096, b"end!"), (1 << 45, b"middle"))
    try:
        with frozen(source(run_folder, path)) as found:
            [disk] = found.disks
            changes = disk.changes(None)
            assert disk.disk.size == size
            assert extents.total(changes.data) <= 2 * 2 * MiB
            buffer = bytearray(4)
            disk.open().read_into(size - 4096, memoryview(buffer))
            assert buffer == b"end!"
    finally:
        path.unlink()


@pytest.mark.real
@pytest.mark.parametrize("sector", [512, 4096])
def test_block_devices_have_their_own_sectors(tmp_path: Path, run_folder: Path, sector: int) -> None:
    data = filled(tmp_path / "backing", 4 * MiB + 4096)
    with loop_device(tmp_path / "backing", sector) as device, frozen(source(run_folder, device)) as found:
        [disk] = found.disks
        assert (disk.disk.size, disk.disk.sector, disk.disk.path) == (len(data), sector, str(device))
        assert found.machine.id == str(device)
        changes = disk.changes(None)
        assert content(disk, changes.data) == data
        assert found.verify() == []
        with device.open("r+b") as file:
            file.write(b"new")
            file.flush()
            os.fsync(file.fileno())
        assert "was written to while it was read" in found.verify()[0]


@pytest.mark.real
def test_a_device_that_is_part_of_something_larger_is_said(tmp_path: Path, run_folder: Path) -> None:
    filled(tmp_path / "backing", MiB)
    with loop_device(tmp_path / "backing", 512) as device:
        holder = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount or a volume group holds it
        try:
            with frozen(source(run_folder, device)) as found:
                assert "mounted or in use" in found.verify()[0]
        finally:
            os.close(holder)


@pytest.mark.real
def test_a_device_that_fails_is_named_with_the_place(tmp_path: Path, run_folder: Path) -> None:
    filled(tmp_path / "backing", 4 * MiB)
    with loop_device(tmp_path / "backing", 512) as device, frozen(source(run_folder, device)) as found:
        os.truncate(tmp_path / "backing", MiB)
        os.posix_fadvise(os.open(device, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(ReadFailed, match=rf"{device}: \d+ bytes at .* can't be read: Input/output error"):
            content(found.disks[0])


def test_a_disk_that_shrinks_is_named_and_gives_no_point(tmp_path: Path, run_folder: Path) -> None:
    filled(tmp_path / "vm.raw", 3 * MiB)
    with frozen(source(run_folder, tmp_path / "vm.raw")) as found:
        os.truncate(tmp_path / "vm.raw", MiB)
        with pytest.raises(ReadFailed, match=rf"vm\.raw shrank to {MiB} bytes"):
            content(found.disks[0])
        with pytest.raises(ReadFailed, match=r"vm\.raw shrank"):
            found.verify()


def test_a_disk_that_vanishes_is_read_to_its_end(tmp_path: Path, run_folder: Path) -> None:
    data = filled(tmp_path / "vm.raw", 3 * MiB)
    with frozen(source(run_folder, tmp_path / "vm.raw")) as found:
        (tmp_path / "vm.raw").unlink()
        filled(tmp_path / "vm.raw", 77)
        assert content(found.disks[0]) == data
        assert found.verify() == []


@pytest.mark.parametrize(("grow", "word"), [(0, "was written to"), (1, "grew")])
def test_a_file_that_changes_is_noted(tmp_path: Path, run_folder: Path, grow: int, word: str) -> None:
    path = tmp_path / "vm.raw"
    filled(path, MiB)
    os.utime(path, ns=(1, 1))
    with frozen(source(run_folder, path)) as found:
        with path.open("r+b") as file:
            file.seek(MiB - 1 + grow)
            file.write(b"!")
        [note] = found.verify()
        assert f"{path} {word}" in note
        assert "may mix moments" in note


@pytest.mark.real
def test_a_running_machine_is_refused_and_none_starts_meanwhile(tmp_path: Path, run_folder: Path) -> None:
    path = tmp_path / "vm.raw"
    filled(path, MiB)
    hypervisor = source(run_folder, path)
    with running_machine(path, "raw"), pytest.raises(Busy, match=r"vm\.raw is in use by a running machine.*qemu:/"):
        hypervisor.machines()
    with frozen(hypervisor), pytest.raises(subprocess.CalledProcessError) as refused:
        poke(path, "write 0 512", format_="raw")
    assert 'Failed to get "write" lock' in refused.value.stderr
    poke(path, "write 0 512", format_="raw")


def test_locks_last_until_the_file_is_closed(tmp_path: Path) -> None:
    filled(tmp_path / "vm.raw", 10)
    file = RawFile(tmp_path / "vm.raw")
    reader = file.open()
    reader.close()
    reader.close()
    writer = os.open(tmp_path / "vm.raw", os.O_RDWR)
    assert rawfile._is_held(writer, 201)
    file.close()
    file.close()
    assert not rawfile._is_held(writer, 201)
    os.close(writer)


def test_several_disks_are_one_machine(tmp_path: Path, run_folder: Path) -> None:
    paths = [tmp_path / "a" / "root.raw", tmp_path / "b" / "root.raw", tmp_path / "data.raw"]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        filled(path, 1000 + number)
    [machine] = source(run_folder, *paths).machines()
    assert machine.id == str(paths[0])
    assert machine.name == "root"
    assert [(d.id, d.size) for d in machine.disks] == [("root", 1000), ("root-2", 1001), ("data", 1002)]


def test_a_link_leads_to_the_same_machine(tmp_path: Path, run_folder: Path) -> None:
    filled(tmp_path / "vm.raw", 10)
    (tmp_path / "link.raw").symlink_to(tmp_path / "vm.raw")
    [machine] = source(run_folder, tmp_path / "link.raw").machines()
    assert machine.id == str(tmp_path / "vm.raw")


def test_a_list_of_changes_counts_from_the_second_point_on(tmp_path: Path, run_folder: Path) -> None:
    path = sparse(tmp_path / "vm.raw", 4 * MiB, (0, b"a" * 65536), (MiB, b"b" * 65536))
    listed = tmp_path / "changed"
    listed.write_text(f"{MiB} 4096\n{2 * MiB} 65536\n")
    with frozen(source(run_folder, path)) as found:
        token = found.disks[0].token
        assert token is not None
        assert token.kind == MARK
    hypervisor = source(run_folder, ImageSpec(path, changed=listed))
    with frozen(hypervisor, {DiskId("vm"): token}) as found:
        assert found.disks[0].changes(None).continuity is Continuity.UNKNOWN
        changes = found.disks[0].changes(token)
        assert changes.continuity is Continuity.INCREMENTAL
        assert changes.data.tolist() == [[MiB, 4096]]
        assert changes.zero.tolist() == [[2 * MiB, 65536]]
    with frozen(source(run_folder, path), {DiskId("vm"): token}) as found:
        changes = found.disks[0].changes(token)
        assert (changes.continuity, changes.reason) == (Continuity.UNKNOWN, "")


def test_a_guests_fake_header_is_read_as_bytes_and_noted(tmp_path: Path, run_folder: Path) -> None:
    path = sparse(tmp_path / "vm.raw", MiB, (0, b"QFI\xfb\0\0\0\3"))
    with frozen(source(run_folder, path)) as found:
        assert content(found.disks[0]) == path.read_bytes()
        assert "read as raw" in found.notes[0]


def test_what_cannot_be_done_is_refused(tmp_path: Path, run_folder: Path) -> None:
    filled(tmp_path / "vm.raw", 10)
    hypervisor = source(run_folder, tmp_path / "vm.raw")
    [machine] = hypervisor.machines()
    with (
        pytest.raises(UsageError, match="crash"),
        hypervisor.snapshot(machine, LeaseId("l"), {}, Consistency.FILESYSTEM),
    ):
        pytest.fail("A filesystem-consistent snapshot began")
    gone = Machine(MachineId("/elsewhere"), "gone", "image")
    with pytest.raises(NotFound, match="gone"), hypervisor.snapshot(gone, LeaseId("l"), {}, None):
        pytest.fail("A snapshot of another machine began")
    (tmp_path / "vm.raw").unlink()
    with pytest.raises(NotFound, match="There is no disk"):
        hypervisor.machines()
    hypervisor.release(machine, None, [])


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "vm.raw", 10)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rawfile.os, "open", refuse)
    with pytest.raises(HostUnreachable, match=r"vm\.raw can't be opened: Permission denied"):
        RawFile(tmp_path / "vm.raw")
