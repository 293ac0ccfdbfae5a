"""The names of everything we make inside a QEMU: they say which store made it, and in which lease.

    hvb-<store>-<lease>-f0      fleecing node of disk 0     (node names have 31 characters at most)
    hvb-<store>-<lease>-p0      the file under it
    hvb-<store>-<lease>-j0      copy-before-write job;  -c0 the job that formats the scratch
    hvb-<store>-<lease>-e0      NBD export
    hvb-<store>-<lease>-t0      the target of a stream; -m0 the mirror into it, -x0 the filter that it puts above the disk
    hvb-<store>-merged-<lease>  what is exported: a disabled copy of the checkpoint since which changes are asked
    hvb-<store>-safe-<random>   the checkpoint: recording, until a committed point names its successor

<store> is 8 hexadecimal digits of the store's id, <lease> 12 of the hash of the lease's.  The folder of a lease has the
name of its machine's hash too, for several machines share one scratch directory.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

from hvbackup.errors import UsageError
from hvbackup.model import LeaseId

TOKEN_KIND = "qemu-bitmap"
PREFIX = "hvb-"  # of every store's names


def _short(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


@dataclass(frozen=True, slots=True)
class StoreNames:
    """What a store's names begin with."""

    store_id: str

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{8}", self.store_id):
            raise UsageError(f"Store id {self.store_id} is not 8 hexadecimal digits")

    @property
    def prefix(self) -> str:
        """Everything of ours begins with this."""
        return f"{PREFIX}{self.store_id}-"

    def new_checkpoint(self) -> str:
        """A name no checkpoint ever had: an old token must never find a bitmap of another moment."""
        return f"{self.prefix}safe-{secrets.token_hex(8)}"

    def is_checkpoint(self, bitmap: str) -> bool:
        """Whether this bitmap is a checkpoint our store made."""
        return bitmap.startswith(f"{self.prefix}safe-")

    def is_merged(self, bitmap: str) -> bool:
        """Whether this bitmap was only made to be exported, by any lease of our store."""
        return bitmap.startswith(f"{self.prefix}merged-")

    def folder_prefix(self, machine_id: str) -> str:
        """What the folders of all leases of a machine begin with."""
        return f"{self.prefix}{_short(machine_id, 8)}-"

    def of(self, lease: LeaseId) -> LeaseNames:
        """The names one lease uses."""
        return LeaseNames(self, _short(lease, 12))

    def found(self, prefix: str) -> LeaseNames:
        """The names of the lease of ours that begin with this."""
        return LeaseNames(self, prefix.removeprefix(self.prefix).removesuffix("-"))


@dataclass(frozen=True, slots=True)
class LeaseNames:
    """The names of what one lease makes."""

    store: StoreNames
    tag: str

    @property
    def prefix(self) -> str:
        """Every node, job and export of the lease begins with this."""
        return f"{self.store.prefix}{self.tag}-"

    @property
    def merged(self) -> str:
        """The bitmap that is exported."""
        return f"{self.store.prefix}merged-{self.tag}"

    def folder(self, machine_id: str) -> str:
        """The name of the folder that holds the scratch files and the socket."""
        return self.store.folder_prefix(machine_id) + self.tag

    def fleece(self, index: int) -> str:
        """The node that shows the disk as it was."""
        return f"{self.prefix}f{index}"

    def file(self, index: int) -> str:
        """The node of the scratch file."""
        return f"{self.prefix}p{index}"

    def job(self, index: int) -> str:
        """The job that copies old blocks before they are overwritten."""
        return f"{self.prefix}j{index}"

    def target(self, index: int) -> str:
        """The node of our target."""
        return f"{self.prefix}t{index}"

    def mirror(self, index: int) -> str:
        """The job that sends each write there."""
        return f"{self.prefix}m{index}"

    def filter(self, index: int) -> str:
        """The node through which the guest writes meanwhile."""
        return f"{self.prefix}x{index}"

    def export(self, index: int) -> str:
        """The export's id in QEMU."""
        return f"{self.prefix}e{index}"
