"""Points made of moments while a life goes on, and room made in the journal by what they cover.

The hypervisor is not read for it: a point is folded from the newest point and the journal.  A segment goes only when a point
holds what it holds, and its window has passed or the budget needs its room.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from hvbackup import memory
from hvbackup.errors import HvbackupError, Interrupted, NotFound, StoreDamage, trace
from hvbackup.fold import fold
from hvbackup.model import SECOND, DiskId, Instant, Outcome, Token
from hvbackup.protect.events import ContinuityLost, Folded, Trouble
from hvbackup.protect.marks import Mark
from hvbackup.protect.setting import Setting
from hvbackup.store.journal.history import Moment
from hvbackup.store.journal.merging import merge
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.window import check_budget, trim

FOLD_AT = 0.8  # of the budget: a point is made early, so that what it covers may go
FOLD_AGAIN_NS = 60 * SECOND  # after one that failed
TRIM_TO = 0.5  # of the budget: so much stays then, or there would be a point at every cycle from here on


class Recorded(Protocol):
    """What has been recorded until now."""

    recorder: Recorder
    newest: Moment
    tokens: Mapping[DiskId, Token]

    def name_tokens(self) -> None:
        """The newest moment names the tokens."""


class Points:
    """The points of one life.  Thread safety: one thread."""

    def __init__(self, setting: Setting, since: Instant) -> None:
        self._set = setting
        self._folded = since  # the time of the moment that was folded last
        self._again = Instant(0)  # a moment as late as this, after a point that could not be made
        self._folding: threading.Thread | None = None
        self._wanted: list[tuple[Moment, Mark]] = []  # points that somebody waits for
        self.tokens: Sequence[Token] = ()  # what the point that is being made will name

    def want(self, moment: Moment, mark: Mark) -> None:
        """A point is to be made of a moment."""
        self._wanted.append((moment, mark))

    def keep_up(self, life: Recorded) -> None:
        """A point is being made if one is due; the journal is within its budget, or SpaceExhausted is raised.

        Raises ContinuityLost when none can be made of what there is.
        """
        if self._set.damaged:
            raise ContinuityLost(
                f"The journal of machine {self._set.machine.name} is damaged, and no point can be made of it: "
                "one is made of the machine itself"
            )
        if self._folding and self._folding.is_alive() and not self._set.is_full():
            return
        self.join()  # the budget is a promise: the next moment waits for room
        if self._set.is_full():
            self.make_room(self.prepare(life))
        elif self._wanted:
            wanted, self._wanted = self._wanted, []
            if wanted[-1][0] == life.newest:
                self.prepare(life)
            self._begin(self._fold_wanted, wanted)
        elif self._is_due(life.newest.t):
            self._begin(self._fold, self.prepare(life))

    def _is_due(self, now: Instant) -> bool:
        if 0 < self._again - now <= FOLD_AGAIN_NS:
            return False
        since = now - self._folded  # less than nothing: the clock was set back
        return self._set.is_full(FOLD_AT) or not 0 <= since < self._set.rhythm.fold_every_ns

    def _begin(self, work: Callable[[Any], None], what: object) -> None:
        self._folding = threading.Thread(target=work, args=(what,), name="hvbackup-fold")
        self._folding.start()

    def _fold_wanted(self, wanted: Sequence[tuple[Moment, Mark]]) -> None:
        for moment, mark in wanted:
            mark.fold(lambda moment=moment: self._told(moment))  # type: ignore[misc]

    def _told(self, moment: Moment) -> Outcome:
        outcome, folded = self._made(moment)
        self._set.report(folded)
        return outcome

    def join(self) -> None:
        """No point is being made when this returns."""
        if self._folding:
            self._folding.join()

    def make_room(self, moment: Moment) -> None:
        """The journal is within its budget, or SpaceExhausted is raised: what no point covers never goes."""
        self.cover(moment)
        self._check_budget(covered=True)

    def cover(self, moment: Moment) -> None:
        """A point holds the newest moment, or the journal is within its budget without it, or SpaceExhausted is raised.

        The segment of that moment stays until another one begins, however large it is: a life that begins makes room soon.
        """
        try:
            self._set.report(self.fold(moment))
        except Interrupted:
            raise
        except HvbackupError as e:  # what earlier points cover may be room enough
            self._failed(moment, e)
            with contextlib.suppress(HvbackupError):
                self._set.sealing.finish()  # what waits to be sealed becomes smaller
            self.trim()
            self._check_budget(covered=False)

    def prepare(self, life: Recorded) -> Moment:
        """The newest moment ends a segment, so that a point and the facts behind it never share one."""
        life.name_tokens()
        life.recorder.rotate()
        self._folded, self.tokens = life.newest.t, list(life.tokens.values())
        return life.newest

    def _fold(self, moment: Moment) -> None:
        try:
            self._set.report(self.fold(moment))
        except Interrupted:
            self._try_again(moment)
        except HvbackupError as e:
            self._failed(moment, e)
        except Exception as e:  # noqa: BLE001 - of a thread of its own: nobody else would say it, or try again
            trace(e)
            self._failed(moment, HvbackupError(f"No point could be made: {type(e).__name__}: {e}"))

    def _failed(self, moment: Moment, error: HvbackupError) -> None:
        self._try_again(moment)
        self._set.report(Trouble(error, FOLD_AGAIN_NS / SECOND))

    def _try_again(self, moment: Moment) -> None:
        self._again = Instant(moment.t + FOLD_AGAIN_NS)
        self._folded = Instant(moment.t - self._set.rhythm.fold_every_ns)  # it is due then

    def fold(self, moment: Moment) -> Folded:
        """A point of the moment exists when this returns, and what need not be kept is gone; the hypervisor is not read."""
        return self._made(moment)[1]

    def _made(self, moment: Moment) -> tuple[Outcome, Folded]:
        began, s = time.monotonic(), self._set
        s.sealing.reach(moment.seq)
        try:
            with s.writing:
                outcome = fold(s.store, s.machine.id, moment, s.options)
        except (NotFound, StoreDamage):
            s.damaged = True
            raise
        point = outcome.point
        assert point is not None  # every other way out of `fold` raises
        removed = self.trim()
        merge(s.store, s.machine.id)
        s.store.chunks.forget()
        memory.give_back()
        return outcome, Folded(point, time.monotonic() - began, removed)

    def trim(self) -> int:
        """What points cover and need not be kept is gone; how many bytes."""
        s = self._set
        limits = s.rhythm.limits
        if s.is_full(FOLD_AT):
            limits = replace(limits, budget_bytes=int(limits.budget_bytes * TRIM_TO))
        return trim(s.store, s.machine.id, limits, by_age=not s.steps.any)

    def _check_budget(self, *, covered: bool) -> None:
        s = self._set
        check_budget(s.store, s.machine.id, s.rhythm.limits, by_age=not s.steps.any, covered=covered)
