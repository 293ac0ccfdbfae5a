"""The write stream of a real guest: each moment recovers as after a power failure, and every trap of the mirror is sprung."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import hvbackup.hypervisors
from hvbackup.capture import Options
from hvbackup.errors import JournalGap, NotFound, StreamBroken, StreamBypassed
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.hypervisors.qemu_stream_guard import HUNG_SECONDS
from hvbackup.hypervisors.qemu_wire import Wire
from hvbackup.hypervisors.qmp import Qmp
from hvbackup.model import SECOND, DiskId, Instant
from hvbackup.protect.events import Rhythm
from hvbackup.protect.protection import Protection
from hvbackup.protect.streaming import StreamLife
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.store import Store, init
from hvbackup.target.ring import find
from labs.guest import Guest, make_disk
from tests.hypervisors.daemon import SETTINGS, only
from tests.protecting import in_memory
from tests.scribe import Metronome
from tests.test_protect_guest import FILES, SIZE, mounted, recovered
from tests.test_stream_kills import StreamWorker, last_recorded

pytestmark = [pytest.mark.real, pytest.mark.guest]
WRITER = f"-s {4 << 20}"


@pytest.fixture
def folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as name:
        yield Path(name)


@pytest.fixture
def guest(folder: Path) -> Generator[Guest]:
    """Three disks with a file system each, and two more monitors that nobody uses."""
    disks = [make_disk(folder / "a.qcow2", SIZE), *(make_disk(folder / f"{n}.raw", SIZE, "raw") for n in "bc")]
    extra = [w for n in ("second", "third") for w in ("-qmp", f"unix:{folder / n}.sock,server=on,wait=off")]
    with Guest(folder / "g", disks, extra=extra) as made:
        mounted(made)
        yield made


@pytest.fixture
def store(folder: Path) -> Generator[Store]:
    init(folder / "store", None)
    with in_memory(folder / "rings"), Store.open(folder / "store", folder / "state", []) as found:
        yield found


def protection_of(store: Store, guest: Guest, folder: Path) -> Protection:
    hypervisor = QemuHypervisor(guest.qmp_path, "00c0ffee", scratch_dir=folder / "s", settings=SETTINGS)
    rhythm = Rhythm(SECOND // 10, 3600 * SECOND, stream=True, rings=(folder / "rings").resolve())
    return Protection(store, hypervisor, only(hypervisor), Options(), rhythm)


def begun(protection: Protection) -> StreamLife:
    life = protection.begin("a test")
    assert isinstance(life, StreamLife)
    return life


class Stepping:
    """A life that goes on by itself, until left."""

    def __init__(self, life: StreamLife) -> None:
        self._life, self._stop = life, threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._stop.wait(self._life.step())
        except BaseException as e:  # noqa: BLE001 - looked at by the test
            self.error = e

    def __enter__(self) -> Stepping:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)

    def wait(self, seconds: float = 120) -> BaseException:
        self._thread.join(seconds)
        assert self.error is not None, "nothing was noticed"
        return self.error


def moments(history: History) -> list[Moment]:
    seqs, times = history.moments
    return [Moment(int(s), Instant(int(t))) for s, t in zip(seqs, times, strict=True)]


def check_moments(folder: Path, history: History, after: int, until: int, count: int, rng: random.Random) -> None:
    """Random moments recover to prefixes, and later ones hold as much or more."""
    offered = [m for m in moments(history) if after < m.seq <= until]
    picked = sorted(rng.sample(offered, min(count, len(offered))), key=lambda m: m.seq)
    reached = [recovered(folder, history, m) for m in [*picked, offered[-1]]]
    assert reached == sorted(reached)


@pytest.mark.timeout(600)
def test_every_moment_of_a_guest_recovers_and_kills_lose_nothing(guest: Guest, folder: Path) -> None:
    """Three kills of hvbackup and two of QEMU; what was acknowledged before each is in the journal before the gap."""
    init(folder / "store", None)
    rng = random.Random(7)
    source = f"qemu:{guest.qmp_path}"
    guest.start_writer(*FILES, mode="overwrite", options=WRITER)
    guest.wait_acked(20)
    worker = StreamWorker(folder, source)
    worker.wait_for("begun")
    for turn in range(5):
        time.sleep(0.5 + rng.random())
        if turn in (2, 4):
            guest.kill()
            acked = guest.acked()
            time.sleep(1.0)
            worker.end(signal.SIGKILL)
            guest.start()
            mounted(guest)
            guest.sh("rm -f /mnt/*/records; sync")  # another run of the witness begins
            guest.start_writer(*FILES, mode="overwrite", options=f"{WRITER} -i {turn}")
            guest.wait_acked(20)
        else:
            acked = guest.acked()
            worker.end(signal.SIGKILL)
        worker = StreamWorker(folder, source)
        worker.wait_for("begun")
        with Store.open(folder / "store", folder / "state2", []) as store:
            history = History(store, next(iter(store.points())).machine.id)
            before = last_recorded(history)
            assert acked <= recovered(folder, history, before), "what was acknowledged is recorded"
            if turn in (0, 2):
                check_moments(folder, history, before.seq - 150, before.seq, 4, rng)
    guest.stop_writer()
    assert worker.end(signal.SIGINT) == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [12, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_random_moments_of_a_guest_recover(guest: Guest, folder: Path, count: int) -> None:
    """Anywhere in a stream, also where file systems wrote their journals: what was acknowledged is there, and nothing torn."""
    init(folder / "store", None)
    guest.start_writer(*FILES, mode="overwrite", options=WRITER)
    worker = StreamWorker(folder, f"qemu:{guest.qmp_path}")
    worker.wait_for("begun")
    from_here = guest.acked()
    guest.wait_acked(from_here + 10 * count, timeout_seconds=300)
    guest.stop_writer()
    acked = guest.acked()
    assert worker.end(signal.SIGINT) == 0
    with Store.open(folder / "store", folder / "state2", []) as store:
        history = History(store, next(iter(store.points())).machine.id)
        offered = moments(history)
        assert len(offered) > 10 * count, "one moment for each write of the guest's disks"
        check_moments(folder, history, offered[0].seq, offered[-1].seq, count, random.Random(count))
        assert recovered(folder, history, offered[-1]) in (acked, acked + 1), (
            "one may be on its way when the witness ends"
        )


@pytest.mark.timeout(600)
def test_writes_that_go_past_the_mirror_are_noticed(guest: Guest, store: Store, folder: Path) -> None:
    protection = protection_of(store, guest, folder)
    life = begun(protection)
    guest.start_writer(*FILES, mode="overwrite", options=WRITER)
    guest.wait_acked(20)
    with Stepping(life) as stepping:
        time.sleep(2.5)
        end = time.monotonic() + 120
        while life._good is None and time.monotonic() < end:
            time.sleep(0.05)
        good = life._good
        guest.qmp("qom-set", path="/machine/peripheral/vda/virtio-backend", property="drive", value="disk0")
        assert isinstance(stepping.wait(), StreamBypassed)
    assert good
    with contextlib.suppress(StreamBroken):
        life.close()
    history = History(store, protection.setting.machine.id)
    check_moments(folder, history, good.seq - 200, good.seq, 3, random.Random(1))
    doubtful = life.newest
    with pytest.raises((JournalGap, NotFound)):
        history.by_seq(doubtful.seq)
    again = begun(protection)
    guest.stop_writer()
    guest.pause()
    again.step()
    again.close()
    history = History(store, protection.setting.machine.id)
    assert_is_the_disk(guest, folder, history)


def assert_is_the_disk(guest: Guest, folder: Path, history: History) -> None:
    """The newest moment is what the disks of a paused guest hold."""
    raw = bytearray(SIZE)
    history.view(moments(history)[-1], DiskId("vdb")).read_into(0, memoryview(raw))
    assert raw == (folder / "b.raw").read_bytes()


@pytest.mark.timeout(600)
def test_a_target_that_hangs_holds_a_guest_for_about_a_second(guest: Guest, store: Store, folder: Path) -> None:
    """Its watchdog kills it; discards are swallowed and zeroes arrive, before that."""
    protection = protection_of(store, guest, folder)
    life = begun(protection)
    allocated = os.stat(folder / "b.raw").st_blocks
    guest.sh("dd if=/dev/urandom of=/mnt/b/junk bs=64k count=128 conv=fsync 2>/dev/null; rm /mnt/b/junk; sync")
    grown = os.stat(folder / "b.raw").st_blocks
    guest.sh("fstrim /mnt/b; sync")
    assert os.stat(folder / "b.raw").st_blocks >= grown > allocated, "the mirror swallows discards"
    guest.start_writer(*FILES, mode="overwrite", options=WRITER)
    guest.wait_acked(20)
    assert life.target
    metronome = Metronome()
    with Stepping(life) as stepping:
        began = time.monotonic()
        guest.wait_acked(guest.acked() + 40)
        pace = time.monotonic() - began  # of this guest, on this machine
        os.kill(life.target.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        before = guest.acked()
        assert isinstance(stepping.wait(), StreamBroken)
        assert guest.wait_acked(before + 20) >= before + 20
        assert time.monotonic() - stopped < metronome.bound(HUNG_SECONDS + 3.0 + 2 * pace)
    metronome.stop()
    with contextlib.suppress(StreamBroken):
        life.close()
    again = begun(protection)
    guest.stop_writer()
    guest.sh("sync")
    guest.pause()
    again.step()
    again.close()
    assert_is_the_disk(guest, folder, History(store, protection.setting.machine.id))
    assert find(folder / "rings" / "none") is None
    with Qmp(guest.qmp_path) as qmp:
        names = [n["node-name"] for n in qmp.command("query-named-block-nodes", flat=True)]
    assert not [n for n in names if n.startswith("hvb-")]


@pytest.mark.timeout(600)
def test_a_main_loop_that_hangs_is_freed_out_of_band(guest: Guest, store: Store, folder: Path) -> None:
    """Somebody cancels a mirror whose target hangs: QEMU hears nothing any more, but a yank on the second monitor."""
    guard = guard_module()
    protection = protection_of(store, guest, folder)
    life = begun(protection)
    stream = life.stream
    assert life.target
    guest.start_writer(*FILES, mode="overwrite", options=WRITER)
    guest.wait_acked(20)
    assert stream._guard  # type: ignore[attr-defined]
    stream._guard._process.kill()  # type: ignore[attr-defined]
    with Wire(folder / "second.sock", 60, out_of_band=True) as second:
        os.kill(life.target.pid, signal.SIGSTOP)
        time.sleep(0.3)
        with Wire(guest.qmp_path, 60) as wire, contextlib.suppress(Exception):
            wire._socket.settimeout(2.0)
            wire.one("job-cancel", id=stream._set.names.mirror(0))  # type: ignore[attr-defined]
        before = guest.acked()
        time.sleep(1.0)
        assert guest.acked() <= before + 1, "the guest waits"
        guard.yank(second.fileno(), stream._set.names.prefix)  # type: ignore[attr-defined]
        guest.wait_acked(before + 20)
    os.kill(life.target.pid, signal.SIGKILL)
    with contextlib.suppress(StreamBroken):
        life.close()
    assert guest.acked() > before
    guest.stop_writer()


def guard_module() -> Any:
    """The guard's program, as it is imported when it runs as a file."""
    folder = str(Path(hvbackup.hypervisors.__file__).parent)
    sys.path.append(folder)
    try:
        return importlib.import_module("qemu_stream_guard")
    finally:
        sys.path.remove(folder)
