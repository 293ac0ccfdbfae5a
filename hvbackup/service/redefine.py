"""restore --to-libvirt: a machine's disks become files, and a domain of libvirt is defined on them, last of all.

interrupted after         left behind                     what to do
1 some disks written      files, a restore that did not end   the same again with --resume
2 all disks written       files                           the same again with --resume: nothing is written twice
3 TPM state put back      files, a folder of libvirt's    the same again: it is written anew
4 domain defined          the machine, switched off
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvbackup.errors import UsageError
from hvbackup.hypervisors import libvirt_define, libvirt_sidecar
from hvbackup.hypervisors.libvirt_define import NewDomain
from hvbackup.hypervisors.libvirt_sidecar import NVRAM, TPM
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.hypervisors.source import adapter_of
from hvbackup.model import RecoveryPoint
from hvbackup.recover.restore import Mode
from hvbackup.service import recovery
from hvbackup.service.moment import choose
from hvbackup.service.recovery import Goal, OnProgress, RestoredPoint, Which
from hvbackup.service.session import Session

IMAGES = Path("/var/lib/libvirt/images")


@dataclass(frozen=True, slots=True)
class Target:
    """Which libvirt, and as what."""

    uri: str
    name: str = ""  # empty: as it was called
    networks: Mapping[str, str] = field(default_factory=dict)
    new_identity: bool | None = None  # None: only where the machine is there already
    state: Path = libvirt_sidecar.STATE


@dataclass(frozen=True, slots=True)
class Where:
    """Where the disks go, and in which way."""

    to: Path | None = None  # a folder; None: libvirt's own, under the machine's name
    format: str = ""  # empty: qcow2, which can record what changes
    mode: Mode = Mode.NEW


@dataclass(frozen=True, slots=True)
class Defined:
    """A domain that is there now, switched off."""

    name: str
    uuid: str
    new_identity: bool


def restore_to_libvirt(
    session: Session, which: Which, place: Where, target: Target, progress: OnProgress
) -> tuple[RestoredPoint, Defined | None]:
    """Disks restored and the domain defined when this returns; None when a disk is damaged, and then it is not defined.

    Raises UsageError (a name, identity or network that does not fit) before anything is written.
    """
    where = LibvirtUri.parse(target.uri)
    if not where.local:
        raise UsageError(f"{target.uri}: Disks are written to this host; run hvbackup on the one of that libvirt")
    if which.disks:
        raise UsageError("A machine is defined with all its disks; leave out --disk")
    host = adapter_of("hvbackup.hypervisors.libvirt_host", "libvirt:").Host(where.uri)
    with session.open() as store:
        point = choose(store, which.machine, which.at, which.now).point
    name = target.name or point.machine.name
    anew = _checked(host, point, name, target)
    goal = Goal(place.to or IMAGES / name, place.format or "qcow2", place.mode)
    done = recovery.restore(session, which, goal, progress)
    if recovery.verdict(done):
        return done, None
    xml, notes = _definition(done, NewDomain(name, _disks(done), _nvram(done), target.networks, anew))
    made = host.define(xml)
    notes += _put_back_tpm(done, target.state / "swtpm" / made.uuid)
    done = RestoredPoint(done.point, done.disks, done.machine_file, [*done.notes, *notes])
    return done, Defined(name, made.uuid, anew)


def _checked(host: Any, point: RecoveryPoint, name: str, target: Target) -> bool:
    """Whether the machine gets a new identity.  Raises UsageError."""
    there = {d.uuid: d.name() for d in host.domains()}
    if name in there.values():
        raise UsageError(f"A domain {name} is there already at {target.uri}; choose another name with --name")
    present = str(point.machine.id) in there
    if present and target.new_identity is False:
        raise UsageError(
            f"The machine is there already at {target.uri} as {there[str(point.machine.id)]}, with the same UUID; "
            "say --new-identity, or remove that one"
        )
    if point.config.kind == "libvirt-xml":
        _check_networks(host, point, target)
    return present if target.new_identity is None else target.new_identity


def _check_networks(host: Any, point: RecoveryPoint, target: Target) -> None:
    known = host.networks()
    for kind, old in libvirt_define.networks(point.config.native):
        wanted = target.networks.get(old, old)
        if (kind == "network" or old in target.networks) and wanted not in known:
            raise UsageError(
                f"There is no network {wanted} at {target.uri}; it has {', '.join(known) or 'none'}. "
                f"Say which one to use with --network {old}=NAME"
            )


def _disks(done: RestoredPoint) -> Mapping[str, tuple[str, str]]:
    return {
        str(d.root.disk.id): (str(d.path.absolute()), d.format)
        for d in done.disks
        if d.root.disk.id not in (NVRAM, TPM)
    }


def _nvram(done: RestoredPoint) -> str:
    return next((str(d.path.absolute()) for d in done.disks if d.root.disk.id == NVRAM), "")


def _definition(done: RestoredPoint, new: NewDomain) -> tuple[str, list[str]]:
    config = done.point.config
    if config.kind == "libvirt-xml":
        return libvirt_define.rewritten(config.native, new)
    if new.networks:
        raise UsageError("The machine was not captured from libvirt, so which networks it was on is not known")
    return libvirt_define.plain(config.portable, new), [
        "The machine was not captured from libvirt: it is defined as a plain machine without a network"
    ]


def _put_back_tpm(done: RestoredPoint, folder: Path) -> list[str]:
    """The TPM's state is in libvirt's folder for the new domain."""
    for disk in (d for d in done.disks if d.root.disk.id == TPM):
        try:
            libvirt_sidecar.unpack_tpm(disk.path.read_bytes(), folder)
            _give_to(folder, folder.parent)
        except OSError as error:
            return [f"The state of its TPM could not be put into {folder} ({error}); it is in {disk.path}"]
    return []


def _give_to(folder: Path, like: Path) -> None:
    """The program behind a TPM runs as a user of its own: the one that owns the other folders there."""
    owner = next((p.stat() for p in sorted(like.iterdir()) if p != folder), None)
    if owner is not None and os.geteuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            shutil.chown(path, owner.st_uid, owner.st_gid)
