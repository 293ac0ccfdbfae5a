"""A machine with an emulated TPM: its state comes along, and works again in another machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvbackup.hypervisors.libvirt_sidecar import TPM, unpack_tpm
from hvbackup.model import Continuity, LeaseId
from labs.libvirtd import Libvirtd
from tests.hypervisors.conformance import whole
from tests.hypervisors.libvirtd import LibvirtMachine, machine

pytestmark = pytest.mark.real

DEVICE = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def state_of(vm: LibvirtMachine) -> Path:
    return vm.libvirtd.folder / "lib/swtpm" / vm.uuid


def files(folder: Path) -> dict[str, bytes]:
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def test_the_state_of_a_tpm_comes_along(libvirtd: Libvirtd, tmp_path: Path) -> None:
    with machine(libvirtd, formats=("qcow2",), extra=DEVICE) as vm:
        vm.define()
        hypervisor = vm.hypervisor()
        [never_ran] = hypervisor.machines()
        assert [d.id for d in never_ran.disks] == ["vda"]
        vm.start()
        [found] = hypervisor.machines()
        with hypervisor.snapshot(found, LeaseId("l"), {}, None) as frozen:
            assert not frozen.notes
            disk = next(d for d in frozen.disks if d.disk.id == TPM)
            data, token = whole(disk), disk.token
            assert disk.changes(token).continuity is Continuity.INCREMENTAL
            assert len(disk.changes(token).data) == 0
        hypervisor.release(found, LeaseId("l"), [])
        unpack_tpm(data, tmp_path / "back")
        assert files(tmp_path / "back") == files(state_of(vm)) != {}
    with machine(libvirtd, formats=("qcow2",), extra=DEVICE) as again:
        again.define()
        unpack_tpm(data, state_of(again))
        again.start()  # swtpm takes it
        assert files(state_of(again))


def test_a_tar_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    import io
    import tarfile

    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as tar:
        member = tarfile.TarInfo("../outside")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(OSError, match="outside its folder"):
        unpack_tpm(into.getvalue(), tmp_path / "f")
    assert not (tmp_path / "outside").exists()
