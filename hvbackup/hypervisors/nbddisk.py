"""A disk behind an NBD server: what is allocated, what a dirty bitmap says, and readers.

One connection is held from first to last: some servers end with their last client, some serve only one.  A server that
does not promise one consistent disk to several connections gets no second one; its readers share the first.

Thread safety: any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvbackup.extents import Spans, spans, whole
from hvbackup.nbd.client import NbdClient, Settings

ALLOCATION = "base:allocation"
BITMAP = "qemu:dirty-bitmap:"  # and the bitmap's name

_ZERO = 2  # base:allocation: reads as zeroes
_DIRTY = 1  # qemu:dirty-bitmap: changed


@dataclass(frozen=True, slots=True)
class NbdDisk:
    """One open export; `client` is the connection that is held."""

    client: NbdClient
    settings: Settings | None = None  # of further connections

    def allocated(self) -> Spans:
        """What may hold other bytes than zeroes; everything when the server can't tell."""
        if ALLOCATION not in self.client.contexts:
            return whole(self.client.size)
        rows = self.client.status(ALLOCATION)
        return spans(rows[(rows[:, 2] & _ZERO) == 0, :2])

    def has_bitmap(self, name: str) -> bool:
        """Whether the server shows this dirty bitmap."""
        return BITMAP + name in self.client.contexts

    def dirty(self, name: str) -> Spans:
        """What the bitmap says has changed."""
        rows = self.client.status(BITMAP + name)
        return spans(rows[(rows[:, 2] & _DIRTY) != 0, :2])

    def open(self) -> NbdClient | SharedReader:
        """A reader: a connection of its own where the server allows it."""
        if self.client.can_multi_conn:
            return NbdClient.open(self.client.uri, settings=self.settings)
        return SharedReader(self.client)


@dataclass(frozen=True, slots=True)
class SharedReader:
    """A reader on somebody else's connection; closing it does not close that."""

    client: NbdClient

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        self.client.read_into(offset, buffer)

    def close(self) -> None:
        """Nothing to give back."""
