"""Files inside disks: real file systems read back byte for byte, broken and hostile ones end in an error with a name."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.errors import (
    ChunkDamaged,
    FileSystemUnreadable,
    HvbackupError,
    NotFound,
    PartlyFailed,
    StoreDamage,
    UsageError,
)
from hvbackup.model import SECOND, Disk, DiskId, Instant, KiB, MachineId, MiB, Token
from hvbackup.recover import affected, browse, filesystems
from hvbackup.recover.browse import Kind, Volumes
from hvbackup.recover.copyout import CopyOut
from hvbackup.store.journal.history import History
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.store import Store, init
from tests.recover.filesystems import MAKERS, ext, files_of, make_tree, run
from tests.store.test_history import commit_empty_point

pytestmark = pytest.mark.real


class Image:
    """A disk of bytes; ranges that are bad raise, as damaged chunks do."""

    def __init__(self, data: bytes | bytearray, bad: tuple[tuple[int, int], ...] = ()) -> None:
        self.data, self.size, self.bad = data, len(data), bad

    def read_into(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        assert 0 <= offset <= end <= self.size
        if any(start < end and offset < start + length for start, length in self.bad):
            raise ChunkDamaged("chunk 4711 is damaged")
        buffer[:] = self.data[offset:end]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tree(tmp_path_factory.mktemp("tree"))
    (folder / "bin").symlink_to("usr/bin")
    (folder / "many/up").symlink_to("../etc/hosts")
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture(scope="module")
def images(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every kind of file system with the tree in it; FAT12 with as much as it has room for."""
    folder, found = tmp_path_factory.mktemp("images"), dict[str, bytes]()
    small = folder / "small"
    for name, make in MAKERS.items():
        image = folder / name
        if name == "fat12":
            for part in ("etc", "usr/bin"):
                (small / part).mkdir(parents=True)
            for part in ("etc/hosts", "usr/bin/prog", "empty"):
                (small / part).write_bytes((tree / part).read_bytes())
        make(small if name == "fat12" else tree, image)
        found[name] = image.read_bytes()
        image.unlink()
    return found


def opened(data: bytes | bytearray, bad: tuple[tuple[int, int], ...] = ()) -> Volumes:
    return browse.open(Image(data, bad))


def contents(volumes: Volumes, top: str) -> dict[str, bytes]:
    """Every file below a folder, by its path from there."""
    found = volumes.walk(volumes.find(top))
    files = [f.path for f in found if volumes.facts(f).kind is Kind.FILE]
    return {path.removeprefix(f"{top}/"): b"".join(volumes.read(path)) for path in files}


@pytest.mark.parametrize("kind", MAKERS)
def test_files_read_back_as_they_were_put_in(kind: str, tree: Path, images: dict[str, bytes]) -> None:
    volumes = opened(images[kind])
    found = contents(volumes, "/0")
    wanted = dict(files_of(tree))
    if kind == "fat12":
        wanted = {name: wanted[name] for name in ("etc/hosts", "usr/bin/prog", "empty")}
    elif kind.startswith("fat"):
        wanted["many/up"] = wanted["etc/hosts"]  # a link, which mcopy follows
    elif kind == "ntfs":
        wanted = {name: data for name, data in wanted.items() if "/" not in name}
    elif kind == "xfs":
        wanted = {name: data for name, data in wanted.items() if " " not in name}
    assert found == wanted
    assert len(found) > 2


@pytest.mark.parametrize("kind", ["ext2", "ext4", "xfs", "btrfs"])
def test_links_are_followed_on_the_way_and_shown_at_the_end(kind: str, tree: Path, images: dict[str, bytes]) -> None:
    volumes = opened(images[kind])
    assert volumes.stat("/0/bin/prog").path == "/0/usr/bin/prog"
    assert b"".join(volumes.read("/0/many/../bin/prog")) == (tree / "usr/bin/prog").read_bytes()
    entry = volumes.stat("/0/many/up")
    assert (entry.kind, entry.target) == (Kind.LINK, "../etc/hosts")
    with pytest.raises(UsageError, match="is no file, it is a link, to"):
        list(volumes.read("/0/many/up"))
    with pytest.raises(FileSystemUnreadable, match="circles"):
        volumes.stat("/0/loop/x")
    with pytest.raises(NotFound, match="there is no nothing in /0/usr/bin"):
        volumes.stat("/0/bin/nothing")


def test_what_a_listing_says(tree: Path, images: dict[str, bytes]) -> None:
    volumes = opened(images["ext4"])
    [part] = volumes.list("/")
    assert (part.path, part.kind, part.note, part.size) == ("/0", Kind.FOLDER, "ext", len(images["ext4"]))
    by_name = {e.name: e for e in volumes.list("/0/etc")}
    status = (tree / "etc/shadow").stat()
    shadow = by_name["shadow"]
    assert (shadow.mode, shadow.size) == (stat.S_IMODE(status.st_mode), status.st_size)
    assert shadow.mtime is not None
    assert shadow.mtime // 10**9 == int(status.st_mtime)
    assert volumes.stat("/").kind is Kind.FOLDER
    assert [e.name for e in volumes.list("/0/etc/hosts")] == ["hosts"], "a file lists itself"


def test_content_inside_an_inode(tmp_path: Path, tree: Path) -> None:
    ext("ext4", "-O", "inline_data")(tree, tmp_path / "image")
    volumes = opened((tmp_path / "image").read_bytes())
    assert b"".join(volumes.read("/0/tiny")) == (tree / "tiny").read_bytes()
    with pytest.raises(FileSystemUnreadable, match="/0/etc can't be read: a folder inside its inode is not understood"):
        volumes.list("/0/etc")


def test_names_of_windows_are_found_in_any_case(images: dict[str, bytes]) -> None:
    for kind in ("ntfs", "fat32"):
        assert opened(images[kind]).stat("/0/LARGE.bin").size == 3 * MiB + 17
    with pytest.raises(NotFound):
        opened(images["ext4"]).stat("/0/LARGE.bin")


# -- partitions ------------------------------------------------------------------------------------------------------------


def partitioned(folder: Path, label: str, lines: str, parts: dict[int, bytes], size: int = 80 * MiB) -> bytearray:
    """A disk that sfdisk has partitioned."""
    disk = folder / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, size)
    script = folder / "script"
    script.write_text(f"label: {label}\n{lines}")
    run("sh", "-c", f"sfdisk -q {disk} < {script}")
    data = bytearray(disk.read_bytes())
    for start, content in parts.items():
        data[start : start + len(content)] = content
    return data


def test_a_disk_with_gpt(tmp_path: Path, images: dict[str, bytes]) -> None:
    lines = "start=2048, size=49152, name=root\nstart=51200, size=49152\nstart=100352, size=2048\n"
    data = partitioned(tmp_path, "gpt", lines, {2048 * 512: images["ext4"], 51200 * 512: images["ntfs"]})
    volumes = opened(data)
    assert [(e.path, e.note) for e in volumes.list("/")] == [("/1", "ext, root"), ("/2", "ntfs"), ("/3", "unknown")]
    assert [e.size for e in volumes.list("/")] == [49152 * 512, 49152 * 512, 2048 * 512]
    assert b"".join(volumes.read("/1/etc/hosts")) == b"127.0.0.1 localhost\n"
    assert volumes.stat("/2/large.bin").size == 3 * MiB + 17
    with pytest.raises(FileSystemUnreadable, match=r"/3 holds nothing that is known"):
        volumes.list("/3")
    with pytest.raises(NotFound, match=r"There is no partition 4 on this disk; it has /1 \(ext\)"):
        volumes.list("/4/etc")


def test_a_disk_with_mbr_and_logical_partitions(tmp_path: Path, images: dict[str, bytes]) -> None:
    lines = "start=2048, size=49152, type=83\nstart=51200, size=100000, type=5\n"
    lines += "start=53248, size=49152, type=83\nstart=104448, size=24576, type=6\n"
    data = partitioned(tmp_path, "dos", lines, {53248 * 512: images["ext3"], 104448 * 512: images["fat16"]})
    volumes = opened(data)
    assert [(e.path, e.note) for e in volumes.list("/")] == [("/1", "unknown"), ("/5", "ext"), ("/6", "fat")]
    assert b"".join(volumes.read("/5/etc/hosts")) == b"".join(volumes.read("/6/etc/hosts"))


# -- damage ----------------------------------------------------------------------------------------------------------------


def test_a_damaged_chunk_is_an_error_and_never_zeroes(tree: Path, images: dict[str, bytes]) -> None:
    for kind in ("ext4", "fat32", "ntfs", "xfs", "btrfs"):
        data = images[kind]
        at = data.index((tree / "large.bin").read_bytes()[2 * MiB : 2 * MiB + 512])
        volumes = opened(data, bad=((at // (64 * KiB) * 64 * KiB, 64 * KiB),))
        with pytest.raises(ChunkDamaged, match=r"/0/large.bin.*4711"):
            list(volumes.read("/0/large.bin"))
        assert b"".join(volumes.read("/0/sparse")) == (tree / "sparse").read_bytes(), "the others are whole"


def test_damage_of_what_describes_files_is_damage(images: dict[str, bytes]) -> None:
    with pytest.raises(ChunkDamaged):
        opened(images["ext4"], bad=((0, 64 * KiB),)).list("/0")


def test_damage_that_a_reader_swallows_is_told(images: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes a folder it can't read for an empty one: the error below it counts, and not what it made of that."""
    volumes = opened(images["ext4"])
    system = volumes.find("/0").system

    def swallowing(_: object) -> Iterator[tuple[str, object]]:
        volumes._view.bad = ((0, len(images["ext4"])),)  # type: ignore[attr-defined]
        with contextlib.suppress(HvbackupError):
            system.window.read_at(20 * MiB, MiB)
        return iter(())

    monkeypatch.setattr(system, "children", swallowing)
    with pytest.raises(ChunkDamaged, match=r"/0: .*4711"):
        volumes.list("/0")


def read_through(volumes: Volumes) -> None:
    """Everything there is is read and dropped; where a file claims much, the first of it."""
    for found in volumes.walk(volumes.find("/0")):
        if volumes.facts(found).kind is Kind.FILE:
            for _ in itertools.islice(volumes.pieces(found), 20):
                pass


@pytest.mark.parametrize("kind", ["ext2", "ext4", "fat32", "ntfs", "xfs", "btrfs"])
def test_broken_file_systems_end_in_an_error_with_a_name(kind: str, images: dict[str, bytes]) -> None:
    """Bytes of the structures are changed, or the end is cut off: whatever comes out, it ends, and without a traceback."""
    rng, named = random.Random(kind), 0
    whole = images[kind]
    used = [i for i in range(0, len(whole), 512) if any(whole[i : i + 512])][:600]
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 4, 40])):
            at = rng.choice(used) + rng.randrange(512)
            data[at : at + 4] = rng.choice(
                [rng.randbytes(4), b"\xff\xff\xff\xff", bytes(4), struct.pack("<I", at // 512)]
            )
        del data[rng.choice([len(data), len(data), rng.randrange(len(data))]) :]
        try:
            read_through(opened(data))
        except HvbackupError:
            named += 1
    assert named > 5, "the changes hit nothing"


def test_a_moment_of_a_journal(tmp_path: Path, tree: Path, images: dict[str, bytes]) -> None:
    """The file system came through the journal, and so did a later change of a file: each moment has its own bytes."""
    image, machine, disk = images["ext4"], MachineId("m1"), DiskId("vda")
    init(tmp_path / "store", None)
    with Store.open(tmp_path / "store", tmp_path / "state", [], owner=True) as store:
        commit_empty_point(store, len(image))
        rec = Recorder(store, machine, [Disk(disk, len(image))])
        for at in range(0, len(image), MiB):
            piece = image[at : at + MiB]
            if any(piece):
                rec.write(disk, Instant(SECOND), [(at, len(piece))], piece)
        first = rec.barrier(Instant(SECOND), {disk: Token("fake", "1")})
        rec.write(disk, Instant(2 * SECOND), [(image.index(b"127.0.0.1 local"), 9)], b"127.9.9.9")
        second = rec.barrier(Instant(2 * SECOND), {disk: Token("fake", "2")})
        rec.close()
        history = History(store, machine)
        for seq, address in ((first, b"127.0.0.1"), (second, b"127.9.9.9")):
            volumes = browse.open(history.view(history.by_seq(seq), disk))
            assert b"".join(volumes.read("/0/etc/hosts")) == address + b" localhost\n"
            assert b"".join(volumes.read("/0/large.bin")) == (tree / "large.bin").read_bytes()


def test_a_folder_within_itself(tmp_path: Path) -> None:
    """A FAT in which a folder lies in itself, as a broken chain of folders may have it."""
    (tmp_path / "tree/in/side").mkdir(parents=True)
    MAKERS["fat16"](tmp_path / "tree", tmp_path / "image")
    data = bytearray((tmp_path / "image").read_bytes())
    outer, inner = data.index(b"IN         ") + 26, data.index(b"SIDE       ") + 26
    data[inner : inner + 2] = data[outer : outer + 2]
    with pytest.raises(FileSystemUnreadable, match="folders lead in circles"):
        read_through(opened(data))
    assert isinstance(copy_out(opened(data), "/0/in", tmp_path / "to").done.verdict(), PartlyFailed)


# -- copying out -----------------------------------------------------------------------------------------------------------


def copy_out(volumes: Volumes, path: str, to: Path, *, force: bool = False) -> CopyOut:
    out = CopyOut(volumes, lambda _: None, force=force)
    out.copy(volumes.find(path), to)
    return out


def test_a_folder_is_copied_whole(tmp_path: Path, tree: Path, images: dict[str, bytes]) -> None:
    out = copy_out(opened(images["ext4"]), "/0", tmp_path / "to")
    assert out.done.verdict() is None
    copied = tmp_path / "to/0"
    assert files_of(copied) == files_of(tree)
    assert os.readlink(copied / "bin") == "usr/bin"
    assert stat.S_IMODE((copied / "etc/shadow").stat().st_mode) == 0o600, "without setuid"
    assert int((copied / "etc/shadow").stat().st_mtime) == int((tree / "etc/shadow").stat().st_mtime)
    assert (copied / "sparse").stat().st_blocks * 512 < 5 * MiB


def test_nothing_is_overwritten_unless_that_was_said(tmp_path: Path, images: dict[str, bytes]) -> None:
    volumes = opened(images["ext4"])
    (tmp_path / "hosts").write_text("mine")
    with pytest.raises(UsageError, match="say --force"):
        copy_out(volumes, "/0/etc/hosts", tmp_path)
    assert (tmp_path / "hosts").read_text() == "mine"
    (tmp_path / "elsewhere").write_text("mine too")
    (tmp_path / "hosts").unlink()
    (tmp_path / "hosts").symlink_to("elsewhere")
    copy_out(volumes, "/0/etc/hosts", tmp_path, force=True)
    assert (tmp_path / "hosts").read_text() == "127.0.0.1 localhost\n"
    assert (tmp_path / "elsewhere").read_text() == "mine too", "a link is replaced, not written through"


def renamed(data: bytes, old: bytes, new: bytes) -> bytearray:
    """A file system in which a name was written over, as a hostile guest may."""
    assert len(old) == len(new)
    assert old in data
    return bytearray(data.replace(old, new))


def test_hostile_names_lead_nowhere(tmp_path: Path, images: dict[str, bytes]) -> None:
    data = renamed(images["ext2"], b"file 149", b"../../x1")
    out = copy_out(opened(data), "/0/many", tmp_path / "in/side")
    assert isinstance(out.done.verdict(), PartlyFailed)
    assert [path for path, _ in out.done.failed] == ["/0/many/deep/a rather long name of ../../x1"]
    assert len(list((tmp_path / "in/side/many/deep").iterdir())) == 149
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_name_that_is_there_twice_is_written_once(tmp_path: Path, images: dict[str, bytes]) -> None:
    """The second could be a folder behind a link that the first made."""
    data = renamed(images["ext2"], b"name of file 149", b"name of file 148")
    out = copy_out(opened(data), "/0/many", tmp_path)
    assert [path for path, _ in out.done.failed] == ["/0/many/deep/a rather long name of file 148"]


def test_of_a_damaged_file_nothing_is_left_and_the_others_are_there(
    tmp_path: Path, tree: Path, images: dict[str, bytes]
) -> None:
    data = images["ext4"]
    at = data.index((tree / "large.bin").read_bytes()[2 * MiB : 2 * MiB + 512])
    out = copy_out(opened(data, bad=((at, 1),)), "/0", tmp_path)
    assert isinstance(out.done.verdict(), StoreDamage)
    wanted = dict(files_of(tree))
    del wanted["large.bin"]
    assert files_of(tmp_path / "0") == wanted


def test_without_the_readers_there_is_a_word_on_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, images: dict[str, bytes]
) -> None:
    monkeypatch.setattr(filesystems, "READERS", {"ext": "nosuchreader"})
    with pytest.raises(UsageError, match=r"pip install 'hvbackup\[files\]'"):
        opened(images["ext4"])


@pytest.mark.parametrize(
    ("run_", "hit"),
    [
        ((0, 10), False),
        ((0, 11), True),
        ((12, 1), True),
        ((19, 5), True),
        ((20, 5), False),
        ((5, 100), True),
        ((35, 9), False),
    ],
)
def test_which_runs_lie_on_what_is_lost(run_: tuple[int, int], hit: bool) -> None:
    assert affected._overlap([run_], [(10, 10), (30, 5)]) is hit
