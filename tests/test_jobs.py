"""Jobs outlive the service: whatever is killed, each ends once, and its end is known."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hvbackup.errors import NotFound, UsageError
from hvbackup.jobs import Job, Jobs, Limits, State, Task
from hvbackup.model import Instant
from tests.cli.rig import World, make_disk

SIZE = 3 << 20


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.done("init")
    make_disk(tmp_path / "a.raw", SIZE)
    make_disk(tmp_path / "b.raw", SIZE)
    made.done("backup", f"image:{tmp_path / 'b.raw'}", "--name", "m1")
    return made


MAP = Task("map", ["map", "m1"], lasting=True)


def jobs_of(world: World) -> Jobs:
    return Jobs(world.state / "jobs", lambda: Instant(time.time_ns()), world.environment)


def backup(world: World, name: str = "a.raw", **more: str) -> Task:
    return Task("backup", ["backup", f"image:{world.folder / name}"], **more)


def until(jobs: Jobs, done: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        jobs.step(Limits())
        time.sleep(0.05)


def ended(jobs: Jobs, job: Job) -> Job:
    until(jobs, lambda: not jobs.get(job.id).state.is_open)
    return jobs.get(job.id)


def test_a_job_runs_a_command_and_keeps_what_it_said(world: World) -> None:
    jobs = jobs_of(world)
    good, bad = jobs.submit(backup(world)), jobs.submit(backup(world, "nosuch.raw"))
    assert ended(jobs, good).state is State.DONE
    assert jobs.answer(good.id)["status"] == "ok"
    assert jobs.progress(good.id)["done_bytes"] == SIZE  # type: ignore[index]
    failed = ended(jobs, bad)
    assert failed.state is State.FAILED
    assert "nosuch.raw" in failed.error
    again = jobs_of(world)
    assert [again.get(j.id) for j in (good, bad)] == [jobs.get(good.id), failed]


def test_a_service_that_was_killed_finds_its_jobs_again(world: World) -> None:
    """Queued, running, and ended while nobody looked."""
    jobs = jobs_of(world)
    lasting = jobs.submit(Task("map", ["map", "nobody"], lasting=True))
    jobs.submit(backup(world))
    running = jobs.submit(MAP)
    jobs.step(Limits(total=0))
    failing = jobs.get(lasting.id).process
    del jobs
    assert failing
    assert failing.wait(60.0)
    again = jobs_of(world)
    assert [j.task.kind for j in again.open()] == ["map", "backup", "map"]
    until(again, lambda: again.get(lasting.id).state is State.FAILED)
    assert "nobody" in again.get(lasting.id).error
    assert again.open()[-1].id == running.id
    until(again, lambda: len(again.open()) == 1)
    until(again, lambda: again.answer(running.id) is not None)  # it serves
    again.cancel(running.id)
    assert ended(again, running).state is State.DONE, "an export that is ended has done its work"


def test_a_job_whose_process_was_started_but_not_written_down_is_not_started_twice(world: World) -> None:
    jobs = jobs_of(world)
    job = jobs.submit(MAP)
    jobs.step(Limits())
    process = jobs.get(job.id).process
    assert process is not None
    path = jobs.folder(job.id) / "job.json"
    value = path.read_text()
    path.write_text(value.replace(f'"process": {{"pid": {process.pid}', '"process": null, "was": {"pid": 0').replace(
        ', "was": {"pid": 0, "started": ' + str(process.started) + f', "boot_id": "{process.boot_id}"}}', ""
    ))  # fmt: skip
    again = jobs_of(world)
    assert again.get(job.id).process == process
    again.cancel(job.id)
    ended(again, job)


def test_a_job_that_was_about_to_be_started_is_started(world: World) -> None:
    """Whoever was to start it was killed once it was written down, and before there was a process."""
    jobs = jobs_of(world)
    job = jobs.submit(backup(world))
    jobs._put(replace(job, state=State.RUNNING, began=1))
    again = jobs_of(world)
    assert again.get(job.id).state is State.QUEUED
    assert ended(again, job).state is State.DONE
    jobs._put(replace(again.get(job.id), state=State.RUNNING, exit_code=None))
    (jobs.folder(job.id) / "exit").unlink()
    assert "killed" in ended(jobs_of(world), job).error, "what had begun is not begun again"


def test_a_job_that_was_killed_says_so(world: World) -> None:
    jobs = jobs_of(world)
    job = jobs.submit(MAP)
    jobs.step(Limits())
    process = jobs.get(job.id).process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    assert "killed" in ended(jobs, job).error


def test_limits_hold_for_all_for_a_store_and_for_a_source() -> None:
    limits = Limits(3, {"main": 2}, {"slow": 1})
    running = [Task("backup", [], "main", "slow", "m1")]
    assert limits.admit(Task("backup", [], "main", "fast", "m2"), running)
    assert not limits.admit(Task("backup", [], "other", "slow", "m2"), running), "one at a time from this host"
    assert not limits.admit(Task("backup", [], "other", "fast", "m1"), running), "the machine is being captured"
    two = [*running, Task("check", [], "main")]
    assert not limits.admit(Task("backup", [], "main", "fast", "m2"), two)
    assert limits.admit(Task("map", [], "main", lasting=True), two)
    assert not limits.admit(Task("backup", []), [*two, Task("backup", [])])


def test_a_queued_job_is_cancelled_at_once_and_an_ended_one_not_at_all(world: World) -> None:
    jobs = jobs_of(world)
    job = jobs.submit(backup(world))
    assert jobs.cancel(job.id).state is State.CANCELLED
    with pytest.raises(UsageError, match="has ended"):
        jobs.cancel(job.id)
    with pytest.raises(NotFound):
        jobs.get("nosuch")
    assert jobs.forget(-1) == 1
    assert jobs.all() == []
