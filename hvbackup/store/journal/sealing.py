"""Logs that have ended become segments, one after the other, on a thread of its own.

Sealing reads a log back, compresses it and encrypts it anew: two or three times the work of taking the guest's writes, and nobody
waits for it, for a log is as durable and as readable as a segment, only larger.  So while a guest writes as much as it can,
sealing rests, and the host's processors are the guest's.  It goes on when the guest is calmer, or when so much waits that it
would be missed: then it takes its share of the processors again.

    killed after                left behind                             cleaned by
    1 some logs ended           logs                                    take_over(): the newest one at once, the others later
    2 segment written           both                                    take_over(): the log is removed
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from hvbackup.errors import StoreDamage
from hvbackup.model import GiB, MachineId
from hvbackup.store.journal import journal
from hvbackup.store.journal.journal import FOLDER, LOG, Name
from hvbackup.store.journal.segment import write_segment
from hvbackup.store.store import Store

WAITING_MAX_BYTES = 2 * GiB  # of logs that wait: room for a burst, and what a reader has to look through


def take_over(store: Store, machine: MachineId) -> list[Name]:
    """What a dead writer left is settled, but for these logs, oldest first: they are whole, and are sealed as any other.

    The newest one, which nobody has ended, is sealed up to its last barrier when this returns, or removed where it has none.
    """
    folder = store.ring.machine_name(machine)
    names = sorted(journal.all_files(store.files, folder), key=lambda n: (n.epoch, n.first))
    left = []
    for name in (n for n in names if n.suffix == LOG):
        if any(n.covers(name) for n in names):
            store.files.remove(f"{FOLDER}/{folder}/{name}")
        else:
            left.append(name)
    if left and left[-1] == names[-1]:
        seal(store, machine, left.pop())
    return left


def seal(store: Store, machine: MachineId, name: Name) -> None:
    """The segment of a log exists when this returns, if the log holds any moment, and the log is gone.

    A log whose header a power cut took stays where anything in it was durable, for whoever can read it; one that is gone needs
    no segment: points cover it.
    """
    folder = store.ring.machine_name(machine)
    path = f"{FOLDER}/{folder}/{name}"
    try:
        frames = journal.up_to_last_barrier(journal.read_log(store.files, store.ring, folder, name))
        write_segment(store.files, store.ring, folder, name, frames)
    except StoreDamage:
        if journal.held_moments(store.files, folder, name):
            return
    except FileNotFoundError:
        return
    store.files.remove(path)


class Sealing:
    """Thread safety: every method from any thread."""

    def __init__(self, work: Callable[[Name], None]) -> None:
        """`work` makes a segment of a log."""
        self._work = work
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Name, int]] = deque()
        self._thread: threading.Thread | None = None  # while anything waits, or is being sealed
        self._rests_until = 0.0
        self._failed: BaseException | None = None

    def add(self, name: Name, size: int) -> None:
        """A log has ended.  Raises what sealing earlier ones raised."""
        with self._changed:
            self._waiting.append((name, size))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hvbackup-seal")
                self._thread.start()
            self._changed.notify_all()
        self._raise()

    @property
    def waiting(self) -> int:
        """How many logs wait, with the one that is being sealed."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether as much waits as may."""
        with self._changed:
            return self._full()

    def rest(self, seconds: float) -> None:
        """Nothing more is sealed for so long, unless as much waits as may; 0: go on."""
        with self._changed:
            self._rests_until = time.monotonic() + seconds
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Less waits than may when this returns.  Raises what sealing raised."""
        with self._changed:
            while self._full():
                self._changed.wait()
            self._raise()

    def finish(self) -> None:
        """Nothing waits when this returns.  Raises what sealing raised."""
        self.rest(0)
        self._join()
        self._raise()

    def abandon(self) -> None:
        """Nothing is being sealed when this returns; what waits is left to whoever takes the journal over."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()
        self._join()

    def _join(self) -> None:
        with self._changed:
            while self._thread:
                self._changed.wait()

    def _raise(self) -> None:
        with self._changed:
            failed, self._failed = self._failed, None
        if failed:
            raise failed

    def _full(self) -> bool:
        return sum(size for _, size in self._waiting) >= WAITING_MAX_BYTES

    def _run(self) -> None:
        while name := self._next():
            try:
                self._work(name)
            except BaseException as e:  # noqa: BLE001 - handed to the thread that owns the recorder
                self._failed = e
            with self._changed:
                if self._waiting and self._waiting[0][0] == name:
                    self._waiting.popleft()
                self._changed.notify_all()

    def _next(self) -> Name | None:
        """The oldest log, when it is its time; None when nothing waits, and the thread ends."""
        with self._changed:
            while self._waiting and not self._full() and (left := self._rests_until - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._waiting:
                return self._waiting[0][0]
            self._thread = None
            self._changed.notify_all()
            return None
