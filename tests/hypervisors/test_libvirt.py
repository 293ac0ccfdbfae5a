"""A real libvirtd with a machine that runs, paused: the suite."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from labs.libvirtd import Libvirtd
from tests.hypervisors.conformance import Conformance
from tests.hypervisors.libvirtd import LibvirtMachine, machine

pytestmark = pytest.mark.real


class TestRunning(Conformance):
    SECTOR_STEP = 512
    EXAMPLES = 6

    @pytest.fixture
    def rig(self, libvirtd: Libvirtd) -> Generator[LibvirtMachine]:
        with machine(libvirtd) as made:
            yield made.define().start()
