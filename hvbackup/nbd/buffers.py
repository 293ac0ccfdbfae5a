"""Memory for requests being served: reused, and bounded for all connections of a server together."""

from __future__ import annotations

import threading

_SMALL_BYTES = 64 * 1024  # up to here bounded by the number of threads, so a slow client cannot starve small reads
_LEAST_BYTES = 4096
_KEEP = 8  # spare buffers of each size; fresh memory costs a page fault for each 4 KiB


class Lease:
    """`view` is yours until you give the lease back."""

    __slots__ = ("buffer", "counted", "view")

    def __init__(self, buffer: bytearray, length: int, counted: int) -> None:
        self.buffer = buffer
        self.view = memoryview(buffer)[:length]
        self.counted = counted


class BufferPool:
    """Lends buffers whose sizes are powers of two; their content is undefined.

    Thread safety: any thread may take and give back; whoever asks for more than is left waits.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = self._left = limit_bytes
        self._changed = threading.Condition()
        self._spare: dict[int, list[bytearray]] = {}
        self._closed = False

    def take(self, length: int) -> Lease:
        """A buffer of `length` bytes; ConnectionAbortedError once the pool is closed."""
        size = max(_LEAST_BYTES, 1 << (length - 1).bit_length())
        counted = min(size, self._limit) if size > _SMALL_BYTES else 0
        if counted:
            self._reserve(counted)
        try:
            buffer = self._spare[size].pop()
        except (KeyError, IndexError):
            buffer = bytearray(size)
        return Lease(buffer, length, counted)

    def give_back(self, lease: Lease) -> None:
        """The buffer may be lent again."""
        lease.view.release()
        size = len(lease.buffer)
        spare = self._spare.setdefault(size, [])
        if len(spare) < _KEEP and size * _KEEP <= self._limit:
            spare.append(lease.buffer)
        if lease.counted:
            with self._changed:
                self._left += lease.counted
                self._changed.notify_all()

    def close(self) -> None:
        """Wake whoever waits for memory."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _reserve(self, size: int) -> None:
        with self._changed:
            while self._left < size and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ConnectionAbortedError("the server is closing")
            self._left -= size
