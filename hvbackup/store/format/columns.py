"""Columns of numbers in a mapped file: of what is looked at, and of nothing else, the checksum is verified first.

A table of a day of writes is half a gigabyte, and a view touches a few pages of it: reading all of it would cost more than the
view, and believing it could give back wrong bytes.  So the file carries a CRC-32 of every 64 KiB, and each of those is verified
once, when somebody first looks at it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from hvbackup.errors import StoreDamage

PAGE_BYTES = 64 * 1024


def sums_of(body: bytes | memoryview) -> NDArray[np.uint32]:
    """The checksums of a body, one for each page."""
    return np.array([crc32(body[at : at + PAGE_BYTES]) for at in range(0, len(body), PAGE_BYTES)], np.uint32)


class Checked:
    """The body of a file, mapped.  Thread safety: any thread; a page may be verified twice."""

    def __init__(self, path: Path, head: int, size: int, sums_crc: int) -> None:
        """`size` bytes from `head` on are columns, the rest of the file their checksums.  Raises StoreDamage."""
        self._path, self._head = path, head
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._body = memoryview(self._map)[head : head + size]
        sums = memoryview(self._map)[head + size :]
        if crc32(sums) != sums_crc:
            raise self.damaged()
        self._sums = np.frombuffer(sums, np.uint32)
        self._seen = bytearray(len(self._sums))

    def array(self, offset: int, items: int, kind: str) -> NDArray[Any]:
        """Numbers at an offset of the file, which nobody has verified."""
        return np.frombuffer(self._map, kind, items, offset)

    def verify(self, start: int, end: int) -> None:
        """These bytes of the file are what was written.  Raises StoreDamage, and removes the file: it is made again."""
        for page in range((start - self._head) // PAGE_BYTES, -(-(end - self._head) // PAGE_BYTES)):
            if not self._seen[page]:
                at = page * PAGE_BYTES
                if crc32(self._body[at : at + PAGE_BYTES]) != int(self._sums[page]):
                    raise self.damaged()
                self._seen[page] = 1

    def damaged(self) -> StoreDamage:
        """The file is removed, and this says so."""
        self._path.unlink(missing_ok=True)
        return StoreDamage(
            f"The cache {self._path} was damaged and is removed; nothing of the store is lost, run this again"
        )


class Column:
    """One column of a file: verified where it is looked at."""

    def __init__(self, file: Checked, offset: int, items: int, kind: str) -> None:
        self._file, self._offset = file, offset
        self._array = file.array(offset, items, kind)
        self._width = self._array.itemsize

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    @overload
    def __getitem__(self, key: slice) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, key: int) -> Any: ...

    def __getitem__(self, key: slice | int) -> Any:
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self._array))
            if stop > start:
                self._verify(start, stop)
        else:
            self._verify(key, key + 1)
        return self._array[key]

    def searchsorted(self, value: int, /, side: Any = "left") -> Any:
        """As of an array that is sorted, which only the numbers on both sides of the answer have to prove."""
        i = int(self._array.searchsorted(value, side))
        low, high = max(0, i - 1), min(len(self._array), i + 1)
        if high > low:
            self._verify(low, high)
        before = i == 0 or (self._array[i - 1] <= value if side == "right" else self._array[i - 1] < value)
        after = i == len(self._array) or (self._array[i] > value if side == "right" else self._array[i] >= value)
        if not (before and after):
            raise self._file.damaged()
        return i

    def _verify(self, start: int, stop: int) -> None:
        self._file.verify(self._offset + start * self._width, self._offset + stop * self._width)


Numbers = NDArray[Any] | Column  # in memory or in a file
