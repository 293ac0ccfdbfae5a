"""Protection of one machine: one life after the other, until told to end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from hvbackup.capture import Options, Progress
from hvbackup.errors import Busy, HostUnreachable, HvbackupError, Interrupted, SpaceExhausted, StoreDamage, trace
from hvbackup.hypervisors import Hypervisor
from hvbackup.leases import Leases
from hvbackup.model import SECOND, Consistency, Machine
from hvbackup.protect import beginning
from hvbackup.protect.events import ContinuityLost, Event, JournalStalled, Paused, Rhythm, TooBusy, Trouble
from hvbackup.protect.life import Life
from hvbackup.protect.marks import Mark
from hvbackup.protect.meeting import Meeting
from hvbackup.protect.setting import Setting
from hvbackup.store.shelves import pauses
from hvbackup.store.shelves.pauses import Pause
from hvbackup.store.store import Store

BACKOFF_SECONDS = (1, 2, 5, 10, 30, 60)  # between lives, while the host does not answer
STEADY_SECONDS = 5.0  # a life that lasts as long begins the count anew
IDLE_TIMES = 4  # as long as an attempt took a machine is left alone that writes too much for its journal
LOOK_SECONDS = 1.0  # for the end of a pause
PASSING = (HostUnreachable, ContinuityLost, Busy, SpaceExhausted, JournalStalled, StoreDamage)  # by itself, perhaps


class Protection:
    """Protects one machine until it is told to end.

    Thread safety: `run` on one thread; `mark` and `end` from any.  `writing` is held while chunks or points are written.
    """

    def __init__(
        self,
        store: Store,
        hypervisor: Hypervisor,
        machine: Machine,
        options: Options,
        rhythm: Rhythm,
        report: Callable[[Event], None] = lambda _: None,
        writing: AbstractContextManager[object] | None = None,
    ) -> None:
        options, leases = replace(options, progress=self._go_on), Leases(store, options.clock)
        lock = writing or threading.RLock()
        self.setting = Setting(store, hypervisor, machine, options, rhythm, self._report, lock, leases)
        self._teller, self._told_of = report, ""
        self._wake, self._ended = threading.Event(), threading.Event()
        self._failures, self._unexpected = 0, ""
        self._living = self._begun = self._protected = False

    def meet(self, meeting: Meeting) -> None:
        """The next moment, which comes at once, is to be one with other machines."""
        late, self.setting.seat = self.setting.seat, meeting.seat(self.setting.machine.id)
        if late:
            late.leave("it is still busy with an earlier moment")
        self._wake.set()

    def mark(self, label: str, consistency: Consistency | None = Consistency.CRASH, *, point: bool = False) -> Mark:
        """Name the moment of the next cycle, which begins at once; `point`: and a point is made of it."""
        mark = Mark(label, consistency, point=point)
        self.setting.marks.add(mark)
        self._wake.set()
        return mark

    def look(self) -> None:
        """A pause has begun or ended: see to it at once."""
        self._wake.set()

    @property
    def living(self) -> bool:
        """Whether anything of ours may be in the machine's way."""
        return self._living

    @property
    def begun(self) -> bool:
        """Whether a life goes on that has recorded a moment."""
        return self._begun

    @property
    def paused(self) -> bool:
        """Whether the machine is to be left alone."""
        return self._pause() is not None

    def end(self) -> None:
        """`run` returns soon."""
        self._ended.set()
        self._wake.set()

    def _report(self, event: Event) -> None:
        """Somebody is told; whoever can't be told keeps nobody from protecting."""
        try:
            self._teller(event)
        except Exception as e:  # noqa: BLE001 - a pipe that nobody reads, a full disk
            if str(e) != self._told_of:  # once, not with every moment
                trace(e)
            self._told_of = str(e)

    def _go_on(self, _: Progress) -> None:
        """Called while a point is made: long work ends early when it is not wanted any more."""
        if self._ended.is_set():
            raise Interrupted("Protection was told to end while a point was being made; the next start makes it")
        if self._wake.is_set() and self._pause():
            raise Interrupted("Protection was paused while a point was being made; it is made afterwards")

    def _pause(self) -> Pause | None:
        return pauses.current(self.setting.store, self.setting.machine.id, self.setting.options.clock())

    def run(self) -> None:
        """Protect until told to end.  Raises what makes no sense from the start, as UsageError; all else is waited for."""
        try:
            self._run()
        finally:
            # A life that broke off has left some; what could not be sealed is for the next one to tell.
            with contextlib.suppress(HvbackupError):
                self.setting.sealing.finish()

    def _run(self) -> None:
        why = "protection was not running"
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                why = self._wait_while_paused() or why
                if not self._ended.is_set():
                    self._living = True
                    self._live(self.begin(why))
            except Interrupted:
                continue  # told to end, or to pause
            except Exception as e:  # noqa: BLE001 - the machine is to be protected, whatever one life stumbles over
                trouble = self._trouble(e)
                why = str(trouble)
                self._retry(trouble, time.monotonic() - began)
            finally:
                self._living = self._begun = False

    def _trouble(self, e: Exception) -> HvbackupError:
        """What a person reads of an error after which another life is begun.  Raises it when none was possible from the start."""
        if isinstance(e, HvbackupError):
            if isinstance(e, PASSING) or self._protected:
                return e
            raise e
        if str(e) != self._unexpected:  # once, not every minute
            trace(e)
        self._unexpected = str(e)
        return HvbackupError(f"Protection of machine {self.setting.machine.name} met an error: {type(e).__name__}: {e}")

    def _retry(self, trouble: HvbackupError, took: float) -> None:
        """Wait until a new life is worth an attempt, after one that took so many seconds."""
        seconds: float = BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]
        if isinstance(trouble, TooBusy):
            seconds = max(seconds, min(IDLE_TIMES * took, self.setting.rhythm.fold_every_ns / SECOND))
        self._failures += 1
        self._living = self._begun = False
        if isinstance(trouble, TooBusy):
            self._wake.clear()
        if not isinstance(trouble, JournalStalled):
            self.setting.report(Trouble(trouble, seconds))
        if isinstance(trouble, TooBusy):
            if not self._ended.is_set():
                self._wake.wait(seconds)  # a mark or a backup that is wanted is a reason to try
        else:
            self._ended.wait(seconds)

    def _wait_while_paused(self) -> str:
        """No pause lasts when this returns why the machine was left alone; empty where it was not."""
        told, why = None, ""
        while (pause := self._pause()) and not self._ended.is_set():
            if pause != told:
                self.setting.report(Paused(pause))
            told, why = pause, f"paused: {pause.why}"
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
        return why

    def begin(self, why: str) -> beginning.AnyLife:
        """A life has begun: a moment of it is durable.  `why` says why there may be a gap before it."""
        return beginning.begin(self.setting, why)

    def _live(self, life: Life) -> None:
        """Until told to end, or paused: then one more moment is made, the last before the administrator's work."""
        self._begun = self._protected = True
        began = time.monotonic()
        seconds, paused = self.setting.rhythm.every_ns / SECOND, False
        try:
            while not self._ended.is_set() and not paused:
                self._wake.wait(seconds)
                if self._ended.is_set():
                    break
                self._wake.clear()
                paused = self._pause() is not None
                seconds = life.step()
                if time.monotonic() - began >= STEADY_SECONDS:
                    self._failures = 0
        except BaseException as e:
            if isinstance(e, JournalStalled):
                self.setting.report(Trouble(e, 0))  # at once: closing waits for that disk
            with contextlib.suppress(HvbackupError):
                life.close(seal=False)
            raise
        life.close()
