"""ext2, ext3 and ext4."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from dissect.extfs import ExtFS
from dissect.extfs.c_ext import c_ext

from hvbackup.errors import FileSystemUnreadable
from hvbackup.model import GiB, Instant
from hvbackup.recover.browse import Facts, Kind
from hvbackup.recover.filesystems import pieces
from hvbackup.recover.window import Run, Window

KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.FOLDER, stat.S_IFLNK: Kind.LINK}
FOLDER_MOST = 1 * GiB
NEEDS_RECOVERY = 0x4  # of the incompatible features: the journal holds what is not in its place yet
ENCRYPTED = 0x800  # of an inode's flags
INODE_INLINE = 60
EXTENT_HEADER = struct.Struct("<HHHHI")  # magic, entries, most, depth, generation
EXTENT = struct.Struct("<IHHI")  # first block, length, high and low half of where
EXTENT_INDEX = struct.Struct("<IIHH")  # first block, low and high half of where, unused
EXTENT_MAGIC = 0xF30A
EXTENT_DEPTH = 5
UNWRITTEN = 0x8000  # lengths beyond it: allocated, never written
DIRECT = 12


class Ext:
    """One of them."""

    case_counts = True

    def __init__(self, window: Window) -> None:
        self.window = window
        self._fs = ExtFS(window)
        self._block: int = self._fs.block_size
        self.root = self._fs.root
        self.notes: list[str] = []
        if self._fs.sb.s_feature_incompat & NEEDS_RECOVERY:
            self.notes.append(
                "the file system was in use; what its journal had not put in place yet is not seen, so the newest changes "
                "may be missing; a point of a frozen machine, or `boot`, has them"
            )

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        self._refuse(node)
        if node.inode.i_flags & c_ext.EXT4_INLINE_DATA_FL:
            raise FileSystemUnreadable("a folder inside its inode is not understood")
        if node.size > min(FOLDER_MOST, self.window.size):
            raise FileSystemUnreadable(f"a folder claims {node.size} bytes")
        for child in node.iterdir():
            yield child.filename, child

    def facts(self, node: Any) -> Facts:
        mode = node.inode.i_mode
        kind = KINDS.get(stat.S_IFMT(mode), Kind.OTHER)
        target = self._content(node).decode(errors="surrogateescape") if kind is Kind.LINK else ""
        size = node.size if kind in (Kind.FILE, Kind.LINK) else 0
        return Facts(kind, size, stat.S_IMODE(mode), Instant(self._mtime(node)), target)

    def _mtime(self, node: Any) -> int:
        """Seconds are signed, and have two more bits where inodes have room for them."""
        seconds, extra = node.inode.i_mtime, node.inode.i_mtime_extra if self._fs.sb.s_inode_size > 128 else 0
        signed = seconds - (1 << 32) if seconds >= 1 << 31 else seconds
        nanoseconds: int = (signed + ((extra & 3) << 32)) * 1_000_000_000 + (extra >> 2)
        return nanoseconds

    def _content(self, link: Any) -> bytes:
        """What a link holds."""
        if link.size > self._block:
            raise FileSystemUnreadable(f"a link claims {link.size} bytes")
        if link.size < INODE_INLINE:
            return bytes(link.inode.i_block)[: link.size]
        return b"".join(data for _, data in self.pieces(link, self._block))

    def key(self, node: Any) -> Any:
        return node.inum

    def runs(self, node: Any) -> Sequence[Run]:
        self._refuse(node)
        if node.inode.i_flags & c_ext.EXT4_INLINE_DATA_FL:
            return []
        wanted = -(-node.size // self._block)
        raw = bytes(node.inode.i_block)
        found = self._extents(raw) if node.inode.i_flags & c_ext.EXT4_EXTENTS_FL else self._blocks(raw, wanted)
        return list(self._checked(found))

    def _checked(self, found: Iterator[tuple[int, int, int]]) -> Iterator[Run]:
        """(first block in the file, where, how many) as runs; nothing twice, and nothing outside."""
        at = 0
        for first, where, count in found:
            if first < at or where + count > self._fs.block_count:
                raise FileSystemUnreadable("its extents overlap, or are outside of its file system")
            if first > at:
                yield None, (first - at) * self._block
            yield where * self._block, count * self._block
            at = first + count

    def _extents(self, raw: bytes, depth: int = EXTENT_DEPTH) -> Iterator[tuple[int, int, int]]:
        magic, entries, _, level, _ = EXTENT_HEADER.unpack_from(raw)
        if magic != EXTENT_MAGIC or level > depth or EXTENT_HEADER.size * (entries + 1) > len(raw):
            raise FileSystemUnreadable("a node of its extents is broken")
        for i in range(1, entries + 1):
            if level:
                _, low, high, _ = EXTENT_INDEX.unpack_from(raw, i * EXTENT_INDEX.size)
                yield from self._extents(self._node(low | high << 32), level - 1)
                continue
            first, count, high, low = EXTENT.unpack_from(raw, i * EXTENT.size)
            if count <= UNWRITTEN:
                yield first, low | high << 32, count

    def _node(self, block: int) -> bytes:
        raw = self.window.read_at(block * self._block, self._block)
        if not block or len(raw) < self._block:
            raise FileSystemUnreadable("a node of its blocks is outside of its file system")
        return raw

    def _blocks(self, raw: bytes, wanted: int) -> Iterator[tuple[int, int, int]]:
        """The older way: twelve blocks, and trees of one, two and three levels; 0 is a hole."""
        numbers = struct.unpack_from("<15I", raw)
        yield from self._joined((i, n) for i, n in enumerate(numbers[:DIRECT]) if n and i < wanted)
        first, per = DIRECT, self._block // 4
        for level, number in enumerate(numbers[DIRECT:], 1):
            if number and first < wanted:
                yield from self._joined(self._tree(number, level, first, wanted))
            first += per**level

    def _tree(self, number: int, level: int, first: int, wanted: int) -> Iterator[tuple[int, int]]:
        per = self._block // 4
        step = per ** (level - 1)
        for i, below in enumerate(struct.unpack(f"<{per}I", self._node(number))):
            at = first + i * step
            if at >= wanted:
                return
            if below and level == 1:
                yield at, below
            elif below:
                yield from self._tree(below, level - 1, at, wanted)

    @staticmethod
    def _joined(blocks: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        run: tuple[int, int, int] | None = None
        for at, number in blocks:
            if run and at == run[0] + run[2] and number == run[1] + run[2]:
                run = (run[0], run[1], run[2] + 1)
                continue
            if run:
                yield run
            run = (at, number, 1)
        if run:
            yield run

    def pieces(self, node: Any, most: int) -> Iterator[tuple[int, bytes]]:
        if node.inode.i_flags & c_ext.EXT4_INLINE_DATA_FL:
            return iter([(0, self._inline(node))] if node.size else [])
        return pieces(self.window, self.runs(node), node.size, most)

    def _inline(self, node: Any) -> bytes:
        """What is in the inode itself, and behind that in an attribute."""
        data = bytes(node.inode.i_block)[: node.size]
        if node.size > len(data):
            data += b"".join(a.value for a in node.xattr if a.name == "system.data")
        if len(data) < node.size:
            raise FileSystemUnreadable("what it holds inside its inode is not whole")
        return data[: node.size]

    @staticmethod
    def _refuse(node: Any) -> None:
        if node.inode.i_flags & ENCRYPTED:
            raise FileSystemUnreadable("it is encrypted by its file system")


def open_one(window: Window) -> Ext:
    """Raises what dissect raises on a broken one."""
    return Ext(window)
