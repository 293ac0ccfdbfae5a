"""Looks at QEMU while a stream goes on, on a thread of their own: a monitor that is slow or busy never holds up the journal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hvbackup.errors import DiskReplaced, HostUnreachable, StreamBroken
from hvbackup.hypervisors import Stream
from hvbackup.model import DiskId, Instant, Token
from hvbackup.store.journal.history import Moment

LOOK_SECONDS = 1.0  # so many moments are in doubt when writes went past us
SETTLE_SECONDS = 60.0  # between two checkpoints: bounds what the next life has to read


@dataclass(slots=True)
class Look:
    """What one look has found."""

    t: Instant  # when it began
    began: float  # by the monotonic clock
    ended: float = 0.0
    good: Moment | None = None  # nothing went past us until this moment
    tokens: Mapping[DiskId, Token] | None = None  # checkpoints that were made: what had arrived before is not in them
    error: Exception | None = None
    silence: HostUnreachable | None = None  # why nobody could be asked


class Looks:
    """The looks of one life.  Thread safety: one thread."""

    def __init__(
        self, stream: Stream, arrived: Callable[[DiskId], int], broke: Callable[[], bool], clock: Callable[[], int]
    ) -> None:
        """`broke`: whether writes arrive no more, of all disks from one moment on; what QEMU counts since went nowhere else."""
        self._stream, self._arrived, self._broke, self._clock = stream, arrived, broke, clock
        self._thread: threading.Thread | None = None
        self._found: Look | None = None
        self._looked = self._settled = time.monotonic()

    def poll(self, newest: Moment) -> Look | None:
        """What the last look has found, once; the next one begins when it is time for it."""
        if self._thread and not self._thread.is_alive():
            self._thread, found, self._found = None, self._found, None
            return found
        if not self._thread and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            self._thread = threading.Thread(target=self._look, args=(newest,), name="hvbackup-look")
            self._thread.start()
        return None

    def unheard(self) -> list[Look]:
        """What a look has found that nobody was told of; nobody looks any more when this returns."""
        self.join()
        return [self._found] if self._found else []

    def last(self, newest: Moment) -> list[Look]:
        """As `unheard`, and what one more finds, where there is anybody to ask."""
        found = self.unheard()
        if self._broke() or (found and found[0].silence):
            return found
        self._look(newest, settle=False)
        return [*found, *([self._found] if self._found else [])]

    def _look(self, newest: Moment, *, settle: bool = True) -> None:
        self._found = look = Look(Instant(self._clock()), time.monotonic())
        try:
            tokens = None
            if settle and time.monotonic() - self._settled >= SETTLE_SECONDS:
                self._settled = time.monotonic()
                tokens = self._settle()
            self._stream.check(self._arrived)  # afterwards: what went past us before is in the earlier checkpoints
            look.good, look.tokens = newest, tokens
        except (StreamBroken, DiskReplaced) as e:
            if not self._broke():
                look.error = e
        except HostUnreachable as e:
            look.silence = e  # somebody else holds the monitor; a QEMU that is gone cuts its connections
        except Exception as e:  # noqa: BLE001 - handed to the thread of the life, which ends with it
            look.error = e
        finally:
            look.ended = time.monotonic()

    def _settle(self) -> Mapping[DiskId, Token] | None:
        """New checkpoints; None where QEMU refuses them now, which must keep nobody from looking."""
        try:
            return self._stream.settle()
        except (StreamBroken, DiskReplaced):
            raise
        except HostUnreachable:
            return None

    def join(self) -> None:
        """Nobody looks any more."""
        if self._thread:
            self._thread.join()
            self._thread = None
