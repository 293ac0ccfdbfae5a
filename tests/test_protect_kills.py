"""SIGKILL of the worker, of QEMU, of both, and of a whole host, at random moments: every moment that was told stays, exactly.

The quick version is part of every run, the long one of `make soak`, which leaves its figures in `.lab/figures`.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvbackup.errors import HostUnreachable, JournalGap
from hvbackup.model import DiskId, Instant, MachineId, MiB
from hvbackup.store.journal.history import History
from hvbackup.store.store import Store, init
from tests.hypervisors.daemon import Daemon, make_image, node
from tests.protecting import Worker
from tests.scribe import Scribe

pytestmark = pytest.mark.real
SIZES = {"vda": 8 * MiB, "vdb": 4 * MiB}
VICTIMS = ("hvbackup", "hvbackup", "hvbackup", "qemu", "both", "host")
KILLS_OF_A_STORE = 25
FIGURES = Path(__file__).parents[1] / ".lab" / "figures"


@dataclass
class Tally:
    """What was hit."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: int = 0  # told of, and proved
    gaps: int = 0
    resumed: int = 0  # lives that went on from their newest barrier
    captured: int = 0
    seconds: float = 0.0


def finds_it_again(worker: Worker) -> bool:
    """A new moment is there; False: there was no machine yet when the worker first looked, so it said so and ended."""
    told, end = worker.told("moment"), time.monotonic() + 120
    while worker.process.poll() is None and worker.told("moment") == told:
        assert time.monotonic() < end, worker.events[-3:]
        time.sleep(0.02)
    if worker.process.poll() is None:
        return True
    assert worker.end(signal.SIGKILL) == HostUnreachable.exit_code
    assert [list(e) for e in worker.events] == [["error"]], "nothing had begun"
    return False


class Case:
    """One store and one machine, whose guest writes throughout."""

    def __init__(self, folder: Path, scribe: Scribe, daemon: Daemon, tally: Tally) -> None:
        self.folder, self.scribe, self.daemon, self.tally = folder, scribe, daemon, tally
        self.machine = f"qemu:{daemon.qmp_path}"
        self.seen: dict[int, int] = {}  # moment -> writes it holds
        self.promised: dict[int, int] = {}  # moment -> writes that were answered for before it was told of

    def kill(self, victim: str, rng: random.Random) -> None:
        """Begin, and kill at a random moment."""
        worker = Worker(self.folder, self.machine, "--fold", "2s")
        if rng.random() < 0.7:  # the others die while they begin
            worker.wait_for("begun")
        until = time.monotonic() + rng.uniform(0.3, 2.0)
        while time.monotonic() < until:
            self._note(worker)
            time.sleep(0.005)
        if victim != "hvbackup":
            self.daemon.kill()
        if victim in ("hvbackup", "both", "host"):
            worker.process.kill()
        else:  # the worker lives on, and finds the next QEMU
            self.daemon.start()
            if not finds_it_again(worker):
                worker = Worker(self.folder, self.machine, "--fold", "2s")
                worker.wait_for("moment")
            worker.process.kill()
        worker.end(signal.SIGKILL)
        self._note(worker)
        if victim == "host":
            for gone in ("run", "state"):
                shutil.rmtree(self.folder / gone, ignore_errors=True)
        if victim in ("both", "host"):
            self.daemon.start()
        hows = [e["how"] for e in worker.events if e.get("event") == "begun"]
        self.tally.resumed += hows.count("resumed")
        self.tally.captured += hows.count("captured")
        self.tally.kills[victim] += 1

    def _note(self, worker: Worker) -> None:
        for e in list(worker.events):
            if e.get("event") in ("moment", "begun"):
                self.promised.setdefault(int(e["seq"]), 0)

    def prove(self) -> None:
        """What a stranger finds in the store now: all that was told of, each an exact prefix, and nothing else than before."""
        with Store.open(self.folder / "store", self.folder / "state2", []) as store:
            history = History(store, MachineId(self.machine))
            offered = history.moments[0].tolist()
            assert set(self.promised) | set(self.seen) <= set(offered), "a moment is gone"
            for seq in offered:
                if seq not in self.seen or seq == offered[len(offered) // 2]:
                    n = self.scribe.verify(images(history, seq))
                    assert self.seen.setdefault(seq, n) == n
            reached = [self.seen[seq] for seq in offered]
            assert reached == sorted(reached)
            for gap in history.told.gaps:
                if gap.end - gap.start > 2:
                    with pytest.raises(JournalGap):
                        history.at(Instant((gap.start + gap.end) // 2))
            self.tally.gaps = max(self.tally.gaps, len(history.told.gaps))


def images(history: History, seq: int) -> dict[str, bytearray]:
    found = {disk: bytearray(size) for disk, size in SIZES.items()}
    for disk, image in found.items():
        history.view(history.by_seq(seq), DiskId(disk)).read_into(0, memoryview(image))
    return found


def torture(kills: int, seed: int) -> Tally:
    tally, rng, began = Tally(), random.Random(seed), time.monotonic()
    while tally.kills.total() < kills:
        with tempfile.TemporaryDirectory(prefix="hvk-") as name:
            one_store(Path(name), min(KILLS_OF_A_STORE, kills - tally.kills.total()), rng, tally)
    tally.seconds = round(time.monotonic() - began)
    return tally


def one_store(folder: Path, kills: int, rng: random.Random, tally: Tally) -> None:
    init(folder / "store", None)
    nodes = [node(name, make_image(folder / f"{name}.raw", size, "raw"), "raw") for name, size in SIZES.items()]
    daemon = Daemon(folder, nodes).start()
    try:
        with Scribe(daemon, SIZES, 400, seed=rng.getrandbits(32)) as scribe:
            case = Case(folder, scribe, daemon, tally)
            for number in range(kills):
                case.kill(VICTIMS[number % len(VICTIMS)], rng)
                case.prove()
            last = Worker(folder, case.machine)
            last.wait_for("begun")
            scribe.stop()
            tagged = last.run("tag", "m1", "the end", "--json")
            assert tagged.returncode == 0, tagged.stderr
            assert last.end(signal.SIGTERM) == 0
            case.prove()
            assert case.seen[json.loads(tagged.stdout)["seq"]] == scribe.acked, (
                "the end holds all that was answered for"
            )
            assert not daemon.leftovers()
            tally.moments += len(case.seen)
    finally:
        daemon.kill()


@pytest.mark.timeout(600)
def test_kills_of_every_side_spoil_no_moment() -> None:
    tally = torture(25, seed=20261124)
    assert tally.moments > 20, tally  # on a busy machine a life has little more than its first
    assert tally.resumed >= 3, "a worker that was killed goes on from its newest barrier"
    assert tally.gaps > 8


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_five_hundred_times() -> None:
    tally = torture(500, seed=random.SystemRandom().getrandbits(32))
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / "kills-protect.txt").write_text(f"{tally}\n")
    assert tally.moments > 500
