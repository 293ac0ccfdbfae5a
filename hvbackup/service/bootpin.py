"""The pin of a booted machine: its point stays until the boot is discarded, whoever lives until then.

Its id follows from the boot's name, so that `discard` needs neither a record of it nor a key.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
from typing import Self

from hvbackup.config import Places
from hvbackup.errors import HvbackupError, NotFound, StoreMissing
from hvbackup.files import Files
from hvbackup.model import Instant, RecoveryPoint
from hvbackup.store.shelves import pins
from hvbackup.store.store import Store, describe


class BootPin:
    """A pin that is taken once the boot has a name, and dropped again when the context is left by an error."""

    def __init__(self, places: Places, store: Store, point: RecoveryPoint, now: Instant) -> None:
        self._places, self._store, self._point, self._now = places, store, point, now
        self._name = ""
        self.notes: list[str] = []

    def take(self, name: str) -> None:
        """The point stays until the boot of this name is discarded.  Raises NotFound when it was forgotten just now."""
        what = f"boot {name} on {socket.gethostname()}"
        pin_id = _id(self._places, self._store.id, name)
        try:
            pins.take(self._store, [self._point], what, self._now, lasting=True, pin_id=pin_id)
            self._name = name
        except NotFound:
            raise
        except HvbackupError as e:
            self.notes.append(f"Nobody knows that the point is in use, and it could be forgotten meanwhile: {e}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._name:
            drop(self._places, self._name)


def drop(places: Places, name: str) -> None:
    """The pin of the boot of this name is gone when this returns; nothing happens where there is no store any more."""
    files = Files(places.store)
    with contextlib.suppress(StoreMissing):
        pins.PINS.remove(files, _id(places, describe(files).id, name))


def _id(places: Places, store: bytes, name: str) -> str:
    """One for each name, state directory and host."""
    whole = f"{socket.gethostname()} {places.state} {store.hex()} {name}"
    return hashlib.sha256(whole.encode()).hexdigest()[:16]
