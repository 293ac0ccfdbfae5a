"""A domain that is off: its images are read by ourselves, as `image:` sources are.

The bitmaps in them are the same: those a running machine's checkpoints made record nothing while it is off, because nobody
writes, and the one that a capture at rest adds is what libvirt is told of when the machine runs again.  While we read, the images
are locked: a machine that is started meanwhile is refused by QEMU.  So this is for images that can be reached from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from hvbackup.errors import HvbackupError, NotFound, UsageError
from hvbackup.hypervisors import LEFT_ALONE, FrozenDisk, imagedisk, libvirt_lineage, libvirt_xml, qemuimg, qemunbd
from hvbackup.hypervisors.imagedisk import Image, ImageSpec, RawDisk, ServedDisk
from hvbackup.hypervisors.libvirt_host import Domain
from hvbackup.hypervisors.libvirt_lineage import Lineage
from hvbackup.hypervisors.libvirt_pull import LibvirtFrozen
from hvbackup.hypervisors.libvirt_room import Room
from hvbackup.hypervisors.libvirt_seen import Seen
from hvbackup.hypervisors.libvirt_xml import RAW, DomainDisk
from hvbackup.hypervisors.nbddisk import NbdDisk
from hvbackup.hypervisors.qemu_names import StoreNames
from hvbackup.hypervisors.qemuimg import ImageInfo
from hvbackup.hypervisors.rawfile import RawFile
from hvbackup.model import Consistency, Disk, DiskId, Instant, LeaseId, Machine, Token


def begin(
    room: Room, seen: Seen, lease: LeaseId, since: Mapping[DiskId, Token], wanted: Consistency | None
) -> LibvirtFrozen:
    """The machine as it was left.  Raises UsageError, Busy, HostUnreachable."""
    _refuse(seen, wanted)
    folder = room.folder(seen.machine, room.names.of(lease))
    with room.locked(seen.machine.id):
        room.make(folder)
    stack = ExitStack()
    stack.callback(room.remove, folder)
    try:
        checkpoint = room.names.new_checkpoint()
        lineages = seen.lineages()
        disks: list[FrozenDisk] = [
            _open(room, seen, disk, lineages[disk.target], lease, since.get(DiskId(disk.target)), checkpoint, stack)
            for disk in seen.disks
        ]
        beside, notes = seen.read_sidecars()
    except BaseException:
        stack.close()
        raise
    images = [d for d in disks if isinstance(d, RawDisk | ServedDisk)]
    disks += beside
    return LibvirtFrozen(
        Machine(seen.machine.id, seen.machine.name, seen.machine.platform, tuple(d.disk for d in disks)),
        Instant(room.clock()),
        seen.config(),
        [*seen.notes, *(n for d in images for n in d.notes), *notes],
        disks,
        Consistency.CRASH,
        LEFT_ALONE,
        lambda: [note for d in images if (note := d.changed())],
        stack.close,
    )


def _refuse(seen: Seen, wanted: Consistency | None) -> None:
    name = seen.machine.name
    if wanted not in (None, Consistency.CRASH):
        raise UsageError(
            f"Machine {name} is off and is read at rest, which can't be made {wanted}-consistent; "
            "ask for crash consistency, which a machine that was shut down exceeds by itself"
        )
    far = [d.target for d in seen.disks if not d.at_rest or not seen.where.local]
    if far:
        raise UsageError(
            f"Machine {name} is off, and its disks ({', '.join(far)}) can't be read from here without a QEMU; "
            f"start it, paused if it should not run (virsh start --paused {name}), or back it up on its own host"
        )


def _open(
    room: Room,
    seen: Seen,
    disk: DomainDisk,
    lineage: Lineage,
    lease: LeaseId,
    since: Token | None,
    checkpoint: str,
    stack: ExitStack,
) -> RawDisk | ServedDisk:
    spec = ImageSpec(Path(disk.path), disk.format)
    image = Image(DiskId(disk.target), spec, Path(disk.path), disk.format)
    if disk.format == RAW:
        file = RawFile(image.path)
        stack.callback(file.close)
        raw = RawDisk.of(image, file, lease)
        raw.token = None  # nothing records what changes
        return raw
    folder = room.folder(seen.machine, room.names.of(lease))
    info = lineage.info or qemuimg.info(image.path, disk.format)
    doubt = (
        "" if since is None else libvirt_lineage.doubt(since, disk.target, lineage) or _bitmap_doubt(since, disk, info)
    )
    note = _add(lineage, image.path, checkpoint)
    token = None if note or not lineage.tracked else libvirt_lineage.token(checkpoint, info.size, lineage)
    old = since.value if since and not doubt else ""
    server = qemunbd.serve(image.path, disk.format, folder, seen.disks.index(disk), old)
    stack.callback(server.stop)
    found = Disk(image.id, server.client.size, disk.sector, disk.path)
    corrupt = f"{image.path} is marked corrupt; look at it with `qemu-img check`" if info.corrupt else ""
    notes = [text for text in (note, corrupt) if text]
    return ServedDisk(found, token, NbdDisk(server.client), _here(image, info), None, since, doubt, notes)


def _here(image: Image, info: ImageInfo) -> ImageInfo:
    """As it is after a bitmap was added: `changed` must not take that for somebody else's write."""
    return qemuimg.info(image.path, image.format) if info.can_track else info


def _bitmap_doubt(since: Token, disk: DomainDisk, info: ImageInfo) -> str:
    flags = info.bitmaps.get(since.value)
    if flags is None:
        return (
            f"Checkpoint {since.value} is gone from disk {disk.target}: the image was replaced, or the bitmap removed"
        )
    if "in-use" in flags:
        return f"Checkpoint {since.value} on disk {disk.target} is inconsistent: the machine was not stopped cleanly"
    if "auto" not in flags:
        return f"Checkpoint {since.value} on disk {disk.target} was switched off and missed changes"
    return ""


def _add(lineage: Lineage, path: Path, checkpoint: str) -> str:
    """A bitmap records from now on; or why not."""
    if not lineage.tracked:
        return ""
    try:
        qemuimg.add_bitmap(path, checkpoint)
    except HvbackupError as error:
        return f"Changes can't be recorded, so the next capture compares the whole disk: {error}"
    return ""


def release(domain: Domain, names: StoreNames, keeping: Collection[str], *, look_here: bool) -> None:
    """Checkpoints that are not kept are gone, from the images and from libvirt."""
    gone = _remove_bitmaps(domain, names, keeping) if look_here else set()
    with contextlib.suppress(NotFound):
        for name in domain.checkpoints():
            if names.is_checkpoint(name) and name not in keeping and name in gone:
                domain.forget_checkpoint(name)


def _remove_bitmaps(domain: Domain, names: StoreNames, keeping: Collection[str]) -> set[str]:
    """Which checkpoints of ours have no bitmap any more."""
    unwanted = {n for n in domain.checkpoints() if names.is_checkpoint(n) and n not in keeping}
    for disk in _images(libvirt_xml.spec(domain.xml()).disks):
        spec = ImageSpec(Path(disk.path), disk.format)
        image = Image(DiskId(disk.target), spec, spec.path, disk.format)
        imagedisk.remove_bitmaps(image, f"{names.prefix}safe-", keeping)
    return unwanted


def _images(disks: Sequence[DomainDisk]) -> Sequence[DomainDisk]:
    return [d for d in disks if d.at_rest and d.format != RAW and Path(d.path).exists()]
