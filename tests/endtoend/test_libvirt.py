"""The installed program and a libvirtd: machines are backed up, lost, and defined and booted again."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from labs.libvirtd import Libvirtd, daemon, run
from tests.endtoend.rig import Installed
from tests.hypervisors.libvirtd import LibvirtMachine, guest, machine, wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]  # a busy machine without KVM


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    with daemon() as made:
        yield made


@pytest.fixture
def world() -> Iterator[Installed]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        made = Installed(Path(folder))
        made.run("init", "--no-encryption")
        yield made


class Uefi(LibvirtMachine):
    """It has variables of its firmware, a network, a channel and an identity."""

    network = "<interface type='network'><source network='old'/><mac address='52:54:00:12:34:56'/></interface>"

    def xml(self) -> str:
        loader = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
        nvram = f"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{self.folder}/vars.fd</nvram>"
        text = super().xml().replace("</type></os>", f"</type>{loader}{nvram}</os><features><acpi/></features>")
        return text.replace("</devices>", f"{self.network}</devices>")


@pytest.fixture
def uefi(libvirtd: Libvirtd) -> Iterator[LibvirtMachine]:
    with machine(libvirtd) as made:
        made.__class__ = Uefi
        yield made


def defined(vm: LibvirtMachine, name: str) -> str:
    return str(vm.connection.lookupByName(name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def disks_of(folder: Path, vm: LibvirtMachine) -> dict[str, bytes]:
    found = {}
    for disk in vm.disks:
        raw = folder / f"{disk}.check"

        run("qemu-img", "convert", "-O", "raw", folder / f"{disk}.qcow2", raw)
        found[disk] = raw.read_bytes()
    return found


def test_a_machine_comes_back_as_a_domain(uefi: LibvirtMachine, world: Installed) -> None:
    vm = uefi
    vm.define()
    (vm.folder / "vars.fd").write_bytes(Path("/usr/share/OVMF/OVMF_VARS_4M.fd").read_bytes()[:-8] + b"our mark")
    for line in ("first", "second"):
        if not vm.domain.isActive():
            with contextlib.suppress(libvirt.libvirtError):
                vm.connection.networkDefineXML("<network><name>old</name></network>")
            text = vm.xml().replace(Uefi.network, "")
            vm.connection.defineXML(text)
            vm.start()
        vm.write("vda", 0, line.encode() * 1000)
        vm.write("vdb", 1 << 20, line.encode() * 1000)
        ran = world.done("backup", vm.source(), "--json")
    shown = json.loads(ran.out)["runs"][0]
    assert {d["how"] for d in shown["point"]["disks"]} == {"incremental"}
    content = {d: vm.content(d) for d in vm.disks}
    variables = (vm.folder / "vars.fd").read_bytes()
    uri = vm.libvirtd.uri

    # beside the one that is still there: another identity, whether asked for or not
    to = world.folder / "copy"
    assert "there already" in world.refused(2, "restore", vm.name, "--to-libvirt", uri, "--to", to)
    words = ["restore", vm.name, "--to-libvirt", uri, "--to", to, "--name", f"{vm.name}-copy"]
    assert "same UUID" in world.refused(2, *words, "--keep-identity")
    assert not to.exists()
    made = json.loads(world.done(*words, "--json").out)
    assert made["defined"]["new_identity"] is True
    assert made["defined"]["uuid"] != vm.uuid
    assert disks_of(to, vm) == content
    assert (to / "nvram.raw").read_bytes() == variables
    text = defined(vm, f"{vm.name}-copy")
    assert str(to / "nvram.raw") in text
    assert str(to / "vda.qcow2") in text
    vm.connection.lookupByName(f"{vm.name}-copy").createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    vm.connection.lookupByName(f"{vm.name}-copy").destroy()

    # booted without libvirt, with its firmware and the variables of it
    booted = json.loads(world.run("boot", vm.name, "--name", "again", "--json").out)
    assert booted["state"] == "running"
    assert not any("plain machine" in note or "nvram" in note for note in booted["notes"])
    assert "pflash1" in Path(f"/proc/{booted['processes']['qemu']}/cmdline").read_text()
    world.done("discard", "again")

    # the original is lost: it comes back as itself
    vm.stop()
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    for disk in vm.disks:
        vm.path(disk).unlink()
    back = json.loads(world.done("restore", vm.name, "--to-libvirt", uri, "--to", world.folder / "back", "--json").out)
    assert back["defined"] == {"name": vm.name, "uuid": vm.uuid, "new_identity": False}
    assert disks_of(world.folder / "back", vm) == content
    vm.start()  # and is protected on: its disks are other files, so they are compared
    ran = world.run("backup", vm.source(), "--json")
    assert ran.code == 0
    shown = json.loads(ran.out)["runs"][0]
    assert {d["how"] for d in shown["point"]["disks"]} == {"compared", "incremental"}
    assert "in another file" in str(shown["notes"])


def test_networks_are_mapped_or_refused(uefi: LibvirtMachine, world: Installed) -> None:
    vm, connection = uefi, uefi.connection
    with contextlib.suppress(libvirt.libvirtError):
        connection.networkDefineXML("<network><name>old</name></network>")
    connection.networkDefineXML("<network><name>new</name></network>")
    vm.define()
    world.done("backup", vm.source())  # off
    connection.networkLookupByName("old").undefine()
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    words = ["restore", vm.name, "--to-libvirt", vm.libvirtd.uri, "--to", world.folder / "back"]
    assert "Say which one to use with --network old=NAME" in world.refused(2, *words)
    assert "no network nowhere" in world.refused(2, *words, "--network", "old=nowhere")
    assert not (world.folder / "back").exists()
    world.done(*words, "--network", "old=new")
    text = defined(vm, vm.name)
    assert "<source network='new'/>" in text
    assert "52:54:00:12:34:56" in text
    assert "belong to --to-libvirt" in world.refused(2, "restore", vm.name, "--to", world.folder / "x", "--name", "y")


@pytest.mark.guest
def test_a_guest_of_libvirt_is_booted_from_its_point(libvirtd: Libvirtd, world: Installed) -> None:
    with guest(libvirtd) as vm:
        wait_until(lambda: "state='connected'" in vm.domain.XMLDesc(), 60)
        vm.sh("echo a moment to remember | dd of=/dev/vdb conv=fsync")
        world.done("backup", vm.source(), "--consistency", "crash")
        booted = json.loads(world.run("boot", vm.name, "--name", "again", "--json").out)
        try:
            assert booted["state"] == "running"
            assert not any("plain machine" in note for note in booted["notes"])
        finally:
            world.done("discard", "again")


def test_a_machine_under_protection_whose_worker_is_killed(libvirtd: Libvirtd, world: Installed) -> None:
    with machine(libvirtd, formats=("qcow2",)) as vm:
        vm.define().start()
        moments: list[tuple[int, bytes]] = []
        for life in range(2):
            worker = world.start("protect", vm.source(), "--every", "500ms", "--json")
            assert worker.stdout
            waiting = False  # for the moment of what was written last: one before it may be told after it
            while len(moments) < 3 * (life + 1):
                event = json.loads(worker.stdout.readline())
                if event["event"] != "moment":
                    continue
                if event["read_bytes"] > 0:
                    waiting = False
                elif not waiting:
                    moments.append((event["seq"], vm.content("vda")))  # nothing was written since
                    vm.write("vda", len(moments) * 65536, b"moment %d" % len(moments) * 100)
                    waiting = True
            worker.kill()
            worker.communicate()
        vm.write("vda", 20 * 65536, b"unprotected" * 100)
        ran = json.loads(world.run("backup", vm.source(), "--json").out)["runs"][0]
        assert [d["how"] for d in ran["point"]["disks"]] == ["incremental"]
        assert len([name for name in vm.leftovers() if "safe" in name]) == len(vm.leftovers()) <= 2
        for seq, content in moments:
            to = world.folder / f"{seq}.raw"
            world.run("restore", vm.name, "--at", f"seq:{seq}", "--disk", "vda", "--to", to)
            assert to.read_bytes() == content
