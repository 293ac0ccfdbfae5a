"""The keeper while its store can't be looked at: what runs goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hvbackup import config
from hvbackup.config import KeyOptions
from hvbackup.daemon import keeper as keepers
from hvbackup.daemon import workers
from hvbackup.daemon.keeper import Keeper
from hvbackup.service.estate import Estate
from hvbackup.service.session import Session
from hvbackup.store.journal import journal
from tests.cli.rig import World, make_disk
from tests.daemon.rig import configure, until

CONFIG = """
[service]
prune = ""
[source.a]
uri = "image:{folder}/a.raw"
name = "web1"
[policy.continuous]
machines = ["web1"]
protect = true
rpo = "1h"
[store.main]
path = "{folder}/store"
check = ""
reclaim = ""
regroup = ""
"""


@dataclass
class Worker:
    """A process that runs until it is asked to end, and does nothing."""

    asked: list[int] = field(default_factory=list)

    def is_running(self) -> bool:
        return not self.asked

    def signal(self, number: int) -> None:
        self.asked.append(number)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.done("init")
    make_disk(tmp_path / "a.raw", 1 << 20)
    made.done("backup", f"image:{tmp_path}/a.raw", "--name", "web1")
    configure(made, CONFIG)
    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    found: list[Worker] = []

    def start(*_: Any, **__: Any) -> Worker:
        found.append(Worker())
        return found[-1]

    monkeypatch.setattr(workers, "start_detached", start)
    return found


@pytest.fixture
def keeper(world: World, started: list[Worker], monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    for name in ("WORKERS_SECONDS", "ESTATE_SECONDS", "OPEN_AGAIN_SECONDS"):
        monkeypatch.setattr(keepers, name, 0.0)
    made = Keeper(config.places(environment=world.environment, root=False), KeyOptions())
    made.environment = made.discovery.environment = world.environment
    made.jobs._environment = world.environment
    until(lambda: made.step() or started)
    yield made
    made.close()


def test_a_store_that_cannot_be_looked_at_ends_no_worker(
    keeper: Keeper, started: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Estate, "refresh", failing)
        broken.setattr(Session, "open", failing)
        keeper.step()
        keeper.step()
        assert "store:main" in {a.key for a in keeper.current_alarms()}
        assert keeper.reload()
        keeper.step()
        assert [w.asked for w in started] == [[]]
    keeper.step()
    assert [w.asked for w in started] == [[]]
    assert [r.name for r in keeper.rows()] == ["web1"]


def test_who_is_to_be_protected_is_told_by_the_configuration_meanwhile(
    world: World, keeper: Keeper, started: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estate, "refresh", failing)
    monkeypatch.setattr(Session, "open", failing)
    configure(world, CONFIG.replace("protect = true", 'schedule = "*-02-29"'))
    assert keeper.reload()
    keeper.step()
    assert [w.asked for w in started] == [[signal.SIGTERM]]


def failing(*_: Any) -> None:
    raise keepers.HvbackupError("Cannot read the store: Input/output error")


def test_a_journal_whose_files_go_while_they_are_counted(world: World) -> None:
    with Session(config.places(environment=world.environment, root=False)).open() as store:
        [key] = store.machine_folders()
        folder = store.files.path(f"{journal.FOLDER}/{key}")
        folder.mkdir(parents=True)
        (folder / "stays").write_bytes(bytes(1000))
        (folder / "gone").symlink_to("nowhere")  # listed, and not there
        estate = Estate(store)
        estate.refresh()
        assert [k.journal_bytes for k in estate.all()] == [1000]
