"""The service beside a real libvirtd: policies by what the domain's metadata says, and nothing waits for the next look."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from hvbackup.hypervisors.libvirt_xml import NAMESPACE
from labs.libvirtd import Libvirtd, daemon
from tests.cli.rig import World
from tests.daemon.rig import Served, configure, points, until
from tests.hypervisors.libvirtd import LibvirtMachine, machine

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

CONFIGURATION = """
[source.host]
uri = "libvirt:{uri}"
tags = ["lab"]
[service]
discover = "1d"
[policy.gold]
machines = ["tag:gold"]
schedule = "1h"
rpo = "2h"
[store.main]
check = ""
reclaim = ""
regroup = ""
"""


@pytest.fixture
def own() -> Iterator[Libvirtd]:
    with daemon() as made:
        yield made


@pytest.fixture
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        made = World(Path(folder))
        made.done("init")
        yield made
        made.run("serve", "--end-workers")


class Tagged(LibvirtMachine):
    """Its metadata names it."""

    def xml(self) -> str:
        tags = f"<metadata><h:tags xmlns:h='{NAMESPACE}'>gold, <h:tag>db</h:tag></h:tags></metadata>"
        return super().xml().replace("<memory", f"{tags}<memory")


def states(world: World) -> dict[str, tuple[str, Any]]:
    """How each machine stands, and what its host told of it last."""
    from hvbackup import config
    from hvbackup.cli import local

    answer = local.ask(config.places(environment=world.environment, root=False), "GET", "/api/v1/machines")
    return {m["name"]: (m["state"], (m["event"] or {}).get("kind")) for m in answer["machines"]} if answer else {}


def test_domains_are_noticed_as_they_come_and_go(own: Libvirtd, world: World) -> None:
    """The next look is a day away: whatever happens here happens because the host told of it."""
    configure(world, CONFIGURATION.replace("{uri}", own.uri))
    served = Served(world)
    until(lambda: served.said("Ready"))
    with machine(own, formats=("qcow2",)) as plain, machine(own, formats=("qcow2",)) as vm:
        vm.__class__ = Tagged
        until(lambda: served.said("tells what happens"))
        plain.define()
        until(lambda: states(world).get(plain.name) == ("unprotected", "defined"))
        vm.define()
        until(lambda: points(world).get(vm.name) == 1)
        assert plain.name not in points(world)

        # a person tags the other one, as the documentation says: virsh metadata --uri ... --key h --set "<tags>gold</tags>"
        plain.domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, "<tags>gold</tags>", "h", NAMESPACE, 2)
        until(lambda: points(world).get(plain.name) == 1)

        vm.start()
        until(lambda: states(world)[vm.name][1] == "started")
        vm.stop()
        until(lambda: states(world)[vm.name][1] == "stopped")
        vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        until(lambda: states(world)[vm.name] == ("gone", "removed"))

        # the daemon dies: what happens meanwhile is seen once it is back
        own.kill()
        until(lambda: served.said("source host"))
        own.start()
        plain.connection, vm.connection = own.connection(), own.connection()
        vm.define()
        until(lambda: states(world)[vm.name][0] == "protected")
    assert served.kill(signal.SIGTERM) == 0
