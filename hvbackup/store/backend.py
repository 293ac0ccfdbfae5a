"""What a store needs of the place it lives in: put a new file, get, list, delete.  A directory is the first body.

The names of a store's files never change meaning: everything except `keys/` and `leases/` is written once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer


class Upload(Protocol):
    """A file on its way; it exists only after `commit`."""

    size: int

    def write(self, data: Buffer) -> None:
        """Append `data`."""

    def commit(self, name: str) -> None:
        """The file exists, durably, when this returns."""

    def abandon(self) -> None:
        """Drop what was written."""


class Backend(Protocol):
    """A flat space of names with `/`.  `hvbackup.files.Files` is the body for local directories."""

    def new(self) -> Upload:
        """Begin a file; it gets its name when it is committed."""

    def write_new(self, name: str, data: Buffer) -> None:
        """Write a whole file; raises HvbackupError when it exists with other content."""

    def replace(self, name: str, data: Buffer) -> None:
        """Write a whole file, whatever was there."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def exists(self, name: str) -> bool:
        """Whether the file is there."""

    def size(self, name: str) -> int:
        """Length in bytes.  Raises FileNotFoundError."""

    def read(self, name: str) -> bytes:
        """All bytes.  Raises FileNotFoundError."""

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`.  Raises FileNotFoundError."""

    def will_read(self, name: str, offset: int, length: int) -> None:
        """Whoever can may fetch this range ahead; never waits, never raises."""

    def names(self, directory: str) -> list[str]:
        """What is directly in a directory, sorted; [] when there is none."""

    def sweep(self) -> int:
        """Remove unfinished files of a killed writer."""
