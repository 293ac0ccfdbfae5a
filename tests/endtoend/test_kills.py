"""SIGKILL of hvbackup, of QEMU and of both at random moments, while the guest writes: no promise is broken, nothing is left.

The quick version is part of every run, the long one of `make soak`, which leaves the figures that docs/testing.md quotes in
`.lab/figures`.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.rig import make_disk
from tests.endtoend.rig import Installed, Protected, files_below, processes, protected, short_folder

KILLS_OF_A_STORE = 5  # then a new one, or proving all old points again would take most of the time
WAIT_SECONDS = 120
FIGURES = Path(__file__).parents[2] / ".lab" / "figures"
START_SECONDS = 0.25  # a program that is not loaded yet is not worth killing


@dataclass
class Tally:
    """What was hit."""

    kills: int = 0
    points: int = 0  # committed and proved
    stages: Counter[str] = field(default_factory=Counter)
    hows: Counter[str] = field(default_factory=Counter)  # how the next run read its disks
    seconds: float = 0.0


def torture(victim: str, kills: int, seed: int) -> Tally:
    """So many kills of the victim, each followed by every proof."""
    tally, began, rng = Tally(), time.monotonic(), random.Random(seed)
    while tally.kills < kills:
        with protected(rng.getrandbits(32)) as case:
            for _ in range(min(KILLS_OF_A_STORE, kills - tally.kills)):
                tally.stages[kill_once(case, victim, rng)] += 1
                tally.kills += 1
                tally.hows.update(recover(case, victim))
            tally.points += len(case.proved)
    tally.seconds = round(time.monotonic() - began)
    return tally


def kill_once(case: Protected, victim: str, rng: random.Random) -> str:
    """Begin a backup, and kill at a random moment; what had happened by then."""
    process = case.start()
    time.sleep(rng.uniform(START_SECONDS, case.span * 1.1))
    if victim != "hvbackup":
        case.machine.kill()
    if victim == "both":
        time.sleep(rng.choice([0, rng.uniform(0, 0.05)]))
    if victim != "qemu":
        process.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert "Traceback" not in err, err
    stage = stage_of(case, process)
    if victim == "qemu":
        judge_survivor(case, process, out, err)
    return stage


def stage_of(case: Protected, process: subprocess.Popen[str]) -> str:
    """How far the run got, by what is left of it."""
    points = len([p for p in (case.world.store / "points").rglob("*") if p.is_file()])
    if points > len(case.proved):
        return "after its end" if process.returncode == 0 else "after the commit"
    return "while the snapshot was open" if list((case.world.store / "leases").glob("*")) else "outside of it"


def judge_survivor(case: Protected, process: subprocess.Popen[str], out: str, err: str) -> None:
    """A run whose QEMU was killed ends with its point, or with exit code 4 and a message that names the machine."""
    if process.returncode == 0:
        return
    assert process.returncode == 4, (process.returncode, out, err)
    error = json.loads(out.splitlines()[-1])["error"]
    assert str(case.machine.daemon.folder) in error["message"] or "nbd+unix" in error["message"], error


def recover(case: Protected, victim: str) -> list[str]:
    """Everything that was promised holds, the next run works, and then nothing is left; how its disks were read."""
    case.prove_points()  # what was written before the crash counts for them, not what the crash left
    case.prove_store()
    if victim != "hvbackup":
        case.machine.revive()
    ran, hows = case.backup()
    if victim == "hvbackup":
        assert hows == ["incremental", "incremental"], ran.err
    case.prove_clean()
    return hows


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["hvbackup", "qemu", "both"])
def test_killed_at_random_moments(victim: str) -> None:
    assert torture(victim, 3, seed=20261122).points >= 4


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_boot_killed_at_random_moments_is_discarded_whole() -> None:
    """Whatever half of it is there, `discard --list` knows it and `discard` ends it."""
    rng = random.Random(5)
    with short_folder() as folder:
        world = Installed(folder)
        world.done("init")
        make_disk(folder / "disk.raw", 2_000_384)
        world.done("backup", f"image:{folder}/disk.raw", "--name", "web")
        words = ("boot", "web", "--generic", "--name", "trial")
        began = time.monotonic()
        assert world.run(*words).code == 0
        span = time.monotonic() - began
        world.done("discard", "trial")
        for _ in range(4):
            process = world.start(*words)
            time.sleep(rng.uniform(START_SECONDS, max(START_SECONDS, span)))
            process.kill()
            process.communicate(timeout=WAIT_SECONDS)
            for boot in world.done("discard", "--list", "--json").json["boots"]:
                world.done("discard", boot["name"])
            assert not processes(folder, set())
            assert not [path for path in files_below(folder / "run", world.state / "boots") if path.is_file()]
        assert world.done("check", "--deep", "--json").json["ok"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", ["hvbackup", "qemu", "both"])
def test_killed_fifty_times(victim: str) -> None:
    tally = torture(victim, 50, seed=random.SystemRandom().getrandbits(32))
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"kills-{victim}.txt").write_text(f"{tally}\n")
    assert tally.points >= tally.kills
