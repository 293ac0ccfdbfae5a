"""Capture when things go wrong: trackers that lie, hosts that vanish, disks that run full, runs that die half-way."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvbackup.hypervisors.fake import FakeDisk, Order, Tracking
from hvbackup.model import Status
from tests.world import BLOCK, World

BOTH_ORDERS = pytest.mark.parametrize("order", list(Order), ids=lambda order: order.name.lower())


@BOTH_ORDERS
def test_a_lying_tracker_is_found_out_and_the_disk_compared_whole(tmp_path: Path, order: Order) -> None:
    world = World(tmp_path, disks={"vda": FakeDisk(10 * BLOCK)}, order=order).init()
    disk = world.disks["vda"]
    with world.opened() as store:
        disk.write(0, world.rng.randbytes(disk.size))
        world.capture(store)
        disk.tracking = Tracking.LIES
        disk.write(70_000, world.rng.randbytes(300_000))
        outcome = world.capture(store)
        assert outcome.status is Status.DEGRADED
        assert "vda" in outcome.notes[0]
        assert len(outcome.notes) == 1
        world.check_all(store)
