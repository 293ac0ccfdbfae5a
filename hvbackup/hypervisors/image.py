"""Images and block devices of a machine that is switched off.

Raw files and devices are read directly, everything else through a `qemu-nbd -r` of our own.  A machine that runs is not
read here: its disks are of no one moment (Busy, by QEMU's image locks), and none starts on them before we are done.

qcow2 images have persistent bitmaps: each capture adds one, which QEMU keeps up to date while the machine runs, and the
next capture at rest reads what it shows.  A bitmap knows nothing of the files below an image, so the token remembers those.

    killed after                     left behind                              cleaned by
    1 new bitmap added               old and new bitmap, both recording       release
    2 qemu-nbd started               a folder (qemu-nbd ends with us)         release
    3 snapshot left                  old and new bitmap                       release, told what is committed

A bitmap is added before anything is read: a machine started in between makes it name more than it must, never less.

Thread safety: one thread makes a snapshot and leaves it; its disks may be read from any number of threads meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvbackup.errors import Busy, NotFound, UsageError
from hvbackup.hypervisors import LEFT_ALONE, Can, Standstill, imagedisk, qemuimg, qemunbd
from hvbackup.hypervisors.imagedisk import Image, ImageSpec, RawDisk, ServedDisk
from hvbackup.hypervisors.imageformat import RAW
from hvbackup.hypervisors.qemu_names import StoreNames
from hvbackup.hypervisors.rawfile import RawFile
from hvbackup.model import Consistency, Disk, DiskId, Instant, LeaseId, Machine, MachineConfig, MachineId, Token

__all__ = ["ImageFrozen", "ImageSource", "ImageSpec"]


class ImageSource:
    """The disks of one machine, by their paths.  Construction touches nothing."""

    platform = "image"

    def __init__(
        self,
        specs: Sequence[ImageSpec],
        store_id: str,
        *,
        name: str = "",
        runtime: Path | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._specs = tuple(specs)
        self._names = StoreNames(store_id)
        self._name = name
        self._runtime = (runtime or qemunbd.default_runtime()).absolute()
        self._clock = clock
        self.can = Can(changed_extents=True, allocated_extents=True, several_disks_at_once=True, readers=4)

    def machines(self) -> Sequence[Machine]:
        return [self._machine([imagedisk.describe(image) for image in self._found()])]

    @contextmanager
    def snapshot(
        self,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        consistency: Consistency | None,
        *,
        fine: bool = False,
    ) -> Generator[ImageFrozen]:
        if consistency not in (None, Consistency.CRASH):
            raise UsageError(
                f"Machine {machine.name} is read at rest, which can't be made {consistency}-consistent; "
                "ask for crash consistency, which a machine that was shut down exceeds by itself"
            )
        images = self._found()
        if machine.id != str(images[0].path):
            raise NotFound(f"Machine {machine.name} ({machine.id}) is not the one of these images: {images[0].path}")
        self._refuse_second(machine)
        try:
            with ExitStack() as stack:
                disks = [self._open(i, image, machine, lease, since, stack) for i, image in enumerate(images)]
                yield self._frozen(images, disks)
        finally:
            self._end(machine, lease)

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        self._end(machine, lease)
        keeping = {token.value for token in keep if token.kind == imagedisk.TOKEN_KIND}
        for spec in self._specs:
            if spec.path.exists():  # with the image its bitmaps are gone
                imagedisk.remove_bitmaps(imagedisk.look(spec, DiskId("")), self._bitmap_prefix, keeping)

    # --- a snapshot begins and ends ---------------------------------------------------------------------------------

    def _open(
        self,
        index: int,
        image: Image,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        stack: ExitStack,
    ) -> RawDisk | ServedDisk:
        if image.format == RAW:
            file = RawFile(image.path)
            stack.callback(file.close)
            return RawDisk.of(image, file, lease)
        return self._serve(index, image, machine, lease, since.get(image.id), stack)

    def _serve(
        self, index: int, image: Image, machine: Machine, lease: LeaseId, since: Token | None, stack: ExitStack
    ) -> ServedDisk:
        from hvbackup.hypervisors.nbddisk import NbdDisk  # a raw disk needs no NBD

        names = self._names.of(lease)
        folder = qemunbd.private_folder(self._runtime, names.folder(machine.id))
        info = qemuimg.info(image.path, image.format)
        old, doubt = imagedisk.predecessor(image, info, since)
        token, note = imagedisk.successor(image, info, self._bitmap_prefix + names.tag, lease)
        server = qemunbd.serve(image.path, image.format, folder, index, old)
        stack.callback(server.stop)
        corrupt = f"{image.path} is marked corrupt; look at it with `qemu-img check`" if info.corrupt else ""
        disk = Disk(image.id, server.client.size, path=str(image.path))
        notes = [text for text in (image.doubt, note, corrupt) if text]
        return ServedDisk(disk, token, NbdDisk(server.client), info, image.spec.changed, since, doubt, notes)

    def _frozen(self, images: Sequence[Image], disks: Sequence[RawDisk | ServedDisk]) -> ImageFrozen:
        portable = {"disks": [{"id": i.id, "path": str(i.path), "format": i.format} for i in images]}
        machine = self._machine([disk.disk for disk in disks])
        notes = [note for disk in disks for note in disk.notes]
        return ImageFrozen(machine, Instant(self._clock()), MachineConfig(portable=portable), notes, disks)

    def _end(self, machine: Machine, lease: LeaseId | None) -> None:
        names = self._names
        prefix = names.folder_prefix(machine.id) if lease is None else names.of(lease).folder(machine.id)
        qemunbd.release(self._runtime, prefix)

    def _refuse_second(self, machine: Machine) -> None:
        for folder in self._runtime.glob(self._names.folder_prefix(machine.id) + "*"):
            raise Busy(f"Machine {machine.name} has an open snapshot ({folder}); wait for it, or release its lease")

    # --- names ------------------------------------------------------------------------------------------------------

    @property
    def _bitmap_prefix(self) -> str:
        # Not the prefix of a running QEMU's checkpoints: those belong to the machine's points under another id.
        return f"{self._names.prefix}image-"

    def _found(self) -> Sequence[Image]:
        ids: list[DiskId] = []
        for spec in self._specs:
            ids.append(_new_id(spec.path, ids))
        return [imagedisk.look(spec, disk_id) for spec, disk_id in zip(self._specs, ids, strict=True)]

    def _machine(self, disks: Sequence[Disk]) -> Machine:
        first = Path(disks[0].path)
        return Machine(MachineId(str(first)), self._name or first.stem, self.platform, tuple(disks))


@dataclass(slots=True)
class ImageFrozen:
    """A machine at rest."""

    machine: Machine
    t: Instant
    config: MachineConfig
    notes: Sequence[str]
    disks: Sequence[RawDisk | ServedDisk]
    consistency: Consistency = Consistency.CRASH
    standstill: Standstill = LEFT_ALONE

    def verify(self) -> Sequence[str]:
        """What somebody changed while it was read.  Raises ReadFailed when a disk lost its end."""
        return [note for disk in self.disks if (note := disk.changed())]


def _new_id(path: Path, taken: Sequence[DiskId]) -> DiskId:
    """The file's stem; disks that come later in the list make way, so that adding one renames none."""
    found, number = path.stem, 1
    while found in taken:
        number += 1
        found = f"{path.stem}-{number}"
    return DiskId(found)
