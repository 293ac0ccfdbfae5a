"""Reading back: caches that stay small, views from many threads, and files of the wrong kind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import zstandard

from hvbackup.errors import ChunkDamaged, PointDamaged, StoreDamage, StoreMissing
from hvbackup.files import Files
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.store.chunks import reader, writer
from hvbackup.store.format import blockmap, keys, pack, sealed
from hvbackup.store.format import layout as f
from hvbackup.store.format.runs import Runs
from hvbackup.store.store import Store
from tests.world import BLOCK, KEY, World, contents

pytestmark = pytest.mark.walk

RING = keys.Keyring.generate(bytes(16), encrypted=True)


def test_views_from_many_threads_with_caches_too_small_for_them(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockmap, "LEAVES_CACHED", 1)
    monkeypatch.setattr(reader, "PAGE_CACHE", 1)
    world = World(ram, KEY, disks={"vda": FakeDisk(1200 * BLOCK)}).init()
    disk = world.disks["vda"]
    for block in range(0, 1200, 30):
        disk.write(block * BLOCK, world.rng.randbytes(3000))
    with world.opened() as store:
        point = world.capture(store).point
        assert point is not None
        store.chunks._cache_bytes = 3 * BLOCK
        view = store.view(point.disks[0])
        expected, failures = bytes(disk.content), []

        def read(step: int) -> None:
            try:
                for i in range(200):
                    offset = (i * step * 30 * BLOCK + i) % (disk.size - 5000)
                    buffer = bytearray(5000)
                    view.read_into(offset, memoryview(buffer))
                    assert buffer == expected[offset : offset + 5000]
                    found = view.cached(offset // BLOCK * BLOCK, 100)
                    assert found is None or found == expected[offset // BLOCK * BLOCK :][:100]
            except BaseException as e:  # noqa: BLE001
                failures.append(e)

        threads = [threading.Thread(target=read, args=(step,)) for step in (1, 7, 11, 13)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert store.chunks._cached_bytes <= 3 * BLOCK
        assert len(store.chunks._pages) <= 1


def test_what_is_in_memory_is_known_to_be(ram: Path) -> None:
    world = World(ram, disks={"vda": FakeDisk(3 * BLOCK)}).init()
    world.disks["vda"].write(0, b"x" * BLOCK)
    with world.opened() as store:
        point = world.capture(store).point
        assert point is not None
        view = store.view(point.disks[0])
        assert view.cached(0, 10) is None
        view.read_into(0, memoryview(bytearray(10)))
        assert view.cached(5, 10) == b"x" * 10
        assert view.cached(2 * BLOCK, 10) == bytes(10)
        assert view.cached(BLOCK - 5, 10) is None, "a range over two blocks is not answered from here"
        store.chunks.forget()
        assert view.cached(5, 10) is None
        view.read_into(0, memoryview(bytearray(10)))
        assert view.cached(5, 10) == b"x" * 10


def test_what_will_be_read_is_asked_of_the_disk_beforehand(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(ram, KEY, disks={"vda": FakeDisk(600 * BLOCK)}).init()
    for block in (0, 1, 2, 300):
        world.disks["vda"].write(block * BLOCK, world.rng.randbytes(3000))
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Files, "will_read", lambda self, *place: told.append(place))
    with world.opened() as store:
        point = world.capture(store).point
        assert point is not None
    with world.opened() as store:
        view = store.view(point.disks[0])
        view.expect([(0, 10), (5 * BLOCK, 10)])
        assert told == [], "the map page is not in memory, and is not fetched"
        view.read_into(0, memoryview(bytearray(10)))
        view.expect([(0, 10), (BLOCK - 1, 2), (2 * BLOCK, 1), (4 * BLOCK, 2 * BLOCK), (view.size - 1, 1)])
        ids = [view.map.id(block) for block in (1, 2)]  # 0 is in memory, 4 and 5 are zero, the last leaf is not known
        places = [place for chunk in ids for place in store.index.everywhere(chunk)]
        assert sorted(told) == sorted((pack.path_of(p.pack), p.offset, p.stored) for p in places)


def test_map_pages_fill_packs_of_their_own_size(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PACK_BYTES", 20_000)
    world = World(ram, disks={"vda": FakeDisk(256 * 12 * BLOCK)}).init()
    for leaf in range(12):
        for block in range(60):
            world.disks["vda"].write((leaf * 256 + block) * BLOCK, world.rng.randbytes(64))
    with world.opened() as store:
        point = world.capture(store).point
        assert point is not None
        meta = [n for n in pack.list_packs(store.files) if store.files.read(pack.path_of(n))[5] == f.KIND_META]
        assert len(meta) >= 4
        assert contents(store, point) == world.content()
        assert store.view(point.disks[0]).map.root


def test_headers_of_another_version_kind_or_store_are_refused_by_name() -> None:
    data = sealed.seal(RING, f.KIND_POINT, "points/a", {})
    with pytest.raises(StoreDamage, match="kind 3"):
        sealed.unseal(RING, f.KIND_RUN, "points/a", data)
    stranger = keys.Keyring.generate(bytes([1] * 16), encrypted=True)
    with pytest.raises(StoreDamage, match="belongs to store"):
        sealed.unseal(stranger, f.KIND_POINT, "points/a", data)
    newer = f.with_crc(f.HEADER.pack(f.HEADER_MAGIC, 2, f.KIND_POINT, 0, RING.store, bytes(32), 0))
    with pytest.raises(StoreMissing, match="format 2"):
        sealed.unseal(RING, f.KIND_POINT, "points/a", newer + data[64:])
    with pytest.raises(StoreDamage, match="damaged header"):
        sealed.unseal(RING, f.KIND_POINT, "points/a", newer[:60] + b"oops" + data[64:])
    with pytest.raises(PointDamaged, match="signature"):
        sealed.unseal(RING, f.KIND_POINT, "points/b", data)


@pytest.mark.parametrize("plain", [b"no zstd frame", zstandard.compress(b"no json"), zstandard.compress(b"[1]")])
def test_a_signed_file_that_holds_nothing_of_ours_is_refused(plain: bytes) -> None:
    ring = keys.Keyring.generate(bytes(16), encrypted=False)
    head = f.with_crc(f.HEADER.pack(f.HEADER_MAGIC, f.FORMAT, f.KIND_POINT, 0, ring.store, bytes(32), len(plain)))
    data = head + plain + ring.signer.sign(sealed._digest("x", head, plain))
    with pytest.raises(PointDamaged, match="x "):
        sealed.unseal(ring, f.KIND_POINT, "x", data)


def test_packs_that_are_missing_or_of_the_other_kind_are_refused(ram: Path) -> None:
    world = World(ram, None).life(1)
    with world.opened() as store:
        name = pack.list_packs(store.files)[0]
        encrypted = keys.Keyring(store.id, True, *(bytes(32) for _ in range(4)))
        with pytest.raises(StoreDamage, match="not encrypted"):
            pack.cipher_of(store.files, encrypted, name)
        for call in (
            lambda: pack.read_footer(store.files, "00" * 32),
            lambda: pack.cipher_of(store.files, encrypted, "00" * 32),
        ):
            with pytest.raises(StoreDamage, match="is missing"):
                call()


def test_a_record_of_another_length_than_it_says_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100)
    for codec, data, plain in ((f.CODEC_RAW, b"x" * 99, 100), (f.CODEC_ZSTD, frame, 200), (f.CODEC_ZSTD, b"junk", 4)):
        head = f.RECORD.pack(f.RECORD_MAGIC, 0, codec, f.CHUNK_BLOCK, 1, len(data), plain)
        record = f.with_crc(head, bytes(36)) + bytes(36) + data
        with pytest.raises(ChunkDamaged, match="the place"):
            pack.decode(record, None, b"", zstandard.ZstdDecompressor(), "the place")


def test_a_pack_without_a_footer_is_read_by_its_records(ram: Path) -> None:
    world = World(ram, KEY).life(2)
    for path in (world.store_path / "packs").rglob("*.pack"):
        path.write_bytes(path.read_bytes()[:-64])
    with world.opened() as store:
        world.check_all(store)


def test_records_behind_noise_are_found_again(ram: Path) -> None:
    world = World(ram, None).life(1)
    with world.opened(owner=False) as store:
        name = max(pack.list_packs(store.files), key=lambda n: len(pack.read_footer(store.files, n)))
        rows = pack.read_footer(store.files, name)
        path = store.files.path(pack.path_of(name))
        data = bytearray(path.read_bytes())
        data[64:68] = b"oops"
        path.write_bytes(data[:-10])
        store.files.forget(pack.path_of(name))
        found = pack.scan(store.files, name)
    lost = rows[rows["offset"] == 64]["id"].tolist()
    assert len(rows) > len(lost) > 0
    assert set(found["id"].tolist()) == set(rows["id"].tolist()) - set(lost)


def test_a_point_that_was_meant_to_go_is_not_missed(ram: Path) -> None:
    world = World(ram, KEY).life(3)
    with world.opened() as store:
        oldest = next(store.points())
        path = store.path_of(oldest)
        store.files.remove(path)
        assert any(path in problem for problem in store.runs.problems())
        store.tell("prune", world.clock(), forgotten=[path])
        assert store.runs.problems() == []


def test_a_record_that_can_not_be_read_is_named(ram: Path) -> None:
    world = World(ram, KEY).life(2)
    with world.opened() as store:
        path = store.files.path(next(iter(store.runs)).path)
        path.unlink()
        path.mkdir()
        assert any("Cannot read" in problem for problem in store.runs.problems())
        assert isinstance(Runs(store.files, store.ring, store.state)._one("runs/none"), str)


def test_a_lost_chunk_is_named_with_every_place_that_was_tried(ram: Path) -> None:
    world = World(ram, KEY).life(1)
    with world.opened() as store:
        with pytest.raises(ChunkDamaged, match="no pack holds it"):
            store.chunks.block(bytes([1] * 32))
        packs = [p for p in pack.list_packs(store.files) if store.files.read(pack.path_of(p))[5] == f.KIND_META]
        point = next(store.points())
        for name in packs:
            path = store.files.path(pack.path_of(name))
            path.write_bytes(path.read_bytes()[:64] + bytes(path.stat().st_size - 64))
            store.files.forget(pack.path_of(name))
        with pytest.raises(ChunkDamaged) as e:
            store.chunks.page(point.disks[0].root)
        assert point.disks[0].root.hex() in str(e.value)


def test_a_reader_follows_packs_that_were_sealed_after_it_was_opened(ram: Path) -> None:
    world = World(ram, KEY, disks={"vda": FakeDisk(600 * BLOCK)}).init()
    disk = world.disks["vda"]
    with world.opened() as store:
        disk.write(0, world.rng.randbytes(3 * BLOCK))
        world.capture(store)
        with Store.open(store.files.root, store.state.root.parent, [KEY]) as reader_of_old:
            disk.write(300 * BLOCK, world.rng.randbytes(5 * BLOCK))
            point = world.capture(store).point
            assert point is not None
            out = bytearray(disk.size)
            reader_of_old.view(point.disks[0]).read_into(0, memoryview(out))
            assert out == disk.content
