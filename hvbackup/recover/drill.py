"""Drill: a disk is restored to nowhere, block by block through the pipeline of a restore, and its first bytes are looked at.

What it proves: every block of the disk at that moment can be read, decrypted and decoded, and is what it was when captured.  What
it does not: that the guest was well when it was captured, or that it boots; `boot` shows that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hvbackup.pipeline import Take, at_once
from hvbackup.recover.restore import restore
from hvbackup.store.chunks.view import DiskView

HEAD_BYTES = 68 * 1024
SIGNS = (  # what, where its mark is, the mark
    ("GPT", 512, b"EFI PART"),
    ("GPT", 4096, b"EFI PART"),
    ("LVM", 512, b"LABELONE"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("XFS", 0, b"XFSB"),
    ("NTFS", 3, b"NTFS    "),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("ext", 1080, b"\x53\xef"),
    ("btrfs", 65600, b"_BHRfS_M"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("MBR", 510, b"\x55\xaa"),
)


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What one disk came to."""

    size: int
    read_bytes: int
    seconds: float
    holds: str  # what its first bytes say: GPT, ext, ...; "" where they say nothing that we know


class _Nowhere:
    """A target that keeps nothing."""

    blank = True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """It reads as zeroes."""
        buffer[:] = bytes(len(buffer))

    def write(self, offset: int, data: memoryview) -> None:
        """Gone."""

    def zero(self, offset: int, length: int) -> None:
        """Likewise."""

    def finish(self) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """Nor to let go."""


def rehearse(view: DiskView, key: bytes, progress: Callable[[int, int], None], take: Take = at_once) -> Rehearsed:
    """Every block of the disk was read and is right when this returns.  Raises ChunkDamaged."""
    began = time.monotonic()
    done = restore(view, _Nowhere(), key, progress, compare=False, take=take)
    head = bytearray(min(HEAD_BYTES, view.size))
    view.read_into(0, memoryview(head))
    return Rehearsed(view.size, done.written_bytes, round(time.monotonic() - began, 3), holds(bytes(head)))


def holds(head: bytes) -> str:
    """What the first bytes of a disk say that it holds.  Pure."""
    return next((what for what, at, mark in SIGNS if head[at : at + len(mark)] == mark), "")
