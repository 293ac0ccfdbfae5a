"""Machines of a libvirtd of the tests' own.  QEMU's own block layer plays the guest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import textwrap
import time
import uuid as uuids
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from hvbackup.hypervisors.libvirt import LibvirtHypervisor, Settings
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.model import MiB
from labs.guest import Console, acked_numbers, build, make_disk
from labs.libvirtd import Libvirtd, disk_xml, run

STORE = "00c0ffee"
SIZE = 4 * MiB


class LibvirtMachine:
    """A paused machine whose guest is QEMU's own block layer; what the suite calls a rig."""

    def __init__(
        self,
        libvirtd: Libvirtd,
        folder: Path,
        *,
        name: str = "",
        uuid: str = "",
        formats: Sequence[str] = ("qcow2", "qcow2"),
        extra: str = "",
        size: int = SIZE,
        file_systems: Sequence[str] = (),
    ) -> None:
        self.libvirtd, self.folder = libvirtd, folder
        self.uuid = uuid or str(uuids.uuid4())
        self.name = name or f"m-{self.uuid[:8]}"
        self.disks: Sequence[str] = tuple(f"vd{chr(97 + i)}" for i in range(len(formats)))
        self.formats = dict(zip(self.disks, formats, strict=True))
        self.connection = libvirtd.connection()
        self.extra = extra
        folder.mkdir(parents=True, exist_ok=True)
        for disk, driver in self.formats.items():
            run("qemu-img", "create", "-q", "-f", driver, self.path(disk), str(size))
            if disk in file_systems:
                make_disk(self.path(disk), size, driver)

    def path(self, disk: str) -> Path:
        return self.folder / f"{self.name}-{disk}.{self.formats[disk]}"

    def xml(self) -> str:
        disks = "".join(disk_xml(d, self.path(d), f) for d, f in self.formats.items())
        return textwrap.dedent(
            f"""
            <domain type='qemu'><name>{self.name}</name><uuid>{self.uuid}</uuid>
            <memory unit='MiB'>64</memory><vcpu>1</vcpu>
            <os><type arch='x86_64' machine='q35'>hvm</type></os>
            <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}{self.extra}</devices></domain>
            """
        )

    def define(self) -> LibvirtMachine:
        self.connection.defineXML(self.xml())
        return self

    def start(self) -> LibvirtMachine:
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        return self

    def create(self) -> LibvirtMachine:
        """A transient machine runs."""
        self.connection.createXML(self.xml(), libvirt.VIR_DOMAIN_START_PAUSED)
        return self

    def stop(self) -> None:
        """QEMU closes its images in good order."""
        if self.domain.isActive():
            self.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    @property
    def domain(self) -> libvirt.virDomain:
        return self.connection.lookupByUUIDString(self.uuid)

    def source(self, **options: str) -> str:
        """What `hvbackup` is told."""
        more = "".join(f"&{key}={value}" for key, value in options.items())
        return f"libvirt:{self.libvirtd.uri}&domain={self.uuid}{more}"

    def hypervisor(self, **options: Any) -> LibvirtHypervisor:
        where = LibvirtUri.parse(self.source().removeprefix("libvirt:"))
        settings = Settings(60.0, 60.0, 1 * MiB, self.libvirtd.folder / "lib")
        given = {"scratch_dir": self.folder / "s", "runtime": self.folder / "r", "settings": settings, **options}
        return LibvirtHypervisor(where, STORE, **given)

    # the guest

    def io(self, disk: str, command: str) -> None:
        """qemu-io on the device, inside QEMU."""
        device = self.qdev(disk)
        answer = libvirt_qemu.qemuMonitorCommand(
            self.domain, f'qemu-io -d {device} "{command}"', libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        )
        assert "rror" not in answer, answer

    def qdev(self, disk: str) -> str:
        return f"/machine/peripheral/virtio-disk{self.disks.index(disk)}/virtio-backend"

    def write(self, disk: str, offset: int, data: bytes) -> None:
        pattern = self.folder / "pattern"
        pattern.write_bytes(data)
        self.io(disk, f"write -s {pattern} {offset} {len(data)}")

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.io(disk, f"write -z -u {offset} {length}")

    def content(self, disk: str) -> bytes:
        if self.domain.isActive():
            self.io(disk, "flush")
        raw = self.folder / f"{disk}.content"
        run("qemu-img", "convert", "-U", "-f", self.formats[disk], "-O", "raw", self.path(disk), raw)
        return raw.read_bytes()

    def resize(self, disk: str, size: int) -> None:
        self.domain.blockResize(disk, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

    def new_life(self) -> None:
        os.kill(self.qemu_pid(), signal.SIGKILL)
        wait_until(lambda: not self.domain.isActive())
        self.start()

    def qemu_pid(self) -> int:
        return int((self.libvirtd.folder / f"run/qemu/{self.name}.pid").read_text())

    def add_foreign(self, disk: str) -> Callable[[], bool]:
        others = "".join(f"<disk name='{d}' checkpoint='no'/>" for d in self.disks if d != disk)
        xml = f"<domaincheckpoint><name>virtnbdbackup.0</name><disks><disk name='{disk}' checkpoint='bitmap'/>{others}"
        self.domain.checkpointCreateXML(f"{xml}</disks></domaincheckpoint>", 0)
        return lambda: self.bitmaps(disk).get("virtnbdbackup.0", False)

    def bitmaps(self, disk: str) -> dict[str, bool]:
        """Name -> whether it records, in QEMU."""
        nodes = self.monitor("query-named-block-nodes", flat=True)
        found = [n for n in nodes if n["drv"] == self.formats[disk] and n["file"] == str(self.path(disk))]
        return {b["name"]: b["recording"] for n in found for b in n.get("dirty-bitmaps", []) if "name" in b}

    def monitor(self, name: str, **arguments: Any) -> Any:
        asked = json.dumps({"execute": name, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuMonitorCommand(self.domain, asked, 0))["return"]

    def leftovers(self) -> list[str]:
        """Jobs, folders, and each checkpoint on each disk."""
        found = [str(p) for p in (self.folder / "s").glob("*")]
        if not self.domain.isActive():
            return found + [f"{d}/{b}" for d in self.disks for b in self.stored(d) if b.startswith("hvb-")]
        with contextlib.suppress(libvirt.libvirtError):
            found.append(self.domain.backupGetXMLDesc())
        known = [c.getName() for c in self.domain.listAllCheckpoints()]
        seen = {f"{d}/{b}" for d in self.disks for b in self.bitmaps(d) if b.startswith("hvb-")}
        unseen = [n for n in known if n.startswith("hvb-") and not any(n in s for s in seen)]
        return [*found, *sorted(seen), *unseen]

    def stored(self, disk: str) -> list[str]:
        """The bitmaps in an image at rest."""
        info = json.loads(run("qemu-img", "info", "-U", "--output=json", self.path(disk)))
        return [b["name"] for b in info.get("format-specific", {}).get("data", {}).get("bitmaps", [])]

    def remove(self) -> None:
        """QEMU is dead.  The definition stays until the daemon goes: libvirt waits for two seconds when a machine ends."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(self.qemu_pid(), signal.SIGKILL)
        self.connection.close()


def wait_until(done: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextlib.contextmanager
def machine(libvirtd: Libvirtd, **options: Any) -> Iterator[LibvirtMachine]:
    """A machine, defined and off, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        made = LibvirtMachine(libvirtd, Path(folder), **options)
        try:
            yield made
        finally:
            made.remove()


Fixture = Generator[LibvirtMachine]


class LibvirtGuest(LibvirtMachine):
    """The lab guest under libvirt: a real kernel, a shell on its serial line, a guest agent."""

    console: Console

    def xml(self) -> str:
        home = build()
        append = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check nokaslr"
        boot = f"<kernel>{home}/vmlinuz</kernel><initrd>{home}/initramfs</initrd><cmdline>{append}</cmdline>"
        devices = (
            f"<serial type='unix'><source mode='bind' path='{self.folder}/console.sock'/><target port='0'/></serial>"
            f"<serial type='file'><source path='{self.folder}/acks'/><target port='1'/></serial>"
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        )
        text = (
            super().xml().replace("</type></os>", f"</type>{boot}</os>").replace("</devices>", f"{devices}</devices>")
        )
        return text.replace("<vcpu>1</vcpu>", "<vcpu>1</vcpu><cpu mode='maximum'/>").replace(">64<", ">128<")

    def start(self) -> LibvirtGuest:
        self.domain.create()
        self.console = Console(self.folder / "console.sock")
        self.console.wait_ready(240, booting=True)
        return self

    def sh(self, command: str, *, check: bool = True) -> str:
        return self.console.sh(command, check=check)

    def start_writer(self, *files: str, options: str = "") -> None:
        self.sh(f"writer overwrite {options} {' '.join(files)} >/dev/ttyS1 2>&1 & echo $! >/tmp/writer.pid")

    def acked(self) -> int:
        numbers = acked_numbers(self.folder / "acks")
        return numbers[-1] if numbers else 0

    def wait_acked(self, number: int) -> int:
        wait_until(lambda: self.acked() >= number, 180)
        return self.acked()


@contextlib.contextmanager
def guest(libvirtd: Libvirtd, **options: Any) -> Iterator[LibvirtGuest]:
    """A guest whose shell answers, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        made = LibvirtGuest(libvirtd, Path(folder), **options)
        try:
            made.define()
            yield made.start()
        finally:
            made.remove()
