"""Upgrade and downgrade with running workers: who is started by one version is adopted by the other, both ways."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvbackup.cli import local
from hvbackup.config import places
from hvbackup.model import MiB
from tests.cli.rig import World
from tests.daemon.rig import Served, configure, notes, until
from tests.hypervisors.daemon import Daemon, make_image, node

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = """
[source.a]
uri = "qemu:{folder}/a/qmp.sock"
name = "web1"
[policy.continuous]
machines = ["web1"]
protect = true
every = "1s"
fold = "5s"
rpo = "60s"
[store.main]
check = ""
reclaim = ""
regroup = ""
"""


def installed(folder: Path, version: str, *later: tuple[str, str, str]) -> Path:
    """The program with another version number, and with what a later version may have written."""
    shutil.copytree(ROOT / "hvbackup", folder / "hvbackup", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in (("__init__.py", '__version__ = "', f'__version__ = "{version}"  # "'), *later):
        path = folder / "hvbackup" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.done("init")
    yield made
    made.run("serve", "--end-workers")


def served(world: World, program: Path) -> Served:
    made = Served(world, PYTHONPATH=str(program), PYTHONSAFEPATH="1")  # else the folder we are in comes first
    until(lambda: made.said("Ready"))
    return made


def ask(world: World, method: str, path: str, body: Any = None) -> Any:
    found = places(environment=world.environment, root=False)
    return local.ask(found, method, path, body)


def replaced(world: World, version: str, seq: int) -> dict[str, Any]:
    """The worker, once it is of this version and has recorded more."""

    def found() -> dict[str, Any] | None:
        return next((n for n in notes(world) if n["version"] == version and n["seq"] > seq), None)

    note: dict[str, Any] = until(found)
    return note


def test_workers_and_jobs_survive_an_upgrade_and_a_downgrade(world: World, tmp_path: Path) -> None:
    old = installed(tmp_path / "old", "7.0")
    new = installed(
        tmp_path / "new",
        "7.1",
        ("service/standing.py", '    paused: str = ""', '    later: str = "a field of 7.1"\n    paused: str = ""'),
        ("jobs.py", '    who: str = "schedule"', '    later: str = "a field of 7.1"\n    who: str = "schedule"'),
    )
    configure(world, CONFIGURATION)
    (tmp_path / "a").mkdir()
    made = Daemon(tmp_path / "a", [node("vda", make_image(tmp_path / "a/vda.raw", 4 * MiB, "raw"), "raw")]).start()
    try:
        service = served(world, old)
        first = replaced(world, "7.0", 2)
        machine = until(lambda: ask(world, "GET", "/api/v1/machines")["machines"])[0]["key"]
        until(lambda: ask(world, "GET", f"/api/v1/machines/{machine}")["points"])
        lasting = ask(world, "POST", f"/api/v1/machines/{machine}/map", {})["id"]
        until(lambda: ask(world, "GET", f"/api/v1/jobs/{lasting}")["state"] == "running")
        seq = first["seq"]
        for version, program in (("7.1", new), ("7.0", old)):
            before = notes(world)[0]["process"]["pid"]
            assert service.kill(signal.SIGTERM) == 0
            assert notes(world)[0]["process"]["pid"] == before, "the worker protects while no service runs"
            until(lambda seq=seq: notes(world)[0]["seq"] > seq)
            service = served(world, program)
            note = replaced(world, version, seq)
            assert note["process"]["pid"] != before, "the new version's own worker goes on"
            seq = note["seq"]
            until(lambda: ask(world, "GET", "/api/v1/machines")["machines"][0]["state"] == "protected")
            assert ask(world, "GET", f"/api/v1/jobs/{lasting}")["state"] == "running", "jobs are adopted as well"
            assert ask(world, "POST", f"/api/v1/machines/{machine}/tag", {"tag": f"by {version}"})["seq"] > seq
        ask(world, "DELETE", f"/api/v1/jobs/{lasting}")
        until(lambda: ask(world, "GET", f"/api/v1/jobs/{lasting}")["ended"])
        assert service.kill(signal.SIGTERM) == 0
    finally:
        made.kill()
    world.run("serve", "--end-workers")
    for version in ("7.1", "7.0"):
        assert world.run("restore", "web1", "--at", f"tag:by {version}", "--to", tmp_path / version).code == 0
    assert world.run("check", "--deep").code == 0
