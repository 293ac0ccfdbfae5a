"""The safety net of continuous protection: whatever happens to a machine or its host, moments are exact or refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from hvbackup.errors import HostUnreachable, JournalGap
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.model import Instant, LeaseId, MachineId, MiB
from hvbackup.store.journal.history import History
from hvbackup.store.store import Store, init
from labs.guest import Guest, LabDisk, make_disk
from tests.endtoend.mounts import needs_mount, small_disk
from tests.hypervisors.daemon import Daemon, make_image, node
from tests.protecting import Worker
from tests.scribe import Scribe
from tests.test_stream_kills import StreamWorker

pytestmark = pytest.mark.real
SIZES = {"vda": 8 * MiB, "vdb": 4 * MiB}


def machine_in(folder: Path) -> Daemon:
    folder.mkdir(exist_ok=True)
    nodes = [node(name, make_image(folder / f"{name}.raw", size, "raw"), "raw") for name, size in SIZES.items()]
    return Daemon(folder, nodes).start()


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[list[Daemon]]:
    made: list[Daemon] = []
    yield made
    for daemon in made:
        daemon.kill()


def wait_until(done: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def content(history: History, seq: int) -> dict[str, bytearray]:
    """All disks at a moment."""
    found = {}
    for disk in history.told_until(seq).disks:
        view = history.view(history.by_seq(seq), disk)
        found[str(disk)] = bytearray(view.size)
        view.read_into(0, memoryview(found[str(disk)]))
    return found


def verified(folder: Path, scribe: Scribe, machine: str) -> list[int]:
    """How many writes each moment of a machine holds: an exact prefix, and never fewer than the moment before."""
    with Store.open(folder / "store", folder / "state2", []) as store:
        history = History(store, MachineId(machine))
        reached = [scribe.verify(content(history, seq)) for seq in history.moments[0].tolist()]
    assert reached == sorted(reached)
    return reached


def test_several_workers_protect_machines_of_one_host_in_one_store(daemons: list[Daemon], tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    daemons += [machine_in(tmp_path / "a"), machine_in(tmp_path / "b")]
    with Scribe(daemons[0], SIZES, 200) as first, Scribe(daemons[1], SIZES, 200, seed=2) as second:
        workers = [
            Worker(tmp_path, f"qemu:{d.qmp_path}", "--fold", "2s", name=n) for d, n in zip(daemons, "ab", strict=True)
        ]
        for worker in workers:
            worker.wait_for("begun")
        third = Worker(tmp_path, f"qemu:{daemons[0].qmp_path}", name="a")
        assert third.process.wait(120) == 5, "a machine has one worker"
        for worker in workers:
            worker.wait_for("folded", 2)
        for worker in workers:
            worker.process.send_signal(signal.SIGKILL)
        for worker in workers:
            worker.end(signal.SIGKILL)
        again = [Worker(tmp_path, f"qemu:{d.qmp_path}", name=n) for d, n in zip(daemons, "ab", strict=True)]
        for worker in again:
            worker.wait_for("moment", 2)
            assert worker.of("begun")[0]["how"] == "resumed"
            assert worker.end(signal.SIGTERM) == 0
    for daemon, scribe in zip(daemons, (first, second), strict=True):
        assert len(verified(tmp_path, scribe, f"qemu:{daemon.qmp_path}")) > 6
        assert not daemon.leftovers()


@needs_mount
def test_a_full_scratch_opens_a_gap_and_the_guest_goes_on(daemons: list[Daemon], tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    daemons.append(machine_in(tmp_path / "a"))
    (tmp_path / "state").mkdir()
    with small_disk(tmp_path, "state/scratch", 400 * MiB) as disk, Scribe(daemons[0], SIZES, 300) as scribe:
        worker = Worker(tmp_path, f"qemu:{daemons[0].qmp_path}")
        worker.wait_for("moment", 3)
        disk.fill(200 * MiB)  # less than what has to stay free
        worker.wait_for("trouble")
        assert "scratch" in str(worker.of("trouble")[0]["error"]["message"]).lower()
        acked = scribe.acked
        wait_until(lambda: scribe.acked > acked + 100)
        disk.empty()
        worker.wait_for("begun", 2)
        assert worker.of("begun")[1]["how"] == "resumed"
        assert worker.end(signal.SIGTERM) == 0
        machine = f"qemu:{daemons[0].qmp_path}"
    verified(tmp_path, scribe, machine)
    scribe.assert_never_stalled(4.0)
    with Store.open(tmp_path / "store", tmp_path / "state2", []) as store:
        assert [g.why for g in History(store, MachineId(machine)).told.gaps]


@needs_mount
def test_a_full_journal_disk_opens_a_gap_and_loses_nothing(daemons: list[Daemon], tmp_path: Path) -> None:
    daemons.append(machine_in(tmp_path / "a"))
    machine = f"qemu:{daemons[0].qmp_path}"
    with small_disk(tmp_path, "full", 96 * MiB) as disk, Scribe(daemons[0], SIZES, 300) as scribe:
        (tmp_path / "store").symlink_to(disk.path / "store")
        init(disk.path / "store", None)
        worker = Worker(tmp_path, machine, "--fold", "1h")
        worker.wait_for("moment", 4)
        told = {int(e["seq"]) for e in worker.of("moment")}
        disk.fill(0)
        worker.wait_for("trouble")
        assert "No room left" in worker.of("trouble")[0]["error"]["message"]
        wait_until(lambda: not [f for f in daemons[0].leftovers() if f.startswith("hvb-")])
        acked = scribe.acked
        wait_until(lambda: scribe.acked > acked + 100)
        begun = len(worker.of("begun"))
        disk.empty()
        worker.wait_for("begun", begun + 1)
        assert worker.of("begun")[-1]["how"] == "resumed"
        worker.wait_for("moment", 1 + len(worker.of("moment")))
        assert worker.end(signal.SIGTERM) == 0
        reached = verified(tmp_path, scribe, machine)
        assert reached[-1] > acked
        with Store.open(tmp_path / "store", tmp_path / "state2", []) as store:
            history = History(store, MachineId(machine))
            assert told <= set(history.moments[0].tolist())
            assert any("No room left" in g.why for g in history.told.gaps)
    assert not daemons[0].leftovers()


def test_a_host_that_was_rebooted_goes_on_with_a_gap(daemons: list[Daemon], tmp_path: Path) -> None:
    """Every process is gone, and so is everything on tmpfs: sockets, scratch, STATE."""
    init(tmp_path / "store", None)
    daemons.append(machine_in(tmp_path / "a"))
    source, machine = f"qemu:{daemons[0].qmp_path}", f"qemu:{daemons[0].qmp_path}"
    with Scribe(daemons[0], SIZES, 300) as scribe:
        worker = Worker(tmp_path, source)
        worker.wait_for("moment", 4)
        before = len(verified(tmp_path, scribe, machine))
        worker.process.kill()
        daemons[0].kill()
        worker.end(signal.SIGKILL)
        for gone in ("run", "state", "state2"):
            shutil.rmtree(tmp_path / gone, ignore_errors=True)
        acked = scribe.acked
        daemons[0].start()
        worker = Worker(tmp_path, source)
        worker.wait_for("moment", 2)
        [begun] = worker.of("begun")
        assert begun["how"] == "captured", "the bitmaps were in the memory of the QEMU that is gone"
        assert begun["gap"]
        assert worker.end(signal.SIGTERM) == 0
    reached = verified(tmp_path, scribe, machine)
    assert len(reached) > before
    assert reached[-1] >= acked
    assert not daemons[0].leftovers()


# -- real guests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvs-") as name:
        yield Path(name)


def number_on(data: bytes | bytearray) -> int:
    return int(bytes(data[:8]).strip(b"\0") or b"0")


def write_number(guest: Guest, number: int) -> None:
    """Answered for when this returns."""
    guest.sh(f"printf %08d {number} | dd of=/dev/vda bs=512 conv=fsync,notrunc 2>/dev/null")


def at_seq(folder: Path, guest: Guest, seq: int) -> bytearray:
    with Store.open(folder / "store", folder / "state2", []) as store:
        [found] = content(History(store, MachineId(guest.uuid)), seq).values()
    return found


def newest(worker: Worker) -> int:
    return int([e for e in worker.events if e["event"] in ("moment", "begun")][-1]["seq"])


def tagged(worker: Worker, label: str) -> int:
    """The moment that is made now."""
    done = worker.run("tag", "lab", label, "--json")
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["seq"])


@pytest.mark.guest
@pytest.mark.timeout(600)
def test_a_disk_that_is_resized_under_a_running_guest(folder: Path) -> None:
    init(folder / "store", None)
    with Guest(folder / "g", [make_disk(folder / "a.qcow2", 16 * MiB, ext4=False)]) as guest:
        worker = Worker(folder, f"qemu:{guest.qmp_path}", name="")
        worker.wait_for("moment", 2)
        write_number(guest, 1)
        small = tagged(worker, "small")
        with worker.between_cycles(guest):  # QEMU refuses it while a job reads the disk
            guest.qmp("block_resize", node_name="disk0", size=24 * MiB)
        worker.wait_for("begun", 2)
        guest.sh(f"printf %08d 2 | dd of=/dev/vda bs=512 seek={20 * MiB // 512} conv=fsync,notrunc 2>/dev/null")
        write_number(guest, 3)
        large = tagged(worker, "large")
        assert worker.end(signal.SIGTERM) == 0
        gap = worker.of("begun")[1]["gap"]
    before, after = at_seq(folder, guest, small), at_seq(folder, guest, large)
    assert (len(before), number_on(before)) == (16 * MiB, 1)
    assert (len(after), number_on(after), number_on(after[20 * MiB :])) == (24 * MiB, 3, 2)
    assert gap


@pytest.mark.guest
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [Worker, StreamWorker])
def test_a_machine_that_moves_to_another_qemu_by_live_migration(folder: Path, kind: type[Worker]) -> None:
    """The one it has left says so and records nothing; protection of the new one goes on with the same machine and a gap."""
    init(folder / "store", None)
    disk = make_disk(folder / "a.raw", 16 * MiB, "raw", ext4=False)
    with Guest(folder / "g", [disk]) as guest:
        worker = kind(folder, f"qemu:{guest.qmp_path}", name="")
        worker.wait_for("moment", 2)
        write_number(guest, 1)
        before = tagged(worker, "before")
        with arriving(guest, disk, folder) as target:
            with contextlib.nullcontext() if kind is StreamWorker else worker.between_cycles(guest):
                guest.qmp("migrate", uri=f"unix:{folder}/migration")  # which QEMU gives up if it ends within a cycle
                wait_until(lambda: target.qmp("query-status")["status"] == "running", 90)
            worker.wait_for("trouble")
            assert "live migration" in worker.of("trouble")[0]["error"]["message"]
            count = len(worker.of("moment"))
            guest.console, taken = target.console, guest.console
            write_number(guest, 2)
            elsewhere = Instant(time.time_ns())
            time.sleep(7)
            assert len(worker.of("moment")) == count, "a disk that nobody writes to any more has no moments"
            worker.end(signal.SIGTERM)
            again = kind(folder, f"qemu:{target.qmp_path}", name="")
            again.wait_for("moment", 1)
            after = tagged(again, "after")
            [begun] = again.of("begun")
            assert begun["gap"]
            assert again.end(signal.SIGTERM) == 0
            guest.console = taken
    assert number_on(at_seq(folder, guest, before)) == 1
    assert number_on(at_seq(folder, guest, after)) == 2
    with Store.open(folder / "store", folder / "state2", []) as store:
        history = History(store, MachineId(guest.uuid))
        gaps = history.told.gaps
        for t in (elsewhere, Instant((gaps[-1].start + gaps[-1].end) // 2)):
            with pytest.raises(JournalGap):
                history.at(t)


class Leaving:
    """A place among others in which the machine moves to another QEMU before it could stop."""

    def __init__(self, move: Callable[[], None]) -> None:
        self._move = move

    def ready(self) -> bool:
        self._move()
        return False

    def standing(self) -> bool:
        raise AssertionError("it has not stopped")

    def switched(self, t: Instant) -> bool:
        raise AssertionError(t)

    def leave(self, why: str) -> None:
        raise AssertionError(why)


@pytest.mark.guest
@pytest.mark.timeout(300)
def test_a_machine_that_moves_in_the_middle_of_a_cycle(folder: Path) -> None:
    """QEMU then refuses whatever comes next, each with words of its own; the user reads that the machine has moved."""
    disk = make_disk(folder / "a.raw", 16 * MiB, "raw", ext4=False)
    with Guest(folder / "g", [disk]) as guest, arriving(guest, disk, folder) as target:

        def move() -> None:
            guest.qmp("migrate", uri=f"unix:{folder}/migration")
            wait_until(lambda: target.qmp("query-status")["status"] == "running", 90)

        qemu = QemuHypervisor(guest.qmp_path, "0123abcd", scratch_dir=folder / "run")
        cycles = qemu.cycles(qemu.machines()[0], LeaseId("cycles"))
        with pytest.raises(HostUnreachable, match="live migration"), cycles.snapshot({}, seat=Leaving(move)):
            pass


def arriving(guest: Guest, disk: LabDisk, folder: Path) -> Guest:
    """The same machine in another QEMU, which waits for it."""
    return Guest(folder / "t", [disk], name=guest.name, uuid=guest.uuid, incoming=f"unix:{folder}/migration")
