"""Memory for requests being served: reused, and bounded for each connection and for all of them together."""

from __future__ import annotations

import threading

_SMALL_BYTES = 64 * 1024  # up to here bounded by the number of threads, so a slow client cannot starve small reads
_LEAST_BYTES = 4096
_KEEP = 8  # spare buffers of each size; fresh memory costs a page fault for each 4 KiB
_KEEP_MAX_BYTES = 1024 * 1024  # larger ones go back to the system


class Budget:
    """A number of bytes that may be in use.

    Thread safety: any thread may take and give back; whoever asks for more than is left waits.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit = self.left = limit_bytes
        self._changed = threading.Condition()
        self._closed = False

    def take(self, size: int) -> None:
        """`size` bytes are yours, or all there are; ConnectionAbortedError once the budget is closed."""
        size = min(size, self.limit)
        with self._changed:
            while self.left < size and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ConnectionAbortedError("the server is closing")
            self.left -= size

    def give_back(self, size: int) -> None:
        """Others may use what was taken."""
        with self._changed:
            self.left += min(size, self.limit)
            self._changed.notify_all()

    def close(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Lease:
    """`view` is yours until you give the lease back."""

    __slots__ = ("buffer", "view")

    def __init__(self, buffer: bytearray, length: int) -> None:
        self.buffer = buffer
        self.view = memoryview(buffer)[:length]


class Shelf:
    """Spare buffers, whose sizes are powers of two, and the budget of the server.

    Thread safety: any thread may take and put back.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.budget = Budget(limit_bytes)
        self._spare: dict[int, list[bytearray]] = {}

    def buffer(self, size: int) -> bytearray:
        """A buffer of undefined content."""
        try:
            return self._spare[size].pop()
        except (KeyError, IndexError):
            return bytearray(size)

    def put_back(self, buffer: bytearray) -> None:
        """The buffer may be used again."""
        spare = self._spare.setdefault(len(buffer), [])
        if len(spare) < _KEEP and len(buffer) <= _KEEP_MAX_BYTES:
            spare.append(buffer)


class Pool:
    """What one connection borrows from the shelf.

    Thread safety: any thread may take and give back; whoever asks for more than is left waits.
    """

    def __init__(self, shelf: Shelf, limit_bytes: int) -> None:
        self._shelf = shelf
        self._own = Budget(limit_bytes)

    def take(self, length: int) -> Lease:
        """A buffer of `length` bytes of undefined content; ConnectionAbortedError once the server closes."""
        size = max(_LEAST_BYTES, 1 << (length - 1).bit_length())
        if size > _SMALL_BYTES:
            self._own.take(size)
            try:
                self._shelf.budget.take(size)
            except ConnectionAbortedError:
                self._own.give_back(size)
                raise
        return Lease(self._shelf.buffer(size), length)

    def give_back(self, lease: Lease) -> None:
        """The lease ends."""
        lease.view.release()
        size = len(lease.buffer)
        self._shelf.put_back(lease.buffer)
        if size > _SMALL_BYTES:
            self._shelf.budget.give_back(size)
            self._own.give_back(size)
