"""Several machines at one moment: all stop, each takes its moment, all go on.

Each machine's life is on a thread of its own, so they meet: everybody waits until all have got as far, for a bounded time, and
whoever is late is left out.  An application that is spread over the machines so has moments in common: what one of them had
answered for before another could depend on it is there wherever the other's is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hvbackup.model import Instant, MachineId

READY_SECONDS = 10.0  # a cycle that is under way ends first
STOPPED_SECONDS = 1.0  # nobody's machine stands still for longer because of another one
LATE = "it did not answer in time"


@dataclass(frozen=True, slots=True)
class Met:
    """What became of a meeting."""

    id: str
    group: str
    times: Mapping[MachineId, Instant]  # of those that have the moment in common
    left_out: Mapping[MachineId, str]  # of the others, why

    @property
    def spread_ms(self) -> float:
        """Between the first machine's moment and the last one's; none of them wrote anything meanwhile."""
        return round((max(self.times.values()) - min(self.times.values())) / 1e6, 3) if self.times else 0.0

    def common(self, machine: MachineId) -> dict[str, object]:
        """What the barrier of a machine says of the moment; nothing where it is not common."""
        if machine not in self.times or len(self.times) < 2:
            return {}
        common = {"id": self.id, "group": self.group, "machines": sorted(self.times), "spread_ms": self.spread_ms}
        return {**common, "left_out": dict(self.left_out)}


class Meeting:
    """One moment of several machines.  Thread safety: any thread."""

    def __init__(self, id_: str, group: str, members: Collection[MachineId]) -> None:
        self._id, self._group = id_, group
        self._expected = set(members)
        self._reached: list[set[MachineId]] = [set(), set(), set()]  # ready, standing, switched
        self._closed = [False, False, False]
        self._times: dict[MachineId, Instant] = {}
        self._left_out: dict[MachineId, str] = {}
        self._changed = threading.Condition()

    def seat(self, machine: MachineId) -> MachineSeat:
        """The place of one machine."""
        return MachineSeat(self, machine)

    def leave(self, machine: MachineId, why: str) -> None:
        """The others need not wait for this machine."""
        with self._changed:
            if machine in self._expected and machine not in self._times:
                self._expected.discard(machine)
                self._left_out[machine] = why
                self._changed.notify_all()

    def reach(self, step: int, machine: MachineId, seconds: float, t: Instant | None = None) -> bool:
        """Wait until everybody has got as far as this machine has; False when they went on without it."""
        end = time.monotonic() + seconds
        with self._changed:
            if machine not in self._expected or self._closed[step]:
                return False
            self._reached[step].add(machine)
            if t is not None:
                self._times[machine] = t
            self._changed.notify_all()
            while not self._closed[step] and not self._expected <= self._reached[step]:
                if not self._changed.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                    break
            self._close(step)
            return machine in self._expected

    def _close(self, step: int) -> None:
        """Whoever is not there yet is left out."""
        if not self._closed[step]:
            self._closed[step] = True
            self._left_out.update(dict.fromkeys(self._expected - self._reached[step], LATE))
            self._expected &= self._reached[step]
            self._changed.notify_all()

    def result(self) -> Met:
        """What became of it, once everybody has switched or left."""
        with self._changed:
            times = {m: t for m, t in self._times.items() if m in self._expected} if self._closed[2] else {}
            return Met(self._id, self._group, times, dict(self._left_out))


class MachineSeat:
    """One machine's place; see `hypervisors.Seat`.  Thread safety: the machine's thread."""

    def __init__(self, meeting: Meeting, machine: MachineId) -> None:
        self._meeting, self._machine = meeting, machine

    def ready(self) -> bool:
        """This machine is about to stop."""
        return self._meeting.reach(0, self._machine, READY_SECONDS)

    def standing(self) -> bool:
        """It has stopped."""
        return self._meeting.reach(1, self._machine, STOPPED_SECONDS)

    def switched(self, t: Instant) -> bool:
        """Its moment is taken."""
        return self._meeting.reach(2, self._machine, STOPPED_SECONDS, t)

    def leave(self, why: str) -> None:
        """It takes no part."""
        self._meeting.leave(self._machine, why)

    def common(self) -> dict[str, object]:
        """What the barrier of this machine says of the moment."""
        return self._meeting.result().common(self._machine)
