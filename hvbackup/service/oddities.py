"""What the store's records say of machines besides their points: drills, and what is odd.  Read once, and then only what is new.

tracker     a hypervisor called blocks unchanged that had changed: the disk was compared whole
change      much more changed, for the time it took, than usual: a new load, an update, or somebody who encrypts
"""

from __future__ import annotations

import itertools
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from hvbackup.model import SECOND, MiB
from hvbackup.store.format.runs import Record
from hvbackup.store.store import Store

READ_MAX = 20_000  # of the newest records of each writer, at the first look
USUAL = 20  # captures that say what is usual
FEW = 6  # too few to say
RISE = 10.0  # times as fast as usual
RISE_MIN_BYTES = 64 * MiB
KEPT = 500  # of a machine


@dataclass(frozen=True, slots=True)
class Drill:
    """A rehearsed recovery."""

    t: int  # when it was made
    moment: int  # what was recovered
    at: str
    seconds: float
    error: str


@dataclass(frozen=True, slots=True)
class Oddity:
    """Something that somebody should look at."""

    t: int
    kind: str
    text: str


@dataclass(slots=True)
class _Told:
    """Of one machine."""

    drills: list[Drill] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    changed: list[tuple[int, int]] = field(default_factory=list)  # time and bytes of its newest captures


@dataclass(slots=True)
class Oddities:
    """Of all machines of one store.  Thread safety: any thread."""

    store: Store
    _of: dict[str, _Told] = field(default_factory=dict)
    _seen: dict[str, str] = field(default_factory=dict)  # writer -> its newest record that was read
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, machine: str) -> tuple[Sequence[Drill], Sequence[Oddity]]:
        """Everything that is told of a machine, oldest first."""
        with self._lock:
            for record in self.store.runs.after(self._seen, READ_MAX):
                self._take(record)
            told = self._of.get(machine, _Told())
            return list(told.drills), list(told.oddities)

    def _take(self, record: Record) -> None:
        _, writer, name = record.path.split("/")
        self._seen[writer] = max(self._seen.get(writer, ""), name)
        value = record.value
        machine, kind = str(value.get("machine", "")), value.get("kind")
        if not machine or kind not in ("drill", "capture", "fold"):
            return
        told, t = self._of.setdefault(machine, _Told()), int(value["t"])
        if kind == "drill":
            found = (int(value["moment"]), str(value["at"]), float(value["seconds"]), str(value["error"]))
            told.drills = [*told.drills, Drill(t, *found)][-KEPT:]
            return
        if value.get("distrusted"):
            odd = Oddity(
                t, "tracker", "blocks the hypervisor called unchanged had changed; the disks were compared whole"
            )
            told.oddities.append(odd)
        told.changed = [*told.changed, (t, int(value.get("figures", {}).get("changed_bytes", 0)))][-USUAL - 2 :]
        if odd_ := rise(told.changed):
            told.oddities.append(odd_)
        del told.oddities[:-KEPT]


def rise(captures: Sequence[tuple[int, int]]) -> Oddity | None:
    """Whether the newest of some captures (time, changed bytes; oldest first) is out of the ordinary.  Pure."""
    rates = [n / max(1, t - before) for (before, _), (t, n) in itertools.pairwise(captures)]
    if len(rates) <= FEW or captures[-1][1] < RISE_MIN_BYTES:
        return None
    usual = statistics.median(rates[:-1])
    if rates[-1] <= RISE * usual:
        return None
    times = f"{rates[-1] / usual:.0f} times as fast as usual" if usual else "where nothing does usually"
    t, n = captures[-1]
    return Oddity(t, "change", f"{n / MiB:.0f} MiB changed in {(t - captures[-2][0]) / SECOND:.0f} s, {times}")
