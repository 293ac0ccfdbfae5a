"""Asking sources for their machines: one that hangs is said to, keeps what it had, and delays nobody else."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.configuration import SourceSettings
from hvbackup.daemon import discovery
from hvbackup.daemon.discovery import Discovery
from tests.cli.rig import World, make_disk
from tests.daemon.rig import until


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.done("init")
    for name in "ab":
        make_disk(tmp_path / f"{name}.raw", 65536)
    return made


@pytest.fixture
def asked(world: World) -> Iterator[Discovery]:
    made = Discovery([], world.environment)
    yield made
    made.close()


def test_a_host_that_hangs_keeps_its_machines_and_delays_nobody(
    world: World, asked: Discovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {n: SourceSettings(uri=f"image:{tmp_path}/{n}.raw", name=n) for n in "ab"}
    until(lambda: (asked.step(sources, 3600), len(asked.machines) == 2)[1])
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "qmp.sock"))
        silent.listen()
        sources["a"] = SourceSettings(uri=f"qemu:{tmp_path}/qmp.sock", name="a")
        before = time.monotonic()
        asked.ask_all()
        asked.step(sources, 3600)
        hangs = asked.sources["a"].process
        assert hangs is not None
        assert hangs.poll() is None, "it waits for nobody"
        hangs.send_signal(signal.SIGSTOP)  # else it gives up of itself, maybe before "b" has answered
        until(lambda: (asked.step(sources, 3600), asked.sources["b"].process is None)[1])
        assert asked.sources["b"].answered > before
        assert asked.sources["a"].process is hangs
        monkeypatch.setattr(discovery, "ANSWER_SECONDS", 6.0)
        until(lambda: (asked.step(sources, 3600), asked.sources["a"].error)[1])
    assert "does not answer" in asked.sources["a"].error
    assert asked.sources["b"].error == ""
    assert sorted(m.name for m in asked.machines) == ["a", "b"], "a machine is not gone because its host hangs"
    assert asked.sources["a"].process is None
    sources["a"] = SourceSettings(uri=f"image:{tmp_path}/a.raw", name="a")
    monkeypatch.setattr(discovery, "ANSWER_SECONDS", 120.0)
    asked.ask_all()
    until(lambda: (asked.step(sources, 3600), not asked.sources["a"].error)[1])


def test_what_cannot_be_understood_is_said(world: World, asked: Discovery, tmp_path: Path) -> None:
    sources = {
        "a": SourceSettings(uri=f"image:{tmp_path}/nosuch.raw"),
        "b": SourceSettings(uri=f"image:{tmp_path}/b.raw"),
    }
    until(lambda: (asked.step(sources, 3600), asked.complete)[1])
    assert "nosuch.raw" in asked.sources["a"].error
    assert [m.source for m in asked.machines] == ["b"]
    asked._understand("b", asked.sources["b"], b"Segmentation fault")
    assert asked.sources["b"].error == "gave no answer that can be understood"
    assert [m.source for m in asked.machines] == ["b"]
