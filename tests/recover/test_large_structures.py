"""What grows beyond an inode: the kernel (and ntfs-3g) wrote it, and what they read is what we read, byte for byte.

B+trees of XFS for folders and for files of thousands of extents, indexes of NTFS and records beside records, every compression
of btrfs.  What is compressed in a way that nobody here knows is refused by name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dissect.xfs.c_xfs import c_xfs

from hvbackup.errors import FileSystemUnreadable
from hvbackup.model import KiB, MiB
from hvbackup.recover import browse
from hvbackup.recover.browse import Found, Kind, Volumes
from hvbackup.recover.filesystems import btrfs
from tests.endtoend.mounts import needs_mount
from tests.recover.filesystems import run

pytestmark = [pytest.mark.real, needs_mount]

NAME = "a long name, of which a large folder has very many {:06} " + "x" * 60


class Mapped:
    """An image as a disk; it is not in memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._map[offset : offset + len(buffer)]


def blank(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextlib.contextmanager
def mounted(image: Path, *options: str) -> Iterator[Path]:
    """By the kernel.  All is in its place on the disk before it is unmounted, for somebody may keep it mounted elsewhere."""
    folder = image.with_suffix(".mounted")
    folder.mkdir()
    run("mount", "-o", ",".join(["loop", *options]), image, folder)
    try:
        yield folder
        run("mount", "-o", "remount,ro", folder)
    finally:
        run("umount", folder)


@contextlib.contextmanager
def mounted_by_ntfs_3g(image: Path) -> Iterator[Path]:
    folder = image.with_suffix(".mounted")
    folder.mkdir()
    words = ["ntfs-3g", "-o", "no_detach,compression", str(image), str(folder)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as daemon:
        while not os.path.ismount(folder):
            assert daemon.poll() is None
        try:
            yield folder
        finally:
            run("umount", folder)
            daemon.wait(120)


def read_all(volumes: Volumes) -> dict[str, bytes]:
    """Every file by its path: found once, for to look for each would read a large folder as often as it has files."""
    found = [f for f in volumes.walk(volumes.find("/0")) if volumes.facts(f).kind is Kind.FILE]
    return {f.path.removeprefix("/0/"): content(volumes, f) for f in found}


def content(volumes: Volumes, found: Found) -> bytes:
    data = bytearray(volumes.file_size(found))
    for offset, piece in volumes.pieces(found):
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(path: Path, *parts: tuple[int, bytes], size: int | None = None, synced: bool = False) -> None:
    """Each part at its place, in this order; the file ends where it is told to."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for offset, data in parts:
        os.pwrite(fd, data, offset)
        if synced:
            os.fsync(fd)
    if size is not None:
        os.ftruncate(fd, size)
    os.close(fd)


def fill(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        os.close(os.open(folder / NAME.format(i), os.O_CREAT | os.O_WRONLY))


def test_trees_of_xfs(tmp_path: Path) -> None:
    """A folder and a file that each need a tree of extents, also one that was emptied for the most part, and shared extents."""
    image, rng = blank(tmp_path / "xfs", 320 * MiB), random.Random(3)
    run("mkfs.xfs", "-q", "-f", image)
    with mounted(image) as at:
        fill(at / "large", 12_000)
        fill(at / "emptied", 4000)
        for i in range(4000):
            if i % 50:
                (at / "emptied" / NAME.format(i)).unlink()
        write(at / "scattered", *((i * 8 * KiB, rng.randbytes(4 * KiB)) for i in range(3000)), size=3000 * 8 * KiB + 5)
        run("fallocate", "-l", "8M", at / "reserved")
        write(at / "reserved", *((i * 64 * KiB + 3, b"here") for i in range(100)))
        run("cp", "--reflink=always", at / "scattered", at / "shared")
        write(at / "shared", *((i * 80 * KiB, rng.randbytes(5000)) for i in range(200)))
        wanted = on_disk(at)
    volumes = browse.open(Mapped(image))
    for path in ("large", "scattered", "shared"):
        node = volumes.find(f"/0/{path}").node
        assert node.inode.di_format == c_xfs.xfs_dinode_fmt.XFS_DINODE_FMT_BTREE, "it is what this is about"
    assert read_all(volumes) == wanted
    assert len(wanted) == 12_000 + 80 + 3


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_what_was_never_written_reads_as_zeroes(tmp_path: Path, kind: str) -> None:
    """Room that was reserved where another file's bytes were: nobody ever reads those."""
    image = blank(tmp_path / kind, 320 * MiB)
    run(f"mkfs.{kind}", "-q", image)
    with mounted(image) as at:
        free = os.statvfs(at).f_bavail * os.statvfs(at).f_frsize
        write(at / "secret", *((i * MiB, b"secret!!" * (128 * KiB)) for i in range((free - 8 * MiB) // MiB)))
        run("sync", "-f", at)
        (at / "secret").unlink()
        run("sync", "-f", at)
        run("fallocate", "-l", "40M", at / "reserved")
        write(at / "reserved", *((i * 4 * MiB + 100_000, b"here") for i in range(10)))
    volumes = browse.open(Mapped(image))
    found = content(volumes, volumes.find("/0/reserved"))
    assert found.count(b"here") == 10
    assert found.replace(b"here", bytes(4)) == bytes(40 * MiB)


def test_indexes_and_many_records_of_ntfs(tmp_path: Path) -> None:
    """A folder whose index is a tree with removed names in it; files whose runs need records of their own; compressed files."""
    image, rng = blank(tmp_path / "ntfs", 64 * MiB), random.Random(4)
    words = [rng.randbytes(6) for _ in range(300)]
    run("mkntfs", "-q", "-F", "-s", "512", image)
    with mounted_by_ntfs_3g(image) as at:
        fill(at / "large", 3000)
        for i in range(0, 3000, 3):
            (at / "large" / NAME.format(i)).unlink()
        write(at / "scattered", *((i * 8 * KiB, rng.randbytes(4 * KiB)) for i in range(2500)), size=2500 * 8 * KiB + 5)
        packed = at / "packed"
        packed.mkdir()
        attributes = int.from_bytes(os.getxattr(packed, "system.ntfs_attrib"), "little")
        os.setxattr(packed, "system.ntfs_attrib", (attributes | 0x800).to_bytes(4, "little"))
        for name, size in (("text", 1_500_001), ("short", 300), ("unit", 65_536)):
            (packed / name).write_bytes(text(rng, words, size))
        (packed / "mixed").write_bytes(text(rng, words, 200_000) + rng.randbytes(200_000) + bytes(300_000) + b"end")
        wanted = on_disk(at)
    volumes = browse.open(Mapped(image))
    assert len(volumes.find("/0/scattered").node.attributes.find("", 0x80)) > 1, "it is what this is about"
    assert read_all(volumes) == wanted
    assert len(wanted) == 2000 + 1 + 4


def text(rng: random.Random, words: list[bytes], size: int) -> bytes:
    """Something that can be compressed."""
    return b"".join(rng.choices(words, k=size // 6 + 1))[:size]


@pytest.fixture(scope="module", params=["zlib", "lzo", "zstd"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A btrfs with that compression, and what the kernel reads from it."""
    image, rng = blank(tmp_path_factory.mktemp("packed") / "btrfs", 160 * MiB), random.Random(5)
    words = [rng.randbytes(6) for _ in range(300)]
    run("mkfs.btrfs", "-q", "-f", image)
    with mounted(image, f"compress-force={request.param}") as at:

        def some(size: int) -> bytes:
            return text(rng, words, size)

        for name, size in (("text", 3_000_001), ("inside", 1500), ("page", 4096), ("odd", 131_073)):
            (at / name).write_bytes(some(size))
        for name, size in (("grown inside", 1500), ("grown", 131_073)):  # their last blocks were not full
            write(at / name, (0, some(size)), synced=True)
            os.truncate(at / name, 1 * MiB)
        (at / "mixed").write_bytes(some(300_000) + rng.randbytes(300_000) + bytes(500_000) + some(100_000))
        write(at / "holes", *((i * 200_000, some(5000)) for i in range(60)), size=60 * 200_000 + 7)
        write(
            at / "rewritten", (0, some(1_000_000)), *((i * 7 % 240 * 4096, some(4096)) for i in range(40)), synced=True
        )
        write(at / "stale", (0, rng.randbytes(8 * MiB)), synced=True)
        (at / "stale").unlink()
        run("fallocate", "-l", "9M", at / "reserved")
        write(at / "reserved", (1 * MiB, b"x" * 5000))
        run("cp", "--reflink=always", at / "text", at / "cloned")
        write(at / "cloned", (100_000, b"y" * 5000))
        run("btrfs", "-q", "subvolume", "create", at / "sub")
        (at / "sub" / "page").write_bytes(some(4096))
        os.sync()
        wanted = on_disk(at)
    return image, wanted


def test_compressed_files_of_btrfs(packed: tuple[Path, dict[str, bytes]]) -> None:
    image, wanted = packed
    volumes = browse.open(Mapped(image))
    stream = volumes.find("/0/text").node.open()
    assert all(extent.compression for extent in stream.extents), "it is what this is about"
    assert read_all(volumes) == wanted
    assert len(wanted) == 12


@pytest.mark.parametrize("change", ["shorter", "unknown", "encrypted", "too large"])
def test_what_is_compressed_wrongly_is_refused(packed: tuple[Path, dict[str, bytes]], change: str) -> None:
    """What an extent holds is less than it should, or nobody knows how to read it: an error, and not some bytes."""
    volumes = browse.open(Mapped(packed[0]))
    found = volumes.find("/0/text")
    stream = found.node.open()
    changes: dict[str, Callable[[object], dict[str, int]]] = {
        "shorter": lambda e: {"length": e.length + 4096},  # type: ignore[attr-defined]
        "unknown": lambda _: {"compression": 4},
        "encrypted": lambda _: {"encryption": 1},
        "too large": lambda _: {"disk_length": 1 << 40},
    }
    stream.extents = [e._replace(**changes[change](e)) for e in stream.extents]
    found.node.open = lambda: stream
    with pytest.raises(FileSystemUnreadable, match="/0/text can't be read"):
        list(volumes.pieces(found))


def test_a_frame_of_zstd_is_whole_and_no_larger_than_an_extent() -> None:
    import zstandard

    small, huge = zstandard.compress(b"x" * 9000), zstandard.compress(bytes(256 * MiB))
    assert btrfs.unpacked(small + bytes(4000), btrfs.ZSTD, 0, 4096) == b"x" * 9000
    for broken in (small[:-1], huge, b""):
        with pytest.raises(FileSystemUnreadable, match="not whole, or holds more"):
            btrfs.unpacked(broken, btrfs.ZSTD, 0, 4096)
