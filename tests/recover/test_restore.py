"""Restoring to files: whatever the target held, and wherever a restore ended, the target equals the disk, and no more is written
than must be."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hvbackup.errors import Busy, ChunkDamaged, UsageError
from hvbackup.files import PARTIAL, Kernel
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.recover import restore as module
from hvbackup.recover.rawtarget import WRITE_BACK_BYTES, RawTarget
from hvbackup.recover.restore import Mode, Restored, check_target, to_file
from hvbackup.store.chunks import writer
from hvbackup.store.chunks.view import DiskView
from hvbackup.store.store import Store
from tests.world import BLOCK, KEY, World

BLOCKS = 300
SIZE = BLOCKS * BLOCK + 1536


@pytest.fixture
def world(ram: Path) -> World:
    """Four points of one disk, each with some blocks of its own: neighbours on the disk are far apart in the store."""
    world = World(ram, KEY, disks={"vda": FakeDisk(SIZE)}).init()
    disk = world.disks["vda"]
    with world.opened() as store:
        for point in range(4):
            for block in range(point, BLOCKS, 16):
                disk.write(block * BLOCK, world.rng.randbytes(3000))
            disk.write(20 * BLOCK * point, world.rng.randbytes(2 * BLOCK))
            disk.write(200 * BLOCK, bytes(5 * BLOCK))
            disk.write(SIZE - 700, world.rng.randbytes(700))
            world.capture(store)
    return world


@pytest.fixture
def store(world: World) -> Iterator[Store]:
    with world.opened(owner=False) as store:
        yield store


def newest(world: World, store: Store) -> tuple[DiskView, bytes]:
    point = list(store.points())[-1]
    return store.view(point.disks[0]), world.oracle[point.id]["vda"]


def oldest(world: World, store: Store) -> bytes:
    return world.oracle[next(store.points()).id]["vda"]


def restored(store: Store, view: DiskView, path: Path, mode: Mode) -> Restored:
    check_target(path, mode, "raw")
    return to_file(view, path, store.ring.block_key, lambda _done, _total: None, mode)


BEFORE: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "nothing": lambda older, rng: None,
    "an older state": lambda older, rng: older,
    "noise": lambda older, rng: rng.randbytes(SIZE),
    "noise that is shorter": lambda older, rng: rng.randbytes(9 * BLOCK + 5),
    "noise that is longer": lambda older, rng: rng.randbytes(SIZE + 99_999),
    "zeroes": lambda older, rng: bytes(SIZE),
    "nothing in it": lambda older, rng: b"",
}


@pytest.mark.parametrize("mode", [Mode.REPLACE, Mode.DIFFERENTIAL])
@pytest.mark.parametrize("before", BEFORE)
def test_whatever_the_target_held_it_equals_the_disk(world: World, store: Store, mode: Mode, before: str) -> None:
    view, expected = newest(world, store)
    path = world.path / "disk.raw"
    content = BEFORE[before](oldest(world, store), random.Random(7))
    if content is not None:
        path.write_bytes(content)
    done = restored(store, view, path, mode)
    assert path.read_bytes() == expected
    assert not path.with_name(path.name + PARTIAL).exists()
    if mode is Mode.DIFFERENTIAL and before == "an older state":
        assert 0 < done.written_bytes < done.kept_bytes * 4, "blocks that were right were written again"
        assert done.kept_bytes + done.written_bytes == data_bytes(expected)
    else:
        assert (done.kept_bytes, done.written_bytes) == (0, data_bytes(expected))


def data_bytes(content: bytes) -> int:
    return sum(len(b) for i in range(0, len(content), BLOCK) if any(b := content[i : i + BLOCK]))


@pytest.mark.parametrize("before", [b for b in BEFORE if b != "nothing"])
def test_whatever_an_unfinished_restore_left_is_not_believed(world: World, store: Store, before: str) -> None:
    view, expected = newest(world, store)
    path = world.path / "disk.raw"
    content = BEFORE[before](oldest(world, store), random.Random(8))
    assert content is not None
    path.with_name(path.name + PARTIAL).write_bytes(content)
    restored(store, view, path, Mode.RESUME)
    assert path.read_bytes() == expected


class Dies(Exception):
    """The process is no more."""


class DyingKernel(Kernel):
    """Dies at the nth durable step; those before it took effect."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.calls: list[str] = []

    def step(self, name: str) -> None:
        self.calls.append(name)
        self.left -= 1
        if self.left < 0:
            raise Dies

    def fsync(self, fd: int) -> None:
        self.step("fsync")

    def rename(self, old: str, new: str) -> None:
        self.step("rename")
        super().rename(old, new)

    def sync_dir(self, path: str) -> None:
        self.step("sync_dir")


def test_the_disk_begins_to_write_long_before_the_end(tmp_path: Path) -> None:
    class Watching(Kernel):
        begun = 0

        def begin_write_back(self, fd: int) -> None:
            self.begun += 1
            super().begin_write_back(fd)

    kernel, piece = Watching(), bytes(WRITE_BACK_BYTES // 2)
    target = RawTarget(tmp_path / "disk.raw", 4 * len(piece), keep=False, in_place=False, kernel=kernel)
    for i in range(4):
        target.write(i * len(piece), piece)
        assert kernel.begun == (i + 1) // 2
    target.finish()
    target.close()
    assert (tmp_path / "disk.raw").stat().st_size == 4 * len(piece)


class DyingTarget(RawTarget):
    """Dies at a durable step, or in the midst of a write."""

    def __init__(self, path: Path, size: int, kernel: DyingKernel, *, in_place: bool) -> None:
        super().__init__(path, size, keep=True, in_place=in_place, kernel=kernel)
        self._dying = kernel

    def write(self, offset: int, data: memoryview) -> None:  # type: ignore[override]
        if self._dying.left <= 0:
            super().write(offset, memoryview(data)[: len(data) // 2])
        self._dying.step("write")
        super().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._dying.step("zero")
        super().zero(offset, length)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_restore_that_dies_at_any_step_goes_on(
    world: World, store: Store, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "THREADS", 1)
    view, expected = newest(world, store)
    path = world.path / "disk.raw"
    partial = path.with_name(path.name + PARTIAL)
    older, deaths, step = oldest(world, store), 0, 0
    while True:
        path.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
        if in_place:
            path.write_bytes(older)
        kernel = DyingKernel(step)
        try:
            with closing(DyingTarget(path, view.size, kernel, in_place=in_place)) as target:
                module.restore(view, target, store.ring.block_key, lambda _done, _total: None, compare=in_place)
            break
        except Dies:
            deaths += 1
        assert not path.exists() or path.read_bytes() in (older, expected), (
            "a half-written image was taken for a whole one"
        )
        if path.exists() and path.read_bytes() == expected:
            assert kernel.calls[-3:] == ["fsync", "rename", "sync_dir"], "it was given its name before it was durable"
        else:
            mode = Mode.DIFFERENTIAL if path.exists() else Mode.RESUME
            done = restored(store, view, path, mode)
            assert done.kept_bytes >= (step - 3) * BLOCK * (not in_place), "it started over"
        assert path.read_bytes() == expected
        step += 1 if step < 5 or step > 100 else 23
    assert deaths >= 8
    assert kernel.calls[-3:] == ["fsync", "rename", "sync_dir"]


def test_chunks_are_read_as_the_packs_have_them(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pack is read from its beginning to its end, however the disk is scattered over them."""
    monkeypatch.setattr(writer, "PACK_BYTES", 40 * BLOCK)
    monkeypatch.setattr(module, "THREADS", 1)
    world = World(ram, disks={"vda": FakeDisk(512 * BLOCK)}).init()
    with world.opened() as store:
        for point in range(8):
            for block in range(point, 512, 8):
                world.disks["vda"].write(block * BLOCK, world.rng.randbytes(BLOCK))
            world.capture(store)
    with world.opened(owner=False) as store:
        reads: list[tuple[str, int]] = []
        read_at = store.files.read_at

        def recorded(name: str, offset: int, length: int) -> bytes:
            if length > BLOCK:
                reads.append((name, offset))
            return read_at(name, offset, length)

        monkeypatch.setattr(store.files, "read_at", recorded)
        view, expected = newest(world, store)
        restored(store, view, ram / "disk.raw", Mode.NEW)
        assert (ram / "disk.raw").read_bytes() == expected
        packs = [name for name, _ in reads]
        switches = sum(a != b for a, b in itertools.pairwise(packs))
        assert switches == len(set(packs)) - 1 > 8
        for pack in set(packs):
            offsets = [o for name, o in reads if name == pack]
            assert offsets == sorted(offsets)


def test_zeroes_in_a_file_become_holes(world: World, store: Store) -> None:
    view, expected = newest(world, store)
    path = world.path / "disk.raw"
    path.write_bytes(b"x" * SIZE)
    restored(store, view, path, Mode.DIFFERENTIAL)
    assert path.read_bytes() == expected
    assert path.stat().st_blocks * 512 <= data_bytes(expected) + 2 * BLOCK


def test_a_damaged_chunk_is_named_and_what_was_written_stays(world: World, store: Store) -> None:
    view, _ = newest(world, store)
    pack = max((world.store_path / "packs").glob("*/*.pack"), key=lambda p: p.stat().st_size)
    pack.write_bytes(pack.read_bytes()[:5000] + b"\0" * 100 + pack.read_bytes()[5100:])
    path = world.path / "disk.raw"
    with pytest.raises(ChunkDamaged, match="is lost"):
        restored(store, view, path, Mode.NEW)
    assert not path.exists()
    assert path.with_name(path.name + PARTIAL).exists()


def test_two_restores_at_a_time_are_kept_apart(world: World, store: Store) -> None:
    path = world.path / "disk.raw"
    with closing(RawTarget(path, SIZE, keep=True, in_place=False)), pytest.raises(Busy, match=r"disk\.raw\.partial"):
        RawTarget(path, SIZE, keep=True, in_place=False)


@pytest.mark.parametrize("mode", list(Mode))
def test_what_is_no_file_is_never_written_to(world: World, mode: Mode) -> None:
    with pytest.raises(UsageError, match="/dev/null is neither"):
        check_target(Path("/dev/null"), mode, "raw")
    with pytest.raises(UsageError, match="is neither"):
        check_target(world.path, mode, "raw")


def test_what_exists_is_refused_with_the_options_that_allow_it(world: World) -> None:
    path = world.path / "disk.raw"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"--replace .* --differential"):
        check_target(path, Mode.NEW, "raw")
    with pytest.raises(UsageError, match=r"--replace .* --differential"):
        check_target(path, Mode.RESUME, "raw")
    path.rename(path.with_name(path.name + PARTIAL))
    with pytest.raises(UsageError, match="--resume"):
        check_target(path, Mode.NEW, "raw")
