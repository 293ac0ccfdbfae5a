"""A recorder on a thread of its own, so that a slow disk is noticed, and never waited for while a machine is frozen.

What a cycle reads goes into a queue, and from there to the journal's disk.  When one write or fsync takes more than a second, the
cycle is given up at once: the snapshot is released, an alarm is raised, and the journal has a gap.  Nothing that is written is
lost by that: when the disk answers again, what is whole counts, and a new life goes on from there.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvbackup.model import DiskId, Instant, MiB
from hvbackup.protect.events import JournalStalled
from hvbackup.store.journal.recorder import Recorder

STALL_SECONDS = 1.0
READING_SECONDS = 30.0  # what is read between cycles keeps nobody waiting, and takes as long as a view takes to open
SEALING_SECONDS = 20.0  # a set that is larger than a log waits as long for earlier ones to be sealed
QUEUED_BYTES = 8 * MiB  # bounds memory: a cycle reads no faster than the disk writes

T = TypeVar("T")


class Journaling:
    """Thread safety: one thread calls; `recorder` is for others while nothing is queued."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._changed = threading.Condition()
        self._queue: collections.deque[tuple[Callable[[], Any], int]] = collections.deque()
        self._queued_bytes = 0
        self._since: float | None = None  # when what is being done now began
        self._failed: BaseException | None = None
        self._ended = False
        self._thread: threading.Thread | None = None

    def write(
        self, disk: DiskId, t: Instant, extents: Sequence[tuple[int, int]], data: bytes | bytearray | memoryview
    ) -> None:
        """As of a recorder, later.  Raises JournalStalled, and what an earlier call has led to."""
        self._until_sealed()
        self._put(lambda: self.recorder.write(disk, t, extents, data), len(data))

    def zero(self, disk: DiskId, t: Instant, extents: Sequence[tuple[int, int]]) -> None:
        """As of a recorder, later.  Raises JournalStalled, and what an earlier call has led to."""
        self._put(lambda: self.recorder.zero(disk, t, extents), 0)

    def call(self, work: Callable[[], T], seconds: float | None = None) -> T:
        """What `work` returns, after all that was queued before, and in that time.

        Raises JournalStalled, and what any of it raises.
        """
        results: list[T] = []
        self._put(lambda: results.append(work()), 0)
        with self._changed:
            while self._queue or self._since is not None:
                self._wait(seconds or STALL_SECONDS)
            self._raise()
        return results[0]

    def drain(self) -> None:
        """Nothing is queued when this returns, however long it takes; what went wrong is forgotten."""
        with self._changed:
            while self._queue or self._since is not None:
                self._changed.wait()
            self._failed = None

    def close(self) -> None:
        """The thread has ended when this returns, after all that was queued."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()

    def _put(self, work: Callable[[], Any], size: int) -> None:
        with self._changed:
            self._raise()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hvbackup-journal", daemon=True)
                self._thread.start()
            while self._queued_bytes + size > QUEUED_BYTES and self._queue:
                self._wait(STALL_SECONDS)
            self._queue.append((work, size))
            self._queued_bytes += size
            self._changed.notify_all()

    def _until_sealed(self) -> None:
        """No log that ends has to wait for others, which takes longer than any write."""
        end = time.monotonic() + SEALING_SECONDS
        while self.recorder.must_wait:
            if time.monotonic() > end:
                raise JournalStalled(f"The journal's disk has sealed nothing for {SEALING_SECONDS:g} s")
            time.sleep(STALL_SECONDS / 100)

    def _wait(self, seconds: float) -> None:
        """For the other thread to get on.  Raises JournalStalled when what it does takes longer."""
        self._changed.wait(STALL_SECONDS / 10)
        late = self._since
        if late is None or time.monotonic() - late <= seconds:
            return
        self._changed.wait(STALL_SECONDS / 10)  # where the whole host stood still the disk may have answered long ago
        if self._since == late:
            raise JournalStalled(
                f"The journal's disk has not answered for {seconds:g} s; nothing is recorded until it does"
            )

    def _raise(self) -> None:
        if self._failed:
            failed, self._failed = self._failed, None
            raise failed

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._ended:
                    self._changed.wait()
                if not self._queue:
                    return
                work, size = self._queue.popleft()
                self._since = time.monotonic()
            self._do(work)
            with self._changed:
                self._queued_bytes -= size
                self._since = None
                self._changed.notify_all()

    def _do(self, work: Callable[[], Any]) -> None:
        if self._failed:
            return  # what follows in the set can't become a moment any more
        try:
            work()
        except BaseException as e:  # noqa: BLE001 - handed to the thread that calls
            self._failed = e
