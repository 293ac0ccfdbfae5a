"""XFS."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from typing import Any

from dissect.xfs.c_xfs import c_xfs
from dissect.xfs.xfs import XFS, fsb_to_bb

from hvbackup.errors import FileSystemUnreadable
from hvbackup.model import GiB, Instant, KiB
from hvbackup.recover.browse import Facts, Kind
from hvbackup.recover.filesystems import pieces
from hvbackup.recover.window import Run, Window

KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.FOLDER, stat.S_IFLNK: Kind.LINK}
FOLDER_MOST = 1 * GiB
LINK_MOST = 1 * KiB
REALTIME = 0x1  # of an inode's flags: its bytes are on another device
INODE_BYTES = (256, 512, 1024, 2048)
FORMATS = c_xfs.xfs_dinode_fmt
NOTE = (
    "what the log of XFS had not put in place yet is not seen: where the machine was not frozen, the newest changes may be "
    "missing; `boot` has them"
)


class Xfs:
    """One file system."""

    case_counts = True

    def __init__(self, window: Window) -> None:
        self.window = window
        self._fs = XFS(window)
        sb = self._fs.sb
        if sb.sb_inodesize not in INODE_BYTES or not sb.sb_agblocks or sb.sb_agcount > 1 << 20:
            raise FileSystemUnreadable("its superblock makes no sense")
        self._block: int = self._fs.block_size
        self.root = self._fs.root
        self.notes = [NOTE]

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        if node.size > FOLDER_MOST:
            raise FileSystemUnreadable(f"a folder claims {node.size} bytes")
        for child in node.iterdir():
            yield child.filename, child

    def facts(self, node: Any) -> Facts:
        mode = node.inode.di_mode
        kind = KINDS.get(stat.S_IFMT(mode), Kind.OTHER)
        if kind is Kind.LINK and node.size > LINK_MOST:
            raise FileSystemUnreadable(f"a link claims {node.size} bytes")
        size = node.size if kind in (Kind.FILE, Kind.LINK) else 0
        return Facts(kind, size, stat.S_IMODE(mode), Instant(node.mtime_ns), node.link if kind is Kind.LINK else "")

    def key(self, node: Any) -> Any:
        return node.inum

    def runs(self, node: Any) -> Sequence[Run]:
        if node.inode.di_flags & REALTIME:
            raise FileSystemUnreadable("its bytes are on the realtime device")
        if node.inode.di_format == FORMATS.XFS_DINODE_FMT_LOCAL:
            return []
        if node.inode.di_format not in (FORMATS.XFS_DINODE_FMT_EXTENTS, FORMATS.XFS_DINODE_FMT_BTREE):
            raise FileSystemUnreadable("it keeps its bytes in a way that is not known")
        return list(self._runs(node))

    def _runs(self, node: Any) -> Iterator[Run]:
        at, sb = 0, self._fs.sb
        for first, where, count, unwritten in node._iter_blocks():
            group, block = fsb_to_bb(where, sb.sb_agblklog)
            begin = (group * sb.sb_agblocks + block) * self._block
            if first < at or begin + count * self._block > self.window.size:
                raise FileSystemUnreadable("its extents overlap, or are outside of its file system")
            if unwritten:
                continue
            if first > at:
                yield None, (first - at) * self._block
            yield begin, count * self._block
            at = first + count

    def pieces(self, node: Any, most: int) -> Iterator[tuple[int, bytes]]:
        return pieces(self.window, self.runs(node), node.size, most)


def open_one(window: Window) -> Xfs:
    """Raises what dissect raises on a broken one."""
    return Xfs(window)
