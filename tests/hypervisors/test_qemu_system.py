"""A whole QEMU machine that is never started: devices, its own monitor, no NBD server but ours."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from hvbackup.errors import HostUnreachable, UsageError
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.hypervisors.qmp import Qmp
from hvbackup.model import LeaseId, MiB
from tests.hypervisors.conformance import BLOCK, Conformance
from tests.hypervisors.daemon import SETTINGS, STORE, make_image, node, only

pytestmark = pytest.mark.real

UUID = str(uuid.uuid4())  # of this process: machines of two test processes must not share a folder


class System:
    """A paused machine; qemu-io in its own block layer plays the guest, a bytearray remembers what it did."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.qmp_path = folder / "qmp.sock"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> System:
        command = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg"]
        command += ["-m", "64", "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        command += ["-qmp", f"unix:{self.folder / 'own.sock'},server=on,wait=off", *self._arguments]
        log = (self.folder / "qemu.log").open("wb")
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder)
        log.close()
        end = time.monotonic() + 120
        while True:
            try:
                self.qmp().close()
                break
            except HostUnreachable:
                if time.monotonic() > end or self._process.poll() is not None:
                    pytest.fail((self.folder / "qemu.log").read_text())
                time.sleep(0.05)
        return self

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(120)
            self._process = None

    def qmp(self) -> Qmp:
        """The test's own monitor; the adapter has another."""
        return Qmp(self.folder / "own.sock", timeout_seconds=60)

    def hypervisor(self, **extra: Path) -> QemuHypervisor:
        return QemuHypervisor(self.qmp_path, STORE, scratch_dir=self.folder / "s", settings=SETTINGS, **extra)

    def __enter__(self) -> System:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


def blockdev(*nodes: dict[str, object]) -> list[str]:
    return [word for each in nodes for word in ("-blockdev", json.dumps(each))]


class SystemRig:
    """Two disks on one machine: qcow2, and raw with 4 KiB sectors in a thread of its own."""

    SIZES = {"vda": 32 * BLOCK, "vdb": 17 * BLOCK + 4096}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self.disks: Sequence[str] = list(self.SIZES)
        self._shadow = {disk: bytearray(size) for disk, size in self.SIZES.items()}
        first, second = folder / "a.qcow2", folder / "b.raw"
        make_image(first, self.SIZES["vda"])
        make_image(second, self.SIZES["vdb"], "raw")
        self.system = System(
            folder,
            *("-uuid", UUID, "-name", "two disks", "-smp", "2"),
            *blockdev(node("node-a", first), node("node-b", second, "raw")),
            *("-object", "iothread,id=io1"),
            *("-device", "virtio-blk-pci,drive=node-a,id=vda"),
            *(
                "-device",
                "virtio-blk-pci,drive=node-b,id=vdb,iothread=io1,logical_block_size=4096,physical_block_size=4096",
            ),
        ).start()
        self._nodes = {"vda": "node-a", "vdb": "node-b"}

    def hypervisor(self) -> QemuHypervisor:
        return self.system.hypervisor()

    def write(self, disk: str, offset: int, data: bytes) -> None:
        pattern = self.system.folder / "pattern"
        pattern.write_bytes(data)
        self._io(disk, f"write -s {pattern} {offset} {len(data)}")
        self._shadow[disk][offset : offset + len(data)] = data

    def zero(self, disk: str, offset: int, length: int) -> None:
        self._io(disk, f"write -z -u {offset} {length}")
        self._shadow[disk][offset : offset + length] = bytes(length)

    def content(self, disk: str) -> bytes:
        return bytes(self._shadow[disk])

    def resize(self, disk: str, size: int) -> None:
        with self.system.qmp() as qmp:
            qmp.command("block_resize", node_name=self._nodes[disk], size=size)
        self._shadow[disk] += bytes(size - len(self._shadow[disk]))

    def new_life(self) -> None:
        for disk in self.disks:  # or a write would be lost in QEMU's own cache, which is not the question here
            self._io(disk, "flush")
        self.system.kill()
        self.system.start()

    def add_foreign(self, disk: str) -> Callable[[], bool]:
        with self.system.qmp() as qmp:
            qmp.command("block-dirty-bitmap-add", node=self._nodes[disk], name="libvirt-1")
        return lambda: f"{disk}/libvirt-1" in self._bitmaps()

    def leftovers(self) -> Sequence[str]:
        with self.system.qmp() as qmp:
            found = [n["node-name"] for n in qmp.command("query-named-block-nodes", flat=True)]
            found += [j["id"] for j in qmp.command("query-jobs")]
            found += [e["id"] for e in qmp.command("query-block-exports")]
        files = [str(path) for path in (self.system.folder / "s").glob("*")]
        return [f for f in found if f.startswith("hvb-")] + files + [b for b in self._bitmaps() if "/hvb-" in b]

    def _bitmaps(self) -> Sequence[str]:
        disks = {name: disk for disk, name in self._nodes.items()}
        with self.system.qmp() as qmp:
            nodes = qmp.command("query-named-block-nodes", flat=True)
        return [
            f"{disks[n['node-name']]}/{b['name']}"
            for n in nodes
            for b in n.get("dirty-bitmaps", [])
            if n["node-name"] in disks and "name" in b
        ]

    def _io(self, disk: str, command: str) -> None:
        device = f"/machine/peripheral/{disk}/virtio-backend"
        with self.system.qmp() as qmp:
            said = qmp.command("human-monitor-command", command_line=f'qemu-io -d {device} "{command}"')
        assert not said  # trouble is said here, the rest goes to QEMU's own output


class TestSystem(Conformance):
    SECTOR_STEP = 4096
    EXAMPLES = 8

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Generator[SystemRig]:
        rig = SystemRig(tmp_path)
        yield rig
        rig.system.kill()


def test_what_a_machine_says_of_itself(tmp_path: Path) -> None:
    rig = SystemRig(tmp_path)
    try:
        machine = only(rig.hypervisor())
        assert (machine.id, machine.name, machine.platform) == (UUID, "two disks", "qemu")
        assert [(d.id, d.size, d.sector) for d in machine.disks] == [
            ("vda", 32 * BLOCK, 512),
            ("vdb", 17 * BLOCK + 4096, 4096),
        ]
        assert machine.disks[0].path.endswith("a.qcow2")
        with rig.hypervisor().snapshot(machine, LeaseId("l"), {}, None) as frozen:
            config = frozen.config
        native = json.loads(config.native)
        assert config.kind == "qemu-argv"
        assert native["argv"][0] == "qemu-system-x86_64"
        assert "virtio-blk-pci,drive=node-a,id=vda" in native["argv"]
        assert native["cwd"] == str(tmp_path)
        assert native["exe"].endswith("/qemu-system-x86_64")
        assert config.portable["memory_bytes"] == 64 * MiB
        assert config.portable["cpus"] == 2
        assert "q35" in config.portable["machine_type"]
        assert [(d["id"], d["node"], d["driver"]) for d in config.portable["disks"]] == [
            ("vda", "node-a", "qcow2"),
            ("vdb", "node-b", "raw"),
        ]
        assert not frozen.notes
    finally:
        rig.system.kill()


def test_the_ways_of_old_command_lines(tmp_path: Path) -> None:
    """-drive in its several forms; CD-ROMs, floppies and firmware are left out, and it is said why."""
    one, two, flash = (make_image(tmp_path / name, MiB, "raw") for name in ("one.raw", "two.raw", "flash.raw"))
    arguments = [
        *("-drive", f"file={one},format=raw,if=virtio"),
        *("-drive", f"file={two},format=raw,if=none,id=second", "-device", "ide-hd,drive=second,bus=ide.1"),
        *("-drive", f"file={flash},format=raw,if=pflash,readonly=on"),
        *("-drive", f"file={flash},format=raw,if=none,id=disc,readonly=on,file.locking=off"),
        *("-device", "ide-cd,drive=disc,id=dvd,bus=ide.2"),
        *("-device", "ide-cd,id=tray,bus=ide.3"),
        *("-device", "isa-fdc", "-device", "floppy,id=fd"),
    ]
    with System(tmp_path, *arguments) as system:
        machine = only(system.hypervisor())
        assert machine.id == f"qemu:{system.qmp_path}"
        assert machine.name == tmp_path.name  # the socket is called qmp.sock, like everybody's
        assert [disk.id for disk in machine.disks] == ["virtio0", "second"]
        with system.hypervisor().snapshot(machine, LeaseId("l"), {}, None) as frozen:
            assert [disk.disk.id for disk in frozen.disks] == ["virtio0", "second"]
            assert frozen.config.portable["skipped"] == {
                "pflash0": "read-only firmware",
                "dvd": "a CD-ROM",
                "tray": "a CD-ROM",
                "fd": "a floppy",
            }


def test_a_machine_file_is_taken_instead_of_the_process(tmp_path: Path) -> None:
    given = tmp_path / "vm.sh"
    given.write_text("# my machine\nqemu-system-x86_64 -m 64 \\\n  -name 'with space' # end\n")
    with System(tmp_path) as system:
        hypervisor = system.hypervisor(machine_file=given)
        with hypervisor.snapshot(only(hypervisor), LeaseId("l"), {}, None) as frozen:
            native = json.loads(frozen.config.native)
    assert native["argv"] == ["qemu-system-x86_64", "-m", "64", "-name", "with space"]
    assert native["cwd"] == str(tmp_path)


@pytest.mark.parametrize("text", ['{"argv": 3}', '{"arg": []}', "[1", "qemu 'unclosed"])
def test_a_machine_file_that_is_none(tmp_path: Path, text: str) -> None:
    given = tmp_path / "vm.json"
    given.write_text(text)
    with System(tmp_path) as system, pytest.raises(UsageError, match=str(given)):
        system.hypervisor(machine_file=given).machines()
