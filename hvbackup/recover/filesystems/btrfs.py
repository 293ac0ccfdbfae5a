"""btrfs: one device, with compression and subvolumes."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Any

from dissect.btrfs import Btrfs as Reader

from hvbackup.errors import FileSystemUnreadable
from hvbackup.model import Instant, KiB
from hvbackup.recover.browse import Facts, Kind
from hvbackup.recover.window import Window

KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.FOLDER, stat.S_IFLNK: Kind.LINK}
LINK_MOST = 4 * KiB
NODE_MOST = 64 * KiB


class Btrfs:
    """One file system."""

    case_counts = True

    def __init__(self, window: Window) -> None:
        self.window = window
        self._fs = Reader(window)
        if self._fs.sb.num_devices != 1:
            raise FileSystemUnreadable(f"it is one of {self._fs.sb.num_devices} devices of a btrfs")
        if self._fs.node_size > NODE_MOST:
            raise FileSystemUnreadable(f"it claims nodes of {self._fs.node_size} bytes")
        self.root = self._fs.root
        self.notes: list[str] = []

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        yield from node.iterdir()

    def facts(self, node: Any) -> Facts:
        mode = node.inode.mode
        kind = KINDS.get(stat.S_IFMT(mode), Kind.OTHER)
        if kind is Kind.LINK and node.size > LINK_MOST:
            raise FileSystemUnreadable(f"a link claims {node.size} bytes")
        size = node.size if kind in (Kind.FILE, Kind.LINK) else 0
        return Facts(kind, size, stat.S_IMODE(mode), Instant(node.mtime_ns), node.link if kind is Kind.LINK else "")

    def key(self, node: Any) -> Any:
        return (node.subvolume.objectid, node.inum)

    def runs(self, node: Any) -> None:
        """Its bytes may be compressed, and lie in chunks of its own: it can't tell."""

    def pieces(self, node: Any, most: int) -> Iterator[tuple[int, bytes]]:
        stream, at = node.open(), 0
        while at < node.size:
            self.window.allow()
            data = stream.read(min(most, node.size - at))
            if not data:
                raise FileSystemUnreadable(f"it ends after {at} of {node.size} bytes")
            yield at, data
            at += len(data)


def open_one(window: Window) -> Btrfs:
    """Raises what dissect raises on a broken one."""
    return Btrfs(window)
