"""A stretch of a disk as a file object: what readers of file systems read from.

They take many small reads, so pages are kept.  They may swallow what goes wrong below them, so the first error is remembered
and `check` raises it.  What they read may be made to lead them in circles, so every operation has a number of reads.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from hvbackup.errors import FileSystemUnreadable, HvbackupError
from hvbackup.model import KiB, MiB

PAGE_BYTES = 256 * KiB
PAGES = 64  # 16 MiB: the tables of a large file system
READS = 100_000  # between one name and the next; a sound file system needs a few
LARGEST_READ = 64 * MiB  # no structure of a file system is larger

Run = tuple[int | None, int]  # (where it begins in the window, or None where it reads as zeroes; length)


class View(Protocol):
    """A read-only disk: a `DiskView`, a `LayeredView`, or anything that reads like them."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.  Raises ChunkDamaged."""


class Window:
    """[start, start + size) of a disk.  Reads behind its end are short.  Thread safety: none, one reader at a time."""

    def __init__(self, view: View, start: int, size: int) -> None:
        self.start, self.size = start, max(0, min(size, view.size - start))
        self._view = view
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self._at, self._left = 0, READS
        self.error: HvbackupError | None = None

    # -- as a file object ----------------------------------------------------------------------------------------------

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Where the next read begins."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if self._at < 0:
            raise ValueError(f"{self._at} is before the beginning")
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def read(self, length: int = -1) -> bytes:
        """The bytes there, fewer at the end."""
        data = self.read_at(self._at, self.size - self._at if length < 0 else length)
        self._at += len(data)
        return data

    # -- as bytes ------------------------------------------------------------------------------------------------------

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes there, fewer at the end.  Raises ChunkDamaged, and FileSystemUnreadable after too many reads."""
        length = max(0, min(length, self.size - offset))
        self._left -= 1
        try:
            if self._left < 0:
                raise FileSystemUnreadable("its structures lead in circles")
            if length > LARGEST_READ:
                raise FileSystemUnreadable(f"one of its structures claims {length} bytes")
            return self._read(offset, length)
        except HvbackupError as e:
            self.error = self.error or e
            raise

    def _read(self, offset: int, length: int) -> bytes:
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        if length >= PAGE_BYTES:
            return self._direct(offset, length)
        parts = []
        for number in range(first, last + 1):
            begin = number * PAGE_BYTES
            lo, hi = max(offset, begin), min(offset + length, begin + PAGE_BYTES)
            page = self._page(number)
            parts.append(self._direct(lo, hi - lo) if page is None else page[lo - begin : hi - begin])
        return b"".join(parts)

    def _page(self, number: int) -> bytes | None:
        """A page, or None where some of it can't be read: then what is wanted may still be whole."""
        page = self._pages.get(number)
        if page is not None:
            self._pages.move_to_end(number)
            return page
        begin = number * PAGE_BYTES
        try:
            page = self._direct(begin, min(PAGE_BYTES, self.size - begin))
        except HvbackupError:
            return None
        self._pages[number] = page
        if len(self._pages) > PAGES:
            self._pages.popitem(last=False)
        return page

    def _direct(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        if length:
            self._view.read_into(self.start + offset, memoryview(buffer))
        return bytes(buffer)

    # -- what readers do with it ---------------------------------------------------------------------------------------

    def allow(self) -> None:
        """Something was found: as many reads again."""
        self._left = READS

    def forgive(self) -> None:
        """What went wrong was told; the next operation begins anew."""
        self.error = None
        self.allow()


class RunFile(io.RawIOBase):
    """The content that runs of a window make up, as a file object."""

    def __init__(self, window: Window, runs: Sequence[Run], size: int) -> None:
        super().__init__()
        self.size = size
        self._window, self._runs, self._at = window, runs, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, length: int = -1) -> bytes:
        end = min(self.size, self._at + length) if length >= 0 else self.size
        if end - self._at > LARGEST_READ:
            raise FileSystemUnreadable(f"one of its structures claims {end - self._at} bytes")
        parts, begin = [], 0
        for where, size in self._runs:
            lo, hi = max(self._at, begin), min(end, begin + size)
            if lo < hi:
                parts.append(bytes(hi - lo) if where is None else self._window.read_at(where + lo - begin, hi - lo))
            begin += size
            if begin >= end:
                break
        data = b"".join(parts)
        self._at += len(data)
        return data
