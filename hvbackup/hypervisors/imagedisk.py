"""One disk of a machine at rest, in two kinds: raw bytes that we read ourselves, and images that `qemu-nbd` reads for us."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hvbackup.errors import ReadFailed
from hvbackup.hypervisors import Changes, Reader, changedlist, imageformat, qemuimg
from hvbackup.hypervisors.changedlist import MARK
from hvbackup.hypervisors.imageformat import QCOW2
from hvbackup.hypervisors.qemuimg import ImageInfo
from hvbackup.hypervisors.rawfile import RawFile, kind_of
from hvbackup.model import Disk, DiskId, LeaseId, Token

if TYPE_CHECKING:  # a raw disk needs no NBD
    from hvbackup.hypervisors.nbddisk import NbdDisk

TOKEN_KIND = "image-bitmap"


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One disk as the user named it."""

    path: Path
    format: str = ""  # forced; "" decides by name and header
    changed: Path | None = None  # a list of what changed since the newest point, claimed by the user
    track: bool = True  # whether a bitmap may be added to the image


@dataclass(frozen=True, slots=True)
class Image:
    """One disk as it was found."""

    id: DiskId
    spec: ImageSpec
    path: Path  # canonical
    format: str
    doubt: str = ""  # about the format, for the user


def look(spec: ImageSpec, disk_id: DiskId) -> Image:
    """Find the disk and its format.  Raises NotFound, UsageError, HostUnreachable."""
    mode = kind_of(spec.path)
    choice = imageformat.choose(spec.path, spec.format, mode)
    # A device keeps the name it was given: /dev/vg/vm stays, the /dev/dm-3 behind it is another disk after a reboot.
    path = spec.path.absolute() if stat.S_ISBLK(mode) else spec.path.resolve()
    return Image(disk_id, spec, path, choice.format, choice.doubt)


@dataclass(slots=True)
class RawDisk:
    """A raw file or device."""

    disk: Disk
    token: Token | None
    file: RawFile
    listed: Path | None
    notes: Sequence[str]

    @classmethod
    def of(cls, image: Image, file: RawFile, lease: LeaseId) -> RawDisk:
        """The disk in an open file."""
        disk = Disk(image.id, file.size, file.sector, str(image.path))
        notes = [image.doubt] if image.doubt else []
        return cls(disk, changedlist.mark(lease, file.size), file, image.spec.changed, notes)

    def changes(self, since: Token | None) -> Changes:
        """What the user's list says, or everything that is allocated."""
        listed = changedlist.read(self.listed, self.file.size) if self.listed else None
        return changedlist.changes(listed, since, self.file.data(), self.file.size, "")

    def open(self) -> Reader:
        """A reader of the file itself."""
        return self.file.open()

    def changed(self) -> str:
        """See `RawFile.changed`."""
        return self.file.changed()


@dataclass(slots=True)
class ServedDisk:
    """An image that our `qemu-nbd` serves."""

    disk: Disk
    token: Token | None
    served: NbdDisk
    info: ImageInfo
    listed: Path | None
    since: Token | None  # what the exported bitmap records changes since
    doubt: str  # why there is no such bitmap, when there should be
    notes: Sequence[str]
    _stamps: Sequence[tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self._stamps = self.info.stamps()

    def changes(self, since: Token | None) -> Changes:
        """What the user's list or the bitmap says, or everything that is allocated."""
        size, allocated = self.disk.size, self.served.allocated()
        if self.listed:
            return changedlist.changes(changedlist.read(self.listed, size), since, allocated, size, "")
        if since is not None and since == self.since and not self.doubt and since.kind != MARK:
            return changedlist.changes(self.served.dirty(since.value), since, allocated, size, "")
        doubt = self.doubt if since == self.since else f"Bitmap {since.value} was not asked for" if since else ""
        return changedlist.changes(None, since, allocated, size, doubt)

    def open(self) -> Reader:
        """A connection to our `qemu-nbd`."""
        return self.served.open()

    def changed(self) -> str:
        """Why what was read may be of more than one moment.  Raises ReadFailed when a file lost its end."""
        for path, before, now in zip(self.info.files, self._stamps, self.info.stamps(), strict=True):
            if now[:1] < before[:1]:
                raise ReadFailed(f"{path} shrank or vanished while it was read: no point was made of it; start again")
            if now != before:
                return f"{path} was written to while it was read: this point may mix moments"
        return ""


def predecessor(image: Image, info: ImageInfo, since: Token | None) -> tuple[str, str]:
    """The bitmap that recorded what changed since the token; or "" and why there is none where one should be."""
    if since is None or since.kind == MARK or image.spec.changed:
        return "", ""
    flags = info.bitmaps.get(since.value)
    if since.kind != TOKEN_KIND or flags is None:
        return "", f"Bitmap {since.value} is not in {image.path}: the image was replaced, or the bitmap removed"
    if "in-use" in flags:
        return "", f"Bitmap {since.value} of {image.path} is inconsistent: the machine was not stopped cleanly"
    if "auto" not in flags:
        return "", f"Bitmap {since.value} of {image.path} was switched off and missed changes"
    if since.life.partition(";")[2] != info.backing():
        return "", f"The files below {image.path} changed, of which its bitmap knows nothing"
    return since.value, ""


def successor(image: Image, info: ImageInfo, bitmap: str, lease: LeaseId) -> tuple[Token, str]:
    """A new bitmap in the image, if it can have one, as a token; else a mark, and a note when it should have worked."""
    mark = changedlist.mark(lease, info.size)
    if not (image.spec.track and info.can_track and os.access(image.path, os.W_OK)):
        return mark, ""
    try:
        qemuimg.add_bitmap(image.path, bitmap)
    except ReadFailed as error:
        return mark, f"Changes can't be recorded, so the next capture compares the whole disk: {error}"
    return Token(TOKEN_KIND, bitmap, f"size={info.size};{info.backing()}"), ""


def remove_bitmaps(image: Image, prefix: str, keep: Collection[str]) -> None:
    """The bitmaps whose names begin with `prefix` are gone, except those to keep.  Raises Busy, ReadFailed."""
    if image.format != QCOW2:
        return
    for name in qemuimg.info(image.path, image.format).bitmaps:
        if name.startswith(prefix) and name not in keep:
            qemuimg.remove_bitmap(image.path, name)


def describe(image: Image) -> Disk:
    """The disk without opening a server.  Raises Busy, ReadFailed."""
    if image.format != imageformat.RAW:
        return Disk(image.id, qemuimg.info(image.path, image.format).size, path=str(image.path))
    file = RawFile(image.path)
    file.close()
    return Disk(image.id, file.size, file.sector, str(image.path))
