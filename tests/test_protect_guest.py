"""Continuous protection of a real guest: at every moment its file systems recover, and hold an exact prefix of its writes."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from hvbackup.capture import Options
from hvbackup.errors import HostUnreachable, JournalGap
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.model import SECOND, DiskId, Instant, MachineId, MiB
from hvbackup.protect.events import Rhythm
from hvbackup.protect.protection import Protection
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.store import Store, init
from labs.guest import Console, Guest, LabDisk, make_disk, verify_on_host
from labs.guest_root import add_program, enter
from tests.hypervisors.daemon import SETTINGS, only
from tests.protecting import Worker
from tests.test_stream_kills import StreamWorker

pytestmark = [pytest.mark.real, pytest.mark.guest]

DISKS = ("vda", "vdb", "vdc")
SIZE = 48 * MiB
FILES = ("/mnt/a/records", "/mnt/b/records", "/mnt/c/records")


@pytest.fixture
def folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as name:
        yield Path(name)


def mounted(guest: Guest) -> None:
    guest.sh("mkdir -p /mnt/a /mnt/b /mnt/c && mount /dev/vda /mnt/a && mount /dev/vdb /mnt/b && mount /dev/vdc /mnt/c")


def recovered(folder: Path, history: History, moment: Moment) -> int:
    """How many writes the files hold after the file systems of a moment have recovered, as after a power failure."""
    files = []
    for disk in DISKS:
        image, file = folder / f"{disk}.image", folder / f"{disk}.records"
        content = bytearray(SIZE)
        history.view(moment, DiskId(disk)).read_into(0, memoryview(content))
        image.write_bytes(content)
        journal = subprocess.run(
            [program("e2fsck"), "-p", image], capture_output=True, text=True, timeout=60, check=False
        )
        assert journal.returncode in (0, 1), journal.stdout
        again = subprocess.run(
            [program("e2fsck"), "-fn", image], capture_output=True, text=True, timeout=60, check=False
        )
        assert again.returncode == 0, again.stdout
        subprocess.run(
            [program("debugfs"), "-R", f"dump /records {file}", image], capture_output=True, timeout=60, check=True
        )
        files.append(file)
    return verify_on_host(*files)


def program(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin") or name


def three_disks(folder: Path) -> list[LabDisk]:
    formats = ("qcow2", "raw", "qcow2")
    return [make_disk(folder / f"{n}.{form}", SIZE, form) for n, form in zip("abc", formats, strict=True)]


@pytest.mark.timeout(600)
def test_every_moment_of_a_guest_recovers_to_a_prefix_of_its_writes(folder: Path) -> None:
    prove_moments(folder, 20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_hundred_moments_of_a_guest(folder: Path) -> None:
    prove_moments(folder, 200)


def prove_moments(folder: Path, count: int) -> None:
    init(folder / "store", None)
    rng, known = random.Random(5), {}
    with (
        Guest(folder / "g", three_disks(folder)) as guest,
        Store.open(folder / "store", folder / "state", [], owner=True) as store,
    ):
        mounted(guest)
        guest.start_writer(*FILES, mode="overwrite", options=f"-s {4 * MiB}")
        guest.wait_acked(20)
        hypervisor = QemuHypervisor(guest.qmp_path, "00c0ffee", scratch_dir=folder / "s", settings=SETTINGS)
        protection = Protection(store, hypervisor, only(hypervisor), Options(), Rhythm(SECOND))
        life = protection.begin("a test")
        for number in range(count):
            time.sleep(rng.random() * 0.3)
            before = guest.acked()
            cycle = life.cycle()
            known[cycle.moment.seq] = (before, guest.acked())
            if number % 50 == 30:
                life.points.fold(life.points.prepare(life))
        guest.kill()
        acked = guest.acked()
        with pytest.raises(HostUnreachable):
            life.cycle()
        life.recorder.close()
        guest.start()  # the machine was off, and nobody saw what its disks were written to
        again = protection.begin("the machine was killed")
        mounted(guest)
        after = again.cycle()
        history = History(store, only(hypervisor).id)
        for seq, (low, high) in known.items():
            assert low <= recovered(folder, history, history.by_seq(seq)) <= high + 1
        assert acked <= recovered(folder, history, after.moment) <= acked + 1
        last = history.by_seq(max(known))
        with pytest.raises(JournalGap, match="the machine was killed"):
            history.at(Instant(last.t + 1))
        again.close()


@pytest.mark.timeout(600)
def test_five_kills_of_a_guest_and_its_worker(folder: Path) -> None:
    """Whoever dies, every moment that was told of recovers to a prefix, and holds what had been answered for before it."""
    init(folder / "store", None)
    rng, floor = random.Random(7), dict[int, int]()
    with Guest(folder / "g", three_disks(folder)) as guest:
        for victim in ("hvbackup", "hvbackup", "qemu", "hvbackup", "both"):
            mounted(guest)
            guest.sh(f"rm -f {' '.join(FILES)}; sync")
            worker = Worker(folder, f"qemu:{guest.qmp_path}", name="")
            worker.wait_for("begun")
            guest.start_writer(*FILES, mode="overwrite", options=f"-s {4 * MiB}")
            guest.wait_acked(10)
            seqs = {int(e["seq"]) for e in worker.events}
            before = guest.acked()
            worker.wait_for("moment", 2 + sum(e["event"] == "moment" for e in worker.events))
            told = [int(e["seq"]) for e in worker.events if e["event"] == "moment" and int(e["seq"]) not in seqs]
            floor[told[-1]] = before
            time.sleep(rng.random())
            if victim != "hvbackup":
                guest.kill()
            if victim != "qemu":
                worker.process.kill()
            acked = guest.acked()
            worker.end(signal.SIGKILL)
            with Store.open(folder / "store", folder / "state2", []) as store:
                history = History(store, MachineId(guest.uuid))
                assert set(floor) <= set(history.moments[0].tolist())
                assert floor[told[-1]] <= recovered(folder, history, history.by_seq(told[-1])) <= acked + 1
                last = history.last
                assert last
                assert floor[told[-1]] <= recovered(folder, history, last) <= acked + 1
            if victim != "hvbackup":
                guest.start()
            else:
                guest.stop_writer()
                guest.sh("umount /mnt/a /mnt/b /mnt/c")


# -- recovery ----------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_moment_of_the_journal_is_restored_mapped_and_booted(folder: Path) -> None:
    """All three verbs show the guest as it was when it was tagged, while it goes on, and its worker too."""
    init(folder / "store", None)
    with Guest(folder / "g", [make_disk(folder / "a.qcow2", SIZE)], agent=True) as guest:
        guest.sh("mkdir -p /mnt/a && mount /dev/vda /mnt/a && echo first > /mnt/a/word && sync")
        worker = Worker(folder, f"qemu:{guest.qmp_path}", name="")
        worker.wait_for("moment", 1)
        guest.sh("echo second > /mnt/a/word")  # not on the disk yet: only a guest that takes part writes it there
        tagged = worker.run("tag", "lab", "before", "--consistency", "filesystem", "--json")
        assert tagged.returncode == 0, tagged.stderr
        guest.sh("echo third > /mnt/a/word && sync")
        worker.wait_for("moment", 2 + sum(e["event"] == "moment" for e in worker.events))
        [mark] = json.loads(worker.run("timeline", "lab", "--json").stdout)["marks"]
        assert mark["consistency"] in ("filesystem", "application")
        assert worker.run("restore", "lab", "--at", "tag:before", "--to", str(folder / "out")).returncode == 0
        mapped(worker, folder)
        assert word(folder / "out" / "vda.raw") == "second"
        booted = worker.run("boot", "lab", "--at", "tag:before", "--name", "trial", "--json")
        assert booted.returncode == 0, booted.stderr
        try:
            console = Console(json.loads(booted.stdout)["sockets"]["serial"], 60)
            console.wait_ready(90, booting=True)
            assert console.sh("mkdir -p /mnt/a && mount /dev/vda /mnt/a && cat /mnt/a/word") == "second"
            console.close()
        finally:
            assert worker.run("discard", "trial").returncode == 0
        assert guest.sh("cat /mnt/a/word") == "third"
        assert worker.end(signal.SIGTERM) == 0


def mapped(worker: Worker, folder: Path) -> None:
    """The exports of `map` hold what restore wrote."""
    argv = [sys.executable, "-m", "hvbackup", "map", "lab", "--at", "tag:before", "--json"]
    process = subprocess.Popen(argv, env=worker.environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        [disk] = json.loads(process.stdout.readline())["disks"]
        run = ["qemu-img", "convert", "-O", "raw", disk["uri"], str(folder / "mapped.raw")]
        subprocess.run(run, check=True, timeout=60)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert (folder / "mapped.raw").read_bytes() == (folder / "out" / "vda.raw").read_bytes()


def word(image: Path) -> str:
    subprocess.run([program("e2fsck"), "-p", image], capture_output=True, timeout=60, check=False)
    done = subprocess.run(
        [program("debugfs"), "-R", "cat /word", image], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


# -- a database ---------------------------------------------------------------------------------------------------------------

SQL = """
i=0; { echo 'PRAGMA synchronous=FULL;'; while :; do i=$((i+1));
echo "BEGIN; INSERT INTO entry VALUES($i, randomblob(400)); UPDATE total SET n = n + 1, sum = sum + $i; COMMIT;";
echo ".print ack $i";
done; } | chroot /root /bin/sqlite3 -batch /root-db/db >/dev/ttyS1 2>&1 & echo started
"""


Known = dict[int, tuple[int, int]]  # moment -> transactions that were acknowledged by then, and that may have been made


class Acks:
    """How many transactions had been acknowledged at any time, as seen from outside of the guest while this lasts."""

    LOOK_SECONDS = 0.005

    def __init__(self, guest: Guest) -> None:
        self._guest, self._stop = guest, threading.Event()
        self.looks: list[tuple[int, int, int]] = []  # when it began, when it had ended, and what it saw
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Acks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)

    def _run(self) -> None:
        while not self._stop.wait(self.LOOK_SECONDS):
            began, seen = time.time_ns(), self._guest.acked()
            self.looks.append((began, time.time_ns(), seen))

    def by(self, t: int) -> int:
        """So many certainly were at `t`."""
        return max((seen for _, ended, seen in self.looks if ended <= t), default=0)

    def after(self, t: int) -> int:
        """No more were at `t`."""
        return next(seen for began, _, seen in self.looks if began >= t)

    def news(self) -> list[int]:
        """Times at which one that was just acknowledged was seen."""
        return [ended for (_, _, old), (_, ended, new) in itertools.pairwise(self.looks) if new > old]


def tagged(guest: Guest, worker: Worker, rng: random.Random, count: int) -> Known:
    """Moments that somebody asks for, now and then."""
    known = {}
    for number in range(count):
        time.sleep(rng.random() * 0.5)
        before = guest.acked()
        done = worker.run("tag", "lab", f"moment {number}", "--json")
        assert done.returncode == 0, done.stderr
        known[int(json.loads(done.stdout)["seq"])] = (before, guest.acked() + 1)
    return known


def written(history: History, acks: Acks, rng: random.Random, count: int) -> Known:
    """Of a stream: half at any time, a quarter when an acknowledgement was just seen, and a quarter a write before those."""
    assert history.last
    seqs, known = history.moments[0].tolist(), {}
    news = [t for t in acks.news() if t < history.last.t]
    seen = rng.sample(news, count // 4)
    times = [rng.randrange(acks.looks[0][1], news[-1]) for _ in range(count - 2 * len(seen))]
    for t in [*times, *seen]:
        moment = history.at(Instant(t))
        known[moment.seq] = (acks.by(t), acks.after(moment.t) + 1)
        if t in seen:
            earlier = history.by_seq(seqs[seqs.index(moment.seq) - 1])
            known.setdefault(earlier.seq, (acks.by(earlier.t), acks.after(earlier.t) + 1))
    return known


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stream", "count"), [(False, 12), (True, 50)], ids=["cycles", "stream"])
def test_a_database_opens_at_every_moment_with_exactly_what_was_committed(
    folder: Path, stream: bool, count: int
) -> None:
    prove_database(folder, count, stream=stream)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stream", "count"), [(False, 50), (True, 500)], ids=["cycles", "stream"])
def test_a_database_at_many_moments(folder: Path, stream: bool, count: int) -> None:
    prove_database(folder, count, stream=stream)


def prove_database(folder: Path, count: int, *, stream: bool) -> None:
    """SQLite with a write-ahead log, on ext4, in a guest: each commit is acknowledged when sqlite3 says so."""
    init(folder / "store", None)
    root = folder / "root"
    add_program(root, Path(program("sqlite3")), "/bin/sqlite3")
    (root / "root-db").mkdir()
    disks = [make_disk(folder / "root.raw", 64 * MiB, "raw", content=root), make_disk(folder / "db.qcow2", SIZE)]
    rng = random.Random(3)
    with Guest(folder / "g", disks) as guest:
        enter(guest, "/dev/vda")
        guest.sh("mount /dev/vdb /root/root-db")
        tables = "PRAGMA journal_mode=WAL; CREATE TABLE entry(i INTEGER PRIMARY KEY, b BLOB); "
        tables += "CREATE TABLE total(n INTEGER, sum INTEGER); INSERT INTO total VALUES(0, 0);"
        guest.sh(f"chroot /root /bin/sqlite3 /root-db/db '{tables}'")
        guest.acks_path.write_bytes(b"")
        guest.sh(SQL)
        guest.wait_acked(5)
        worker = (StreamWorker if stream else Worker)(folder, f"qemu:{guest.qmp_path}", name="")
        worker.wait_for("begun")
        with Acks(guest) as acks:
            known = {} if stream else tagged(guest, worker, rng, count)
            guest.wait_acked(guest.acked() + (4 * count if stream else 0))
            assert worker.end(signal.SIGTERM) == 0
            guest.wait_acked(guest.acked() + 1)
    with Store.open(folder / "store", folder / "state2", []) as store:
        history = History(store, MachineId(guest.uuid))
        known = known or written(history, acks, rng, count)
        held = []
        for seq, (low, high) in sorted(known.items()):
            held.append(transactions(folder, history, history.by_seq(seq)))
            assert low <= held[-1] <= high, seq
    assert held == sorted(held)
    assert len(set(held)) > count // 2, "it committed all the time"


def transactions(folder: Path, history: History, moment: Moment) -> int:
    """How many the database holds: all of the first n, whole."""
    image, database = folder / "db.image", folder / "db"
    content = bytearray(SIZE)
    history.view(moment, DiskId("vdb")).read_into(0, memoryview(content))
    image.write_bytes(content)
    found = subprocess.run([program("e2fsck"), "-p", image], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode in (0, 1), found.stdout
    for name in ("db", "db-wal"):
        (folder / name).unlink(missing_ok=True)
        dump = [program("debugfs"), "-R", f"dump /{name} {folder / name}", image]
        subprocess.run(dump, capture_output=True, timeout=60, check=True)
    (folder / "db-shm").unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        count, last, total = db.execute(
            "SELECT count(*), coalesce(max(i), 0), coalesce(sum(i), 0) FROM entry"
        ).fetchone()
        assert db.execute("SELECT n, sum FROM total").fetchall() == [(count, total)]
        assert count == last, "one in between is missing"
    return int(count)
