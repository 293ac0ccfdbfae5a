"""What only QEMU has: block devices, filters, other people's jobs and servers, a scratch that runs full."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hvbackup.errors import Busy, HostUnreachable, SpaceExhausted, UsageError
from hvbackup.hypervisors.qemu import Settings
from hvbackup.hypervisors.qemu_names import StoreNames
from hvbackup.model import Continuity, DiskId, LeaseId, MiB
from tests.hypervisors.conformance import BLOCK, Cycle, whole
from tests.hypervisors.daemon import STORE, Daemon, make_image, node, only
from tests.hypervisors.test_qemu import DaemonRig

pytestmark = pytest.mark.real
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and loop devices need root")


@pytest.fixture
def started(tmp_path: Path) -> Generator[Callable[..., Daemon]]:
    """Daemons that end with the test."""
    with ExitStack() as stack:

        def start(*nodes: Mapping[str, Any]) -> Daemon:
            daemon = Daemon(tmp_path, nodes).start()
            stack.callback(daemon.stop)
            return daemon

        yield start


@pytest.fixture
def rig(tmp_path: Path) -> Generator[DaemonRig]:
    rig = DaemonRig(tmp_path, ("qcow2", "raw"))
    yield rig
    rig.close()


class Writer(threading.Thread):
    """A guest that writes, zeroes and discards at random until it is stopped."""

    def __init__(self, rig: DaemonRig, seed: int) -> None:
        super().__init__(name="guest")
        self.rig, self.random, self.over, self.count = rig, random.Random(seed), threading.Event(), 0

    def run(self) -> None:
        guests = {disk: self.rig.daemon.guest(disk) for disk in self.rig.disks}
        while not self.over.is_set():
            guest = guests[self.random.choice(list(guests))]
            offset = self.random.randrange(guest.size // 512) * 512
            length = min(self.random.choice([512, 4096, BLOCK, 3 * BLOCK]), guest.size - offset)
            verb = self.random.randrange(4)
            if verb == 0:
                guest.write_zeroes(offset, length)
            elif verb == 1:
                guest.trim(offset, length)
            else:
                guest.write(offset, self.random.randbytes(length))
            self.count += 1
        for guest in guests.values():
            guest.close()

    def __enter__(self) -> Writer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(120)


def test_a_guest_that_never_stops_writing(rig: DaemonRig) -> None:
    """What is folded from the changes equals what the snapshot shows, and it shows the same at every reading."""
    cycle = Cycle(rig)
    seen: list[dict[DiskId, bytes]] = []
    with Writer(rig, seed=7) as writer:
        for _ in range(12):
            cycle.capture(lambda frozen: seen.append({d.disk.id: whole(d) for d in frozen.disks}))
            assert {name: bytes(image) for name, image in cycle.images.items()} == seen[-1]
    assert writer.count > 100
    assert seen[0] != seen[-1]
    cycle.capture()
    assert cycle.equal()
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}


@contextmanager
def loop_device(path: Path, sector: int) -> Generator[Path]:
    command = ["losetup", "-f", "--show", "-b", str(sector), str(path)]
    device = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=120)


@as_root
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_block_device(tmp_path: Path, started: Callable[..., Daemon], sector: int) -> None:
    image = make_image(tmp_path / "d.raw", 20 * BLOCK + 4096, "raw")
    with loop_device(image, sector) as device:
        daemon = started(node("vda", device, "raw", protocol="host_device"))
        guest, cycle = daemon.guest("vda"), Cycle(BareRig(daemon))
        guest.write(0, b"on a device " * 8192)
        guest.write(20 * BLOCK, b"t" * 4096)
        cycle.capture()
        guest.write(5 * BLOCK, b"more" * 1024)
        cycle.capture(lambda frozen: guest.write(6 * BLOCK, b"later" * 1000))
        assert cycle.how[DiskId("vda")] is Continuity.INCREMENTAL
        assert cycle.read[DiskId("vda")] == BLOCK
        cycle.capture()
        assert cycle.equal()
        guest.close()
        daemon.stop()


class BareRig:
    """Just enough of a rig for `Cycle`: one daemon, whatever its disks are."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.disks: Sequence[str] = [n["node-name"] for n in daemon.nodes]

    def hypervisor(self) -> Any:
        return self.daemon.hypervisor()

    def content(self, disk: str) -> bytes:
        with self.daemon.guest(disk) as guest:
            buffer = bytearray(guest.size)
            guest.read_into(0, memoryview(buffer))
        return bytes(buffer)


def test_a_filter_on_top_is_seen_through(tmp_path: Path, started: Callable[..., Daemon]) -> None:
    below = node("disk", make_image(tmp_path / "d.qcow2", MiB))
    daemon = started({"driver": "copy-on-read", "node-name": "cor", "file": below})
    machine = only(daemon.hypervisor())
    assert [disk.id for disk in machine.disks] == ["disk"]
    with daemon.guest("cor") as guest:
        guest.write(0, b"old" * 100)
        with daemon.hypervisor().snapshot(machine, LeaseId("l"), {}, None) as frozen:
            guest.write(0, b"new" * 100)
            assert whole(frozen.disks[0]).startswith(b"old" * 100)
            assert not frozen.verify()
    assert list(daemon.bitmaps("disk")) == [frozen.disks[0].token.value]


def test_somebody_elses_job_is_named(rig: DaemonRig) -> None:
    target = make_image(rig.daemon.folder / "copy.qcow2", 32 * BLOCK)
    machine = only(rig.hypervisor())
    with rig.daemon.qmp() as qmp:
        qmp.command("blockdev-add", **node("copy", target))
        qmp.command("blockdev-mirror", job_id="theirs", device="vda", target="copy", sync="full")
    with (
        pytest.raises(Busy, match="busy: block device is in use by block job: mirror"),
        rig.hypervisor().snapshot(machine, LeaseId("l"), {}, None),
    ):
        pytest.fail("A snapshot began beside a mirror")
    assert not rig.leftovers()
    with rig.daemon.qmp() as qmp:
        assert [job["id"] for job in qmp.command("query-jobs")] == ["theirs"]


def test_a_server_of_somebody_else_is_not_ours_to_use(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, [node("vda", make_image(tmp_path / "d.qcow2", MiB))], server=False).start()
    try:
        machine = only(daemon.hypervisor())
        with daemon.qmp() as qmp:
            qmp.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "theirs.sock")}})
        with (
            pytest.raises(Busy, match="runs an NBD server for somebody else"),
            daemon.hypervisor().snapshot(machine, LeaseId("l"), {}, None),
        ):
            pytest.fail("A snapshot began on a foreign server")
        assert not daemon.leftovers()
        assert (tmp_path / "theirs.sock").exists()
    finally:
        daemon.stop()


def test_our_own_server_comes_and_goes(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, [node("vda", make_image(tmp_path / "d.qcow2", MiB))], server=False).start()
    try:
        machine, hypervisor = only(daemon.hypervisor()), daemon.hypervisor()
        for number in range(2):
            with hypervisor.snapshot(machine, LeaseId(f"l{number}"), {}, None) as frozen:
                assert whole(frozen.disks[0]) == bytes(MiB)
        assert not daemon.leftovers()
        with daemon.qmp() as qmp:
            qmp.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "theirs.sock")}})
    finally:
        daemon.stop()


def test_a_server_left_by_a_dead_run_is_used(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, [node("vda", make_image(tmp_path / "d.qcow2", MiB))], server=False).start()
    try:
        machine, hypervisor = only(daemon.hypervisor()), daemon.hypervisor()
        hypervisor.snapshot(machine, LeaseId("dead"), {}, None).__enter__()
        with daemon.qmp() as qmp:  # all that the dead run left is its server
            qmp.command("block-export-del", id=qmp.command("query-block-exports")[0]["id"], mode="hard")
            for job in qmp.command("query-jobs"):
                qmp.command("job-cancel", id=job["id"])
                qmp.command("job-dismiss", id=job["id"])
        with hypervisor.snapshot(machine, LeaseId("next"), {}, None) as frozen:
            assert whole(frozen.disks[0]) == bytes(MiB)
        hypervisor.release(machine, None, [])
        assert not daemon.leftovers()
    finally:
        daemon.stop()


@contextmanager
def small_scratch(daemon: Daemon, size: int) -> Generator[None]:
    folder = daemon.folder / "s"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True, timeout=120)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=120)


@as_root
def test_a_full_scratch_costs_the_snapshot_and_not_the_guest(tmp_path: Path, started: Callable[..., Daemon]) -> None:
    daemon = started(node("vda", make_image(tmp_path / "d.qcow2", 64 * MiB)))
    hypervisor = daemon.hypervisor(settings=Settings(scratch_reserve_bytes=12 * MiB))
    machine = only(hypervisor)
    with small_scratch(daemon, 24 * MiB), daemon.guest("vda") as guest:
        guest.write(0, b"a" * (32 * MiB))
        with hypervisor.snapshot(machine, LeaseId("l"), {}, None) as frozen:
            for at in range(0, 32 * MiB, 256 * 1024):
                guest.write(at, b"b" * (256 * 1024))  # raises if QEMU fails a write of the guest
                threading.Event().wait(0.05)  # so the reserve lasts for many looks of the watchdog
            with pytest.raises(HostUnreachable, match=r"scratch directory .* ran full"):
                frozen.verify()
        hypervisor.release(machine, LeaseId("l"), [])
        assert not daemon.leftovers()
        Cycle(BareRig(daemon)).capture()
        daemon.stop()


@as_root
def test_no_snapshot_begins_on_a_full_scratch(tmp_path: Path, started: Callable[..., Daemon]) -> None:
    daemon = started(node("vda", make_image(tmp_path / "d.qcow2", MiB)))
    hypervisor = daemon.hypervisor()
    with (
        small_scratch(daemon, 4 * MiB),
        pytest.raises(SpaceExhausted, match=str(daemon.folder / "s")),
        hypervisor.snapshot(only(hypervisor), LeaseId("l"), {}, None),
    ):
        pytest.fail("A snapshot began")
    assert not daemon.leftovers()


def test_a_qcow2_of_the_old_version_can_not_store_bitmaps(tmp_path: Path, started: Callable[..., Daemon]) -> None:
    daemon = started(node("vda", make_image(tmp_path / "d.qcow2", MiB, "qcow2", "-o", "compat=0.10")))
    cycle = Cycle(BareRig(daemon))
    cycle.capture()
    cycle.capture()
    assert cycle.how[DiskId("vda")] is Continuity.INCREMENTAL
    assert not any(bitmap["persistent"] for bitmap in daemon.bitmaps("vda").values())


def test_a_read_only_disk(tmp_path: Path, started: Callable[..., Daemon]) -> None:
    image = make_image(tmp_path / "d.qcow2", MiB)
    daemon = started(node("vda", image, **{"read-only": True}))
    machine = only(daemon.hypervisor())
    with daemon.hypervisor().snapshot(machine, LeaseId("l"), {}, None) as frozen:
        assert whole(frozen.disks[0]) == bytes(MiB)
        assert not frozen.verify()
    daemon.hypervisor().release(machine, None, [])
    assert not daemon.leftovers()


def test_a_backing_file_is_part_of_the_disk(tmp_path: Path, started: Callable[..., Daemon]) -> None:
    base = make_image(tmp_path / "base.qcow2", 8 * BLOCK)
    subprocess.run(["qemu-io", "-c", f"write -P 7 {BLOCK} {BLOCK}", str(base)], check=True, capture_output=True)
    top = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(top)], check=True)
    daemon = started(node("vda", top))
    with daemon.guest("vda") as guest:
        guest.write(3 * BLOCK, b"top" * 100)
    cycle = Cycle(BareRig(daemon))
    cycle.capture()
    assert cycle.equal()
    assert cycle.read[DiskId("vda")] == 2 * BLOCK


def test_what_was_not_asked_at_the_start_is_not_known_later(rig: DaemonRig) -> None:
    cycle = Cycle(rig)
    cycle.capture()
    with rig.hypervisor().snapshot(cycle.machine(), cycle.lease(), {}, None) as frozen:
        changes = frozen.disks[0].changes(cycle.tokens[DiskId("vda")])
    assert changes.continuity is Continuity.UNKNOWN
    assert "not asked for" in changes.reason


def test_a_lease_is_used_once(rig: DaemonRig) -> None:
    machine = only(rig.hypervisor())
    (rig.daemon.folder / "s" / StoreNames(STORE).of(LeaseId("l")).folder(machine.id)).mkdir(parents=True)
    with pytest.raises(Busy, match="used before"), rig.hypervisor().snapshot(machine, LeaseId("l"), {}, None):
        pytest.fail("A lease was used twice")
    rig.hypervisor().release(machine, LeaseId("l"), [])
    assert not rig.leftovers()


def test_a_file_that_ends_inside_a_sector(tmp_path: Path, started: Callable[..., Daemon]) -> None:
    """QEMU shows the guest whole sectors, and so do we."""
    image = tmp_path / "odd.raw"
    image.write_bytes(b"odd" * 100_001)
    cycle = Cycle(BareRig(started(node("vda", image, "raw"))))
    cycle.capture()
    assert len(cycle.images[DiskId("vda")]) == 300_032
    assert cycle.equal()


@as_root
def test_a_qemu_of_another_user() -> None:
    with tempfile.TemporaryDirectory(prefix="hvt-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        home = folder / "home"
        home.mkdir()
        image = make_image(home / "d.qcow2", MiB)
        for path in (home, image):
            shutil.chown(path, "nobody")
        daemon = Daemon(home, [node("vda", image)], server=False, user="nobody").start()
        try:
            hypervisor = daemon.hypervisor(scratch_dir=folder / "s")
            with hypervisor.snapshot(only(hypervisor), LeaseId("l"), {}, None) as frozen:
                [made] = (folder / "s").iterdir()
                assert (made.stat().st_mode & 0o777, made.owner()) == (0o700, "nobody")
                assert whole(frozen.disks[0]) == bytes(MiB)
            assert not list((folder / "s").iterdir())
        finally:
            daemon.stop()


def test_checkpoints_of_another_store_are_left_alone(rig: DaemonRig) -> None:
    machine, theirs = only(rig.hypervisor()), "hvb-ffffffff-safe-0123456789abcdef"
    with rig.daemon.qmp() as qmp:
        qmp.command("block-dirty-bitmap-add", node="vda", name=theirs)
    Cycle(rig).capture()
    rig.hypervisor().release(machine, None, [])
    assert list(rig.daemon.bitmaps("vda")) == [theirs]


@pytest.mark.parametrize("store", ["", "xyz", "00C0FFEE", "00c0ffee0"])
def test_a_store_id_that_is_none(rig: DaemonRig, store: str) -> None:
    with pytest.raises(UsageError, match="8 hexadecimal digits"):
        type(rig.hypervisor())(rig.daemon.qmp_path, store, scratch_dir=rig.daemon.folder)
