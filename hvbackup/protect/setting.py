"""What all lives of one machine's protection have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from hvbackup.capture import Options
from hvbackup.hypervisors import Hypervisor
from hvbackup.leases import Leases
from hvbackup.model import DiskId, Instant, Machine, Token
from hvbackup.protect.events import Event, Rhythm
from hvbackup.protect.marks import Marks
from hvbackup.protect.meeting import MachineSeat
from hvbackup.store.journal.recorder import Recorder, Steps
from hvbackup.store.journal.sealing import Sealing
from hvbackup.store.journal.window import journal_bytes
from hvbackup.store.store import Store


@dataclass(frozen=True, slots=True)
class Untold:
    """A doubt that could not be written down, and the tokens that prove nothing, in this epoch of the journal."""

    doubt: dict[str, object]
    tokens: Mapping[DiskId, Token] | None
    epoch: int


@dataclass(slots=True)
class Setting:
    """One machine under protection.  `writing` is held while chunks or points are written."""

    store: Store
    hypervisor: Hypervisor
    machine: Machine  # as it was seen last
    options: Options
    rhythm: Rhythm
    report: Callable[[Event], None]
    writing: AbstractContextManager[object]
    leases: Leases
    marks: Marks = field(default_factory=Marks)
    seat: MachineSeat | None = None  # the next moment is to be one with other machines
    left: int | None = None  # bytes that changed behind the newest point, where the journal had no room for them
    damaged: bool = False  # no point could be made of the newest one and the journal: something of them can't be read
    untold: Untold | None = None
    sealing: Sealing = field(init=False)
    steps: Steps = field(init=False)  # of the clock, since we run

    def __post_init__(self) -> None:
        """Logs that one life leaves are sealed during the next, or while none is."""
        self.steps = Steps(lambda: self.options.clock())
        self.sealing = Sealing(self.store, self.machine.id, self.rhythm.limits.budget_bytes)

    def tell_doubt(
        self, recorder: Recorder, t: Instant, tokens: Mapping[DiskId, Token] | None, doubt: dict[str, object]
    ) -> int:
        """No moment of the doubt is offered when this returns the number of the barrier that tells it.

        Where it can't be written the next life begins with it, before anything else is believed.
        """
        self.keep_doubt(doubt, tokens, recorder.epoch)
        seq = recorder.barrier(t, tokens, doubt=doubt)
        self.untold = None
        return seq

    def keep_doubt(self, doubt: dict[str, object], tokens: Mapping[DiskId, Token] | None, epoch: int) -> None:
        """The next life begins with it."""
        self.untold = Untold(doubt, tokens, epoch)

    def take_seat(self) -> MachineSeat | None:
        """The place at a common moment, for the moment that is made now."""
        seat, self.seat = self.seat, None
        return seat

    def sizes(self) -> dict[DiskId, int]:
        """The machine's disks."""
        return {d.id: d.size for d in self.machine.disks}

    def is_full(self, share: float = 1.0) -> bool:
        """Whether the journal has used that share of its budget."""
        budget = self.rhythm.limits.budget_bytes
        return bool(budget) and journal_bytes(self.store, self.machine.id) > budget * share

    def room(self) -> int:
        """How much of its budget the journal has left; plenty where it has none."""
        budget = self.rhythm.limits.budget_bytes
        return max(0, budget - journal_bytes(self.store, self.machine.id)) if budget else sys.maxsize
