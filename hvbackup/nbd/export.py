"""What the server serves: subclass `Export` and give it a size and `read_into`; everything else has a default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from hvbackup.errors import HvbackupError
from hvbackup.nbd.protocol import BASE_ALLOCATION
from hvbackup.nbd.wire import Buffer


class Export(ABC):
    """One disk as the server sees it.

    Ranges are checked by the server before any method is called: they lie inside of the disk and are multiples of
    `min_block`.  An OSError or HvbackupError raised here becomes an error of that one request and is reported to
    the server's `on_error`; anything else is a bug, ends that connection and shows up in `threading.excepthook`.

    Thread safety: all methods are called from several threads at a time, unless `parallel` is False; then the requests
    of one connection come one after the other, in the order in which they were sent.
    """

    size: int  # bytes; need not be a multiple of anything but min_block
    read_only: bool = True
    description: str = ""
    min_block: int = 1  # the sector size, where requests must be multiples of it
    preferred_block: int = 65536  # what is cheap to read
    parallel: bool = True
    multi_conn: bool = True  # what one connection wrote and flushed, all others see
    contexts: Sequence[str] = (BASE_ALLOCATION,)

    @abstractmethod
    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target`, which is valid until this returns, with the bytes at `offset`."""

    def try_read_cached(self, offset: int, length: int) -> Buffer | None:
        """The bytes when they are at hand in memory without any waiting, else None; never blocks, never raises.

        Called on the thread that reads the socket, before the request is given to a worker; at most 64 KiB.
        """
        return None

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:  # noqa: B027 - right where nothing waits for a disk
        """These (offset, length) are asked for and will be read; called where reads have to wait, and must not wait itself."""

    def extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """(length, flags) of base:allocation one behind the other from `offset`; may go on past the range.

        Only as much is taken as fits the answer, so work lazily: a generator that looks up a piece at a time.
        """
        return ((length, 0),)

    def context_extents(self, context: str, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """The same for another of `contexts`."""
        raise HvbackupError(f"{context}: No such context")

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """`data`, valid until this returns, is written; with `fua` it is durable."""
        raise PermissionError

    def write_zeroes(self, offset: int, length: int, *, fua: bool, may_trim: bool) -> None:
        """The range reads as zeroes; the default writes them."""
        zeroes = memoryview(bytes(min(length, _ZEROES_BYTES)))
        for at in range(0, length, _ZEROES_BYTES):
            self.write(offset + at, zeroes[: length - at], fua=fua)

    def trim(self, offset: int, length: int, *, fua: bool) -> None:  # noqa: B027 - doing nothing is an answer
        """The range is not needed any more; doing nothing is right too."""

    def flush(self) -> None:  # noqa: B027 - right where writes are durable at once
        """Everything whose write has returned is durable."""


_ZEROES_BYTES = 1 << 20
