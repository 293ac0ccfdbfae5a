"""Shelves: small sealed files in a folder of their own, by name: holds, pins, tombstones, settings, requests, condemned packs.

A file that can't be read is never taken for one that is not there: what it forbids may matter, so reading a shelf raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hvbackup.errors import StoreDamage
from hvbackup.store.format.sealed import seal, unseal

if TYPE_CHECKING:
    from hvbackup.store.backend import Backend
    from hvbackup.store.format.keys import Keyring

T = TypeVar("T")
Value = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shelf(Generic[T]):
    """Where things of one kind are, and how they are written."""

    folder: str
    kind: int
    dump: Callable[[T], Value]
    load: Callable[[str, Value], T]  # of the name and the value; raises KeyError, TypeError, ValueError
    pattern: str = "[0-9a-f]{16}"  # of names; files with others are not ours

    def path(self, name: str) -> str:
        """Where a name lives in the store."""
        return f"{self.folder}/{name}"

    def put(self, backend: Backend, ring: Keyring, name: str, thing: T) -> None:
        """The thing is on the shelf, durably, when this returns, whatever was there."""
        backend.replace(self.path(name), seal(ring, self.kind, self.path(name), self.dump(thing)))

    def remove(self, backend: Backend, name: str) -> None:
        """The thing is gone, durably, when this returns."""
        backend.remove(self.path(name))

    def names(self, backend: Backend) -> list[str]:
        """All names, sorted."""
        return [n for n in backend.names(self.folder) if re.fullmatch(self.pattern, n)]

    def get(self, backend: Backend, ring: Keyring, name: str) -> T | None:
        """One thing, or None when it is not there.  Raises StoreDamage when it can't be read."""
        path = self.path(name)
        try:
            return self.load(name, unseal(ring, self.kind, path, backend.read(path)))
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as e:
            raise StoreDamage(f"{path} does not hold what belongs there: {e}") from e

    def all(self, backend: Backend, ring: Keyring) -> Iterator[T]:
        """Everything on the shelf.  Raises StoreDamage when something can't be read."""
        for name in self.names(backend):
            if (thing := self.get(backend, ring, name)) is not None:
                yield thing
