"""Condemned packs: `condemned/ID` lists packs that reclaim is about to remove, so that nobody refers to them any more.

A list is sealed and written before anything else is done to its packs; it is replaced once, when all that lives in them has been
copied, and removed after them.  Writers read all lists when they begin (`writers.py`); reclaim itself never counts a condemned
pack as a place where a chunk is safe, whoever condemned it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from hvbackup.errors import StoreDamage
from hvbackup.model import Instant
from hvbackup.store import format as f
from hvbackup.store.backend import Backend
from hvbackup.store.keys import Keyring
from hvbackup.store.sealed import seal, unseal

FOLDER = "condemned"


@dataclass(frozen=True, slots=True)
class Condemned:
    """One list."""

    id: str
    packs: frozenset[str]
    t: Instant  # when they were condemned
    copied: Instant | None = None  # when everything that lives in them had been copied elsewhere


def new(packs: frozenset[str], t: Instant) -> Condemned:
    """A list that nobody knows of yet."""
    return Condemned(secrets.token_hex(8), packs, t)


def write(backend: Backend, ring: Keyring, found: Condemned) -> None:
    """From here on no writer that begins refers to these packs."""
    path = f"{FOLDER}/{found.id}"
    value = {"packs": sorted(found.packs), "t": found.t, "copied": found.copied}
    backend.replace(path, seal(ring, f.KIND_CONDEMNED, path, value))


def remove(backend: Backend, list_id: str) -> None:
    """The list is gone when this returns."""
    backend.remove(f"{FOLDER}/{list_id}")


def read(backend: Backend, ring: Keyring) -> Iterator[Condemned]:
    """Every list.  Raises StoreDamage naming one that can't be read: then nobody knows what is condemned."""
    for name in names(backend):
        path = f"{FOLDER}/{name}"
        try:
            value = unseal(ring, f.KIND_CONDEMNED, path, backend.read(path))
            yield Condemned(name, frozenset(map(str, value["packs"])), Instant(value["t"]), value["copied"])
        except FileNotFoundError:
            continue  # its packs are gone: the listing of packs, made later, says so
        except (KeyError, TypeError) as e:
            raise StoreDamage(f"{path} holds no list of packs: {e}") from e


def names(backend: Backend) -> list[str]:
    """The ids of all lists."""
    return [n for n in backend.names(FOLDER) if re.fullmatch("[0-9a-f]{16}", n)]
