"""Whether the bitmap that a token names can have seen every change of a disk since.  Pure, but for one look at an image.

A bitmap records what a machine writes.  It does not see that the disk is another file now, or that the files below it were
written to.  So a token says, beside its bitmap, in which file that is and on what it is based.  A snapshot inside the image can't
be reverted to unnoticed: QEMU refuses that while the image has bitmaps *(seen with 7.2)*, and without its bitmap it is compared.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from hvbackup.errors import HvbackupError
from hvbackup.hypervisors import qemuimg
from hvbackup.hypervisors.libvirt_xml import QCOW2, DomainDisk
from hvbackup.hypervisors.qemu_fleeced import has_size
from hvbackup.hypervisors.qemu_names import TOKEN_KIND
from hvbackup.hypervisors.qemuimg import ImageInfo
from hvbackup.model import Token


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a bitmap of a disk depends upon."""

    file: str
    below: str
    tracked: bool  # whether its format can hold bitmaps
    info: ImageInfo | None = None  # where we could look

    def life(self, size: int) -> str:
        """As it stands in a token."""
        return f"size={size};file={self.file};below={self.below}"


def here(disk: DomainDisk, *, in_use: bool) -> Lineage:
    """By looking at the image; by the domain's XML alone where that is not possible."""
    if disk.format != QCOW2 or not disk.at_rest:
        return there(disk)
    path = Path(disk.path)
    try:
        info = qemuimg.info(path, disk.format, in_use=in_use)
    except HvbackupError:
        if not in_use:
            raise
        return there(disk)
    tracked = info.can_track and not disk.read_only and (in_use or os.access(path, os.W_OK))
    return Lineage(_short(os.path.realpath(path)), info.backing(), tracked, info)


def there(disk: DomainDisk) -> Lineage:
    """On another host, where only libvirt can look."""
    below = _short("\n".join(disk.below)) if disk.below else ""
    return Lineage(_short(disk.path), below, disk.format == QCOW2 and not disk.read_only)


def token(name: str, size: int, lineage: Lineage) -> Token | None:
    """What a checkpoint is called in a point; None for a disk that can't have one."""
    return Token(TOKEN_KIND, name, lineage.life(size)) if lineage.tracked else None


def doubt(given: Token | None, disk: str, now: Lineage) -> str:
    """Why changes since the token can't be proved; empty when it only takes the bitmap for that."""
    if given is None:
        return "No earlier checkpoint was given"
    if not now.tracked:
        return f"Disk {disk} can't record changes: only qcow2 images of version 3 can"
    if given.kind != TOKEN_KIND or not has_size(given):
        return f"{given.kind} {given.value} is not a checkpoint of libvirt"
    was = dict(part.partition("=")[::2] for part in given.life.split(";"))
    if was.get("file") != now.file:
        return f"Disk {disk} is in another file than at its checkpoint: a snapshot was taken, merged or reverted to"
    if was.get("below") != now.below:
        return f"The files below disk {disk} changed, of which its checkpoint knows nothing"
    return ""


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
