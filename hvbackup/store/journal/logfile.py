"""The file of an open log: it only grows, and what it is told to keep is durable.

What is appended is put together in memory, and written in whole blocks when that is full or somebody syncs.  The last block is
filled up with zeroes, and written again with what comes next: what it had stays the same, whatever a power cut leaves of it.  So
the file can be written past the page cache too, which is half the work.

    killed after                  left behind                          cleaned by
    1 created                     an empty file                        take_over()
    2 some blocks written         a torn end                           take_over(): readers find the end by checksums
    3 synced                      all that was appended before         nobody: it is the journal

Whoever takes a journal over seals and removes the log that is open: a writer that lives, and does not know, learns it when it
syncs next, before it believes that anything since is kept.
"""

from __future__ import annotations

import errno
import mmap
import os

from hvbackup.errors import Busy
from hvbackup.files import Files, named_errors
from hvbackup.model import KiB, MiB

MEMORY_BYTES = 4 * MiB  # of a log, at most and usually: what is written at a time
BLOCK_BYTES = 4 * KiB  # of a disk, at most and usually


class LogFile:
    """See the module.  It has its own name from the first byte on, and nobody appends to it who has not created it.

    Thread safety: one thread.
    """

    def __init__(self, files: Files, name: str) -> None:
        self._kernel, self.path = files.kernel, files.path(name)
        self._memory = _blocks(MEMORY_BYTES)  # begins with a block
        files.make_dir(os.path.dirname(name))
        with named_errors("create", self.path):
            self._fd = self._kernel.create(str(self.path), files.mode)
            self._kernel.sync_dir(str(self.path.parent))
        self._direct = False
        self._at = 0  # where in the file the memory begins
        self._used = 0
        self._written = 0  # how much of it is in the file
        self._synced = True
        self._unsure = False  # a sync failed: nobody knows what of all that was written before will ever be durable

    @property
    def size(self) -> int:
        """Bytes appended so far."""
        return self._at + self._used

    @property
    def synced(self) -> bool:
        """Whether everything appended is durable."""
        return self._synced

    def room(self, size: int) -> memoryview:
        """Memory for so many bytes behind the last one.  They are appended by `take`, once they are filled in."""
        if self._used + size > len(self._memory):
            self._write()
            self._make_room(size)
        return self._memory[self._used : self._used + size]

    def take(self, size: int) -> None:
        """Append what was put into `room`."""
        self._used += size
        self._synced = False

    def _make_room(self, size: int) -> None:
        """What is written in whole blocks goes; memory that was larger than usual for something large goes with it."""
        whole = self._used - self._used % BLOCK_BYTES
        rest = bytes(self._memory[whole : self._used])
        wanted = max(MEMORY_BYTES, -(-(len(rest) + size) // BLOCK_BYTES) * BLOCK_BYTES)
        if wanted != len(self._memory):
            self._memory = _blocks(wanted)
        self._memory[: len(rest)] = rest
        self._at, self._used, self._written = self._at + whole, len(rest), len(rest)

    def _write(self) -> None:
        """Everything that was appended is in the file."""
        if self._written == self._used:
            return
        first = self._written - self._written % BLOCK_BYTES
        end = -(-self._used // BLOCK_BYTES) * BLOCK_BYTES
        self._memory[self._used : end] = bytes(end - self._used)
        with named_errors("write", self.path):
            self._kernel.write_at(self._fd, self._memory[first:end], self._at + first)
        self._written = self._used

    def past_cache(self, on: bool) -> None:
        """Write past the page cache from here on, or through it: then whoever reads the file soon finds it there."""
        if on != self._direct:
            self._kernel.set_direct(self._fd, on)
            self._direct = on

    def sync(self) -> None:
        """Everything appended before is durable when this returns.  Raises Busy when another writer has taken the file over."""
        if self._synced:
            return
        self._write()
        with named_errors("write", self.path):
            if self._unsure:
                raise OSError(errno.EIO, "it failed before, and what was written then may be lost")
            self._unsure = True
            self._kernel.fsync(self._fd)
        if not self._kernel.links(self._fd):
            raise taken_over(self.path.parent.name)
        self._unsure, self._synced = False, True
        self._make_room(0)

    def close(self) -> None:
        """Everything appended is in the file, and that is let go of."""
        try:
            self._write()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file as it is."""
        self._kernel.close(self._fd)


def taken_over(journal: str) -> Busy:
    """What a writer is told whose journal another one has taken over."""
    return Busy(
        f"Journal {journal} was taken over: somebody protects that machine from another host; protect it from one only"
    )


def _blocks(size: int) -> memoryview:
    """Memory that a disk can be written from; it takes up none before it is used."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
