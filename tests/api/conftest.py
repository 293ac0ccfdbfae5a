"""A keeper over real machines of image files, its application, and somebody of each role."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from hvbackup import config
from hvbackup.api.app import create
from hvbackup.api.gate import Desk
from hvbackup.api.server import Local
from hvbackup.auth import Accounts, Role
from hvbackup.config import KeyOptions
from hvbackup.daemon.keeper import Keeper
from tests.cli.rig import World, make_disk

SIZE = 1 << 20
CONFIG = """
[service]
prune = ""
[source.a]
uri = "image:{folder}/a.raw"
name = "web1"
tags = ["web"]
[source.b]
uri = "image:{folder}/b.raw"
name = "db1"
[source.c]
uri = "image:{folder}/c.raw"
name = "<script>alert(1)</script>"
[policy.daily]
machines = ["web1", "db1"]
rpo = "1000d"
schedule = "*-02-29"
[policy.none]
machines = ["nosuch"]
[store.main]
path = "{folder}/store"
check = ""
reclaim = ""
regroup = ""
"""


@dataclass
class Site:
    """Everything an API test needs."""

    world: World
    keeper: Keeper
    desk: Desk
    app: Any
    tokens: dict[str, str] = field(default_factory=dict)

    def client(self, who: str = "") -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"} if who else {}
        return TestClient(self.app, base_url="https://testserver", headers=headers, raise_server_exceptions=False)

    @property
    def local(self) -> httpx.Client:
        return TestClient(Local(self.app), base_url="https://testserver", raise_server_exceptions=False)

    def key(self, name: str) -> str:
        return next(r.key for r in self.keeper.rows() if r.name == name)

    def finish(self, job: str) -> dict[str, Any]:
        end = time.monotonic() + 180
        while self.keeper.jobs.get(job).state.is_open:
            assert time.monotonic() < end
            self.keeper.step()
            time.sleep(0.05)
        found: dict[str, Any] = self.local.get(f"/api/v1/jobs/{job}").json()
        return found


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    yield from made_site(folder)


def made_site(folder: Path) -> Iterator[Site]:
    world = World(folder)
    world.done("init")
    for name in "abc":
        make_disk(folder / f"{name}.raw", SIZE)
    for file, name in (("a", "web1"), ("a", "web1"), ("b", "db1")):
        world.done("backup", f"image:{folder / file}.raw", "--name", name)
    (world.configuration / "config.toml").write_text(CONFIG.format(folder=folder))
    keeper = Keeper(config.places(environment=world.environment, root=False), KeyOptions())
    keeper.environment = keeper.discovery.environment = keeper.questions.environment = world.environment
    keeper.jobs._environment = world.environment
    end = time.monotonic() + 180
    while len([r for r in keeper.rows() if r.source]) < 3:
        assert time.monotonic() < end
        keeper.step()
        time.sleep(0.1)
    accounts = Accounts(keeper.places.configuration, keeper.clock)
    desk = Desk(keeper, accounts)
    found = Site(world, keeper, desk, create(desk))
    for role in Role:
        found.tokens[role] = accounts.add_token(f"the {role}", role, ["*"], 0)[1]
    for role in (Role.VIEWER, Role.ADMIN):
        found.tokens[f"{role} of web"] = accounts.add_token(f"{role} of web", role, ["tag:web"], 0)[1]
    yield found
    keeper.close()
