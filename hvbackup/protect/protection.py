"""Protection of one machine: one life after the other, until told to end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from hvbackup.capture import Options, Progress
from hvbackup.errors import Busy, HostUnreachable, HvbackupError, Interrupted, SpaceExhausted
from hvbackup.hypervisors import Hypervisor
from hvbackup.leases import Leases
from hvbackup.model import SECOND, Machine
from hvbackup.protect import beginning
from hvbackup.protect.cycles import CycleLife
from hvbackup.protect.events import ContinuityLost, Event, Rhythm, Trouble
from hvbackup.protect.life import Life
from hvbackup.protect.marks import Mark
from hvbackup.protect.setting import Setting
from hvbackup.store.store import Store

BACKOFF_SECONDS = (1, 2, 5, 10, 30, 60)  # between lives, while the host does not answer


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
        self.setting = Setting(store, hypervisor, machine, options, rhythm, report, lock, leases)
        self._wake, self._ended = threading.Event(), threading.Event()
        self._failures = 0

    def mark(self, label: str) -> Mark:
        """Name the moment of the next cycle, which begins at once."""
        mark = Mark(label)
        self.setting.marks.add(mark)
        self._wake.set()
        return mark

    def end(self) -> None:
        """`run` returns soon."""
        self._ended.set()
        self._wake.set()

    def _go_on(self, _: Progress) -> None:
        """Called while a point is made: long work ends early when it is not wanted any more."""
        if self._ended.is_set():
            raise Interrupted("Protection was told to end while a point was being made; the next start makes it")

    def run(self) -> None:
        """Protect until told to end.  Raises UsageError, StoreDamage; whatever may pass by itself is waited for."""
        why = "protection was not running"
        while not self._ended.is_set():
            try:
                self._live(self.begin(why))
            except Interrupted:
                return
            except (HostUnreachable, ContinuityLost, Busy, SpaceExhausted) as e:
                pause = BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]
                why, self._failures = str(e), self._failures + 1
                self.setting.report(Trouble(e, pause))
                self._ended.wait(pause)

    def begin(self, why: str) -> CycleLife:
        """A life has begun: a moment of it is durable.  `why` says why there may be a gap before it."""
        return beginning.begin(self.setting, why)

    def _live(self, life: Life) -> None:
        pause = self.setting.rhythm.every_ns / SECOND
        try:
            while not self._ended.is_set():
                self._wake.wait(pause)
                if self._ended.is_set():
                    break
                self._wake.clear()
                pause = life.step()
                self._failures = 0
        except BaseException:
            with contextlib.suppress(HvbackupError):
                life.close()
            raise
        life.close()
