"""stats, size: what each machine costs, how the store grows, and what a policy would need.

Costs come from the catalog: run records stay when points are pruned, so what was measured is not forgotten with them.  What
differs between points that are far apart comes from their maps, which share what did not change.
"""

from __future__ import annotations

import datetime
import itertools
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvbackup.errors import StoreDamage, UsageError
from hvbackup.model import SECOND, Instant, RecoveryPoint
from hvbackup.service.inventory import History, Inventory, history_of, inventory
from hvbackup.service.look import used_bytes
from hvbackup.service.session import Session
from hvbackup.service.sizing import DAY_NS, Measured, Need, Trend, need, trend
from hvbackup.store.catalog.catalog import Catalog
from hvbackup.store.format.blockmap import BlockMap
from hvbackup.store.keep.retention import Policy
from hvbackup.store.store import Store

DAYS = 30  # looked back
DISTANCES_DAYS = (1, 7, 30)  # at which maps are compared, as far as there are points
PAIRS_MAX = 3  # compared at each distance
COMPARE_SECONDS = 20.0  # for one machine; then it is done with what it has
NEAR = 0.15  # a pair of points counts for a distance when it differs by no more than this part from it

COSTS = """
WITH r AS (
  SELECT r.machine, r.time, r.stored_bytes, coalesce(r.changed_bytes, p.changed_bytes) AS changed_bytes,
         coalesce(r.new_bytes, p.new_bytes) AS new_bytes, row_number() OVER (PARTITION BY r.machine ORDER BY r.time) AS n
  FROM runs r LEFT JOIN points p ON p.id = r.point WHERE r.kind IN ('capture', 'fold', 'copy') AND r.point IS NOT NULL),
later AS (
  SELECT machine, count(*) AS runs, sum(changed_bytes)::BIGINT AS changed, sum(new_bytes)::BIGINT AS new,
         sum(stored_bytes)::BIGINT AS stored
  FROM r WHERE n > 1 AND epoch_us(time) >= {since} GROUP BY machine),
first AS (SELECT machine, changed_bytes, stored_bytes FROM r WHERE n = 1),
j AS (
  SELECT machine, sum(bytes)::BIGINT AS bytes, sum(epoch_us(newest) - epoch_us(oldest))::BIGINT AS us
  FROM segments GROUP BY machine)
SELECT first.machine, coalesce(runs, 0), coalesce(changed, 0), coalesce(new, 0), coalesce(stored, 0), first.changed_bytes,
       first.stored_bytes, j.bytes, j.us
FROM first LEFT JOIN later USING (machine) LEFT JOIN j USING (machine)
"""
GROWTH = """
SELECT (time AT TIME ZONE 'UTC')::DATE AS day, sum(stored_bytes)::BIGINT FROM runs
WHERE stored_bytes IS NOT NULL GROUP BY day ORDER BY day
"""


@dataclass(frozen=True, slots=True)
class Costs:
    """What the captures of one machine brought, as run records have it."""

    runs: int = 0  # within the days that were looked at, without the first of all
    changed_bytes: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0
    first_changed_bytes: int = 0
    first_stored_bytes: int = 0
    journal_bytes: int | None = None
    journal_us: int = 0


@dataclass(frozen=True, slots=True)
class MachineStats:
    """One machine."""

    history: History
    costs: Costs
    days: float  # that the costs are of

    @property
    def size_bytes(self) -> int:
        """Of its disks now."""
        return sum(d.disk.size for d in self.history.points[-1].disks)

    @property
    def full_copies_bytes(self) -> int:
        """What a full copy for each of its points would take."""
        return sum(d.disk.size for p in self.history.points for d in p.disks)

    def per_day(self, amount: int) -> float:
        """An amount of the costs, for each day."""
        return amount / self.days if self.days else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """The store and its machines."""

    machines: Sequence[MachineStats]
    used_bytes: int
    free_bytes: int
    trend: Trend
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Sized:
    """What a policy needs."""

    needs: Sequence[Need]
    used_bytes: int
    free_bytes: int
    trend: Trend
    notes: Sequence[str] = ()

    @property
    def total_bytes(self) -> int:
        """Of all machines, with the margin."""
        return sum(n.total_bytes for n in self.needs)


def stats(session: Session, machines: Sequence[str], now: Instant, days: int = DAYS) -> Stats:
    """What each machine costs and how the store grows.  Raises NotFound, UsageError, Busy."""
    with session.open() as store:
        chosen, costs, growth, notes = _known(store, machines, now, days)
        found = [MachineStats(h, costs.get(h.machine.id, Costs()), _days(h, now, days)) for h in chosen]
        used, free = _room(session)
        return Stats(found, used, free, trend(growth, _day(now), free, days), notes)


def size(
    session: Session, machines: Sequence[str], policy: Policy, window_ns: int, every_ns: int, now: Instant
) -> Sized:
    """What the policy would need.  `every_ns`: between two captures; 0: as now.  Raises NotFound, UsageError, Busy."""
    with session.open() as store:
        chosen, costs, growth, notes = _known(store, machines, now, DAYS)
        needs = []
        for history in chosen:
            measured = _measured(store, history, costs.get(history.machine.id, Costs()))
            needs.append(need(replace(measured, interval_ns=every_ns or measured.interval_ns), policy, window_ns, now))
        used, free = _room(session)
        notes = [*notes, *(note for n in needs for note in n.notes)]
        return Sized(needs, used, free, trend(growth, _day(now), free, DAYS), notes)


def _known(
    store: Store, machines: Sequence[str], now: Instant, days: int
) -> tuple[list[History], dict[str, Costs], Mapping[datetime.date, int], list[str]]:
    found = inventory(store) if not machines else Inventory([history_of(store, name) for name in machines])
    chosen = found.machines
    catalog = Catalog(store.state)
    notes = [*found.notes, *catalog.reconcile(store)]
    since = (now - days * DAY_NS) // 1000
    rows = catalog.query(COSTS.format(since=since))[1]
    costs = {row[0]: Costs(*[v or 0 for v in row[1:7]], *[row[7], row[8] or 0]) for row in rows}
    growth = {datetime.date.fromisoformat(day): n for day, n in catalog.query(GROWTH)[1]}
    return list(chosen), costs, growth, notes


def _day(now: Instant) -> datetime.date:
    return datetime.datetime.fromtimestamp(now // SECOND, datetime.UTC).date()


def _days(history: History, now: Instant, days: int) -> float:
    """How long the costs are of: from the first point, or as far back as was looked, to the newest."""
    since = max(history.points[0].t, now - days * DAY_NS)
    return max(0, history.points[-1].t - since) / DAY_NS


def _room(session: Session) -> tuple[int, int]:
    """(bytes that the store takes, bytes that are free on its disk)."""
    return used_bytes(session.places.store), shutil.disk_usage(session.places.store).free


# -- measuring -------------------------------------------------------------------------------------------------------------


def _measured(store: Store, history: History, costs: Costs) -> Measured:
    """Raises UsageError when there is nothing to measure yet."""
    points = list(history.points)
    if len(points) < 2 or not costs.runs:
        raise UsageError(
            f"{history.machine.name} has been captured once at most: what changes can be told from the second point on"
        )
    gaps = [b.t - a.t for a, b in itertools.pairwise(points)]
    interval = max(1, int(statistics.median(gaps)))
    first = costs.first_stored_bytes / costs.first_changed_bytes if costs.first_changed_bytes else 1.0
    share = costs.stored_bytes / costs.changed_bytes if costs.changed_bytes else first
    changes = {interval: costs.changed_bytes / costs.runs, **_distant(store, points, interval)}
    journal = (
        costs.journal_bytes * DAY_NS / 1000 / costs.journal_us if costs.journal_bytes and costs.journal_us else None
    )
    name, data = history.machine.name, _data_bytes(store, points[-1])
    return Measured(history.machine.id, name, len(points), interval, data, first, share, changes, journal)


def _data_bytes(store: Store, point: RecoveryPoint) -> int:
    """Of all disks, blocks that are not zero."""
    found = 0
    for root in point.disks:
        try:
            found += sum(int(ids.any(axis=1).sum()) * store.block for _, ids in store.view(root).leaves())
        except StoreDamage:
            found += root.disk.size
    return found


def _distant(store: Store, points: Sequence[RecoveryPoint], interval: int) -> dict[int, float]:
    """What differs at each distance of more than one interval at which there are points."""
    until = time.monotonic() + COMPARE_SECONDS
    found = {}
    for days in DISTANCES_DAYS:
        distance = days * DAY_NS
        amounts = []
        for old, new in _pairs(points, distance) if distance > interval * (1 + NEAR) else ():
            if time.monotonic() < until:
                amounts += [n * distance / (new.t - old.t) for n in _differing(store, old, new)]
        if amounts:
            found[distance] = statistics.mean(amounts)
    return found


def _pairs(points: Sequence[RecoveryPoint], distance: int) -> list[tuple[RecoveryPoint, RecoveryPoint]]:
    """The newest pairs of points about so far apart, one after the other."""
    found: list[tuple[RecoveryPoint, RecoveryPoint]] = []
    new = points[-1]
    for point in reversed(points[:-1]):
        if len(found) == PAIRS_MAX:
            break
        if abs(new.t - point.t - distance) <= distance * NEAR:
            found.append((point, new))
            new = point
    return found


def _differing(store: Store, old: RecoveryPoint, new: RecoveryPoint) -> list[int]:
    """[bytes in blocks that differ between two points], or nothing where a map can't be read."""
    total = 0
    for root in new.disks:
        before = old.disk(root.disk.id)
        try:
            mine = store.view(root).map
            other = store.view(before).map if before else BlockMap(type(root.root)(bytes(32)), 0, store.chunks.page)
            total += len(mine.diff(other)) * store.block
        except StoreDamage:
            return []
    return [total]


# -- shapes ----------------------------------------------------------------------------------------------------------------


def _trend_shape(t: Trend) -> dict[str, Any]:
    full = t.full.isoformat() if t.full else None
    return {"stored_bytes_per_day": round(t.per_day_bytes), "days": t.days, "full": full}


def stats_shape(found: Stats) -> dict[str, Any]:
    """`stats` as JSON."""
    return {
        "machines": [_machine_shape(m) for m in found.machines],
        "used_bytes": found.used_bytes,
        "free_bytes": found.free_bytes,
        "growth": _trend_shape(found.trend),
        "notes": list(found.notes),
    }


def _machine_shape(m: MachineStats) -> dict[str, Any]:
    c = m.costs
    return {
        "machine": {"id": m.history.machine.id, "name": m.history.machine.name},
        "points": len(m.history.points),
        "size_bytes": m.size_bytes,
        "days": round(m.days, 3),
        "changed_bytes_per_day": round(m.per_day(c.changed_bytes)),
        "new_bytes_per_day": round(m.per_day(c.new_bytes)),
        "stored_bytes_per_day": round(m.per_day(c.stored_bytes)),
        "stored_bytes": c.first_stored_bytes + c.stored_bytes,
        "deduplication": ratio(c.changed_bytes + c.first_changed_bytes, c.new_bytes + c.first_changed_bytes),
        "compression": ratio(c.new_bytes, c.stored_bytes),
        "reduction": reduction(m),
        "journal_bytes": c.journal_bytes,
    }


def ratio(a: int, b: int) -> float | None:
    """How many times b is in a."""
    return round(a / b, 2) if b else None


def reduction(m: MachineStats) -> float | None:
    """Which part of full copies is not stored."""
    stored = m.costs.first_stored_bytes + m.costs.stored_bytes
    return round(1 - stored / m.full_copies_bytes, 4) if m.full_copies_bytes else None


def sized_shape(found: Sized) -> dict[str, Any]:
    """`size` as JSON."""
    return {
        "machines": [
            {
                "machine": {"id": n.measured.machine, "name": n.measured.name},
                "every_seconds": n.measured.interval_ns / SECOND,
                "points": n.kept,
                "data_bytes": n.measured.data_bytes,
                "changed_bytes_per_day": round(n.measured.day_bytes),
                "reduction": round(1 - n.measured.share, 4),
                "base_bytes": n.base_bytes,
                "points_bytes": n.points_bytes,
                "journal_bytes": n.journal_bytes,
                "total_bytes": n.total_bytes,
            }
            for n in found.needs
        ],
        "total_bytes": found.total_bytes,
        "used_bytes": found.used_bytes,
        "free_bytes": found.free_bytes,
        "fits": found.total_bytes <= found.used_bytes + found.free_bytes,
        "growth": _trend_shape(found.trend),
        "notes": list(found.notes),
    }
