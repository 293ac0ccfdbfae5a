"""How much room a policy needs: judged against stores whose change rates are known, and against what really is stored."""

from __future__ import annotations

import datetime
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvbackup.config import Places
from hvbackup.errors import UsageError
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.model import SECOND, Instant
from hvbackup.replicate import Copier
from hvbackup.service import stats as service
from hvbackup.service.session import Session
from hvbackup.service.sizing import DAY_NS, HOUR_NS, Measured, change, distances, need, trend
from hvbackup.store.keep.retention import Candidate, Policy, Span, plan
from hvbackup.store.store import Store, init
from tests.store.conftest import MEMORY, ram
from tests.world import BLOCK, MACHINE, CarelessKernel, World

pytestmark = pytest.mark.walk

__all__ = ["ram"]

NOW = Instant(1_800_000_000 * SECOND)
MIB = 1 << 20


# --- pure -----------------------------------------------------------------------------------------------------------------


def measured(**changes: float) -> Measured:
    known = {int(k.removeprefix("h")) * HOUR_NS: v for k, v in changes.items()}
    return Measured("id", "web1", 10, HOUR_NS, 1000 * MIB, 0.5, 0.25, known, 48 * MIB)


def test_change_is_measured_or_interpolated_and_never_more_than_everything() -> None:
    m = measured(h1=10.0, h24=100.0, h168=300.0)
    assert change(m, HOUR_NS) == 10
    assert change(m, 24 * HOUR_NS) == 100
    assert change(m, 96 * HOUR_NS) == pytest.approx(200)
    assert change(m, HOUR_NS // 2) == 5
    assert change(m, 336 * HOUR_NS) == 600
    assert change(m, 10**7 * 168 * HOUR_NS) == 1000 * MIB


def test_the_formula_of_daily_points() -> None:
    """Daily change x days to keep x (1 - reduction), the base, and 10 %."""
    found = need(measured(h24=100.0 * MIB), Policy(daily=30), 0, NOW)
    assert found.kept == 30
    assert found.base_bytes == 500 * MIB
    assert found.points_bytes == pytest.approx(29 * 100 * MIB * 0.25, rel=0.05)
    assert found.total_bytes == pytest.approx((found.base_bytes + found.points_bytes) * 1.1, abs=2)
    with_window = need(measured(h24=100.0 * MIB), Policy(daily=30), 12 * HOUR_NS, NOW)
    assert with_window.journal_bytes == 24 * MIB


@settings(max_examples=25)
@given(
    st.builds(Policy, *(st.integers(0, 12) for _ in range(6))).filter(Policy.keeps_something),
    st.sampled_from([HOUR_NS // 4, HOUR_NS, DAY_NS]),
)
def test_the_points_are_those_that_prune_would_keep(policy: Policy, interval: int) -> None:
    """Against years of captures, each of which is there."""
    found = distances(policy, interval, NOW)
    step = max(interval, DAY_NS // 4)
    times = [*range(NOW, NOW - 30 * DAY_NS, -interval), *range(NOW - 30 * DAY_NS, NOW - 13 * 366 * DAY_NS, -step)]
    kept = sum(d.keep for d in plan([Candidate(str(t), Instant(t)) for t in times], policy, {}))
    assert abs(len(found) + 1 - kept) <= 1
    assert all(d > 0 for d in found)


def test_what_never_ends_or_keeps_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="for ever"):
        distances(Policy(daily=-1), HOUR_NS, NOW)
    with pytest.raises(UsageError, match="No rule"):
        distances(Policy(), HOUR_NS, NOW)
    with pytest.raises(UsageError, match="more than"):
        distances(Policy(within=Span.parse("1y")), SECOND, NOW)


def test_the_day_the_disk_is_full() -> None:
    today = datetime.date(2026, 11, 24)
    days = {today - datetime.timedelta(days=n): 100 for n in range(10)}
    found = trend(days, today, 1000, 30)
    assert (found.days, found.per_day_bytes) == (9, pytest.approx(1000 / 9))
    assert found.full == today + datetime.timedelta(days=9)
    assert trend({}, today, 1000, 30).full is None
    assert trend({today: 0}, today, 1000, 30).full is None
    old = {today - datetime.timedelta(days=200): 10**9, **days}
    assert trend(old, today, 1000, 30).per_day_bytes == pytest.approx(1000 / 30)


# --- a store with known change rates ---------------------------------------------------------------------------------------


class Life:
    """A machine that is captured every six hours for days on end: some blocks change each time, some once a day."""

    HOT, DAILY = 6, 4

    def __init__(self, path: Path) -> None:
        self.world = World(path, disks={"vda": FakeDisk(600 * BLOCK)}, kernel=CarelessKernel()).init()
        self.world.disks["vda"].write(0, self.noise(400))
        self.next = 400 * BLOCK

    def noise(self, blocks: int) -> bytes:
        """Half of it can't be compressed."""
        rng = self.world.rng
        return b"".join(rng.randbytes(BLOCK // 2) + bytes(BLOCK // 2) for _ in range(blocks))

    def live(self, days: int) -> None:
        disk, clock = self.world.disks["vda"], self.world.clock
        with self.world.opened() as store:
            self.world.capture(store)
            for step in range(1, 4 * days + 1):
                clock.now = 1_700_000_000 * SECOND + step * DAY_NS // 4
                disk.write(0, self.noise(self.HOT))
                if step % 4 == 0:
                    disk.write((10 + step) * BLOCK, self.noise(self.DAILY))
                self.world.capture(store)

    @property
    def session(self) -> Session:
        w = self.world
        return Session(Places(w.store_path, w.state_path, w.path / "conf", w.path / "run"))

    @property
    def now(self) -> Instant:
        return Instant(self.world.clock.now)


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        found = Life(Path(folder))
        found.live(12)
        yield found


def test_measured_rates_are_the_known_ones(life: Life) -> None:
    found = service.stats(life.session, [], life.now)
    [machine] = found.machines
    per_day = (4 * Life.HOT + Life.DAILY) * BLOCK
    assert machine.per_day(machine.costs.changed_bytes) == pytest.approx(per_day, rel=0.02)
    assert machine.per_day(machine.costs.stored_bytes) == pytest.approx(
        per_day / 2, rel=0.25
    )  # half is zeroes, and maps
    assert machine.size_bytes == 600 * BLOCK
    assert found.trend.days == 12
    assert 0 < found.trend.per_day_bytes < 40 * MIB
    shape = service.stats_shape(found)["machines"][0]
    assert shape["deduplication"] == 1.0
    assert shape["compression"] == pytest.approx(2, rel=0.25)
    assert shape["reduction"] == pytest.approx(1 - shape["stored_bytes"] / (49 * 600 * BLOCK), abs=0.001)


POLICIES = {
    "last": Policy(last=8),
    "six hours": Policy(hourly=10),
    "daily": Policy(daily=10),
    "mixed": Policy(last=3, hourly=6, daily=7, weekly=2),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_the_answer_is_what_really_is_stored(life: Life, ram: Path, policy: Policy) -> None:
    """The points that the rules keep are copied to a store of their own: that is what they take."""
    found = service.size(life.session, [], policy, 0, 0, life.now)
    world = life.world
    other, state = ram / "other", ram / "state"
    init(other, None, kernel=CarelessKernel())
    with world.opened(owner=False) as source, Store.open(other, state, kernel=CarelessKernel()) as target:
        points = list(source.points())
        chosen = plan([Candidate(p.id, p.t) for p in points], policy, {})
        kept = {d.key for d in chosen if d.keep}
        done = list(
            Copier(source, target, world.clock, random.Random(1)).copy(
                [p for p in points if p.id in kept], lambda *_: None
            )
        )
        assert all(r.point for r in done)
    really = sum(p.stat().st_size for p in other.rglob("*") if p.is_file())
    assert really <= found.total_bytes <= 1.35 * really
    assert found.needs[0].kept == len(kept)


def test_overwriting_the_same_blocks_costs_once_a_day_when_only_daily_points_are_kept(life: Life) -> None:
    """The known rates: a naive sum would count what is overwritten four times a day four times."""
    [n] = service.size(life.session, [], Policy(daily=10), 0, 0, life.now).needs
    assert n.measured.day_bytes == pytest.approx((Life.HOT + Life.DAILY) * BLOCK, rel=0.05)
    assert n.measured.changes[n.measured.interval_ns] == pytest.approx((Life.HOT + Life.DAILY / 4) * BLOCK, rel=0.02)
    assert n.measured.interval_ns == DAY_NS // 4


def test_a_machine_that_was_captured_once_is_refused_by_name(ram: Path) -> None:
    life = Life(ram)
    with life.world.opened() as store:
        life.world.capture(store)
    with pytest.raises(UsageError, match=rf"{MACHINE} has been captured once at most"):
        service.size(life.session, [], Policy(daily=10), 0, 0, life.now)
    assert service.stats(life.session, [MACHINE], life.now).machines[0].days == 0


def test_what_was_pruned_still_counts_as_measured(life: Life) -> None:
    before = service.stats(life.session, [], life.now).machines[0].costs
    aside = []
    try:
        for path in sorted((life.world.store_path / "points").glob("*/*"))[:-2]:
            aside.append(path)
            path.rename(life.world.path / path.name)
        assert service.stats(life.session, [], life.now).machines[0].costs.changed_bytes == before.changed_bytes
    finally:
        for path in aside:
            (life.world.path / path.name).rename(path)
