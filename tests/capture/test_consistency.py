"""What a point says of its consistency: no more than is true, and never quietly less than before."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvbackup.capture import capture
from hvbackup.errors import HostUnreachable, UsageError
from hvbackup.model import Consistency, Outcome, RecoveryPoint, Status
from tests.world import MACHINE, World

CRASH, FILESYSTEM, APPLICATION = Consistency.CRASH, Consistency.FILESYSTEM, Consistency.APPLICATION


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).init()


def captured(world: World, wanted: Consistency | None = None) -> tuple[Outcome, RecoveryPoint]:
    """An outcome, and its point as it is read back from the store."""
    with world.opened() as store:
        outcome = capture(store, world.hv, world.hv.machine(MACHINE).model(), world.options(consistency=wanted))
        assert outcome.point is not None
        newest = store.newest(outcome.point.machine.id)
        assert newest is not None
        assert newest.id == outcome.point.id
    return outcome, newest


def test_the_point_knows_how_consistent_it_is_and_how_long_the_guest_stood_still(world: World) -> None:
    world.hv.machine(MACHINE).consistency = APPLICATION
    outcome, point = captured(world)
    assert outcome.status is Status.OK
    assert point.consistency is APPLICATION
    assert point.figures["frozen_seconds"] == outcome.figures.frozen_seconds > 0
    assert point.figures["freezing_seconds"] == outcome.figures.freezing_seconds > 0
    assert "seconds" not in point.figures


def test_a_machine_without_an_agent_is_no_trouble(world: World) -> None:
    outcome, point = captured(world)
    assert (outcome.status, outcome.notes) == (Status.OK, [])
    assert outcome.remarks == ["The guest was left alone"]
    assert point.consistency is CRASH
    assert point.figures["frozen_seconds"] == 0


def test_an_agent_that_failed_is_trouble_and_no_failure(world: World) -> None:
    world.hv.machine(MACHINE).consistency = FILESYSTEM
    world.hv.machine(MACHINE).agent_trouble = "hangs"
    outcome, point = captured(world)
    assert (outcome.status, outcome.notes) == (Status.DEGRADED, ["hangs"])
    assert point.consistency is CRASH


@pytest.mark.parametrize("wanted", [FILESYSTEM, APPLICATION])
def test_what_was_asked_for_and_can_not_be_is_no_point(world: World, wanted: Consistency) -> None:
    with pytest.raises(UsageError, match="crash-consistent"):
        captured(world, wanted)
    world.hv.machine(MACHINE).consistency = APPLICATION
    world.hv.machine(MACHINE).agent_trouble = "hangs"
    with pytest.raises(HostUnreachable, match="hangs"):
        captured(world, wanted)
    with world.opened() as store:
        assert list(store.points()) == []


def test_less_than_the_newest_point_is_never_quiet(world: World) -> None:
    machine = world.hv.machine(MACHINE)
    machine.consistency = FILESYSTEM
    captured(world)
    machine.consistency = CRASH  # as if the agent had been removed from the guest: nothing failed
    outcome, _ = captured(world)
    assert outcome.status is Status.DEGRADED
    assert outcome.notes == ["The newest point was filesystem-consistent, this one is only crash-consistent"]
    outcome, _ = captured(world)
    assert outcome.status is Status.OK, "it is said once"


def test_less_is_fine_for_who_asks_for_it(world: World) -> None:
    world.hv.machine(MACHINE).consistency = FILESYSTEM
    captured(world)
    outcome, point = captured(world, CRASH)
    assert (outcome.status, point.consistency) == (Status.OK, CRASH)
    assert outcome.figures.frozen_seconds == 0
