"""Several processes on one store, and processes that are told to stop at any moment, while the guest writes."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

import hvbackup
from tests.endtoend.rig import Protected, protected

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

PACKAGE = Path(hvbackup.__file__).parent
FIGURES = Path(__file__).parents[2] / ".lab" / "figures"
WAIT_SECONDS = 120
STOPS_OF_A_STORE = 7


def stop_at_random_moments(stops: int, seed: int) -> Counter[str]:
    """Ctrl-C and SIGTERM in turn; each ends with its code and one line, or came too late; then everything is proved."""
    tally: Counter[str] = Counter()
    rng = random.Random(seed)
    while tally.total() < stops:
        with protected(rng.getrandbits(32)) as case:
            for _ in range(min(STOPS_OF_A_STORE, stops - tally.total())):
                number = (signal.SIGINT, signal.SIGTERM)[tally.total() % 2]
                tally[stop_once(case, number, rng)] += 1
            case.prove_store()
            _, hows = case.backup()
            assert hows == ["incremental", "incremental"]
            case.prove_clean()
    return tally


def stop_once(case: Protected, number: signal.Signals, rng: random.Random) -> str:
    process = case.start()
    time.sleep(rng.uniform(0, case.span))
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    new = case.prove_points()
    if process.returncode == 0:
        assert len(new) == 1
        return "too late"
    if process.returncode in (-signal.SIGINT, -signal.SIGTERM) or "KeyboardInterrupt" in err:
        # Python had not begun to load us, or its interpreter was on its way out.
        assert f"{PACKAGE}/" not in err, err
        assert not (case.world.store / "leases").exists() or not list((case.world.store / "leases").glob("*"))
        return "before we were loaded"
    assert process.returncode == 130, (process.returncode, out, err)
    lines = [line for line in err.splitlines() if not line.startswith("hvbackup: warning: ")]
    assert lines == ["hvbackup: error: Interrupted; nothing that was committed is lost"], err
    assert json.loads(out.splitlines()[-1])["error"]["kind"] == "Interrupted"
    left = case.machine.daemon.leftovers()
    assert not left, left
    case.prove_alone()
    return "interrupted, after the commit" if new else "interrupted"


def test_told_to_stop_at_random_moments() -> None:
    assert stop_at_random_moments(6, seed=7).total() == 6


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_told_to_stop_forty_times() -> None:
    tally = stop_at_random_moments(40, seed=random.SystemRandom().getrandbits(32))
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / "stops.txt").write_text(f"{tally}\n")
    assert tally["interrupted"] >= 5


def test_two_backups_a_check_and_a_restore_at_a_time() -> None:
    """One writer at a time, the other says whom it waits for; readers are always welcome and see whole points."""
    with protected(5) as case:
        for _ in range(3):
            case.lowest = case.machine.history.acked
            [point] = list(case.proved)[-1:]
            to = case.world.folder / "beside"
            running = {
                "one": case.start(),
                "two": case.start(),
                "check": case.world.start("check", "--deep", "--json"),
                "restore": case.world.start("restore", "torture", "--at", point, "--to", to, "--replace", "--json"),
                "points": case.world.start("points", "--json"),
            }
            ended = {name: (*p.communicate(timeout=WAIT_SECONDS), p.returncode) for name, p in running.items()}
            backups = sorted(ended[name][2] for name in ("one", "two"))
            assert backups in ([0, 0], [0, 5], [5, 5]), ended
            for name in ("one", "two"):
                out, err, code = ended[name]
                assert "Traceback" not in err
                assert code == 0 or "is in use by process" in json.loads(out)["error"]["message"]
            assert ended["check"][2] == 0, ended["check"]
            assert json.loads(ended["check"][0])["ok"]
            assert ended["restore"][2] == ended["points"][2] == 0, ended
            prove_new(case, backups.count(0))
        case.prove_store()
        case.backup()
        case.prove_clean()


def prove_new(case: Protected, count: int) -> None:
    """Every point that was made meanwhile is a state of the disks."""
    before = len(case.proved)
    case.prove_points(most=2)
    assert len(case.proved) == before + count
