"""Logs that have ended become segments, one after the other, on a thread of its own.

Sealing reads a log back, compresses it and encrypts it anew: two or three times the work of taking the guest's writes, and nobody
waits for it, for a log is as durable and as readable as a segment, only larger.  So while a guest writes as much as it can,
sealing rests, and the host's processors are the guest's.  It goes on when the guest is calmer, or when so much waits that it
would be missed: then it takes its share of the processors again.

    killed after                left behind                             cleaned by
    1 some logs ended           logs                                    take_over(): the newest one at once, the others in turn
    2 segment written           both                                    the log is removed, in its turn
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from hvbackup.errors import HvbackupError, StoreDamage
from hvbackup.model import GiB, MachineId
from hvbackup.store.journal import journal
from hvbackup.store.journal.history import History
from hvbackup.store.journal.journal import FOLDER, LOG, Name
from hvbackup.store.journal.segment import write_segment
from hvbackup.store.store import Store

Lock = AbstractContextManager[bool]

WAITING_MAX_BYTES = 8 * GiB  # of logs that wait: a minute or more of all that a guest can write
BUDGET_SHARE = 8  # and of a budget at most the eighth part
FREE_SHARE = 4  # and of what is free at most as much as the fourth part
WARM_SECONDS = 30.0  # a stream seals every few seconds: tables for views are made not more often than this

_locks: weakref.WeakKeyDictionary[Store, dict[MachineId, Lock]] = weakref.WeakKeyDictionary()
_locking = threading.Lock()


def exclusive(store: Store, machine: MachineId) -> Lock:
    """Held while a file of the journal becomes another one or goes: who removes a log must not meet its segment afterwards.

    Only the process that protects the machine does either.
    """
    with _locking:
        return _locks.setdefault(store, {}).setdefault(machine, threading.Lock())


@dataclass(frozen=True, slots=True)
class Taken:
    """A journal that was taken over."""

    names: Sequence[Name]  # the files that count, in their order
    left: Sequence[Name]  # the logs that are still to be sealed or removed, in theirs
    epoch: int  # the newest there has been, also of files that are gone: nobody may ever meet two files of one name


def take_over(store: Store, machine: MachineId) -> Taken:
    """What a dead writer left is settled.

    The newest log, which nobody has ended, is sealed up to its last barrier when this returns, or removed where it has none; one
    whose header is gone stays.  The others are whole.
    """
    done: set[Name] = set()
    epoch = 0
    while True:
        names = sorted(
            journal.all_files(store.files, store.ring.machine_name(machine)), key=lambda n: (n.epoch, n.first)
        )
        epoch = max([epoch, *(n.epoch for n in names)])
        logs = [n for n in names if n.suffix == LOG and n not in done]
        if not logs or logs[-1] != names[-1]:
            return Taken(journal.counting(names), logs, epoch)
        # Whoever wrote it may not know that we are here, and have ended it just now: then there is another one.
        done.add(logs[-1])
        seal(store, machine, logs[-1])


def seal(store: Store, machine: MachineId, name: Name) -> None:
    """The segment of a log exists when this returns, if the log holds any moment, and the log is gone.

    A log that is damaged stays where anything in it was durable: its index tells of moments that a shorter segment has not.
    One that is gone was sealed, or points cover it.
    """
    folder = store.ring.machine_name(machine)
    path = f"{FOLDER}/{folder}/{name}"
    with exclusive(store, machine):
        names = journal.all_files(store.files, folder)
        if name not in names:
            return
        if not any(n.covers(name) for n in names):
            log = None
            try:
                log = journal.LogReader(store.files, store.ring, folder, name)
                write_segment(store.files, store.ring, folder, name, log.whole())
            except StoreDamage:
                if (log and log.mark() is not None) or journal.held_moments(store.files, folder, name):
                    return
        store.files.remove(path)


class Sealing:
    """The logs of one machine.  Thread safety: every method from any thread."""

    def __init__(self, store: Store, machine: MachineId, budget_bytes: int = 0) -> None:
        """`budget_bytes`: of its journal; 0: it has none."""
        self._store, self._machine = store, machine
        self._waiting_max = min(WAITING_MAX_BYTES, budget_bytes // BUDGET_SHARE or WAITING_MAX_BYTES)
        self._free = 0  # on the disk of the store
        self._sealed_bytes = 0  # all that has been waiting, and is not any more
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Name, int]] = deque()
        self._thread: threading.Thread | None = None  # while anything waits, or is being sealed
        self._rests_until = 0.0
        self._wanted = -1  # logs that begin up to here are waited for: no rest before them
        self._warmed = float("-inf")
        self._failed: BaseException | None = None

    def begin(self, left: Sequence[Name]) -> None:
        """A writer takes the journal over, and these are still to be sealed; what went wrong before is forgotten."""
        folder = f"{FOLDER}/{self._store.ring.machine_name(self._machine)}"
        with self._changed:
            self._failed = None
            self._waiting = deque(entry for entry in self._waiting if entry[0] in left)
            for name in left:
                try:
                    self.add(name, self._store.files.size(f"{folder}/{name}"))
                except FileNotFoundError:
                    continue  # it has been sealed just now

    def add(self, name: Name, size: int) -> None:
        """A log has ended."""
        with self._changed:
            if any(name == other for other, _ in self._waiting):
                return
            with contextlib.suppress(OSError):
                self._free = shutil.disk_usage(self._store.files.root).free
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="hvbackup-seal")
                thread.start()  # it waits for us to let go
                self._thread = thread
            self._waiting.append((name, size))
            self._changed.notify_all()

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

    def check(self) -> None:
        """Raises what sealing has raised since this was asked last."""
        with self._changed:
            failed, self._failed = self._failed, None
        if failed:
            raise failed

    def wait_for_room(self, size: int) -> None:
        """Less waits than may when this returns, or one log alone, or so many bytes less than when it was called.

        What may wait is less when somebody else fills the disk: nobody waits for all that is too much then.
        """
        with self._changed:
            until = self._sealed_bytes + size
            while self._full() and len(self._waiting) > 1 and self._sealed_bytes < until:
                self._changed.wait()

    def reach(self, seq: int) -> None:
        """No log that begins at or before this fact waits when this returns: many reads of segments cost less."""
        with self._changed:
            self._wanted = max(self._wanted, seq)
            self._changed.notify_all()
            while any(name.first <= seq for name, _ in self._waiting):
                self._changed.wait()

    def finish(self) -> None:
        """Nothing waits when this returns.  Raises what sealing raised."""
        self.rest(0)
        self._join()
        self.check()

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

    def _full(self) -> bool:
        waits = sum(size for _, size in self._waiting)
        return bool(waits) and waits >= min(self._waiting_max, self._free // FREE_SHARE)

    def _due(self) -> bool:
        """Whether the oldest log can't rest any longer."""
        return self._full() or self._waiting[0][0].first <= self._wanted

    def _run(self) -> None:
        while name := self._next():
            try:
                seal(self._store, self._machine, name)
                self._warm()
            except BaseException as e:  # noqa: BLE001 - handed to the thread that owns the recorder
                self._failed = e
            with self._changed:
                if self._waiting and self._waiting[0][0] == name:
                    self._sealed_bytes += self._waiting.popleft()[1]
                self._changed.notify_all()

    def _next(self) -> Name | None:
        """The oldest log, when it is its time; None when nothing waits, and the thread ends."""
        with self._changed:
            while self._waiting and not self._due() and (left := self._rests_until - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._waiting:
                return self._waiting[0][0]
            self._thread = None
            self._changed.notify_all()
            return None

    def _warm(self) -> None:
        """Views of the newest moment find their tables made, now and then, and not while more logs wait to be read for it."""
        now = time.monotonic()
        if len(self._waiting) <= 1 and now - self._warmed >= WARM_SECONDS:
            self._warmed = now
            with contextlib.suppress(HvbackupError, FileNotFoundError):  # views make them, or say what is wrong
                History(self._store, self._machine).warm()
