"""Questions of the service: each has a process of its own, and the end of the service is the end of all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hvbackup import config
from hvbackup.cli import local
from hvbackup.daemon.questions import ASKED_MAX, Questions
from hvbackup.errors import Busy, HvbackupError, UsageError
from tests.cli.rig import World, dead, make_disk
from tests.daemon.rig import Served, configure, until

HOLDER = """
import duckdb, sys
con = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.done("init")
    make_disk(tmp_path / "disk.raw", 65536)
    made.done("backup", f"image:{tmp_path}/disk.raw", "--name", "web1")
    return made


@pytest.fixture
def held(world: World) -> Iterator[World]:
    """Somebody else has the index open: whoever asks it waits."""
    world.done("sql", "select 1")
    [catalog] = world.state.rglob("catalog.duckdb")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(catalog)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    # What it says has changed since, so it is not taken as it is.
    world.done("backup", f"image:{world.folder}/disk.raw")
    yield world
    holder.kill()
    holder.communicate()


def test_what_a_command_answers_or_fails_with(world: World) -> None:
    questions = Questions(world.environment)
    assert questions.ask("sql", "--", "select name from points")["rows"] == [["web1"]]
    with pytest.raises(UsageError, match="read-only"):
        questions.ask("sql", "--", "drop table points")
    questions.environment = {**world.environment, "PYTHONPATH": "", "PYTHONHOME": "/nonexistent"}
    with pytest.raises(HvbackupError, match="gave no answer"):
        questions.ask("sql", "--", "select 1")


def test_the_end_leaves_nobody_waiting_and_nothing_running(held: World) -> None:
    questions, said = Questions(held.environment), []

    def ask() -> None:
        try:
            questions.ask("sql", "--", "select 1")
        except HvbackupError as e:
            said.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: questions._asked)
    [process] = questions._asked
    questions.close()
    thread.join(120.0)
    assert not thread.is_alive()
    assert [type(e) for e in said] == [Busy]
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(Busy, match="ending"):
        questions.ask("sql", "--", "select 1")


def test_more_than_a_few_at_once_are_told_to_wait(held: World) -> None:
    questions = Questions(held.environment)

    def ask() -> None:
        with suppress(Busy):
            questions.ask("sql", "--", "select 1")

    threads = [threading.Thread(target=ask) for _ in range(ASKED_MAX)]
    for thread in threads:
        thread.start()
    until(lambda: len(questions._asked) == ASKED_MAX)
    with pytest.raises(Busy, match="in a moment"):
        questions.ask("sql", "--", "select 1")
    assert len(questions._asked) == ASKED_MAX
    questions.close()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()


@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_service_asks_the_index_in_another_process_and_ends_at_once(held: World) -> None:
    """DuckDB aborts a process that ends while it works: no part of it is ever in the service."""
    configure(
        held,
        '[policy.all]\nmachines = ["*"]\nschedule = "*-02-29"\n[store.main]\ncheck = ""\nreclaim = ""\nregroup = ""\n',
    )
    served = Served(held)
    places = config.places(environment=held.environment, root=False)
    until(lambda: served.said("Ready"))
    said: list[HvbackupError] = []
    asked = threading.Thread(target=_ask, args=(places, said))
    asked.start()
    [question] = until(lambda: _questions(served.process.pid))
    os.kill(question, signal.SIGSTOP)  # it never ends of itself: neither answers nor gives up waiting for the index
    try:
        assert "duckdb" not in Path(f"/proc/{served.process.pid}/maps").read_text()
        assert not said
        assert served.kill(signal.SIGTERM) == 0
        until(lambda: dead(question))
    finally:
        if not dead(question):
            os.kill(question, signal.SIGKILL)
    asked.join(30.0)
    assert not asked.is_alive()
    assert len(said) == 1


def _questions(service: int) -> list[int]:
    """The processes of a service that ask the index."""
    found = []
    for task in Path(f"/proc/{service}/task").glob("*/children"):
        with suppress(OSError):  # threads and processes end meanwhile
            found += [int(c) for c in task.read_text().split() if "sql" in _words(c)]
    return found


def _words(process: str) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _ask(places: config.Places, said: list[HvbackupError]) -> None:
    """Somebody who gets no answer, and is told so."""
    try:
        local.ask(places, "POST", "/api/v1/sql", {"query": "select 1"})
    except HvbackupError as e:
        said.append(e)
