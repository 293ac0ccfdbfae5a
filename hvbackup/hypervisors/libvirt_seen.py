"""One look at a domain: which disks it has, what their bitmaps depend upon, and how it is defined."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors import libvirt_lineage, libvirt_sidecar, libvirt_xml
from hvbackup.hypervisors.libvirt_host import Domain, LibvirtRefused
from hvbackup.hypervisors.libvirt_lineage import Lineage
from hvbackup.hypervisors.libvirt_sidecar import Sidecar
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.hypervisors.libvirt_xml import DomainDisk, DomainSpec
from hvbackup.model import Disk, DiskId, Machine, MachineConfig, MachineId

CONFIG_KIND = "libvirt-xml"


@dataclass(frozen=True, slots=True)
class Seen:
    """A domain at one time."""

    domain: Domain
    active: bool
    spec: DomainSpec
    machine: Machine
    sidecars: Sequence[Sidecar]
    shell: Sequence[str]  # how to run something on its host, where that is another one
    definition: str
    notes: Sequence[str]
    where: LibvirtUri = field(repr=False)

    @property
    def disks(self) -> Sequence[DomainDisk]:
        """The disks that are captured, without sidecars."""
        return self.spec.disks

    def lineages(self) -> Mapping[str, Lineage]:
        """What the bitmaps of each disk depend upon, now."""
        if self.where.local:
            return {d.target: libvirt_lineage.here(d, in_use=self.active) for d in self.disks}
        return {d.target: libvirt_lineage.there(d) for d in self.disks}

    def read_sidecars(self) -> tuple[list[libvirt_sidecar.SidecarDisk], list[str]]:
        """What is kept beside the disks, and what could not be read of it."""
        found, notes = [], []
        for sidecar in self.sidecars:
            if not self.active and not self.shell and not Path(sidecar.path).exists():
                continue  # a machine that never ran has none yet
            try:
                found.append(libvirt_sidecar.read(sidecar, self.shell))
            except HostUnreachable as error:
                notes.append(f"The point lacks {sidecar.id}: {error}")
        return found, notes

    def _command_line(self) -> Mapping[str, Any]:
        """How QEMU would be started, for booting a point without libvirt; nothing where libvirt can't say."""
        try:
            words = _words(self.domain.host.command_line(self.definition))
        except (HostUnreachable, ValueError):
            return {}
        return {"command_line": {"argv": words, "cwd": "/", "exe": words[0]}} if words else {}

    def config(self) -> MachineConfig:
        """As it is kept in a recovery point."""
        spec = self.spec
        portable: dict[str, Any] = {
            "memory_bytes": spec.memory_bytes,
            "cpus": spec.cpus,
            "machine_type": spec.machine_type,
            "arch": spec.arch,
            "disks": [_portable(d, self.machine) for d in spec.disks] + [_beside(s) for s in self.sidecars],
            "networks": [dict(n) for n in spec.networks],
            "skipped": dict(spec.skipped),
            **self._command_line(),
        }
        return MachineConfig(CONFIG_KIND, self.definition, portable)


def _words(line: str) -> list[str]:
    """The words of a command, without the environment that libvirt puts before it."""
    words = shlex.split(line)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def look(domain: Domain, where: LibvirtUri, state: Path) -> Seen:
    """A domain as it is now.  Raises NotFound, HostUnreachable."""
    active = domain.active()
    spec = libvirt_xml.spec(domain.xml())
    definition = domain.xml(definition=True)
    beside = libvirt_sidecar.sidecars(spec.uuid, spec.nvram, tpm=spec.tpm, state=state)
    shell, notes = shell_of(where), []
    if beside and not where.local and not shell:
        notes = [f"The point lacks {s.id}, which can't be read through {where.uri}; use qemu+ssh://" for s in beside]
        beside = []
    disks = [Disk(DiskId(d.target), _capacity(domain, d.target), d.sector, d.path) for d in spec.disks]
    disks += [there for s in beside if (there := _sidecar(s, shell))]
    tags = dict.fromkeys([*libvirt_xml.spec(definition).tags, *spec.tags])  # set for good, or for this life alone
    machine = Machine(MachineId(spec.uuid), spec.name, "libvirt", tuple(disks), tuple(tags))
    return Seen(domain, active, spec, machine, beside, shell, definition, notes, where)


def shell_of(where: LibvirtUri) -> Sequence[str]:
    """What begins a command on the other host; nothing where there is no shell."""
    if not where.by_ssh:
        return ()
    login = where.login or where.host
    options = [
        "-o",
        "BatchMode=yes",
        "-o",
        "ConnectTimeout=10",
        *(["-p", str(where.ssh_port)] if where.ssh_port else []),
    ]
    options += [] if where.verify else ["-o", "StrictHostKeyChecking=no"]
    return [where.ssh, *options, *(["-i", where.keyfile] if where.keyfile else []), login]


def _capacity(domain: Domain, target: str) -> int:
    """0 where libvirt can't look: the image is missing, or its storage is."""
    try:
        return domain.capacity(target)
    except LibvirtRefused:
        return 0


def _sidecar(sidecar: Sidecar, shell: Sequence[str]) -> Disk | None:
    """None where it can't be read: a machine that never ran has no variables yet."""
    try:
        return libvirt_sidecar.read(sidecar, shell).disk
    except HostUnreachable:
        return None


def _portable(disk: DomainDisk, machine: Machine) -> Mapping[str, Any]:
    size = next(d.size for d in machine.disks if d.id == disk.target)
    return {
        "id": disk.target,
        "node": "",
        "driver": disk.format,
        "file": disk.path,
        "size": size,
        "sector": disk.sector,
        "read_only": disk.read_only,
    }


def _beside(sidecar: Sidecar) -> Mapping[str, Any]:
    return {"id": sidecar.id, "file": sidecar.path, "role": str(sidecar.id)}
