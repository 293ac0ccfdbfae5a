"""The image adapter passes what every adapter must pass, with qcow2 images that a machine writes to between captures."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hvbackup.errors import Busy, HostUnreachable
from hvbackup.hypervisors.image import ImageFrozen, ImageSource, ImageSpec
from hvbackup.nbd.client import NbdClient
from tests.hypervisors.conformance import BLOCK, Conformance, Cycle
from tests.hypervisors.imagerig import STORE, make, run, runtime, servers
from tests.hypervisors.test_image_qcow2 import flags

pytestmark = pytest.mark.real

SIZES = {"vda": 32 * BLOCK, "vdb": 17 * BLOCK + 512}  # the second ends inside a block


class UndyingSource(ImageSource):
    """Snapshots that are dropped without leaving stay open, as those of a process that was stopped; see `abandon`."""

    def snapshot(self, *arguments: Any, **more: Any) -> AbstractContextManager[ImageFrozen]:
        context = super().snapshot(*arguments, **more)
        UndyingSource.kept.append(context)
        return context

    kept: ClassVar[list[AbstractContextManager[ImageFrozen]]] = []


class ImageRig:
    """A machine that is started for each of its writes; while a snapshot is open it can't start, and writes nothing."""

    FORMAT = "qcow2"

    def __init__(self, folder: Path, runtime_folder: Path) -> None:
        self.disks: Sequence[str] = list(SIZES)
        self.paths = {name: make(folder / f"{name}.qcow2", size) for name, size in SIZES.items()}
        self.run = runtime_folder
        self.refused = 0

    def hypervisor(self) -> ImageSource:
        return UndyingSource([ImageSpec(path) for path in self.paths.values()], STORE, runtime=self.run)

    @contextlib.contextmanager
    def guest(self, disk: str, *options: str) -> Generator[NbdClient]:
        """The machine runs, and is shut down cleanly."""
        socket = self.run.parent / "guest.sock"
        socket.unlink(missing_ok=True)
        command = ["qemu-nbd", *options, "-f", self.FORMAT, "-k", str(socket), str(self.paths[disk])]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            with self._connection(process, socket) as client:
                yield client
            process.wait(120)
        finally:
            process.kill()
            process.communicate()

    def _connection(self, process: subprocess.Popen[bytes], socket: Path) -> NbdClient:
        """As soon as there is one; Busy when the image is locked."""
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(HostUnreachable):
                return NbdClient.open(f"nbd+unix:///?socket={socket}")
            time.sleep(0.01)
        raise Busy("The image is locked")

    def write(self, disk: str, offset: int, data: bytes) -> None:
        self._attempt(disk, lambda guest: guest.write(offset, data))

    def zero(self, disk: str, offset: int, length: int) -> None:
        self._attempt(disk, lambda guest: guest.write_zeroes(offset, length))

    def _attempt(self, disk: str, action: Callable[[NbdClient], object]) -> None:
        try:
            with self.guest(disk) as guest:
                action(guest)
        except Busy:
            self.refused += 1

    def content(self, disk: str) -> bytes:
        with self.guest(disk, "-r") as guest:
            buffer = bytearray(guest.size)
            guest.read_into(0, memoryview(buffer))
        return bytes(buffer)

    def resize(self, disk: str, size: int) -> None:
        run("qemu-img", "resize", "-q", "-f", self.FORMAT, self.paths[disk], str(size))

    def new_life(self) -> None:
        for disk in self.disks:
            with contextlib.suppress(ZeroDivisionError), self.guest(disk, "-t"):
                raise ZeroDivisionError  # the machine is killed

    def add_foreign(self, disk: str) -> Callable[[], bool]:
        run("qemu-img", "bitmap", "--add", self.paths[disk], "libvirt-1")
        return lambda: list(flags(self.paths[disk]).get("libvirt-1", [])) == ["auto"]

    def leftovers(self) -> Sequence[str]:
        bitmaps = [f"{disk}/{name}" for disk, path in self.paths.items() for name in flags(path)]
        folders = [str(folder) for folder in self.run.glob("*")]
        return [*(b for b in bitmaps if f"/hvb-{STORE}-" in b), *folders, *map(str, servers(self.run))]


class TestImages(Conformance):
    SECTOR_STEP = 512
    EXAMPLES = 4

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Generator[ImageRig]:
        with runtime() as folder:
            yield ImageRig(tmp_path, folder)
            UndyingSource.kept.clear()
            assert servers(folder) == []

    def test_writes_during_a_snapshot_are_not_in_it(self, rig: ImageRig) -> None:  # type: ignore[override]
        """Here they can't happen: no machine starts."""
        cycle = Cycle(rig)
        rig.write("vda", 0, b"before" * BLOCK)
        cycle.capture(lambda _: rig.write("vda", 0, b"during" * BLOCK))
        assert rig.refused == 1
        assert cycle.equal()
