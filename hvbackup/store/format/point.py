"""Recovery points as files: `points/MACHINE/TIME-ID`, the commit point of a capture.

MACHINE is the keyed name of the machine, TIME the moment in nanoseconds with 20 digits, ID 16 hexadecimal digits.  The content
is a sealed file (`sealed.py`).  A point names its disks' map roots, so it needs no other point.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict
from typing import Any

from hvbackup.errors import PointDamaged
from hvbackup.model import (
    ChunkId,
    Consistency,
    Disk,
    DiskId,
    DiskRoot,
    Instant,
    Machine,
    MachineConfig,
    MachineId,
    Origin,
    PointId,
    RecoveryPoint,
    Token,
)
from hvbackup.store.format import layout as f
from hvbackup.store.format.keys import Keyring
from hvbackup.store.format.sealed import seal, unseal

FOLDER = "points"


def new_id() -> PointId:
    """An id no other point has."""
    return PointId(secrets.token_hex(8))


def is_name(name: str) -> bool:
    """Whether a file is called like a point; anything else in the directory is not ours."""
    return re.fullmatch(r"\d{20}-[0-9a-f]{16}", name) is not None


def path_of(ring: Keyring, point: RecoveryPoint) -> str:
    """Where a point lives in the store."""
    return f"{FOLDER}/{ring.machine_name(point.machine.id)}/{point.t:020d}-{point.id}"


def dump(ring: Keyring, point: RecoveryPoint) -> bytes:
    """The bytes of the point's file."""
    value = asdict(point)
    if point.origin is None:
        del value["origin"]
    for disk in value["disks"]:
        disk["root"] = disk["root"].hex()
    return seal(ring, f.KIND_POINT, path_of(ring, point), value)


def load(ring: Keyring, path: str, data: bytes) -> RecoveryPoint:
    """The point in a file.  Raises StoreDamage when it is not what was written under this name."""
    value = unseal(ring, f.KIND_POINT, path, data)
    try:
        point = _point(value)
        place = path_of(ring, point)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as e:
        raise PointDamaged(f"{path} holds no recovery point: {e}") from e
    if place != path:
        raise PointDamaged(f"{path} holds the point of another place")
    return point


def _point(value: dict[str, Any]) -> RecoveryPoint:
    machine = value["machine"]
    return RecoveryPoint(
        id=PointId(value["id"]),
        machine=Machine(
            MachineId(machine["id"]), machine["name"], machine["platform"], tuple(_disk(d) for d in machine["disks"])
        ),
        t=Instant(int(value["t"])),
        consistency=Consistency(value["consistency"]),
        disks=tuple(_root(d) for d in value["disks"]),
        config=MachineConfig(**value["config"]),
        figures=value["figures"],
        notes=tuple(value["notes"]),
        seq=value["seq"],
        tags=tuple(map(str, value.get("tags", ()))),
        origin=Origin(**value["origin"]) if value.get("origin") else None,
    )


def _disk(value: dict[str, Any]) -> Disk:
    return Disk(DiskId(value["id"]), int(value["size"]), int(value["sector"]), value["path"])


def _root(value: dict[str, Any]) -> DiskRoot:
    token = Token(**value["token"]) if value["token"] else None
    return DiskRoot(_disk(value["disk"]), ChunkId(bytes.fromhex(value["root"])), token, value["how"])
