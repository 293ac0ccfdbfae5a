"""What is done to a machine beside us, of which no mirror and no bitmap says anything: no moment is offered that lacks a write.

Each is noticed within a look or a cycle, and protection begins again by itself with what the machine is then.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from hvbackup.capture import Options
from hvbackup.errors import HostUnreachable, StreamBypassed
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.model import SECOND, DiskId, MiB
from hvbackup.protect.beginning import AnyLife
from hvbackup.protect.events import Event, Rhythm, Trouble
from hvbackup.protect.protection import Protection
from hvbackup.store.journal.history import History
from hvbackup.store.store import Store, init
from labs.guest import Guest, make_disk
from tests.endtoend.mounts import needs_mount, small_disk
from tests.hypervisors.daemon import SETTINGS, Daemon, make_image, node, only
from tests.protecting import Worker
from tests.test_protect_safety import folder, number_on, wait_until
from tests.test_stream_guest import store

__all__ = ["folder", "store"]
pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
SIZE = 4 * MiB
MODES = pytest.mark.parametrize("streamed", [True, False], ids=["stream", "cycles"])
PORTS = [w for n in range(3) for w in ("-device", f"pcie-root-port,id=port{n},chassis={n + 1},slot={n + 1}")]


def raw(path: Path, name: str, **more: object) -> list[str]:
    """A node that no device uses yet."""
    path.write_bytes(bytes(SIZE))
    file = {"driver": "file", "filename": str(path), "node-name": f"{name}-file", **more}
    return ["-blockdev", json.dumps({"driver": "raw", "node-name": name, "file": file})]


@pytest.fixture
def guest(folder: Path) -> Generator[Guest]:
    """One disk as ever and another that can be unplugged."""
    disks = [make_disk(folder / "a.raw", SIZE, "raw", ext4=False)]
    with Guest(folder / "g", disks, extra=[*PORTS, *raw(folder / "b.raw", "disk1")]) as made:
        plug(made, "vdb", "disk1", 0)
        yield made


def plug(guest: Guest, name: str, drive: str, port: int) -> None:
    """The guest has a disk of this name when this returns."""
    before = guest.sh("ls /sys/block").split()
    guest.qmp("device_add", driver="virtio-blk-pci", id=name, drive=drive, bus=f"port{port}")
    wait_until(lambda: len(guest.sh("ls /sys/block").split()) > len(before), 60)


def unplug(guest: Guest, name: str) -> None:
    """Neither the guest nor QEMU has it when this returns."""
    before = guest.sh("ls /sys/block").split()
    guest.qmp("device_del", id=name)
    wait_until(lambda: len(guest.sh("ls /sys/block").split()) < len(before), 60)
    wait_until(lambda: not [b for b in guest.qmp("query-block") if name in b.get("qdev", "")], 60)


def write(guest: Guest, disk: str, number: int) -> None:
    """Answered for when this returns."""
    guest.sh(f"printf %08d {number} | dd of=/dev/{disk} bs=512 conv=fsync,notrunc 2>/dev/null")


def protection_of(
    store: Store, guest: Guest, folder: Path, streamed: bool, events: list[Event] | None = None
) -> Protection:
    hypervisor = QemuHypervisor(guest.qmp_path, "00c0ffee", scratch_dir=folder / "s", settings=SETTINGS)
    rhythm = Rhythm(
        SECOND // 10 if streamed else SECOND, 3600 * SECOND, stream=streamed, rings=(folder / "rings").resolve()
    )
    report = events.append if events is not None else lambda _: None
    return Protection(store, hypervisor, only(hypervisor), Options(), rhythm, report)


def noticed(life: AnyLife, kind: type[HostUnreachable], match: str = ".") -> None:
    """The life ends with this error, soon."""

    def steps() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            life.step()
            time.sleep(0.1)

    with pytest.raises(kind, match=match):
        steps()
    with contextlib.suppress(HostUnreachable):
        life.close(seal=False)


def newest(protection: Protection) -> dict[str, int]:
    """What the newest moment that is offered has on each disk."""
    history = History(protection.setting.store, protection.setting.machine.id)
    assert history.last
    found = {}
    for disk in history.told.disks:
        data = bytearray(512)
        history.view(history.last, DiskId(disk)).read_into(0, memoryview(data))
        found[str(disk)] = number_on(data)
    return found


def begins_again(protection: Protection, expected: dict[str, int], *, full: bool = False) -> None:
    """And the first moment is what the machine is then; `full`: no bitmap is believed, and every disk is read whole."""
    history = History(protection.setting.store, protection.setting.machine.id)
    assert history.told.distrusted is full
    life = protection.begin("a test")
    life.close()
    assert newest(protection) == expected


@pytest.mark.guest
@MODES
def test_a_disk_that_is_plugged_in_under_another_name(store: Store, guest: Guest, folder: Path, streamed: bool) -> None:
    """The mirror's filter stays where the device was, and the new device writes below it."""
    protection = protection_of(store, guest, folder, streamed)
    life = protection.begin("a test")
    write(guest, "vdb", 1)
    life.step()
    unplug(guest, "vdb")
    plug(guest, "other", "disk1", 1)
    write(guest, guest.sh("ls /sys/block | tail -1").strip(), 2)
    noticed(life, HostUnreachable, "other|vdb")
    assert "other" not in newest(protection)
    assert newest(protection)["vdb"] < 2
    begins_again(protection, {"vda": 0, "other": 2}, full=streamed)


@pytest.mark.guest
def test_a_disk_that_is_unplugged_is_none_any_more(store: Store, guest: Guest, folder: Path) -> None:
    """What is done to its node meanwhile would go past its bitmap."""
    protection = protection_of(store, guest, folder, False)
    life = protection.begin("a test")
    unplug(guest, "vdb")
    noticed(life, HostUnreachable, "vdb.*unplugged")
    begins_again(protection, {"vda": 0})


@pytest.mark.guest
@MODES
def test_a_disk_that_is_new_is_protected_too(store: Store, guest: Guest, folder: Path, streamed: bool) -> None:
    protection = protection_of(store, guest, folder, streamed)
    life = protection.begin("a test")
    (folder / "c.raw").write_bytes(bytes(SIZE))
    guest.qmp(
        "blockdev-add", driver="raw", node_name="disk2", file={"driver": "file", "filename": str(folder / "c.raw")}
    )
    plug(guest, "vdc", "disk2", 1)
    write(guest, "vdc", 3)
    noticed(life, HostUnreachable, "vdc")
    begins_again(protection, {"vda": 0, "vdb": 0, "vdc": 3})


@pytest.mark.guest
@MODES
def test_a_disk_that_is_another_file_under_the_same_name(
    store: Store, guest: Guest, folder: Path, streamed: bool
) -> None:
    protection = protection_of(store, guest, folder, streamed)
    life = protection.begin("a test")
    (folder / "d.raw").write_bytes(b"%08d" % 4 + bytes(SIZE - 8))
    guest.qmp("blockdev-add", driver="file", node_name="other-file", filename=str(folder / "d.raw"))
    guest.qmp("blockdev-reopen", options=[{"driver": "raw", "node-name": "disk1", "file": "other-file"}])
    noticed(life, HostUnreachable, "vdb")
    assert newest(protection)["vdb"] == 0
    begins_again(protection, {"vda": 0, "vdb": 4}, full=True)


@pytest.mark.guest
@MODES
def test_another_file_in_a_node_between_two_lives(store: Store, guest: Guest, folder: Path, streamed: bool) -> None:
    """The bitmap is of the node, and would say that nothing changed."""
    protection = protection_of(store, guest, folder, streamed)
    protection.begin("a test").close()
    (folder / "d.raw").write_bytes(b"%08d" % 4 + bytes(SIZE - 8))
    guest.qmp("blockdev-add", driver="file", node_name="other-file", filename=str(folder / "d.raw"))
    guest.qmp("blockdev-reopen", options=[{"driver": "raw", "node-name": "disk1", "file": "other-file"}])
    begins_again(protection, {"vda": 0, "vdb": 4})


@pytest.mark.guest
@pytest.mark.parametrize("ending", [True, False], ids=["the end", "the beginning"])
def test_a_write_past_the_mirror_before_the_first_look_and_after_the_last(
    store: Store, guest: Guest, folder: Path, ending: bool
) -> None:
    events: list[Event] = []
    protection = protection_of(store, guest, folder, True, events)
    life = protection.begin("a test")
    guest.qmp("qom-set", path="/machine/peripheral/vdb/virtio-backend", property="drive", value="disk1")
    write(guest, "vdb", 5)
    write(guest, "vda", 5)
    if ending:
        life.step()
        life.close()
        [trouble] = [e for e in events if isinstance(e, Trouble)]
        assert isinstance(trouble.error, StreamBypassed)
    else:
        noticed(life, StreamBypassed)
    assert newest(protection) == {"vda": 0, "vdb": 0}
    begins_again(protection, {"vda": 5, "vdb": 5}, full=True)


@pytest.mark.guest
def test_a_write_that_fails_may_be_half_on_the_disk(store: Store, guest: Guest, folder: Path) -> None:
    """QEMU tells the mirror of writes that have succeeded only."""
    (folder / "e.raw").write_bytes(bytes(SIZE))
    image = {"driver": "file", "filename": str(folder / "e.raw")}
    faults = [{"event": "none", "iotype": "write", "errno": 5, "sector": 2048, "once": True}]
    file = {"driver": "blkdebug", "image": image, "inject-error": faults}
    guest.qmp("blockdev-add", driver="raw", node_name="disk2", file=file)
    plug(guest, "vdc", "disk2", 1)
    protection = protection_of(store, guest, folder, True)
    life = protection.begin("a test")
    said = guest.sh("dd if=/dev/zero of=/dev/vdc bs=1M seek=1 count=1 oflag=direct conv=notrunc", check=False)
    assert "error" in said.lower()
    noticed(life, StreamBypassed, "vdc failed")
    begins_again(protection, {"vda": 0, "vdb": 0, "vdc": 0})


@needs_mount
@pytest.mark.guest
def test_a_machine_that_stands_still_because_its_disk_is_full(store: Store, folder: Path) -> None:
    """What of the write is on the disk nobody knows; a reset of the machine forgets it."""
    with small_disk(folder, "host", 16 * MiB) as small, contextlib.ExitStack() as stack:
        image, ballast = small.path / "a.raw", small.path / "ballast"
        disk = make_disk(image, 12 * MiB, "raw", ext4=False)
        guest = stack.enter_context(Guest(folder / "g", [disk]))
        protection = protection_of(store, guest, folder, True)
        life = protection.begin("a test")
        write(guest, "vda", 6)
        with contextlib.suppress(OSError), ballast.open("wb") as fill:
            while True:
                fill.write(bytes(64 * 1024))
                fill.flush()
        guest.console.start("dd if=/dev/urandom of=/dev/vda bs=64k seek=32 count=32 conv=fsync,notrunc")
        wait_until(lambda: guest.qmp("query-status")["status"] == "io-error", 60)
        noticed(life, StreamBypassed, "stands still")
        with pytest.raises(HostUnreachable, match="stands still"):
            protection.begin("a test")
        ballast.unlink()
        guest.resume()
        guest.console.finish()
        begins_again(protection, {"vda": 6})
        guest.kill()
        history = History(store, protection.setting.machine.id)
        assert history.last
        data = bytearray(12 * MiB)
        history.view(history.last, DiskId("vda")).read_into(0, memoryview(data))
        assert data == image.read_bytes()


def test_what_nobody_expected_ends_a_life_and_not_the_protection(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, [node("vda", make_image(tmp_path / "vda.raw", SIZE, "raw"), "raw")]).start()
    init(tmp_path / "store", None)
    try:
        worker = Worker(tmp_path, f"qemu:{daemon.qmp_path}")
        worker.wait_for("moment")
        for scratch in (tmp_path / "state" / "scratch").iterdir():
            shutil.rmtree(scratch)
        worker.wait_for("begun", 2)
        [trouble] = worker.of("trouble")
        assert "FileNotFoundError" in trouble["error"]["message"]
        assert worker.end(signal.SIGTERM) == 0
    finally:
        daemon.kill()
