"""Kills of either side of a stream: whatever the guest was told, and is older than a group fsync, is in the journal."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.errors import JournalGap
from hvbackup.model import Instant
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.store import Store, init
from tests.hypervisors.daemon import Daemon, make_image, node
from tests.protecting import Worker
from tests.scribe import Scribe
from tests.test_stream_qemu import SIZES, every_moment, images, on_disk

pytestmark = pytest.mark.real

FSYNC_SECONDS = 0.1
PROMPT_SECONDS = (
    1.0  # a busy machine lets the worker wait for a processor; what a power cut takes is told by `lag_seconds`
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Two raw disks: what a guest was told is written survives the death of the daemon."""
    nodes = [node(name, make_image(tmp_path / f"{name}.raw", size, "raw"), "raw") for name, size in SIZES.items()]
    made = Daemon(tmp_path, nodes).start()
    yield made
    made.kill()


class StreamWorker(Worker):
    """`hvbackup protect --stream` as a process, and what it says."""

    rhythm = ("--stream",)

    def target(self) -> int:
        """The process of its target."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = {pid for task in tasks for pid in task.read_text().split()}
        [found] = {int(p) for p in children if b"hvbackup-target" in Path(f"/proc/{p}/cmdline").read_bytes()}
        return found


def last_recorded(history: History) -> Moment:
    """The newest moment of the life before the present one."""
    gap = [g for g in history.told.gaps if "not armed" not in g.why][-1]  # that one lies behind the point of a new life
    found = history.newest_at(gap.start)
    assert found
    return found


class Witness:
    """What every stranger who opens the store must find."""

    def __init__(self, folder: Path, scribe: Scribe) -> None:
        self._folder, self._scribe, self._rng = folder, scribe, random.Random(5)
        self.seen: dict[int, int] = {}  # moment -> how many writes it holds
        self.gaps = 0

    def look(self, at_least: int, moments: int = 6) -> int:
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


def kills(daemon: Daemon, folder: Path, count: int, *, machine_every: int) -> None:
    """Kill the worker, its target or the machine, again and again, at random moments."""
    init(folder / "store", None)
    rng, source = random.Random(count), f"qemu:{daemon.qmp_path}"
    with Scribe(daemon, SIZES, 600) as scribe:
        witness = Witness(folder, scribe)
        worker = StreamWorker(folder, source)
        worker.wait_for("begun")
        for turn in range(count):
            time.sleep(rng.random() * 0.4)
            if turn % machine_every == machine_every - 1:
                daemon.kill()
                acked = scribe.acked
                worker.wait_for("trouble", 1 + sum(e["event"] == "trouble" for e in worker.events))
                daemon.start()
                told = sum(e["event"] == "begun" for e in worker.events)
                worker.wait_for("begun", told + 1)
                witness.look(acked)  # it was there when its answer was, and the worker still is
                continue
            if turn % 5 == 4:
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
        assert protected["lag_seconds"] < 30, "a guest that writes nothing is not behind"
        assert worker.end(signal.SIGINT) == 0
        assert witness.look(0) == scribe.acked
        with Store.open(folder / "store", folder / "state2", []) as store:
            history = History(store, next(iter(store.points())).machine.id)
            assert images(history, every_moment(history)[-1]) == on_disk(folder)
    assert not daemon.leftovers()


@pytest.mark.timeout(400)
def test_kills_lose_nothing_that_was_answered(daemon: Daemon, tmp_path: Path) -> None:
    kills(daemon, tmp_path, 25, machine_every=5)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_kills_lose_nothing_that_was_answered(daemon: Daemon, tmp_path: Path) -> None:
    kills(daemon, tmp_path, 500, machine_every=5)
