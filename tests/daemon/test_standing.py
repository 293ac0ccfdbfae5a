"""What is said of a machine: what its jobs have come to, and whether it is late."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from hvbackup.config import Places
from hvbackup.configuration import PolicySettings
from hvbackup.daemon import rows, tasks
from hvbackup.daemon.rows import Standing
from hvbackup.jobs import Jobs, State, Task
from hvbackup.model import SECOND, Instant
from hvbackup.processes import Process
from hvbackup.selection import Chosen, Found
from hvbackup.service import standing as notes
from hvbackup.service.standing import Note

NOW = Instant(1_800_000_000 * SECOND)
HOUR = 3600 * SECOND


class Past:
    """Jobs of one machine that ended as told, an hour apart."""

    def __init__(self, folder: Path) -> None:
        self.now = NOW
        self.jobs = Jobs(folder, lambda: self.now, {})

    def ended(self, state: State, error: str = "") -> None:
        job = self.jobs.submit(Task("backup", ["backup", "image:a"], machine="m1"))
        began, self.now = self.now, Instant(self.now + HOUR)
        self.jobs._put(replace(job, state=state, began=began, ended=Instant(began + 60 * SECOND), error=error))


def test_a_failure_is_no_success_and_keeps_its_reason(tmp_path: Path) -> None:
    past = Past(tmp_path)
    past.ended(State.DONE)
    past.ended(State.FAILED, "the host is gone")
    past.ended(State.CANCELLED)
    past.ended(State.FAILED, "the host is still gone")
    found = tasks.past_of(past.jobs, "m1", "backup")
    assert (found.past.succeeded, found.past.failures) == (NOW, 2)
    assert found.failure == "the host is still gone"
    assert found.last_run_ns == 60 * SECOND, "of the one that succeeded"
    past.ended(State.DEGRADED)
    found = tasks.past_of(past.jobs, "m1", "backup")
    assert (found.past.succeeded, found.past.failures, found.failure) == (NOW + 4 * HOUR, 0, "")


def standing(newest: int, failure: str = "", seen: int = 0, trouble: str = "") -> Standing:
    me = Process.of(os.getpid())
    assert me
    note = Note("m1", "web1", me, since=NOW - 60 * HOUR, newest=newest, trouble=trouble)
    policy = PolicySettings(machines=["web1"], protect=True, rpo="1h")
    chosen = Chosen(Found("m1", "web1", "source"), "p")
    return rows.row(chosen, policy, "main", "key", None, note, failure, int(NOW) - seen, NOW).standing


@pytest.mark.parametrize(
    ("ago", "failure", "expected"),
    [
        (HOUR - SECOND, "", Standing.PROTECTED),
        (HOUR + SECOND, "", Standing.LATE),
        (HOUR - SECOND, "no answer", Standing.FAILING),
        (HOUR + SECOND, "no answer", Standing.LATE),
    ],
    ids=["in time", "late", "failing", "late and failing"],
)
def test_late_is_what_could_not_be_recovered_in_time(ago: int, failure: str, expected: Standing) -> None:
    assert standing(NOW - ago, failure, seen=100 * HOUR) == expected
    assert standing(NOW - ago, trouble=failure, seen=100 * HOUR) == expected


def test_a_machine_without_a_moment_is_late_once_it_had_time() -> None:
    assert standing(0, seen=HOUR - SECOND) == Standing.PROTECTED
    assert standing(0, seen=HOUR + SECOND) == Standing.LATE


def places(folder: Path) -> Places:
    return Places(folder / "store", folder / "state", folder / "conf", folder / "run")


def test_a_note_that_is_being_read_stays_whole(tmp_path: Path) -> None:
    me = Process.of(os.getpid())
    assert me
    first = Note("m1", "web1", me, seq=1)
    notes.write(places(tmp_path), "key", first)
    with notes.path_of(places(tmp_path), "key").open() as reading:
        notes.write(places(tmp_path), "key", replace(first, seq=2))
        assert json.load(reading)["seq"] == 1, "not written over below its reader"
    found = notes.read(places(tmp_path), "key")
    assert found
    assert found.seq == 2


def test_what_a_killed_worker_did_not_write_to_its_end_is_no_note_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "run" / notes.FOLDER
    with notes._files(places(tmp_path)).new() as new:
        new.write(b'{"machine": "m')
        notes.noting(places(tmp_path), lambda machine: machine.id)
        [under_way] = [path for path in folder.rglob("*") if path.is_file()]
        assert not list(folder.glob("*.json"))
        left = under_way.with_name("left")
        left.write_bytes(under_way.read_bytes())  # as a kill leaves it: nobody holds it
    notes.noting(places(tmp_path), lambda machine: machine.id)
    assert [path for path in folder.rglob("*") if path.is_file()] == []
