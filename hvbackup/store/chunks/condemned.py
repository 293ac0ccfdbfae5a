"""Condemned packs: `condemned/ID` lists packs that reclaim is about to remove, so that nobody refers to them any more.

A list is written before anything else is done to its packs; it is replaced once, when all that lives in them has been copied, and
removed after them.  Writers read all lists when they begin (`writers.py`); reclaim itself never counts a condemned pack as a
place where a chunk is safe, whoever condemned it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from hvbackup.model import Instant
from hvbackup.store.format import layout as f
from hvbackup.store.format.shelf import Shelf, Value


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


def _dump(found: Condemned) -> Value:
    return {"packs": sorted(found.packs), "t": found.t, "copied": found.copied}


def _load(name: str, value: Value) -> Condemned:
    copied = value["copied"]
    packs = frozenset(map(str, value["packs"]))
    return Condemned(name, packs, Instant(int(value["t"])), None if copied is None else Instant(int(copied)))


CONDEMNED = Shelf("condemned", f.KIND_CONDEMNED, _dump, _load)
