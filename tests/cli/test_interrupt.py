"""A signal at any step of a command: it ends soon, with its code and nothing left over, or it was too late."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hvbackup.cli.output import Out
from hvbackup.endings import finishing
from hvbackup.errors import Interrupted
from tests.cli.rig import World, make_disk

pytestmark = pytest.mark.walk

SOON_SECONDS = 60.0  # on a busy machine; a hang is ended, and seen, after a hundred


@pytest.fixture
def stored(tmp_path: Path) -> World:
    world = World(tmp_path)
    make_disk(tmp_path / "disk.raw", 12 << 20)
    world.done("init")
    world.done("backup", f"image:{tmp_path}/disk.raw")
    return world


def stepped(world: World, steps: int, seed: int, *words: str, only: str = "") -> list[dict[str, Any]]:
    """How a command went that was signalled at so many random steps."""
    more = [f"--only={only}"] if only else []
    command = [sys.executable, "-m", "tests.cli.stepping", f"--steps={steps}", f"--seed={seed}", *more, "--", *words]
    done = subprocess.run(command, env=world.environment, capture_output=True, text=True, check=True, timeout=3000)
    whole, *others = [json.loads(line) for line in done.stdout.splitlines()]
    assert whole["code"] == 0, whole
    assert len(others) == steps
    return others


def check_each(runs: list[dict[str, Any]]) -> Counter[int]:
    for run in runs:
        assert run["code"] in (0, 130), run
        assert "Traceback" not in run["out"], run
        assert run["seconds"] < SOON_SECONDS, run
        if run["code"] == 130:
            assert json.loads(run["out"].splitlines()[-1])["error"]["kind"] == "Interrupted", run
    return Counter(run["code"] for run in runs)


def check_left(world: World) -> None:
    """Nothing is left but what a killed process may leave, and the next run takes that away."""
    world.done("backup", f"image:{world.folder}/disk.raw")
    assert not list((world.store / "leases").glob("*"))
    assert not list((world.store / "tmp").glob("*"))
    assert world.done("check", "--deep", "--json").json["ok"]


def step_through(world: World, steps: int, seed: int) -> Counter[int]:
    backup = ("backup", "--full", "--json", f"image:{world.folder}/disk.raw")
    to = world.folder / "restored"
    to.mkdir(exist_ok=True)
    restore = ("restore", "disk", "--to", str(to), "--replace", "--json")
    tally = check_each(stepped(world, steps, seed, *backup))
    # The places where it hung once: between taking a lock and saying so.
    tally += check_each(stepped(world, steps, seed, *backup, only="/threading.py"))
    tally += check_each(stepped(world, steps, seed, *backup, only="/hvbackup/files.py"))
    tally += check_each(stepped(world, steps, seed, *restore, only="/hvbackup/recover/restore.py"))
    check_left(world)
    return tally


@pytest.mark.timeout(900)
def test_a_signal_at_random_steps(stored: World) -> None:
    assert step_through(stored, 6, seed=11)[130] > 12


class Signalled(io.StringIO):
    """A signal comes once, when what was written is out."""

    heard = False

    def flush(self) -> None:
        if not self.heard and self.getvalue():
            self.heard = True
            if not finishing(sys._getframe()):
                raise KeyboardInterrupt


class Refusing(io.StringIO):
    """It does not take the first thing that is written."""

    refused = False

    def write(self, text: str) -> int:
        if not self.refused:
            self.refused = True
            raise ValueError
        return super().write(text)


@pytest.mark.parametrize("stdout", [Signalled(), Refusing()], ids=["signalled", "refusing"])
def test_a_program_gets_one_document(stdout: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stdout)
    out = Out(json=True)
    with contextlib.suppress(KeyboardInterrupt, ValueError):
        out.answer({"points": []}, [])
    out.fail(Interrupted("Interrupted"))
    assert len(stdout.getvalue().splitlines()) == 1


SCRIPT = """
import pathlib, signal, sys, tempfile, threading, time
from hvbackup.cli import interrupt
from hvbackup.endings import let_finish
interrupt.install(as_json=False)
interrupt.PATIENCE_SECONDS = 0
signalled = lambda: signal.getsignal(signal.SIGTERM)(signal.SIGTERM, sys._getframe(1))
lock = threading.Condition(threading.Lock())
done = []

def in_a_lock():
    def trace(frame, event, _arg):
        if event == "return" and frame.f_code.co_name == "__enter__" and frame.f_code.co_filename == threading.__file__:
            sys.settrace(None)
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, frame)
        return trace
    sys.settrace(trace)
    with lock:
        pass

class Finalized:
    def __del__(self):
        signalled()

def in_a_finalizer():
    Finalized()

@let_finish
def in_what_must_be_finished():
    signalled()
    time.sleep(1.5)
    done.append("finished")

def import_what_signals():
    folder = tempfile.mkdtemp()
    pathlib.Path(folder, "signalling.py").write_text("import __main__\\n__main__.signalled()\\n")
    sys.path.insert(0, folder)
    import signalling

@let_finish
def in_an_import_of_what_must_be_finished():
    import_what_signals()
    done.append("finished")

@interrupt.answering
def in_an_import_of_a_command():
    import_what_signals()
    done.append("imported")

try:
    globals()[sys.argv[1]]()
    time.sleep(50)
    print("never heard")
except KeyboardInterrupt:
    print("heard", "free" if lock.acquire(blocking=False) else "taken", *done)
"""


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("in_a_lock", "heard free"),
        ("in_a_finalizer", "heard free"),
        ("in_what_must_be_finished", "heard free finished"),
        ("in_an_import_of_what_must_be_finished", "heard free finished"),
        ("in_an_import_of_a_command", "heard free imported"),
    ],
)
def test_a_signal_waits_where_an_exception_would_be_lost(where: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, where], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (expected, "")


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_signal_at_thousands_of_steps(stored: World) -> None:
    assert step_through(stored, 1000, seed=random.SystemRandom().getrandbits(32))[130] > 2000
