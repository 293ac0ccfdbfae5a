"""NTFS."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from dissect.ntfs import NTFS
from dissect.ntfs.c_ntfs import ATTRIBUTE_TYPE_CODE
from dissect.ntfs.index import Index
from dissect.ntfs.mft import Mft, MftRecord
from dissect.ntfs.util import segment_reference

from hvbackup.errors import FileSystemUnreadable
from hvbackup.model import GiB, Instant, KiB, MiB
from hvbackup.recover.browse import Facts, Kind
from hvbackup.recover.filesystems import pieces
from hvbackup.recover.window import Run, RunFile, Window

DATA, INDEX = ATTRIBUTE_TYPE_CODE.DATA, ATTRIBUTE_TYPE_CODE.INDEX_ALLOCATION
NAMES = "$I30"  # the index of a folder
DOS_NAME = 2  # a second, short name of a file
OWN_RECORDS = 24  # the first ones are the file system's own files
IN_USE = 0x1
COMPRESSED, ENCRYPTED = 0x00FF, 0x4000  # of an attribute's flags
FOLDER_MOST = 1 * GiB
COMPRESSED_MOST = 256 * GiB
TICKS_TO_1970 = 116_444_736_000_000_000  # of 100 nanoseconds since 1601


class Ntfs:
    """One file system.  A node is a record of the file table."""

    case_counts = False

    def __init__(self, window: Window) -> None:
        self.window = window
        boot = io.BytesIO(window.read_at(0, 4 * KiB))
        self._fs = NTFS(boot=boot)  # and nothing else: its journals and security are of no use here
        self._fs.fh = window
        self._cluster: int = self._fs.cluster_size
        if not 512 <= self._cluster <= 2 * MiB or self._fs._record_size not in (512, 1024, 2048, 4096):
            raise FileSystemUnreadable("its boot sector makes no sense")
        self._fs.mft = self._table()
        self.root = self._fs.mft.root
        self.notes: list[str] = []

    def _table(self) -> Mft:
        """The file table, which may lie in many places, named in its own records."""
        first = MftRecord.from_fh(self.window, self._fs.boot_sector.MftStartLcn * self._cluster, ntfs=self._fs)
        part = first.attributes.find("", DATA)
        self._fs.mft = Mft(self._file(part), ntfs=self._fs)  # enough of it to find the rest
        del first.__dict__["attributes"]
        return Mft(self._file(first.attributes.find("", DATA)), ntfs=self._fs)

    def _file(self, attributes: Any) -> Any:
        """An attribute that lies on the disk, as a file."""
        return RunFile(self.window, self._runs(attributes), attributes.size())

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        allocation = node.attributes.find(NAMES, INDEX)
        if allocation and (allocation.size() > FOLDER_MOST or allocation[0].header.flags & COMPRESSED):
            raise FileSystemUnreadable(f"a folder claims {allocation.size()} bytes")
        index = Index(node, NAMES)
        if allocation:
            index._index_stream = self._file(allocation)
        for entry in self._entries(index, index.root.entries(), set()):
            record = self._record(entry)
            name = self._name(entry)
            if record is not None and name:
                yield name, record

    def _entries(self, index: Any, level: Iterator[Any], seen: set[int]) -> Iterator[Any]:
        """Of every node that the tree leads to: what is left of removed ones is not looked at."""
        for entry in level:
            if entry.is_node:
                vcn = int(entry.node_vcn)
                if vcn in seen:
                    raise FileSystemUnreadable("the index of a folder leads in circles")
                seen.add(vcn)
                yield from self._entries(index, index.index_buffer(vcn).entries(), seen)
            if entry.is_end:
                return
            yield entry

    @staticmethod
    def _name(entry: Any) -> str:
        """Empty for the short name that a file has besides its own."""
        length, space = entry.buf[64], entry.buf[65]
        raw = bytes(entry.buf[66 : 66 + 2 * length])
        return "" if space == DOS_NAME else raw.decode("utf-16-le", "surrogatepass")

    def _record(self, entry: Any) -> Any:
        reference = entry.header.FileReference
        number = segment_reference(reference)
        if number < OWN_RECORDS:
            return None
        record = self._fs.mft.get(number)
        if record.header.SequenceNumber != reference.SequenceNumber or not record.header.Flags & IN_USE:
            raise FileSystemUnreadable("a name leads to a record that is not its own")
        return record

    def facts(self, node: Any) -> Facts:
        kind, target = Kind.FOLDER if node.is_dir() else Kind.FILE, ""
        if node.is_symlink() or node.is_mount_point():
            kind, target = Kind.LINK, node.reparse_point_name or node.reparse_point_substitute_name
        data = node.attributes.find("", DATA)
        size = data.size() if kind is Kind.FILE and data else 0
        return Facts(kind, size, None, self._mtime(node), target)

    @staticmethod
    def _mtime(node: Any) -> Instant | None:
        known = node.attributes[ATTRIBUTE_TYPE_CODE.STANDARD_INFORMATION]
        if not known:
            return None
        return Instant((known[0].attribute.attr.LastModificationTime - TICKS_TO_1970) * 100)

    def key(self, node: Any) -> Any:
        return node.segment

    def runs(self, node: Any) -> Sequence[Run]:
        data = node.attributes.find("", DATA)
        return [] if not data or data.header.resident else self._runs(data)

    def _runs(self, attributes: Any) -> list[Run]:
        """Where an attribute is.  What was never written of it reads as zeroes, whatever is there."""
        parts = sorted((a for a in attributes if not a.header.resident), key=lambda a: a.header.lowest_vcn)
        if not parts:
            raise FileSystemUnreadable("it has no place on the disk")
        if parts[0].header.flags & ENCRYPTED:
            raise FileSystemUnreadable("it is encrypted by its file system")
        found: list[Run] = []
        vcn = 0
        for part in parts:
            if part.header.lowest_vcn != vcn:
                raise FileSystemUnreadable("a part of its runs is missing")
            for where, count in part.dataruns():
                self._check(where, count)
                found.append((None if where is None else where * self._cluster, count * self._cluster))
                vcn += count
        if parts[0].header.flags & COMPRESSED:
            return found
        return _cut(found, parts[0].header.header.Form.Nonresident.ValidDataLength)

    def _check(self, where: int | None, count: int) -> None:
        outside = where is not None and (
            where < 0 or (where + count) * self._cluster > self.window.size + self._cluster
        )
        if count <= 0 or outside:
            raise FileSystemUnreadable("its runs are outside of its file system")

    def pieces(self, node: Any, most: int) -> Iterator[tuple[int, bytes]]:
        data = node.attributes.find("", DATA)
        if not data:
            return iter(())
        size = data.size()
        if data.header.resident:
            return iter([(0, data.open().read())] if size else [])
        if data.header.flags & COMPRESSED:
            return self._compressed(data, size, most)
        return pieces(self.window, self._runs(data), size, most)

    def _compressed(self, data: Any, size: int, most: int) -> Iterator[tuple[int, bytes]]:
        if size > COMPRESSED_MOST or sum(n for _, n in self._runs(data)) > 2 * COMPRESSED_MOST:
            raise FileSystemUnreadable(f"it claims {size} compressed bytes")
        stream = data.open()
        for at in range(0, size, most):
            self.window.allow()
            data = stream.read(min(most, size - at))
            if len(data) < min(most, size - at):
                raise FileSystemUnreadable("a compressed part of it holds less than it should")
            yield at, data


def _cut(runs: Sequence[Run], valid: int) -> list[Run]:
    """The runs up to what was ever written."""
    found, at = list[Run](), 0
    for where, length in runs:
        length = min(length, valid - at)
        if length <= 0:
            break
        found.append((where, length))
        at += length
    return found


def open_one(window: Window) -> Ntfs:
    """Raises what dissect raises on a broken one."""
    return Ntfs(window)
