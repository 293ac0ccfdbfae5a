"""Tombstones: `tombstones/ID` names the points that are being forgotten, and until when they can be had back."""

from __future__ import annotations

from dataclasses import dataclass

from hvbackup.model import Instant
from hvbackup.store.format import layout as f
from hvbackup.store.format.shelf import Shelf, Value


@dataclass(frozen=True, slots=True)
class Tombstone:
    """One decision to forget."""

    id: str
    points: tuple[str, ...]  # their paths
    t: Instant
    until: Instant  # their trash is kept until then
    why: str
    by: str
    decided: bool = False  # holds were looked at again after it was written: from here on it is carried out


def _dump(t: Tombstone) -> Value:
    return {"points": list(t.points), "t": t.t, "until": t.until, "why": t.why, "by": t.by, "decided": t.decided}


def _load(name: str, v: Value) -> Tombstone:
    points = tuple(map(str, v["points"]))
    t, until = Instant(int(v["t"])), Instant(int(v["until"]))
    return Tombstone(name, points, t, until, str(v["why"]), str(v["by"]), bool(v["decided"]))


TOMBSTONES = Shelf("tombstones", f.KIND_TOMBSTONE, _dump, _load)
