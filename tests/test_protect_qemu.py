"""Continuous protection of a storage daemon that is written to all the time: every moment is an exact prefix of the writes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvbackup.capture import Options
from hvbackup.errors import HostUnreachable, JournalGap
from hvbackup.model import SECOND, DiskId, Instant, MiB
from hvbackup.protect.events import Rhythm
from hvbackup.protect.protection import Protection
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.store import Store, init
from tests.endtoend.mounts import needs_mount, small_disk
from tests.hypervisors.daemon import Daemon, make_image, node, only
from tests.protecting import Worker
from tests.scribe import Scribe

pytestmark = pytest.mark.real
SIZES = {"vda": 8 * MiB, "vdb": 4 * MiB}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Two raw disks: what a guest was told is written survives the death of the daemon."""
    nodes = [node(name, make_image(tmp_path / f"{name}.raw", size, "raw"), "raw") for name, size in SIZES.items()]
    made = Daemon(tmp_path, nodes).start()
    yield made
    made.kill()


def images(history: History, moment: Moment) -> dict[str, bytearray]:
    found = {}
    for disk, size in SIZES.items():
        view = history.view(moment, DiskId(disk))
        found[disk] = bytearray(max(size, view.size))
        view.read_into(0, memoryview(found[disk])[: view.size])
    return found


def every_moment(history: History) -> list[Moment]:
    seqs, times = history.moments
    return [Moment(int(s), Instant(int(t))) for s, t in zip(seqs, times, strict=True)]


def test_every_moment_of_two_disks_is_a_prefix(daemon: Daemon, tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    with (
        Store.open(tmp_path / "store", tmp_path / "state", [], owner=True) as store,
        Scribe(daemon, SIZES, 1500) as scribe,
    ):
        hypervisor = daemon.hypervisor()
        protection = Protection(store, hypervisor, only(hypervisor), Options(), Rhythm(SECOND))
        life = protection.begin("a test")
        known: dict[int, tuple[int, int]] = {}
        rng = random.Random(3)
        for _ in range(25):
            time.sleep(rng.random() * 0.2)
            before = scribe.acked
            cycle = life.cycle()
            known[cycle.moment.seq] = (before, scribe.acked)
        life.points.fold(life.points.prepare(life))
        life.close()
        scribe.stop()
        history = History(store, only(hypervisor).id)
        reached = [scribe.verify(images(history, moment)) for moment in every_moment(history)]
        assert reached == sorted(reached)
        for moment, n in zip(every_moment(history), reached, strict=True):
            low, high = known.get(moment.seq, (0, scribe.acked))
            assert low <= n <= high + 1, moment
        assert len(reached) >= 26
        point = store.newest(only(hypervisor).id)
        assert point is not None
        folded = {d.disk.id: bytearray(d.disk.size) for d in point.disks}
        for root in point.disks:
            store.view(root).read_into(0, memoryview(folded[root.disk.id]))
        assert scribe.verify(folded) == reached[-1]
    assert not daemon.leftovers()


def verify_all(folder: Path, scribe: Scribe, seen: dict[int, int], at_least: int) -> None:
    """Whatever a stranger finds in the store now is an exact prefix; what was offered before still is, and is the same."""
    with Store.open(folder / "store", folder / "state2", []) as store:
        [machine] = {p.machine.id for p in store.points()}
        history = History(store, machine)
        acked = scribe.acked
        offered = every_moment(history)
        assert set(seen) <= {m.seq for m in offered}
        for moment in offered:
            if moment.seq not in seen or moment is offered[len(offered) // 2]:
                n = scribe.verify(images(history, moment))
                assert seen.setdefault(moment.seq, n) == n
        assert [seen[m.seq] for m in offered] == sorted(seen[m.seq] for m in offered)
        assert at_least <= seen[offered[-1].seq] <= acked + 1
        for gap in history.told.gaps:
            if gap.end - gap.start > 2:
                with pytest.raises(JournalGap):
                    history.at(Instant((gap.start + gap.end) // 2))


def test_every_verb_works_while_the_worker_runs(daemon: Daemon, tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    with Scribe(daemon, SIZES, 400) as scribe:
        worker = Worker(tmp_path, f"qemu:{daemon.qmp_path}")
        worker.wait_for("begun")
        before = scribe.acked
        tagged = json.loads(worker.run("tag", "m1", "before upgrade", "--json").stdout)
        after = scribe.acked
        worker.wait_for("folded")
        worker.wait_for("moment", 8)
        chosen = [e["seq"] for e in worker.events if e["event"] == "moment"][-2]
        low = scribe.acked
        made = worker.run("backup", f"qemu:{daemon.qmp_path}", "--tag", "by hand", "--json")
        assert made.returncode == 0, made.stderr
        assert worker.run("restore", "m1", "--at", "tag:by hand", "--to", str(tmp_path / "by-hand")).returncode == 0
        held = {disk: (tmp_path / "by-hand" / f"{disk}.raw").read_bytes() for disk in SIZES}
        assert low <= scribe.verify(held) <= scribe.acked
        assert worker.run("backup", f"qemu:{daemon.qmp_path}", "--full").returncode == 2
        points = json.loads(worker.run("points", "m1", "--json").stdout)["points"]
        assert (
            "by hand" in next(p for p in points if p["id"] == json.loads(made.stdout)["runs"][0]["point"]["id"])["tags"]
        )
        for at, low, high in [
            ("tag:before upgrade", before, after + 1),
            (f"seq:{tagged['seq']}", before, after + 1),
            (f"seq:{chosen}", after, scribe.acked),
            ("latest", after, 0),
        ]:
            folder = tmp_path / f"restored-{at.replace(' ', '-')}"
            done = worker.run("restore", "m1", "--at", at, "--to", str(folder))
            assert done.returncode == 0, done.stderr
            restored = {disk: (folder / f"{disk}.raw").read_bytes() for disk in SIZES}
            assert low <= scribe.verify(restored) <= (high or scribe.acked)
        refused = worker.run("restore", "m1", "--at", f"seq:{chosen - 1}", "--to", str(tmp_path / "no"))
        assert refused.returncode == 2
        assert f"seq:{chosen}" in refused.stderr
        unknown = worker.run("restore", "m1", "--at", "tag:before upgrad", "--to", str(tmp_path / "no"))
        assert "did you mean tag:before upgrade?" in unknown.stderr
        status = json.loads(worker.run("status", "--json").stdout)
        [machine] = status["machines"]
        assert machine["protection"]["worker"] == worker.process.pid
        assert machine["protection"]["lag_seconds"] < 120, "half a second, on a machine that has time"
        assert "before upgrade" in worker.run("timeline", "m1").stdout
        assert worker.end(signal.SIGINT) == 0
        assert worker.run("tag", "m1", "too late").returncode == 2
        time.sleep(1.5)
        again = Worker(tmp_path, f"qemu:{daemon.qmp_path}")
        again.wait_for("begun")
        gap = next(e["gap"] for e in again.events if e["event"] == "begun")
        middle = gap["from"][:19] + "Z"
        assert again.end(signal.SIGTERM) == 0
        inside = again.run("restore", "m1", "--at", middle, "--to", str(tmp_path / "no"))
        assert inside.returncode == 2
        assert inside.stderr.count("seq:") == 2
    assert not daemon.leftovers()


def test_a_pause_leaves_the_machine_alone_over_restarts_and_shows_as_a_gap(daemon: Daemon, tmp_path: Path) -> None:
    """While it lasts the administrator resizes a disk and runs a job of his own: nothing of ours is in the way."""
    init(tmp_path / "store", None)
    source = f"qemu:{daemon.qmp_path}"
    with Scribe(daemon, SIZES, 200) as scribe:
        worker = Worker(tmp_path, source)
        worker.wait_for("moment", 2)
        paused = worker.run("protect", "pause", "m1", "--why", "a resize", "--json")
        assert paused.returncode == 0, paused.stderr
        assert json.loads(paused.stdout)["paused"]["why"] == "a resize"
        last = [e["seq"] for e in worker.events if e["event"] == "moment"][-1]
        assert not daemon.leftovers()
        with daemon.qmp() as qmp:
            daemon.unplug(qmp, "vdb")  # a storage daemon resizes no disk that is in use
            qmp.command("block_resize", node_name="vdb", size=SIZES["vdb"] + 65536)
            daemon.plug(qmp, "vdb")
            qmp.command("blockdev-add", driver="null-co", node_name="sink", size=SIZES["vda"])
            with qmp.events("BLOCK_JOB_COMPLETED") as events:
                qmp.command("blockdev-backup", job_id="mine", device="vda", target="sink", sync="full")
                assert not events.next(60)["data"].get("error")
            qmp.command("blockdev-del", node_name="sink")
        [shown] = json.loads(worker.run("status", "--json").stdout)["machines"]
        assert shown["protection"]["paused"]["why"] == "a resize"
        assert worker.end(signal.SIGKILL) == -signal.SIGKILL
        worker = Worker(tmp_path, source)
        worker.wait_for("paused")
        time.sleep(1.5)
        assert not [e for e in worker.events if e["event"] != "paused"], "it is still left alone"
        assert "PAUSED" in worker.run("timeline", "m1").stdout
        assert not daemon.leftovers()
        before = scribe.acked
        assert worker.run("protect", "resume", "m1").returncode == 0
        [begun] = worker.of("begun")
        assert begun["gap"]["why"] == "paused: a resize"
        assert worker.run("protect", "resume", "m1").returncode == 2, "it is not paused"
        worker.wait_for("moment")
        assert worker.end(signal.SIGTERM) == 0
    with Store.open(tmp_path / "store", tmp_path / "state2", []) as store:
        [machine] = {p.machine.id for p in store.points()}
        history = History(store, machine)
        assert scribe.verify(images(history, history.by_seq(last))) > 0
        newest = history.last
        assert newest
        assert scribe.verify({d: image[: SIZES[d]] for d, image in images(history, newest).items()}) >= before
    assert not daemon.leftovers()


def test_a_pause_ends_by_itself(daemon: Daemon, tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    worker = Worker(tmp_path, f"qemu:{daemon.qmp_path}")
    worker.wait_for("begun")
    assert worker.run("protect", "pause", "m1", "--for", "10s").returncode == 0
    worker.wait_for("begun", 2)
    assert worker.end(signal.SIGTERM) == 0
    assert worker.run("protect", "m1", "--for", "2s").returncode == 2, "only a pause lasts for so long"


@needs_mount
def test_a_journal_disk_that_stalls_never_stalls_the_guest(daemon: Daemon, tmp_path: Path) -> None:
    """The file system of the store stands still, as behind a storage network that is gone: every write and fsync waits."""
    with small_disk(tmp_path, "slow", 128 * MiB) as disk, Scribe(daemon, SIZES, 400) as scribe:
        (tmp_path / "store").symlink_to(disk.path / "store")
        init(disk.path / "store", None)
        worker = Worker(tmp_path, f"qemu:{daemon.qmp_path}")
        worker.wait_for("moment", 3)
        freeze_disk(disk.path, "-f")
        try:
            before = scribe.acked
            wait_until(lambda: any(e["event"] == "trouble" for e in worker.events))
            trouble = next(e for e in worker.events if e["event"] == "trouble")
            assert "has not answered" in trouble["error"]["message"]
            wait_until(lambda: not [f for f in daemon.leftovers() if f.startswith("hvb-")])
            scribe.assert_never_stalled(2.0, before)
            wait_until(lambda: scribe.acked > before + 200)
        finally:
            freeze_disk(disk.path, "-u")
        wait_until(lambda: sum(e["event"] == "begun" for e in worker.events) >= 2)
        begun = [e for e in worker.events if e["event"] == "begun"][-1]
        assert begun["how"] == "resumed"
        assert "has not answered" in begun["gap"]["why"]
        worker.wait_for("moment", 1 + sum(e["event"] == "moment" for e in worker.events))
        assert worker.end(signal.SIGTERM) == 0
        verify_all(tmp_path, scribe, {}, before)
    assert not daemon.leftovers()


def freeze_disk(path: Path, how: str) -> None:
    program = shutil.which("fsfreeze") or "/usr/sbin/fsfreeze"
    subprocess.run([program, how, str(path)], check=True, timeout=120)


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_snapshot_of_the_administrator_begins_a_new_life(daemon: Daemon, tmp_path: Path) -> None:
    """From then on the guest writes to another node, and the bitmap of the old one would say that nothing changes."""
    init(tmp_path / "store", None)
    with (
        Store.open(tmp_path / "store", tmp_path / "state", [], owner=True) as store,
        Scribe(daemon, SIZES, 400) as scribe,
    ):
        hypervisor = daemon.hypervisor()
        protection = Protection(store, hypervisor, only(hypervisor), Options(), Rhythm(SECOND))
        life = protection.begin("a test")
        overlay = make_image(tmp_path / "over.qcow2", SIZES["vda"])
        with daemon.qmp() as qmp:
            file = {"driver": "file", "filename": str(overlay)}
            qmp.command("blockdev-add", driver="qcow2", node_name="over", file=file, backing=None)
            qmp.command("blockdev-snapshot", node="vda", overlay="over")
        with pytest.raises(HostUnreachable, match="not what they were"):
            life.cycle()
        life.recorder.close()
        life.cycles.close()
        again = protection.begin("a snapshot was made")
        time.sleep(0.3)
        before = scribe.acked
        moment = again.cycle().moment
        again.close()
        scribe.stop()
        history, held = History(store, only(hypervisor).id), {}
        for name, disk in (("vda", again.point.disks[0].disk.id), ("vdb", "vdb")):
            held[name] = bytearray(SIZES[name])
            history.view(moment, DiskId(disk)).read_into(0, memoryview(held[name]))
        assert before <= scribe.verify(held)
