"""Kills of either side of a stream, and power cuts: what the guest was told, and is older than a group fsync, is in the journal.

A power cut is a real one, as far as a file system can tell: ext4's own shutdown, which forgets all that was not synced.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvbackup.config import places
from hvbackup.errors import JournalGap
from hvbackup.model import Instant, MiB
from hvbackup.protect.journaling import STALL_SECONDS
from hvbackup.store.journal.history import Gap, History, Moment
from hvbackup.store.store import Store, init
from hvbackup.target.ring import find
from tests.endtoend.mounts import needs_mount, small_disk
from tests.hypervisors.daemon import Daemon, make_image, node
from tests.protecting import SLOW_DISK, Worker
from tests.scribe import BLOCK, Scribe
from tests.test_stream_qemu import SIZES, every_moment, images, on_disk

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / ".lab" / "figures"


def two_disks(folder: Path, images: Path | None = None) -> Daemon:
    """Two raw disks: what a guest was told is written survives the death of the daemon."""
    where = images or folder
    nodes = [node(name, make_image(where / f"{name}.raw", size, "raw"), "raw") for name, size in SIZES.items()]
    return Daemon(folder, nodes)


class StreamWorker(Worker):
    """`hvbackup protect --stream` as a process, and what it says."""

    rhythm = ("--stream",)

    def target(self) -> int:
        """The process of its target."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = {pid for task in tasks for pid in read_bytes(task).decode().split()}
        programs = {int(p): read_bytes(Path(f"/proc/{p}/cmdline")).partition(b"\0")[0] for p in children}
        [found] = [pid for pid, program in programs.items() if program.endswith(b"hvbackup-target")]
        return found


def read_bytes(path: Path) -> bytes:
    """What /proc tells; nothing of a thread or process that has ended meanwhile."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def gap_of_the_last_life(history: History) -> Gap:
    """The one at the head of the present life; a second one may lie behind the point with which it began."""
    return [g for g in history.told.gaps if "not armed" not in g.why][-1]


def last_recorded(history: History) -> Moment:
    """The newest moment of the life before the present one."""
    found = history.newest_at(gap_of_the_last_life(history).start)
    assert found
    return found


class Witness:
    """What every stranger who opens the store must find."""

    def __init__(self, folder: Path, scribe: Scribe, rng: random.Random) -> None:
        self._folder, self._scribe, self._rng = folder, scribe, rng
        self.seen: dict[int, int] = {}  # moment -> how many writes it holds
        self.gaps = 0

    def look(self, at_least: int, moments: int = 3) -> int:
        """Moments are exact prefixes, and `at_least` so many writes were recorded before the last gap; how many are now."""
        with Store.open(self._folder / "store", self._folder / "state2", []) as store:
            [machine] = {p.machine.id for p in store.points()}
            history = History(store, machine)
            offered = every_moment(history)
            acked = self._scribe.acked
            assert set(self.seen) <= {m.seq for m in offered}, "a moment that was offered is gone"
            picked = {m.seq: m for m in [offered[-1], *self._rng.sample(offered, min(moments, len(offered)))]}
            for seq in self._rng.sample(sorted(self.seen), min(2, len(self.seen))):
                picked[seq] = next(m for m in offered if m.seq == seq)
            for seq, moment in sorted(picked.items()):
                n = self._scribe.verify(images(history, moment))
                assert self.seen.setdefault(seq, n) == n
            held = [n for _, n in sorted(self.seen.items())]
            assert held == sorted(held)
            newest = self.seen[offered[-1].seq]
            assert newest <= acked + 1, (newest, acked)
            self.gaps = len(history.told.gaps)
            before = last_recorded(history) if self.gaps > 1 else offered[-1]
            recorded = self._scribe.verify(images(history, before))
            assert at_least <= recorded <= newest, (at_least, recorded, newest)
            for gap in history.told.gaps[-3:]:
                if gap.end - gap.start > 2:
                    with pytest.raises(JournalGap):
                        history.at(Instant((gap.start + gap.end) // 2))
            return newest


def kills(daemon: Daemon, folder: Path, count: int, rng: random.Random) -> None:
    """Kill the worker, its target or the machine, again and again, at random moments."""
    init(folder / "store", None)
    source = f"qemu:{daemon.qmp_path}"
    with Scribe(daemon, SIZES, 600, seed=rng.getrandbits(32)) as scribe:
        witness = Witness(folder, scribe, rng)
        worker = StreamWorker(folder, source)
        worker.wait_for("begun")
        for turn in range(count):
            time.sleep(rng.random() * 0.4)
            if turn % 5 == 4:
                trouble = worker.told("trouble")
                daemon.kill()
                acked = scribe.acked
                worker.wait_for("trouble", trouble + 1)
                begun = worker.told("begun")
                daemon.start()
                worker.wait_for("begun", begun + 1)
                witness.look(acked)  # it was there when its answer was, and the worker still is
                continue
            if turn % 5 == 2:
                os.kill(worker.target(), signal.SIGSTOP)
                time.sleep(0.05)
            before = scribe.acked
            worker.end(signal.SIGKILL)
            worker = StreamWorker(folder, source)
            worker.wait_for("begun")
            witness.look(before)
        assert witness.gaps >= count * 0.8
        scribe.stop()
        told = sum(e["event"] == "moment" for e in worker.events)
        worker.wait_for("moment", told + 2)
        status = json.loads(worker.run("status", "--json").stdout)
        [protected] = [m["protection"] for m in status["machines"]]
        assert protected["worker"] == worker.process.pid
        assert protected["lag_seconds"] < 120, "a guest that writes nothing is not behind"
        assert worker.end(signal.SIGINT) == 0
        assert witness.look(0) == scribe.acked
        with Store.open(folder / "store", folder / "state2", []) as store:
            history = History(store, next(iter(store.points())).machine.id)
            assert images(history, every_moment(history)[-1]) == on_disk(folder)
    assert not daemon.leftovers()


def lives(count: int, rng: random.Random) -> None:
    """So many kills, of machines with stores of their own that are killed 25 times at most."""
    while count > 0:
        with tempfile.TemporaryDirectory(prefix="hvk-") as name:
            machine = two_disks(Path(name)).start()
            try:
                kills(machine, Path(name), min(count, 25), rng)
            finally:
                machine.kill()
        count -= 25


@pytest.mark.timeout(600)
def test_kills_lose_nothing_that_was_answered() -> None:
    """With the five of a guest, in test_stream_guest.py, they are fifty."""
    lives(45, random.Random(20261124))


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_a_thousand_kills_lose_nothing_that_was_answered() -> None:
    seed = random.SystemRandom().getrandbits(32)
    began = time.monotonic()
    lives(1000, random.Random(seed))
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / "kills-stream.txt").write_text(f"1000 kills in {time.monotonic() - began:.0f} s, seed {seed}\n")


_ABORTED = """
import sys
from pathlib import Path
from hvbackup.store.store import init
from tests.test_stream_kills import StreamWorker, two_disks
folder = Path(sys.argv[1])
machine = two_disks(folder).start()
init(folder / "store", None)
worker = StreamWorker(folder, f"qemu:{machine.qmp_path}")
worker.wait_for("begun")
print(machine.process.pid, worker.process.pid, worker.target(), flush=True)
sys.stdin.read()
"""


def test_tests_that_are_killed_leave_no_process_behind(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", _ABORTED, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as aborted:
        assert aborted.stdout
        programs = [Path(f"/proc/{int(pid)}") for pid in aborted.stdout.readline().split()]
        assert len(programs) == 3
        assert all(p.exists() for p in programs)
        aborted.kill()
    end = time.monotonic() + 120
    while any(p.exists() for p in programs):
        assert time.monotonic() < end, "somebody outlives the tests"
        time.sleep(0.05)


# --- power cuts -------------------------------------------------------------------------------------------------------

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2
FSYNC_SECONDS = 0.1  # as `--fsync` says when nothing is said


def cut_power(disk: Path) -> None:
    """Nothing that was not synced reaches the disk any more."""
    fd = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("<I", _NO_LOG_FLUSH))
    finally:
        os.close(fd)


class Durable:
    """What the ring of a stream says of the newest write that is durable."""

    def __init__(self, path: Path) -> None:
        found = find(path)
        assert found
        self._ring = found

    def number(self) -> int:
        """The scribe's number of it, 0 when there is none."""
        _, at = self._ring.tails
        if at < BLOCK:
            return 0
        inside = (at - BLOCK) % self._ring.data_max
        return int.from_bytes(self._ring._data[inside : inside + 8], "little")

    def close(self) -> None:
        self._ring.close()


def ring_of(store: Path, machine: str) -> Path:
    """Where the worker has its ring: in memory, as long as there is power."""
    name = hashlib.sha256(bytes.fromhex(json.loads((store / "HVBACKUP").read_bytes())["id"]) + machine.encode())
    return places().rings / f"{name.hexdigest()[:24]}.ring"


@dataclass(frozen=True, slots=True)
class Cut:
    """What one power cut has taken."""

    lost: int  # writes that had been answered; none of them was durable
    seconds: float  # how long ago the oldest of them was, when the power went
    told_seconds: float  # the longest lag of which the worker had told


def power_cut(folder: Path, rng: random.Random) -> Cut:
    """One host that loses its power while a guest writes, and goes on afterwards."""
    with small_disk(folder, "disk", 1024 * MiB) as disk:
        machine = two_disks(folder, disk.path).start()
        init(disk.path / "store", None)
        kept = {"HVBACKUP_STORE": str(disk.path / "store"), "HVBACKUP_STATE": str(disk.path / "state")}
        source = f"qemu:{machine.qmp_path}"
        try:
            with Scribe(machine, SIZES, 600, seed=rng.getrandbits(32)) as scribe:
                worker = StreamWorker(folder, source, environment=kept)
                worker.wait_for("moment")
                path = ring_of(disk.path / "store", source)
                ring = Durable(path)
                time.sleep(rng.random())
                durable, told = ring.number(), [e for e in worker.events if e["event"] == "moment"]
                answered = scribe.acked
                assert machine.process
                machine.process.send_signal(signal.SIGSTOP)  # a guest without power sees no error
                cut = time.monotonic()
                cut_power(disk.path)
                stalled = any(SLOW_DISK in str(e) for e in list(worker.events))
                ring.close()
                machine.kill()
                worker.end(signal.SIGKILL)
                path.unlink()
        finally:
            machine.kill()
        remount(folder, disk.path)
        machine.start()
        try:
            again = StreamWorker(folder, source, environment=kept)
            again.wait_for("begun")
            with Scribe(machine, SIZES, 600, seed=rng.getrandbits(32), noise=True) as following:
                following.wait(100)
            assert again.end(signal.SIGTERM) == 0
            with Store.open(disk.path / "store", folder / "state2", []) as store:
                history = History(store, next(iter(store.points())).machine.id)
                offered = every_moment(history)
                assert told[-1]["seq"] in {m.seq for m in offered}
                recorded = scribe.verify(images(history, last_recorded(history)))
                assert durable <= recorded <= scribe.acked + 1, (durable, recorded, answered)
                assert_prefixes(history, scribe, following, rng)
                assert images(history, offered[-1]) == on_disk(disk.path), "whatever the disks have lost"
        finally:
            machine.kill()
        lags = [float(e["lag_seconds"]) for e in told]
        age = cut - scribe.answered[recorded + 1] if recorded < answered else 0.0
        assert stalled or age < FSYNC_SECONDS + max(STALL_SECONDS, *lags), "nothing was told of a disk that is so slow"
        return Cut(max(0, answered - recorded), age, max(lags))


def assert_prefixes(history: History, scribe: Scribe, following: Scribe, rng: random.Random) -> None:
    """What is offered from before a cut is so of what was written before, and what is from after it, of that; nothing between."""
    gap, offered = gap_of_the_last_life(history), every_moment(history)
    before = rng.sample(old := [m for m in offered if m.t <= gap.start], min(3, len(old)))
    held = [scribe.verify(images(history, m)) for m in sorted(before, key=lambda m: m.seq)]
    assert held == sorted(held)
    new = [m for m in offered if m.t >= gap.end]
    over = images(history, new[0])
    picked = sorted([*rng.sample(new, 3), new[-1]], key=lambda m: m.seq)
    held = [following.verify(images(history, m), over) for m in picked]
    assert held == sorted(held)
    assert held[-1] == following.acked
    with pytest.raises(JournalGap):
        history.at(Instant((gap.start + gap.end) // 2))


def remount(folder: Path, path: Path) -> None:
    """What the disk held, when there is power again.

    It is a copy: a mount namespace that another program has made meanwhile may hold the old file system, and the kernel
    would give us that one, without power, once more.
    """
    subprocess.run(["umount", str(path)], check=True, timeout=120)
    found, again = folder / "disk.ext4", folder / "again.ext4"
    subprocess.run(["cp", "--sparse=always", str(found), str(again)], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", str(again), str(path)], check=True, timeout=120)


def power_cuts(count: int, rng: random.Random) -> list[Cut]:
    cuts = []
    for _ in range(count):
        with tempfile.TemporaryDirectory(prefix="hvp-") as name:
            cuts.append(power_cut(Path(name), rng))
    return cuts


@needs_mount
@pytest.mark.timeout(600)
def test_power_cuts_take_only_what_was_not_durable() -> None:
    power_cuts(3, random.Random(20261124))


@needs_mount
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_power_cuts_take_only_what_was_not_durable() -> None:
    seed = random.SystemRandom().getrandbits(32)
    cuts = power_cuts(100, random.Random(seed))
    FIGURES.mkdir(parents=True, exist_ok=True)
    lines = [f"{c.lost} answered writes lost, {c.seconds:.3f} s old at most, {c.told_seconds:.3f} s told" for c in cuts]
    (FIGURES / "power-cuts-stream.txt").write_text("\n".join([f"seed {seed}", *lines, ""]))
