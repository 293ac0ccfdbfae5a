"""Figures of stores and machines, for metrics and the console: what is slow to know is looked up rarely, in the background."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvbackup import __version__, metrics
from hvbackup.daemon import tasks
from hvbackup.daemon.keeper import Keeper
from hvbackup.daemon.rows import Row, Standing
from hvbackup.errors import HvbackupError
from hvbackup.jobs import State
from hvbackup.metrics import MachineSample, ServiceSample, StoreSample
from hvbackup.model import SECOND

SLOW_SECONDS = 300.0  # between two looks at what a store's files take and how it grows
KINDS = ("packs", "journals", "points", "runs")
CHECKS = ("check", "deep check")
GROWTH = """
SELECT day, sum(changed_bytes)::BIGINT, sum(new_bytes)::BIGINT, sum(stored_bytes)::BIGINT FROM growth GROUP BY day ORDER BY day
"""


@dataclass(slots=True)
class Slow:
    """What is looked up rarely."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    growth: list[list[Any]] = field(default_factory=list)  # day, changed, new, stored bytes
    looked: float = -1e9
    thread: threading.Thread | None = None

    @property
    def reduction(self) -> float | None:
        """How many times larger what was captured is than what it takes."""
        stored, changed = sum(r[3] or 0 for r in self.growth), sum(r[1] or 0 for r in self.growth)
        return round(changed / stored, 2) if stored else None

    @property
    def per_day_bytes(self) -> float:
        """How much the store grew on each of its last 14 days that have any."""
        recent = [r[3] or 0 for r in self.growth[-14:]]
        return sum(recent) / len(recent) if recent else 0.0


@dataclass(slots=True)
class Figures:
    """The slow figures of every store.  Thread safety: any thread."""

    _of: dict[str, Slow] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, keeper: Keeper, name: str) -> Slow:
        """What is known; a look is begun when it is due."""
        with self._lock:
            slow = self._of.setdefault(str(keeper.stores[name].session.places.store), Slow())
            idle = slow.thread is None or not slow.thread.is_alive()
            if idle and time.monotonic() - slow.looked > SLOW_SECONDS:
                slow.looked = time.monotonic()
                slow.thread = threading.Thread(target=_look, args=(keeper, name, slow), daemon=True)
                slow.thread.start()
            return slow


def _look(keeper: Keeper, name: str, slow: Slow) -> None:
    store = keeper.stores[name].session.places.store
    slow.sizes = {kind: _room(store / kind) for kind in KINDS}
    try:
        slow.growth = keeper.questions.ask("sql", *keeper.store_words(name), "--", GROWTH)["rows"]
    except (HvbackupError, OSError):  # another process has the catalog, or there is no room for it: next time
        slow.looked = time.monotonic() - SLOW_SECONDS + 30


def _room(folder: Path) -> int:
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(at, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


RUN_STATUS = {State.DONE: 0, State.DEGRADED: 1, State.FAILED: 2}
figures = Figures()  # of this process's stores, by their paths


def store_shape(keeper: Keeper, name: str) -> dict[str, Any]:
    """A store as JSON."""
    opened = keeper.stores[name]
    slow = figures.of(keeper, name)
    path = opened.session.places.store
    try:
        found = os.statvfs(path)
        free, whole = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    except OSError:
        free = whole = 0
    growth = slow.per_day_bytes
    return {
        "name": name,
        "path": str(path),
        "error": opened.error or None,
        "machines": len(opened.estate.all()) if opened.estate else 0,
        "points": sum(len(k.times) for k in opened.estate.all()) if opened.estate else 0,
        "bytes": dict(slow.sizes),
        "free_bytes": free,
        "size_bytes": whole,
        "reduction": slow.reduction,
        "growth_bytes_per_day": round(growth),
        "days_until_full": round(free / growth, 1) if growth > 0 else None,
        "growth": [
            {"day": str(d), "changed_bytes": c or 0, "new_bytes": n or 0, "stored_bytes": s or 0}
            for d, c, n, s in slow.growth[-90:]
        ],
    }


def exposition(keeper: Keeper) -> str:
    """The answer to a scrape."""
    service = ServiceSample(
        __version__, {str(s): 0 for s in State} | _counted(str(j.state) for j in keeper.jobs.all()),
        _counted(a.key.partition(":")[0] for a in keeper.alarms),
        {n: not a.error for n, a in keeper.discovery.sources.items()},
    )  # fmt: skip
    stores = [_store_sample(keeper, name) for name in keeper.stores]
    return metrics.exposition(service, stores, [_sample(keeper, r) for r in keeper.rows()])


def _store_sample(keeper: Keeper, name: str) -> StoreSample:
    slow = figures.of(keeper, name)
    found, age = _newest_check(keeper, name)
    damaged = len(found["problems"]) if found else None
    return StoreSample(name, dict(slow.sizes), _free(keeper, name), age, found.get("debt_bytes"), damaged)


def _newest_check(keeper: Keeper, store: str) -> tuple[Mapping[str, Any], float | None]:
    """What the newest check that came to an end has found, good or bad, and how long ago it began."""
    for job in keeper.jobs.of(store):
        said = keeper.jobs.answer(job.id) if job.task.kind in CHECKS and not job.state.is_open else None
        if isinstance(said, dict) and "problems" in said:
            return said, (keeper.clock() - job.began) / SECOND
    return {}, None


def _free(keeper: Keeper, name: str) -> int | None:
    try:
        found = os.statvfs(keeper.stores[name].session.places.store)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _sample(keeper: Keeper, r: Row) -> MachineSample:
    history, drill = tasks.past_of(keeper.jobs, r.id, "backup"), tasks.past_of(keeper.jobs, r.id, "drill")
    status = RUN_STATUS[history.state] if history.state else None
    lag = max(0.0, (keeper.clock() - r.note.newest) / SECOND) if r.note and r.note.newest else None
    return MachineSample(
        r.id, r.name, r.points, r.known.age_seconds(keeper.clock()) if r.known else None, r.rpo_seconds, lag,
        r.known.journal_bytes if r.known and r.known.journal_bytes else None,
        bool(r.note and not r.note.trouble) if r.continuous else None, r.standing is Standing.PAUSED,
        r.standing is not Standing.UNPROTECTED, history.last_run_ns / SECOND if history.last_run_ns else None, status,
        (keeper.clock() - drill.past.succeeded) / SECOND if drill.past.succeeded else None,
        drill.last_run_ns / SECOND if drill.last_run_ns else None,
    )  # fmt: skip


def _counted(words: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return found
