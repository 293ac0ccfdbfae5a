"""Sources that are told what changed pass what every adapter must pass: NBD exports and raw images in the hands of a script.

The script knows what the guest wrote since the newest point: it keeps a list, or a bitmap that QEMU fills.  What it
knows it forgets only once a point is committed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hvbackup.hypervisors import Frozen, Hypervisor
from hvbackup.hypervisors.image import ImageSource, ImageSpec
from hvbackup.hypervisors.nbdsource import DISK_ID, NbdSource, NbdSpec
from hvbackup.model import Consistency, Continuity, DiskId, LeaseId, Machine, Token
from hvbackup.nbd.client import NbdClient
from hvbackup.nbd.uri import NbdUri
from tests.hypervisors.conformance import BLOCK, Conformance, Cycle, Rig, abandon, whole
from tests.hypervisors.imagerig import STORE, make, run, runtime, serves, wait_for
from tests.hypervisors.test_image_conformance import ImageRig

pytestmark = pytest.mark.real

DISK = str(DISK_ID)
SIZE = 17 * BLOCK + 512  # ends inside a block
SIZES = {"vda": 32 * BLOCK, "vdb": SIZE}
BITMAP = "since-the-newest-point"


class Script:
    """Begins before a run and ends after it.  A snapshot that is dropped stays open until its lease is released."""

    def __init__(self, rig: ScriptedRig, inner: Hypervisor) -> None:
        self.rig, self.inner = rig, inner
        self.platform, self.can = inner.platform, inner.can

    def machines(self) -> Sequence[Machine]:
        with self.rig.run_begins():
            return self.inner.machines()

    def snapshot(self, *arguments: Any, **more: Any) -> AbstractContextManager[Frozen]:
        context = self._snapshot(*arguments, **more)
        self.rig.kept.append(context)
        return context

    @contextmanager
    def _snapshot(
        self,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        consistency: Consistency | None,
        *,
        fine: bool = False,
    ) -> Generator[Frozen]:
        with self.rig.run_begins(), self.inner.snapshot(machine, lease, since, consistency, fine=fine) as frozen:
            yield frozen

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        self.rig.kept.clear()
        self.inner.release(machine, lease, keep)
        if any(token.value == lease for token in keep):
            self.rig.committed()


class ChangeList:
    """What was written to one disk since the newest point."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = False
        self._rows: list[tuple[int, int]] = []
        self._told = 0

    def add(self, offset: int, length: int) -> None:
        self._rows.append((offset, length))

    def tell(self) -> None:
        self.path.write_text("".join(f"{offset} {length}\n" for offset, length in self._rows))
        self._told = len(self._rows)

    def committed(self) -> None:
        del self._rows[: self._told]
        self.lost = False

    def lose(self) -> None:
        self._rows.clear()
        self.lost = True

    @property
    def option(self) -> Path | None:
        return None if self.lost else self.path


class ScriptedRig:
    """What the rigs below share."""

    kept: list[AbstractContextManager[Frozen]]

    def run_begins(self) -> AbstractContextManager[None]:
        """The disks are there, and what changed can be told, for as long as the context lasts."""
        raise NotImplementedError

    def committed(self) -> None:
        """What was told is in a point."""
        raise NotImplementedError

    def leftovers(self) -> Sequence[str]:
        """These sources make nothing anywhere."""
        return []


class ListedExport(ScriptedRig):
    """A script that copies the disk at one moment, lets nbdkit serve the copy, and keeps a list of changes."""

    def __init__(self, folder: Path, sockets: Path) -> None:
        self.disks: Sequence[str] = [DISK]
        self.kept = []
        self.live, self.still, self.socket = folder / "live", folder / "still", sockets / "s"
        self.served = self.still
        self.live.write_bytes(b"")
        os.truncate(self.live, SIZE)
        self.changed = ChangeList(folder / "changed")
        self._server: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        run("cp", "--sparse=always", self.live, self.still)
        self.socket.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "--unix", str(self.socket), "file", str(self.served)]
        self._server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(lambda: serves(self.socket))

    def stop(self) -> None:
        assert self._server
        self._server.kill()
        self._server.wait(120)

    def serve_live(self) -> None:
        """From now on nobody copies: the guest writes to what is read."""
        self.stop()
        self.served = self.live
        self.start()

    def hypervisor(self) -> Script:
        spec = NbdSpec(NbdUri(socket=str(self.socket)), changed=self.changed.option)
        return Script(self, NbdSource(spec))

    @contextmanager
    def run_begins(self) -> Generator[None]:
        run("cp", "--sparse=always", "--remove-destination", self.live, self.still)
        self.changed.tell()
        yield

    def committed(self) -> None:
        self.changed.committed()

    def write(self, disk: str, offset: int, data: bytes) -> None:
        with self.live.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        self.changed.add(offset, len(data))

    def zero(self, disk: str, offset: int, length: int) -> None:
        run("fallocate", "-p", "-o", str(offset), "-l", str(length), self.live)
        self.changed.add(offset, length)

    def content(self, disk: str) -> bytes:
        return self.live.read_bytes()

    def resize(self, disk: str, size: int) -> None:
        os.truncate(self.live, size)

    def new_life(self) -> None:
        self.stop()
        self.changed.lose()
        self.start()

    def add_foreign(self, disk: str) -> Callable[[], bool]:
        foreign = self.live.with_name("somebody's file")
        foreign.write_text("")
        return foreign.exists


class BitmapExport(ScriptedRig, ImageRig):
    """A script that serves a qcow2 image with its bitmap for each run, and begins the bitmap anew after each point."""

    def __init__(self, folder: Path, runtime_folder: Path) -> None:
        self.disks = [DISK]
        self.kept = []
        self.path = make(folder / "disk.qcow2", SIZE)
        self.paths = {DISK: self.path}
        self.run = runtime_folder
        self.refused = 0
        self._serving = False
        run("qemu-img", "bitmap", "--add", self.path, BITMAP)

    def hypervisor(self) -> Script:  # type: ignore[override]
        return Script(self, NbdSource(NbdSpec(NbdUri(socket=str(self._socket)), bitmap=BITMAP)))

    @contextmanager
    def run_begins(self) -> Generator[None]:
        if self._serving:
            yield
            return
        server = self._serve("-B", BITMAP) or self._serve()
        assert server, "qemu-nbd does not serve the image"
        self._serving = True
        try:
            yield
        finally:
            self._serving = False
            server.kill()
            server.wait(120)

    def _serve(self, *options: str) -> subprocess.Popen[bytes] | None:
        """None when qemu-nbd refuses the bitmap."""
        self._socket.unlink(missing_ok=True)
        command = ["qemu-nbd", "-t", "-r", "-e", "8", *options, "-f", "qcow2", "-k", str(self._socket), str(self.path)]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(lambda: server.poll() is not None or serves(self._socket))
        return server if server.poll() is None else None

    @property
    def _socket(self) -> Path:
        return self.run.parent / "s"

    def committed(self) -> None:
        run("qemu-img", "bitmap", "--remove", "--add", self.path, BITMAP)

    def leftovers(self) -> Sequence[str]:
        return []


class RawImages(ScriptedRig, ImageRig):
    """A script that keeps a list for each raw image of a machine, which is started for each of its writes."""

    FORMAT = "raw"

    def __init__(self, folder: Path, runtime_folder: Path) -> None:
        self.disks = list(SIZES)
        self.kept = []
        self.paths = {name: folder / f"{name}.raw" for name in SIZES}
        for name, path in self.paths.items():
            path.write_bytes(b"")
            os.truncate(path, SIZES[name])
        self.changed = {name: ChangeList(folder / f"{name}.changed") for name in SIZES}
        self.run = runtime_folder
        self.refused = 0

    def hypervisor(self) -> Script:  # type: ignore[override]
        specs = [ImageSpec(path, "raw", self.changed[name].option) for name, path in self.paths.items()]
        return Script(self, ImageSource(specs, STORE, runtime=self.run))

    @contextmanager
    def run_begins(self) -> Generator[None]:
        for changed in self.changed.values():
            changed.tell()
        yield

    def committed(self) -> None:
        for changed in self.changed.values():
            changed.committed()

    @contextmanager
    def guest(self, disk: str, *options: str) -> Generator[NbdClient]:
        with super().guest(disk, "--discard=unmap", *options) as guest:
            yield guest

    def write(self, disk: str, offset: int, data: bytes) -> None:
        super().write(disk, offset, data)
        self.changed[disk].add(offset, len(data))

    def zero(self, disk: str, offset: int, length: int) -> None:
        super().zero(disk, offset, length)
        self.changed[disk].add(offset, length)

    def new_life(self) -> None:
        super().new_life()
        for changed in self.changed.values():
            changed.lose()

    def add_foreign(self, disk: str) -> Callable[[], bool]:
        foreign = self.paths[disk].with_name("somebody's file")
        foreign.write_text("")
        return foreign.exists


class Scripted(Conformance):
    """Overrides of what no source can have that makes nothing, and knows only what it is told."""

    def test_a_token_nobody_knows_is_compared(self, rig: Rig) -> None:
        """The script speaks of the newest point, which any token stands for: only having none is a doubt."""
        cycle = Cycle(rig)
        rig.write(rig.disks[0], 0, b"once" * BLOCK)
        cycle.capture()
        known = dict(cycle.tokens)
        cycle.tokens = {DiskId(disk): Token("changeId", "52 de c0 d9") for disk in rig.disks}
        rig.write(rig.disks[0], BLOCK, b"twice" * 100)
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        assert cycle.equal()
        assert all(cycle.tokens[disk] != token for disk, token in known.items())
        cycle.tokens = {}
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.UNKNOWN}
        assert cycle.equal()

    def test_an_abandoned_snapshot_keeps_others_out_until_it_is_released(self, rig: Rig) -> None:
        """Nothing of it is left that could be in the way: others needn't wait."""
        abandon(rig.hypervisor(), Cycle(rig).machine(), LeaseId("dead"), {})
        Cycle(rig).capture()
        assert not rig.leftovers()

    @pytest.mark.parametrize("lease", [LeaseId("dead"), None])
    def test_release_leaves_nothing_and_can_be_repeated(self, rig: Rig, lease: LeaseId | None) -> None:
        """Nothing is made, so an abandoned snapshot has no leftovers to begin with."""
        machine = Cycle(rig).machine()
        abandon(rig.hypervisor(), machine, LeaseId("dead"), {})
        for _ in range(2):
            rig.hypervisor().release(machine, lease, [])
            assert not rig.leftovers()
        Cycle(rig).capture()

    def test_release_keeps_what_is_committed_and_what_is_foreign(self, rig: Rig) -> None:
        """Nothing is made, so there are no checkpoints of committed points to count."""
        untouched = rig.add_foreign(rig.disks[0])
        cycle = Cycle(rig)
        cycle.capture()
        rig.hypervisor().release(cycle.machine(), None, list(cycle.tokens.values()))
        rig.write(rig.disks[0], 0, b"more" * BLOCK)
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        assert cycle.equal()
        rig.hypervisor().release(cycle.machine(), None, [])
        assert untouched()


class Listed(Scripted):
    def test_a_new_life_is_compared(self, rig: Rig) -> None:
        """A list that was lost is left out, and comparing is then all that was to be expected: no reason is given."""
        cycle = Cycle(rig, explained=False)
        rig.write(rig.disks[0], 0, b"first life" * BLOCK)
        cycle.capture()
        rig.new_life()
        rig.write(rig.disks[0], 0, b"next life " * BLOCK)
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.UNKNOWN}
        assert cycle.equal()
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}


class TestListedExport(Listed):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> Generator[ListedExport]:
        with runtime() as folder:
            rig = ListedExport(tmp_path, folder.parent)
            yield rig
            rig.kept.clear()
            rig.stop()

    def test_an_export_that_is_written_to_meanwhile_is_right_at_the_next_point(self, rig: ListedExport) -> None:
        """Nobody can see that it moved, so no note says so; what was written in between is changed for the next point."""
        rig.serve_live()
        cycle = Cycle(rig)
        rig.write(DISK, 0, b"before" * BLOCK)

        def overwrite(frozen: Frozen) -> None:
            first = whole(frozen.disks[0])
            rig.write(DISK, 0, b"during" * BLOCK)
            rig.zero(DISK, 8 * BLOCK, BLOCK)
            assert whole(frozen.disks[0]) != first

        cycle.capture(lambda frozen: None)
        cycle.capture(overwrite)
        rig.write(DISK, 12 * BLOCK, b"after" * 100)
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        assert cycle.equal()
        assert 0 < cycle.read[DISK_ID] < SIZE


class TestBitmapExport(Scripted):
    SECTOR_STEP = 512
    EXAMPLES = 4

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Generator[BitmapExport]:
        with runtime() as folder:
            rig = BitmapExport(tmp_path, folder)
            yield rig
            rig.kept.clear()

    def test_writes_during_a_snapshot_are_not_in_it(self, rig: BitmapExport) -> None:  # type: ignore[override]
        """Here they can't happen: qemu-nbd lets no machine start on the image that it serves."""
        cycle = Cycle(rig)
        rig.write(DISK, 0, b"before" * BLOCK)
        cycle.capture(lambda _: rig.write(DISK, 0, b"during" * BLOCK))
        assert rig.refused == 1
        assert cycle.equal()


class TestRawImages(Listed):
    SECTOR_STEP = 512
    EXAMPLES = 4

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Generator[RawImages]:
        with runtime() as folder:
            rig = RawImages(tmp_path, folder)
            yield rig
            rig.kept.clear()

    def test_writes_during_a_snapshot_are_not_in_it(self, rig: RawImages) -> None:  # type: ignore[override]
        """Here machines can't write, and of others that do `verify` tells."""
        cycle = Cycle(rig)
        rig.write("vda", 0, b"before" * BLOCK)
        cycle.capture(lambda _: rig.write("vda", 0, b"during" * BLOCK))
        assert rig.refused == 1
        assert cycle.equal()
        with rig.hypervisor().snapshot(cycle.machine(), LeaseId("l"), cycle.tokens, None) as frozen:
            whole(frozen.disks[1])
            with rig.paths["vdb"].open("r+b") as file:
                file.write(b"someone who knows no locks")
            [note] = frozen.verify()
        assert "vdb.raw was written to while it was read: this point may mix moments" in note
