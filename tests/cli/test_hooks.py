"""Hooks, as an administrator meets them: programs of his own, run by hvbackup in processes of its own, which may be killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cli.rig import World, dead, make_disk

pytestmark = pytest.mark.real

LOG = """#!/bin/sh
echo "$(basename "$0") $1 $HVBACKUP_PHASE $HVBACKUP_MACHINE_NAME ${HVBACKUP_POINT:+point} ${HVBACKUP_ERROR:+error}" \
    "${HVBACKUP_LATE:+late}" | tr -s ' ' >>"$HOME/log"
"""


class Hooked:
    """A world with a store, a disk, and a directory of hooks that write down when they are run."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.done("init")
        make_disk(world.folder / "vm.raw", 300_000)
        self.folder = world.folder / "hooks"
        self.folder.mkdir()
        self.source = f"image:{world.folder / 'vm.raw'}"

    def add(self, name: str, script: str = "") -> Path:
        path = self.folder / name
        path.write_text(LOG + script)
        path.chmod(0o755)
        return path

    def log(self) -> list[str]:
        path = self.world.folder / "log"
        return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, line: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while line not in self.log():
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)


@pytest.fixture
def hooked(tmp_path: Path) -> Hooked:
    return Hooked(World(tmp_path))


def test_every_phase_in_order_and_back(hooked: Hooked) -> None:
    hooked.add("10-first")
    hooked.add("20-second")
    hooked.add("30-old.bak")
    hooked.world.done("backup", hooked.source, "--hook", hooked.folder)
    assert hooked.log() == [
        "10-first pre-freeze pre-freeze vm",
        "20-second pre-freeze pre-freeze vm",
        "20-second post-thaw post-thaw vm",
        "10-first post-thaw post-thaw vm",
        "20-second done done vm point",
        "10-first done done vm point",
    ]


def test_a_hook_that_says_no_means_no_point(hooked: Hooked) -> None:
    hook = hooked.add("quiesce", '[ "$1" != pre-freeze ] || { echo "database is down"; exit 7; }\n')
    hooked.add("zz-later")
    message = hooked.world.refused(1, "backup", hooked.source, "--hook", hooked.folder)
    assert f"Hook {hook} ended with exit code 7 (database is down) at pre-freeze" in message
    assert [line.split()[:2] for line in hooked.log()[:4]] == [
        ["quiesce", "pre-freeze"],
        ["zz-later", "post-thaw"],
        ["quiesce", "post-thaw"],
        ["zz-later", "failed"],
    ]
    assert hooked.log()[4] == "quiesce failed failed vm error"
    assert hooked.world.done("points", "--json").json["points"] == []
    assert list((hooked.world.store / "leases").glob("*")) == []


def test_an_optional_one_only_warns(hooked: Hooked) -> None:
    hooked.add("quiesce", '[ "$1" != pre-freeze ] || exit 7\n')
    ran = hooked.world.run("backup", hooked.source, "--hook", hooked.folder, "--hook-optional", "--json")
    assert ran.code == 0
    [run] = ran.json["runs"]
    assert run["status"] == "degraded"
    assert "exit code 7" in run["notes"][0]
    assert "exit code 7" in run["point"]["notes"][0]


@pytest.mark.parametrize("phase", ["post-thaw", "done"])
def test_a_hook_that_fails_later_does_not_take_the_point_away(hooked: Hooked, phase: str) -> None:
    hooked.add("hook", f'[ "$1" != {phase} ] || exit 1\n')
    ran = hooked.world.run("backup", hooked.source, "--hook", hooked.folder, "--json")
    assert ran.code == 0
    [run] = ran.json["runs"]
    assert run["status"] == "degraded"
    assert f"exit code 1 at {phase}" in run["notes"][0]
    assert len(hooked.world.done("points", "--json").json["points"]) == 1


def test_a_hook_that_hangs_is_killed_with_its_children(hooked: Hooked) -> None:
    hooked.add("hang", '[ "$1" != pre-freeze ] || { sleep 600 & echo $! >"$HOME/pid"; wait; }\n')
    message = hooked.world.refused(1, "backup", hooked.source, "--hook", hooked.folder, "--hook-timeout", "1")
    assert "did not end within 1 s and was killed at pre-freeze" in message
    assert dead(int((hooked.world.folder / "pid").read_text()))
    assert "hang post-thaw post-thaw vm" in hooked.log()


def test_a_child_that_a_hook_leaves_behind_does_not_hold_us_up(hooked: Hooked) -> None:
    hooked.add("daemon", '[ "$1" != pre-freeze ] || { sleep 3600 & echo $! >"$HOME/pid"; }\n')
    hooked.world.done("backup", hooked.source, "--hook", hooked.folder)
    os.kill(int((hooked.world.folder / "pid").read_text()), signal.SIGKILL)


def test_a_capture_that_fails_tells_the_hooks(hooked: Hooked) -> None:
    hooked.add("hook", f'[ "$1" != pre-freeze ] || rm {hooked.world.folder / "vm.raw"}\n')
    assert hooked.world.run("backup", hooked.source, "--hook", hooked.folder).code != 0
    assert [line.split()[1] for line in hooked.log()] == ["pre-freeze", "post-thaw", "failed"]
    assert hooked.log()[-1].endswith("error")


@pytest.mark.parametrize(
    ("mode", "message"), [(0o644, "not an executable program"), (0o757, "can be changed by others")]
)
def test_what_is_no_hook(hooked: Hooked, mode: int, message: str) -> None:
    hook = hooked.add("hook")
    hook.chmod(mode)
    assert message in hooked.world.refused(2, "backup", hooked.source, "--hook", hook)
    assert "can't be run" in hooked.world.refused(2, "backup", hooked.source, "--hook", hooked.folder / "absent")
    (hooked.folder / "empty").mkdir()
    assert "no executable" in hooked.world.refused(2, "backup", hooked.source, "--hook", hooked.folder / "empty")
    assert hooked.log() == []


def test_our_death_before_the_thaw_is_made_good_by_the_guard(hooked: Hooked) -> None:
    hooked.add("hook", '[ "$1" != pre-freeze ] || sleep 5\n')
    process = hooked.world.start("backup", hooked.source, "--hook", hooked.folder)
    hooked.wait_for("hook pre-freeze pre-freeze vm")
    process.kill()
    process.communicate(timeout=120)
    hooked.wait_for("hook post-thaw post-thaw vm late")


def test_the_death_of_both_is_made_good_by_the_next_run(hooked: Hooked) -> None:
    hooked.add("hook", '[ "$1" != pre-freeze ] || [ -e "$HOME/once" ] || { touch "$HOME/once"; sleep 5; }\n')
    process = hooked.world.start("backup", hooked.source, "--hook", hooked.folder)
    hooked.wait_for("hook pre-freeze pre-freeze vm")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # from here on it begins nobody
    for guard in children(process.pid):
        os.kill(guard, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=120)
    assert hooked.log() == ["hook pre-freeze pre-freeze vm"]
    ran = hooked.world.run("backup", hooked.source, "--hook", hooked.folder, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["runs"][0]["notes"][0].startswith("Cleaned up after run")
    assert hooked.log()[1:3] == ["hook post-thaw post-thaw vm late", "hook pre-freeze pre-freeze vm"]
    hooked.world.done("backup", hooked.source, "--hook", hooked.folder)
    assert [line for line in hooked.log() if "late" in line] == hooked.log()[1:2]


def children(pid: int) -> list[int]:
    """The processes a process has begun: the hook, and the guard."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_options_that_make_no_sense(hooked: Hooked) -> None:
    world = hooked.world
    assert "no guest to freeze" in world.refused(2, "backup", hooked.source, "--agent", "/run/agent.sock")
    assert "no guest to freeze" in world.refused(2, "backup", hooked.source, "--exclude-mountpoint", "/data")
    for limit in ("0", "-1", "4000"):
        assert "--freeze-limit" in world.refused(2, "backup", "qemu:/absent.sock", "--freeze-limit", limit)
    crash = ("--consistency", "crash", "--exclude-mountpoint", "/data")
    assert "freezes none" in world.refused(2, "backup", "qemu:/absent.sock", *crash)
