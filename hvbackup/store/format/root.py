"""The root of the map of one disk, as pins and leases name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hvbackup.model import ChunkId, RecoveryPoint


@dataclass(frozen=True, slots=True)
class Root:
    """A map that must stay readable."""

    id: ChunkId
    size: int  # of the disk, in bytes

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {"id": self.id.hex(), "size": self.size}

    @classmethod
    def load(cls, value: dict[str, Any]) -> Root:
        """From JSON.  Raises KeyError, TypeError, ValueError."""
        return cls(ChunkId(bytes.fromhex(value["id"])), int(value["size"]))


Disks = Mapping[str, Root]  # the maps of a point, by disk


def disks_of(point: RecoveryPoint) -> Disks:
    """The maps of a point, by disk."""
    return {d.disk.id: Root(d.root, d.disk.size) for d in point.disks}


def roots_of(point: RecoveryPoint) -> Iterator[Root]:
    """The maps of a point."""
    return (Root(d.root, d.disk.size) for d in point.disks)
