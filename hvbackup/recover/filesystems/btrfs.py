"""btrfs: one device, with compression and subvolumes."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Any

import zstandard
from dissect.btrfs import Btrfs as Reader
from dissect.btrfs import btrfs as reader
from dissect.btrfs.stream import ExtentStream, decode_extent

from hvbackup.errors import FileSystemUnreadable
from hvbackup.model import Instant, KiB
from hvbackup.recover.browse import Facts, Kind
from hvbackup.recover.window import Window

KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.FOLDER, stat.S_IFLNK: Kind.LINK}
LINK_MOST = 4 * KiB
NODE_MOST = 64 * KiB
PACKED_MOST = 128 * KiB  # what a compressed extent takes on the disk, and what it holds
FED_BYTES = 4 * KiB  # at once: what claims to hold gigabytes is given up before it does
PLAIN, ZLIB, LZO, ZSTD = range(4)


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
        if not isinstance(stream, ExtentStream):  # inside the tree
            yield 0, stream.read(min(most, node.size))
            return
        for extent in stream.extents:
            length = min(extent.length, node.size - at)
            if extent.disk_length and length > 0:  # else it is a hole
                found = self._plain if extent.compression == PLAIN else self._packed
                for offset, data in found(extent, length, most):
                    yield at + offset, data
            at += extent.length

    def _plain(self, extent: Any, length: int, most: int) -> Iterator[tuple[int, bytes]]:
        for at in range(0, length, most):
            yield at, self._bytes(extent.disk_offset + extent.offset + at, min(most, length - at))

    def _packed(self, extent: Any, length: int, _most: int) -> Iterator[tuple[int, bytes]]:
        if extent.disk_length > PACKED_MOST:
            raise FileSystemUnreadable(f"a part of it claims {extent.disk_length} compressed bytes")
        packed = self._bytes(extent.disk_offset, extent.disk_length)
        data = unpacked(packed, extent.compression, extent.encryption, self._fs.sector_size)
        data = data[extent.offset : extent.offset + length]
        if len(data) < length:
            raise FileSystemUnreadable("a compressed part of it holds less than it should")
        yield 0, data

    def _bytes(self, offset: int, length: int) -> bytes:
        self.window.allow()
        self._fs._logical_fh.seek(offset)
        data: bytes = self._fs._logical_fh.read(length)
        if len(data) < length:
            raise FileSystemUnreadable("a part of it lies behind the end of its file system")
        return data


def unpacked(packed: bytes, compression: int, encryption: int, sector: int) -> bytes:
    """What a compressed extent holds.  Raises FileSystemUnreadable where the way it was compressed is not known."""
    if compression > ZSTD or encryption:
        raise FileSystemUnreadable(f"it is compressed or encrypted in a way that is not known ({compression})")
    return _of_zstd(packed) if compression == ZSTD else decode_extent(packed, compression, encryption, sector)


def _of_zstd(packed: bytes) -> bytes:
    """One frame; what is behind it fills up a sector."""
    frame, data = zstandard.ZstdDecompressor().decompressobj(), bytearray()
    for at in range(0, len(packed), FED_BYTES):
        data += frame.decompress(packed[at : at + FED_BYTES])
        if frame.eof:
            return bytes(data)
        if len(data) > PACKED_MOST:
            break
    raise FileSystemUnreadable("a compressed part of it is not whole, or holds more than it may")


def open_one(window: Window) -> Btrfs:
    """Raises what dissect raises on a broken one."""
    reader.decode_extent = (
        unpacked  # for what is inside the tree: dissect has no zstd of its own, and lets the unknown through
    )
    return Btrfs(window)
