"""FAT12, FAT16 and FAT32."""

from __future__ import annotations

import calendar
from collections.abc import Iterator, Sequence
from typing import Any

from dissect.fat import FATFS
from dissect.fat.fat import DirectoryEntry, EmptyDirectoryError, LastEmptyDirectoryError
from dissect.util.stream import RangeStream

from hvbackup.errors import FileSystemUnreadable
from hvbackup.model import SECOND, Instant
from hvbackup.recover.browse import Facts, Kind
from hvbackup.recover.filesystems import pieces
from hvbackup.recover.window import Run, RunFile, Window

ENTRY_BYTES = 32
FOLDER_MOST = 65536 * ENTRY_BYTES
NOTE = "times are the machine's local time"


class Fat:
    """One of them."""

    case_counts = False

    def __init__(self, window: Window) -> None:
        self.window = window
        self._fs = FATFS(window)
        self._cluster: int = self._fs.cluster_size
        self._data = self._fs.first_data_sector * self._fs.sector_size
        self._clusters = min(self._fs.fat.entry_count, (window.size - self._data) // self._cluster + 2)
        self.root: Any = self._fs.root
        self.notes = [NOTE]

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        table = self._folder(node)
        while table.tell() < min(table.size, FOLDER_MOST):
            try:
                entry = DirectoryEntry(self._fs, table, node)
            except EmptyDirectoryError:
                continue
            except (LastEmptyDirectoryError, EOFError):
                return
            if not entry.is_volume_id():
                yield _name(entry), entry

    def _folder(self, node: Any) -> Any:
        """The table of a folder."""
        if node is self.root and node.cluster is None:
            stream = node.open()  # FAT12 and FAT16: in a place of its own
            return RangeStream(self.window, stream.offset, node.size)
        runs = self.runs(node)
        return RunFile(self.window, runs, sum(n for _, n in runs))

    def facts(self, node: Any) -> Facts:
        if node is self.root:
            return Facts(Kind.FOLDER)
        kind = Kind.FOLDER if node.is_directory() else Kind.FILE
        size = node.dirent.DIR_FileSize if kind is Kind.FILE else 0
        return Facts(kind, size, None, self._mtime(node))

    @staticmethod
    def _mtime(node: Any) -> Instant | None:
        date, time = node.dirent.DIR_WrtDate, node.dirent.DIR_WrtTime
        year, month, day = 1980 + (date >> 9), date >> 5 & 15, date & 31
        if not 1 <= month <= 12 or not 1 <= day <= 31:
            return None
        seconds = calendar.timegm((year, month, day, time >> 11, time >> 5 & 63, (time & 31) * 2, 0, 0, 0))
        return Instant(seconds * SECOND)

    def key(self, node: Any) -> Any:
        return node.cluster

    def runs(self, node: Any) -> Sequence[Run]:
        found: list[tuple[int, int]] = []
        whole = node is self.root or node.is_directory()
        wanted = self._clusters if whole else -(-node.dirent.DIR_FileSize // self._cluster)
        for cluster in self._chain(node.cluster, wanted, whole=whole):
            at = self._data + (cluster - 2) * self._cluster
            if found and found[-1][0] + found[-1][1] == at:
                found[-1] = (found[-1][0], found[-1][1] + self._cluster)
            else:
                found.append((at, self._cluster))
        return found

    def _chain(self, cluster: int, wanted: int, *, whole: bool) -> Iterator[int]:
        """As many clusters as a file has bytes for, or a whole folder's."""
        table, end = self._fs.fat, 0x0FFFFFF8 & ((1 << self._fs.fat.bits_per_entry) - 1)
        seen = set[int]()
        while len(seen) < wanted:
            if cluster >= end and whole and seen:
                return
            if not 2 <= cluster < self._clusters or cluster in seen:
                raise FileSystemUnreadable("its chain of clusters is broken, or leads in circles")
            seen.add(cluster)
            yield cluster
            self.window.allow()
            cluster = table.get(cluster)

    def pieces(self, node: Any, most: int) -> Iterator[tuple[int, bytes]]:
        return pieces(self.window, self.runs(node), node.dirent.DIR_FileSize, most)


def _name(entry: Any) -> str:
    """Short names are in capitals; two bits say what Windows shows in small letters instead."""
    if entry.ldirents:
        return str(entry.name)
    base, dot, extension = str(entry.name).partition(".")
    how = entry.dirent.DIR_NTRes
    return (base.lower() if how & 0x08 else base) + dot + (extension.lower() if how & 0x10 else extension)


def open_one(window: Window) -> Fat:
    """Raises what dissect raises on a broken one."""
    return Fat(window)
