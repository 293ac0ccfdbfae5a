"""One disk at the moment of a snapshot, as a QEMU serves it over NBD: its own adapter's doing, or libvirt's.

What the guest overwrites lands in a scratch image first, and the export shows the disk through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvbackup import extents
from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors import Changes
from hvbackup.model import Continuity, Disk, Token
from hvbackup.nbd.client import NbdClient
from hvbackup.nbd.uri import NbdUri

_ALLOCATION = "base:allocation"
_ZERO = 2  # base:allocation: reads as zeroes
_DIRTY = 1  # qemu:dirty-bitmap: changed
_SIZE = re.compile(r"size=(\d+)(;|$)")


@dataclass(slots=True)
class FleecedDisk:
    """One disk at the moment of the snapshot, behind QEMU's NBD server."""

    disk: Disk
    token: Token | None
    uri: NbdUri
    merged: str  # the exported bitmap, when continuity is proved
    since: Token | None
    doubt: str  # why it is not

    def changes(self, since: Token | None) -> Changes:
        if since is not None and since != self.since:
            doubt = f"Checkpoint {since.value} was not asked for when the snapshot began"
        else:
            doubt = self.doubt if since is not None else "No earlier checkpoint was given"
        context = "" if doubt else f"qemu:dirty-bitmap:{self.merged}"
        with NbdClient.open(self.uri, contexts=[_ALLOCATION, context] if context else [_ALLOCATION]) as client:
            zero, dirty = self._statuses(client, context)
        if since is None or doubt:
            return Changes(Continuity.UNKNOWN, extents.complement(zero, self.disk.size), zero, doubt)
        grown = extents.spans([(_size_of(since), max(0, self.disk.size - _size_of(since)))])
        changed = extents.union(dirty, grown)
        return Changes(Continuity.INCREMENTAL, extents.subtract(changed, zero), extents.intersect(changed, zero))

    def _statuses(self, client: NbdClient, context: str) -> tuple[extents.Spans, extents.Spans]:
        """What reads as zeroes, and what the bitmap says has changed."""
        missing = {_ALLOCATION, context} - {"", *client.contexts}
        if missing:
            raise HostUnreachable(
                f"{self.uri}: QEMU does not offer {', '.join(sorted(missing))} on disk {self.disk.id}"
            )
        first = client.statuses()
        dirty = _where(first[context], _DIRTY) if context else extents.EMPTY
        # QEMU looks at the scratch first and at the live disk after it.  A discard between the two looks shows a zero that
        # was none at the moment of the snapshot; by the second time the old bytes are in the scratch and are seen.
        zero = extents.intersect(_where(first[_ALLOCATION], _ZERO), _where(client.status(_ALLOCATION), _ZERO))
        return zero, dirty

    def open(self) -> NbdClient:
        return NbdClient.open(self.uri)


def _where(rows: Any, flag: int) -> extents.Spans:
    return extents.spans(rows[(rows[:, 2] & flag) != 0, :2])


def _size_of(token: Token) -> int:
    """How large the disk was at the token; its bitmap says nothing about what grew since."""
    return int(_SIZE.match(token.life)[1])  # type: ignore[index]  # `has_size` was asked before


def has_size(token: Token) -> bool:
    """Whether the token tells how large its disk was."""
    return _SIZE.match(token.life) is not None


def life(disk: Disk) -> str:
    """What a token says of its disk: the size, and in which file it is, for a bitmap stays with its node."""
    return f"size={disk.size};path={_file(disk)}"


def is_elsewhere(disk: Disk, token: Token) -> bool:
    """Whether the disk is in another file than at the token; those made before they told it don't know."""
    then = dict(part.partition("=")[::2] for part in token.life.split(";")).get("path")
    return then is not None and then != _file(disk)


def _file(disk: Disk) -> str:
    path = disk.path
    if path.startswith("json:"):
        with contextlib.suppress(ValueError):  # QEMU cuts what is very long
            path = _inner(json.loads(path.removeprefix("json:")))
    return hashlib.sha256(path.encode()).hexdigest()[:16]


def _inner(node: Mapping[str, Any]) -> str:
    """A node is described as a whole as soon as any of it is not the usual, such as what it is based on, which may change."""
    said = {key: value for key, value in node.items() if key not in ("driver", "backing")}
    if said.keys() == {"filename"}:
        return str(said["filename"])
    if said.keys() == {"file"} and isinstance(said["file"], Mapping):
        return _inner(said["file"])
    return json.dumps(said, sort_keys=True)
