"""A real libvirtd with a machine that runs, paused: the suite."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.hypervisors.conformance import Conformance
from tests.hypervisors.libvirtd import Libvirtd, LibvirtMachine, daemon, machine

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def libvirtd() -> Generator[Libvirtd]:
    with daemon() as made:
        yield made


class TestRunning(Conformance):
    SECTOR_STEP = 512
    EXAMPLES = 10

    @pytest.fixture
    def rig(self, libvirtd: Libvirtd) -> Generator[LibvirtMachine]:
        with machine(libvirtd) as made:
            yield made.define().start()
