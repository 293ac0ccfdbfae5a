"""The service with real machines: it protects, survives every death, obeys its configuration, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hvbackup.model import MiB
from tests.cli.rig import World
from tests.daemon.rig import Served, configure, notes, points, until
from tests.hypervisors.daemon import Daemon, make_image, node

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

# What stores do by themselves on some day of the week, tests leave to no calendar.
IDLE = '[store.main]\ncheck = ""\nreclaim = ""\nregroup = ""\n'
BOTH = """
[source.a]
uri = "qemu:{folder}/a/qmp.sock"
name = "web1"
[source.b]
uri = "qemu:{folder}/b/qmp.sock"
name = "db1"
[service]
discover = "3s"
prune = "5s"
[store.main]
check = ""
reclaim = "6s"
regroup = "6s"
[policy.continuous]
machines = ["web*"]
protect = true
every = "1s"
fold = "4s"
rpo = "60s"
[policy.often]
machines = ["db*"]
schedule = "5s"
rpo = "60s"
keep = {{last = 2}}
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.done("init")
    yield made
    made.run("serve", "--end-workers")


@contextmanager
def machine(folder: Path) -> Iterator[Daemon]:
    folder.mkdir()
    made = Daemon(folder, [node("vda", make_image(folder / "vda.raw", 4 * MiB, "raw"), "raw")]).start()
    try:
        yield made
    finally:
        made.kill()


def jobs_of(world: World) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in (world.state / "jobs").glob("*/job.json")]


def test_the_service_protects_and_its_deaths_cost_nothing(world: World, tmp_path: Path) -> None:
    """Killed at random moments: the worker lives on, jobs are made once, everything verifies, and nothing is left."""
    configure(world, BOTH)
    rng = random.Random(5)
    with machine(tmp_path / "a") as a, machine(tmp_path / "b") as b:
        served = Served(world)
        [first] = until(lambda: notes(world))
        until(lambda: points(world).get("db1", 0) >= 1)
        for _ in range(6):
            time.sleep(rng.random() * 3)
            served.kill()
            served = Served(world)
        until(lambda: served.said("Ready"))
        seen = points(world)
        until(lambda: points(world)["web1"] > seen["web1"] and points(world)["db1"] == 2)
        [note] = until(lambda: notes(world))
        assert note["process"]["pid"] == first["process"]["pid"], "the worker outlived every death of the service"
        assert note["seq"] > first["seq"]
        until(
            lambda: (
                {"prune", "reclaim", "regroup"} <= {j["task"]["kind"] for j in jobs_of(world) if j["state"] == "done"}
            )
        )
        assert served.kill(signal.SIGTERM) == 0
        assert notes(world), "and its end"
        time.sleep(1.5)
        jobs = jobs_of(world)
        for kind in ("prune", "reclaim", "regroup"):
            of_kind = [j for j in jobs if j["task"]["kind"] == kind]
            wrong = [j["error"] for j in of_kind if j["state"] not in ("done", "queued", "running")]
            assert not wrong, kind
            assert "done" in {j["state"] for j in of_kind}, kind
        assert all("in use" not in str(j["error"]) for j in jobs), "no job was started twice"
        ended = world.done("serve", "--end-workers", "--json").json["ended"]
        assert note["process"]["pid"] in ended
        assert world.run("check", "--deep").code == 0
        assert world.run("status", "--json").json["leases"] == []
        assert not a.leftovers()
        assert not b.leftovers()


def test_reload_new_machines_and_a_broken_configuration(world: World, tmp_path: Path) -> None:
    configure(world, BOTH.replace("db*", "nosuch*"))
    with machine(tmp_path / "a"):
        served = Served(world)
        until(lambda: notes(world))
        assert "db1" not in points(world)
        (world.configuration / "conf.d").mkdir()
        (world.configuration / "conf.d/new.toml").write_text("[polcy.x]\n")
        served.process.send_signal(signal.SIGHUP)
        until(lambda: served.said("the old one stays"))
        assert notes(world), "the old configuration still protects"
        with machine(tmp_path / "b"):
            (world.configuration / "conf.d/new.toml").write_text('[policy.rest]\nmachines = ["*"]\nschedule = "5s"\n')
            served.process.send_signal(signal.SIGHUP)
            until(lambda: points(world).get("db1"))
            configure(world, BOTH.replace("protect = true", "protect = false"))
            served.process.send_signal(signal.SIGHUP)
            until(lambda: not notes(world))
        assert served.kill(signal.SIGTERM) == 0


def test_one_service_on_a_host_and_a_broken_start_is_refused(world: World) -> None:
    configure(world, BOTH)
    served = Served(world)
    until(lambda: served.said("Ready"))
    assert f"process {served.process.pid}" in world.refused(5, "serve")
    assert served.kill(signal.SIGINT) == 0
    configure(world, "[service]\nlisen = 'x'\n")
    assert "did you mean listen?" in world.refused(2, "serve")


def test_the_command_line_asks_the_service_and_works_without_it(world: World) -> None:
    quiet = BOTH.replace('reclaim = "6s"', 'reclaim = ""').replace('regroup = "6s"', 'regroup = ""')
    configure(world, quiet.replace("[service]", '[service]\nlisten = "127.0.0.1:0"'))
    served = Served(world)
    until(lambda: served.said("Ready"))
    assert world.done("jobs", "--json").json == {"jobs": []}
    assert "no job 20260101" in world.refused(2, "jobs", "20260101-000000-00000000")
    made = world.done("token", "add", "ci", "--role", "viewer", "--machines", "web*", "--json").json
    assert made["token"].startswith("hvb_")
    assert world.done("token", "list", "--json").json["tokens"][0]["machines"] == ["web*"]
    assert "at least 10" in world.refused(2, "user", "add", "ann", "--role", "admin", "--password-file", "/dev/null")
    assert (world.configuration / "tls/certificate.pem").exists(), "TLS by default, with a certificate of its own"
    assert served.kill(signal.SIGTERM) == 0
    assert world.done("jobs", "--json").json == {"jobs": []}
    assert "nobody to end a job" in world.refused(2, "jobs", "20260101-000000-00000000", "--cancel")


def test_a_backup_is_made_by_the_service_where_one_runs(world: World, tmp_path: Path) -> None:
    configure(
        world,
        '[source.b]\nuri = "qemu:{folder}/b/qmp.sock"\nname = "db1"\n[policy.p]\nmachines = ["*"]\nschedule = "*-02-29"\n'
        + IDLE,
    )
    source = f"qemu:{tmp_path / 'b/qmp.sock'}"
    with machine(tmp_path / "b") as b:
        alone = world.done("backup", source, "--name=db1", "--json").json
        assert "jobs" not in alone
        assert world.done("status", "--json").json["service"] is None
        served = Served(world)
        until(lambda: served.said("Ready"))
        until(
            lambda: (
                (world.done("status", "--json").json["service"] or {"machines": {}})["machines"].get("protected") == 1
            )
        )
        done = world.done("backup", source, "--json").json
        [job] = done["jobs"]
        assert done["runs"][0]["point"]["id"] != alone["runs"][0]["point"]["id"]
        assert world.done("jobs", job, "--json").json["who"] == "local"
        assert "by the service" in world.done("backup", source, "--only=db1").out
        assert "jobs" not in world.done("backup", source, "--json", HVBACKUP_ALONE="1").json
        assert "jobs" not in world.done("backup", source, "--tag=mine", "--json").json, (
            "which the service can't be told"
        )
        assert "The service keeps this store: 1 protected" in world.done("status").out
        said = world.done("prune", "b", "--keep-last=2", "--json").json
        [job] = said["jobs"]
        shown = world.done("jobs", job, "--json").json
        assert (shown["kind"], shown["who"], shown["state"]) == ("prune", "local", "done")
        assert len(said["forgotten"]["points"]) >= 2
        assert world.done("status", "--json").json["machines"][0]["points"] == 2
        assert "Nothing was forgotten" in world.done("prune", "--keep-last=2").out
        assert "b:" in world.done("prune", "--keep-last=2").out
        alone = world.done("prune", "--keep-last=2", "--json", HVBACKUP_ALONE="1").json
        assert "jobs" not in alone
        assert {**said, "jobs": 0}.keys() == {**alone, "jobs": 0}.keys()
        assert "no machine" in world.refused(2, "prune", "nosuch", "--keep-last=2").lower()
        assert "jobs" not in world.done("prune", "--keep-last=1", "--dry-run", "--json").json, "nothing is done"
        b.kill()
        ran = world.run("backup", source, "--json")
        assert ran.code == 4
        assert json.loads(ran.out.splitlines()[-1])["error"]["exit_code"] == 4
        assert served.kill(signal.SIGTERM) == 0


def test_systemd_is_told(world: World, tmp_path: Path) -> None:
    configure(world, IDLE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(120)
        served = Served(world, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="2000000")
        assert systemd.recv(1000) == b"READY=1"
        assert systemd.recv(1000).startswith(b"WATCHDOG=1\nSTATUS=")
        served.process.send_signal(signal.SIGHUP)
        until(lambda: systemd.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC="))
        until(lambda: systemd.recv(1000) == b"READY=1")
        os.kill(served.process.pid, signal.SIGTERM)
        until(lambda: systemd.recv(1000) == b"STOPPING=1")
        assert served.process.wait(120) == 0
        served.log.close()
