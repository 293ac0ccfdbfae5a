"""Folders of leases on this host, and where on the domain's host scratch files and sockets go."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvbackup.errors import Busy
from hvbackup.files import Files
from hvbackup.hypervisors import qemu_server
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.hypervisors.qemu_freeze import Freezing
from hvbackup.hypervisors.qemu_names import LeaseNames, StoreNames
from hvbackup.hypervisors.qmp import Peer
from hvbackup.model import LeaseId, Machine, MachineId

MARKER = "through-qmp"  # in the folder of a lease that made something inside QEMU, of which libvirt knows nothing
BEGIN_WAIT_SECONDS = 30.0  # for a look, or the beginning of another snapshot


class Limits(Protocol):
    """How long to wait, and how much room to leave."""

    @property
    def settle_seconds(self) -> float: ...
    @property
    def scratch_reserve_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Room:
    """What all snapshots of one adapter have in common."""

    where: LibvirtUri
    names: StoreNames
    base: Path  # folders of leases, here
    runtime: Path
    limits: Limits
    freezing: Freezing
    clock: Callable[[], int]
    uid: int  # whom QEMU runs as
    gid: int

    def folder(self, machine: Machine, names: LeaseNames) -> Path:
        """The folder of a lease."""
        return self.base / names.folder(machine.id)

    def folders(self, machine_id: str, lease: LeaseId | None) -> Sequence[Path]:
        """The folder of a lease, or of every lease of our store."""
        if lease is not None:
            return [self.base / self.names.of(lease).folder(machine_id)]
        return sorted(self.base.glob(self.names.folder_prefix(machine_id) + "*"))

    def prefix(self, lease: LeaseId | None) -> str:
        """What the names of everything of a lease, or of our store, begin with."""
        return self.names.prefix if lease is None else self.names.of(lease).prefix

    def make(self, folder: Path) -> None:
        """A folder in which QEMU's user may work.  Raises Busy when this lease has one already."""
        if not folder.parent.exists():
            folder.parent.mkdir(parents=True, mode=0o711)
        qemu_server.make_folder(folder, Peer(0, self.uid, self.gid))

    def mark(self, folder: Path) -> None:
        """What is made from here on may be inside QEMU alone: `release` has to look there."""
        (folder / MARKER).touch(0o600)

    def is_marked(self, folder: Path) -> bool:
        """Whether a lease may have left something inside QEMU."""
        return (folder / MARKER).exists()

    def remove(self, folder: Path) -> None:
        """The folder is gone with everything in it."""
        qemu_server.remove_folder(folder)

    def refuse_second(self, machine: Machine) -> None:
        """Raises Busy when another lease of our store still has something open on this machine."""
        for folder in self.base.glob(self.names.folder_prefix(machine.id) + "*"):
            raise Busy(f"Machine {machine.name} has an open snapshot ({folder}); wait for it, or release its lease")

    @contextmanager
    def locked(self, machine: MachineId, wait_seconds: float = BEGIN_WAIT_SECONDS) -> Iterator[None]:
        """Nobody else of ours on this host begins a snapshot of the machine, or looks at its disks, meanwhile.  Raises Busy.

        libvirt would let a second backup wait for half a minute before it refuses.  And where it has QEMU format scratch (on
        another host whose storage we can't use) a look at that moment makes QEMU 7.2 fail an assertion
        (qcow2_get_specific_info): the end of the guest.
        """
        with Files(self.runtime).owner(f"libvirt-{machine}.lock", f"Machine {machine}", wait_seconds=wait_seconds):
            yield

    def socket(self, folder: Path, names: LeaseNames) -> str:
        """Where QEMU is to listen, on its own host."""
        if self.where.local:
            path = qemu_server.socket_path(folder)
            if path.parent != folder:
                with contextlib.suppress(Busy):
                    self.make(path.parent)
            return str(path)
        return str(Path("/var/tmp") / f"{names.prefix}nbd.sock")  # noqa: S108  # exists on every host, open to QEMU's user

    def scratch(self, folder: Path, names: LeaseNames, target: str, image: str) -> str:
        """Where the old blocks of a disk go; "" leaves it to libvirt, which takes a place beside the image."""
        if self.where.local:
            return str(folder / f"{target}.scratch")
        name = f"{names.prefix}{target}.scratch"
        if self.where.scratch:
            return f"{self.where.scratch.rstrip('/')}/{name}"
        return f"{os.path.dirname(image)}/{name}" if image.startswith("/") and not image.startswith("/dev/") else ""

    def short(self, name: str) -> Path:
        """A place for a socket of our own."""
        return Path(tempfile.gettempdir()) / name
