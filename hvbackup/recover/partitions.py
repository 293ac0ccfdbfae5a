"""Where file systems are on a disk, and of which kind each is: what their first bytes say."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from hvbackup.model import KiB
from hvbackup.recover.window import Window

# GPT header: signature, revision, header size, crc, reserved, own and other LBA, first and last usable, disk, entries, their
# number and size
GPT = struct.Struct("<8sIIIIQQQQ16sQII")
GPT_ENTRY = struct.Struct("<16s16sQQQ72s")  # type, its own id, first and last LBA, flags, name
MBR_ENTRY = struct.Struct("<B3sB3sII")  # boot flag, CHS, type, CHS, first LBA, sectors
EXTENDED = (0x05, 0x0F, 0x85)
PROTECTIVE = 0xEE
MOST = 256  # partitions
SECTORS = (512, 4096)

AT_START = (  # (offset, magic, kind): file systems that have the first sector for themselves
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (3, b"-FVE-FS-", "bitlocker"),
    (3, b"ReFS", "refs"),
    (0, b"XFSB", "xfs"),
    (0, b"LUKS\xba\xbe", "luks"),
    (54, b"FAT1", "fat"),
    (54, b"FAT  ", "fat"),
    (82, b"FAT32", "fat"),
)
BEHIND = (  # and those that leave it alone
    (1080, b"\x53\xef", "ext"),
    (64 * KiB + 64, b"_BHRfS_M", "btrfs"),
    (512, b"LABELONE", "lvm"),
    (4086, b"SWAPSPACE2", "swap"),
    (32 * KiB + 1, b"CD001", "iso9660"),
    (4096, b"\xfc\x4e\x2b\xa9", "raid"),
)
READABLE = ("ext", "ntfs", "fat", "xfs", "btrfs")


@dataclass(frozen=True, slots=True)
class Part:
    """A partition; number 0 is a disk that has none."""

    number: int
    start: int
    size: int
    kind: str  # of what is in it, empty when unknown
    name: str = ""


def parts(disk: Window, sector: int) -> list[Part]:
    """Every partition, in the order of their numbers.  Raises ChunkDamaged."""
    whole = kind_of(disk, 0, AT_START)
    if not whole:
        sizes = (sector, *(s for s in SECTORS if s != sector))
        found = next(filter(None, (list(_gpt(disk, s)) or list(_mbr(disk, s)) for s in sizes)), [])
        if found:
            return sorted(found, key=lambda p: p.number)
    return [Part(0, 0, disk.size, whole or kind_of(disk, 0, BEHIND))]


def kind_of(disk: Window, start: int, known: tuple[tuple[int, bytes, str], ...] = AT_START + BEHIND) -> str:
    """The kind of file system that begins there, or nothing."""
    for offset, magic, kind in known:
        if disk.read_at(start + offset, len(magic)) == magic:
            return kind
    return ""


def _part(disk: Window, number: int, first: int, count: int, sector: int, name: str = "") -> Iterator[Part]:
    start, size = first * sector, count * sector
    if 0 < start < disk.size and size > 0:
        yield Part(number, start, min(size, disk.size - start), kind_of(disk, start), name)


def _gpt(disk: Window, sector: int) -> Iterator[Part]:
    raw = disk.read_at(sector, GPT.size)
    if len(raw) < GPT.size or not raw.startswith(b"EFI PART"):
        return
    *_, table, count, size = GPT.unpack(raw)
    if size < GPT_ENTRY.size or size > 4096:
        return
    for number in range(1, min(count, MOST) + 1):
        raw = disk.read_at(table * sector + (number - 1) * size, GPT_ENTRY.size)
        if len(raw) < GPT_ENTRY.size:
            return
        kind, _, first, last, _, name = GPT_ENTRY.unpack(raw)
        if uuid.UUID(bytes_le=kind).int:
            text = name.decode("utf-16-le", "replace").partition("\0")[0]
            yield from _part(disk, number, first, last - first + 1, sector, text)


def _entries(disk: Window, at: int) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four entries of a boot record, none where there is no such thing."""
    raw = disk.read_at(at, 512)
    if len(raw) < 512 or raw[510:] != b"\x55\xaa":
        return []
    found = [MBR_ENTRY.unpack_from(raw, 446 + 16 * i) for i in range(4)]
    return [(e[2], e[4], e[5]) for e in found] if all(e[0] in (0, 0x80) for e in found) else []


def _mbr(disk: Window, sector: int) -> Iterator[Part]:
    for number, (kind, first, count) in enumerate(_entries(disk, 0), 1):
        if kind in EXTENDED:
            yield from _logical(disk, sector, first)
        elif kind not in (0, PROTECTIVE):
            yield from _part(disk, number, first, count, sector)


def _logical(disk: Window, sector: int, base: int) -> Iterator[Part]:
    """Partitions inside an extended one: a chain of boot records, each naming one partition and the next record."""
    at, seen = base, set[int]()
    for number in range(5, MOST):
        if at in seen:
            return
        seen.add(at)
        entries = _entries(disk, at * sector)
        following = [first for kind, first, _ in entries if kind in EXTENDED]
        for kind, first, count in entries:
            if kind and kind not in EXTENDED:
                yield from _part(disk, number, at + first, count, sector)
        if not following:
            return
        at = base + following[0]
