"""Readers of file systems: the one home of the dissect packages, loaded when a disk is looked into.

Folders and inodes are read by dissect.  Where the bytes of a file are is worked out here from what is on the disk: unwritten
extents, holes and the end of what was ever written read as zeroes, and a chain that does not end is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from hvbackup.errors import FileSystemUnreadable, UsageError
from hvbackup.recover.browse import Facts
from hvbackup.recover.window import Run, Window

READERS = {"ext": "extfs", "ntfs": "ntfs", "fat": "fat", "xfs": "xfs", "btrfs": "btrfs"}


class FileSystem(Protocol):
    """One file system.  A node is a file, a folder or a link, in the words of its reader."""

    window: Window
    root: Any
    notes: Sequence[str]  # what has to be known of what is read
    case_counts: bool  # in names

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        """(name, node) of everything in a folder."""

    def facts(self, node: Any) -> Facts:
        """What is known of a node."""

    def key(self, node: Any) -> Any:
        """What tells a node from all others."""

    def runs(self, node: Any) -> Sequence[Run] | None:
        """Where the bytes of a file are in the window; None where that can't be told."""

    def pieces(self, node: Any, most: int) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of a file, in order, at most so many at once; what is left out reads as zeroes."""


def need() -> None:
    """Raises UsageError where the readers are not installed."""
    if not all(_installed(reader) for reader in READERS.values()):
        raise UsageError(
            "Files inside disks are read with the dissect packages; install them: pip install 'hvbackup[files]'"
        )


def _installed(reader: str) -> bool:
    try:
        return importlib.util.find_spec(f"dissect.{reader}") is not None
    except ModuleNotFoundError:
        return False


def open_one(kind: str, window: Window) -> FileSystem:
    """The file system that fills a window.  Raises whatever its reader raises on bytes that make no sense."""
    module = importlib.import_module(f"hvbackup.recover.filesystems.{kind}")
    reader: Callable[[Window], FileSystem] = module.open_one
    return reader(window)


def pieces(window: Window, runs: Sequence[Run], size: int, most: int) -> Iterator[tuple[int, bytes]]:
    """The bytes that runs make up, up to a size.  Raises FileSystemUnreadable where one is beyond the end."""
    at = 0
    for where, length in runs:
        length = min(length, size - at)
        if where is not None:
            for done in range(0, length, most):
                n = min(most, length - done)
                window.allow()
                data = window.read_at(where + done, n)
                if len(data) < n:
                    raise FileSystemUnreadable("a part of it lies behind the end of its file system")
                yield at + done, data
        at += length
        if at >= size:
            return
