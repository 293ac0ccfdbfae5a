"""The service as a process of its own, and what it leaves for others to see."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.rig import World
from tests.protecting import DIES_WITH_US


def configure(world: World, text: str) -> None:
    (world.configuration / "config.toml").write_text(text.format(folder=world.folder))


class Served:
    """`hvbackup serve` as a process."""

    def __init__(self, world: World, **environment: str) -> None:
        self.world = world
        self.log = (world.folder / "serve.log").open("ab")
        self.from_ = self.log.tell()
        self.process = subprocess.Popen(
            [*DIES_WITH_US, *world.command("serve")],
            env={**world.environment, **environment},
            stdout=self.log,
            stderr=self.log,
        )

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        self.log.close()
        return self.process.wait(120)

    def said(self, text: str) -> bool:
        return text.encode() in (self.world.folder / "serve.log").read_bytes()[self.from_ :]


def until(done: Callable[[], Any], seconds: float = 180.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def notes(world: World) -> list[dict[str, Any]]:
    found = []
    for path in (world.folder / "run/workers").glob("*.json"):
        try:
            note = json.loads(path.read_text())
        except (ValueError, FileNotFoundError):
            continue
        if Path(f"/proc/{note['process']['pid']}").exists():
            found.append(note)
    return found


def points(world: World) -> dict[str, int]:
    return {m["name"]: m["points"] for m in world.run("status", "--json").json["machines"]}
