"""Several machines at one moment: nobody has what another one, on whom it depended, lacks; and every machine goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from hvbackup.model import Instant, MachineId, MiB
from hvbackup.protect.meeting import LATE, Meeting
from hvbackup.store.journal.history import History
from hvbackup.store.store import Store, init
from labs.guest import Guest, make_disk
from tests.daemon.rig import until
from tests.protecting import Worker

A, B, C = MachineId("a"), MachineId("b"), MachineId("c")
MOMENTS = {A: Instant(1_000_000_000), B: Instant(1_070_500_000), C: Instant(1_030_000_000)}


# -- meeting ---------------------------------------------------------------------------------------------------------------


def take_part(meeting: Meeting, machine: MachineId, delays: Sequence[float], said: dict[str, list[bool]]) -> None:
    """One machine's thread, which is that late at each step."""
    seat = meeting.seat(machine)
    steps = [seat.ready, seat.standing, lambda: seat.switched(MOMENTS[machine])]
    said[machine] = []
    for delay, step in zip(delays, steps, strict=True):
        time.sleep(delay)
        said[machine].append(step())
        if not said[machine][-1]:
            return


def meet(delays: dict[MachineId, Sequence[float]]) -> tuple[Meeting, dict[str, list[bool]]]:
    meeting, said = Meeting("1", "shop", list(delays)), dict[str, list[bool]]()
    threads = [threading.Thread(target=take_part, args=(meeting, m, d, said)) for m, d in delays.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return meeting, said


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is late because the machine is slow."""
    monkeypatch.setattr("hvbackup.protect.meeting.READY_SECONDS", 60.0)
    monkeypatch.setattr("hvbackup.protect.meeting.STOPPED_SECONDS", 60.0)


@pytest.mark.usefixtures("patient")
def test_all_meet() -> None:
    meeting, said = meet({A: (0, 0, 0), B: (0.1, 0, 0.1), C: (0, 0.1, 0)})
    assert all(v == [True] * 3 for v in said.values())
    met = meeting.result()
    assert met.times == MOMENTS
    assert met.left_out == {}
    assert met.spread_ms == 70.5
    assert met.common(A) == met.common(C)


@pytest.mark.walk
@pytest.mark.parametrize("step", [1, 2], ids=["stops too late", "switches too late"])
def test_who_is_late_is_left_out_and_named(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds are waited for who takes five: A and C, which take none, may each be late by those themselves."""
    monkeypatch.setattr("hvbackup.protect.meeting.STOPPED_SECONDS", 2.0)
    meeting, said = meet({A: (0, 0, 0), B: (0, *(5.0 if i == step else 0 for i in (1, 2))), C: (0, 0, 0)})
    assert said[A] == said[C] == [True] * 3
    assert said[B][-1] is False
    met = meeting.result()
    assert set(met.times) == {A, C}
    assert met.left_out == {B: LATE}
    assert met.common(A)
    assert not met.common(B)


def test_who_leaves_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvbackup.protect.meeting.READY_SECONDS", 3600.0)  # the test would not live to see it
    monkeypatch.setattr("hvbackup.protect.meeting.STOPPED_SECONDS", 3600.0)
    meeting = Meeting("1", "shop", [A, B])
    meeting.leave(B, "it is gone")
    said: dict[str, list[bool]] = {}
    take_part(meeting, A, (0, 0, 0), said)
    assert said[A] == [True] * 3
    assert meeting.result().common(A) == {}, "one machine has nothing in common with nobody"


# -- real guests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvg-") as name:
        yield Path(name)


class Application(threading.Thread):
    """Writes a number to the disk of the first machine, and when that is answered for, to the second one's; and so on."""

    def __init__(self, guests: Sequence[Guest]) -> None:
        super().__init__(daemon=True)
        self._guests, self._stop_it = guests, threading.Event()
        self.number = 0

    def run(self) -> None:
        while not self._stop_it.is_set():
            for guest in self._guests:
                guest.sh(f"printf %08d {self.number + 1} | dd of=/dev/vda bs=512 conv=fsync,notrunc 2>/dev/null")
            self.number += 1

    def stop(self) -> None:
        self._stop_it.set()
        self.join(120)


def number_at(history: History, seq: int) -> int:
    data = bytearray(8)
    [disk] = history.told_until(seq).disks
    history.view(history.by_seq(seq), disk).read_into(0, memoryview(data))
    return int(data.strip(b"\0") or b"0")


def common_numbers(folder: Path, guests: Sequence[Guest]) -> list[tuple[int, int]]:
    """What the disks of two machines hold at each moment that they have in common."""
    with Store.open(folder / "store", folder / "state2", []) as store:
        first, second = (History(store, MachineId(g.uuid)) for g in guests)
        pairs = {c.id: c.seq for c in second.told.commons}
        return [(number_at(first, c.seq), number_at(second, pairs[c.id])) for c in first.told.commons if c.id in pairs]


@pytest.mark.real
@pytest.mark.guest
@pytest.mark.timeout(600)
def test_at_no_common_moment_has_the_second_machine_what_the_first_one_lacks(folder: Path) -> None:
    init(folder / "store", None)
    guests = [Guest(folder / n, [make_disk(folder / f"{n}.raw", 4 * MiB, "raw", ext4=False)], name=n) for n in "ab"]
    with guests[0], guests[1]:
        application = Application(guests)
        application.start()
        sources = [f"qemu:{g.qmp_path}" for g in guests]
        worker = Worker(folder, sources, "--group", "shop", "--common-every", "1s", "--every", "700ms", name="")
        worker.wait_for_common(24, 200)
        until(lambda: application.number > 30)  # over a serial console, which is as slow as the host is busy
        until(lambda: len(set(common_numbers(folder, guests))) > 10)
        third = subprocess.run(
            [sys.executable, "-c", LEFT_STOPPED, str(guests[0].qmp_path), str(folder)], check=False, timeout=60
        )
        assert third.returncode == -9
        end = time.monotonic() + 120
        while not guests[0].qmp("query-status")["running"]:
            assert time.monotonic() < end, "a machine that we had stopped stands still"
            time.sleep(0.1)
        assert worker.end(2) == 0
        application.stop()
        shown = json.loads(worker.run("timeline", "a", "--json").stdout)["common_moments"]
        assert worker.run("restore", "b", "--at", "common:shop", "--to", str(folder / "out")).returncode == 0
        assert (
            worker.run("restore", "b", "--at", f"common:{shown[0]['id']}", "--to", str(folder / "out0")).returncode == 0
        )
        assert worker.run("restore", "b", "--at", "common:other", "--to", str(folder / "no")).returncode == 2
    both = common_numbers(folder, guests)
    assert len(both) >= 20
    assert all(a - 1 <= b <= a for a, b in both), both
    assert len(set(both)) > 10, "the application wrote all the time"
    assert (folder / "out" / "vda.raw").read_bytes()[:8] == b"%08d" % both[-1][1]
    with Store.open(folder / "store", folder / "state2", []) as store:
        first = History(store, MachineId(guests[0].uuid))
        assert all(c.spread_ms < 3000 for c in first.told.commons), "each of three steps may take its second"


LEFT_STOPPED = """
import os, signal, sys
from pathlib import Path
from hvbackup.hypervisors.qemu_stop import stopped
from hvbackup.hypervisors.qemu_watch import Watch
from hvbackup.hypervisors.qemu_wire import Wire
path, folder = Path(sys.argv[1]), Path(sys.argv[2])
wire, watch = Wire(path, 30), Watch(path, "hvb-none-", folder, 0)
with stopped(wire, watch, folder):
    assert not wire.one("query-status")["running"]
    os.kill(os.getpid(), signal.SIGKILL)
"""

HUNG = (
    LEFT_STOPPED.replace("SIGKILL)", "SIGSTOP)")
    + """
assert wire.one("query-status")["running"]
watch.stop()
"""
)


@pytest.mark.real
@pytest.mark.guest
def test_a_machine_that_we_stopped_goes_on_when_we_are_stopped_ourselves(folder: Path) -> None:
    with Guest(folder / "a", []) as guest:
        done = subprocess.run([sys.executable, "-c", HUNG, str(guest.qmp_path), str(folder)], check=False, timeout=60)
        assert done.returncode == 0
        assert guest.qmp("query-status")["running"]
        guest.qmp("stop")  # one that an administrator has stopped stays so
        held = LEFT_STOPPED.replace("os.kill(os.getpid(), signal.SIGKILL)", "watch.stop()")
        subprocess.run([sys.executable, "-c", held, str(guest.qmp_path), str(folder)], check=True, timeout=60)
        assert not guest.qmp("query-status")["running"]
