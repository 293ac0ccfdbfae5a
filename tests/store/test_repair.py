"""What is stored twice is put back where one of the two is damaged or gone, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hvbackup.capture import Options, capture
from hvbackup.errors import StoreDamage
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import Instant, MiB
from hvbackup.store.check.check import check
from hvbackup.store.check.repair import repair
from hvbackup.store.format import keys
from hvbackup.store.format.layout import CHUNK_POINT
from hvbackup.store.format.pack import path_of
from hvbackup.store.store import Store, init

Damage = Callable[[Path], object]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES: list[Damage] = [truncate, flip, Path.unlink]


class World:
    """A store with three points of one machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = keys.parse_key_text(keys.new_key_text(), "the key")
        init(folder / "store", self.secret)
        disk = FakeDisk(2 * MiB)
        hypervisor = FakeHypervisor([FakeMachine("m1", {"vda": disk})])
        with self.open() as store:
            for n in range(3):
                disk.write(n * 100_000, bytes([n + 1]) * 50_000)
                capture(store, hypervisor, hypervisor.machines()[0], Options())

    def open(self) -> Store:
        return Store.open(self.folder / "store", self.folder / "state", [self.secret], owner=True)

    def points(self) -> list[Path]:
        return sorted((self.folder / "store" / "points").glob("*/*"))

    def content(self) -> dict[Path, bytes]:
        return {
            p: p.read_bytes()
            for name in ("points", "keys")
            for p in (self.folder / "store" / name).rglob("*")
            if p.is_file()
        }


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_vanished_points_come_back(world: World, damage: Damage) -> None:
    before = world.content()
    first, second, _ = world.points()
    damage(first)
    damage(second)
    with world.open() as store:
        assert check(store).problems
        done = repair(store)
        assert sorted(line.split()[0] for line in done) == [
            str(p.relative_to(world.folder / "store")) for p in (first, second)
        ]
        assert check(store, deep=True).problems == []
        assert repair(store) == []
    assert world.content() == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".json", ".copy"])
def test_a_damaged_key_comes_back_from_its_twin(world: World, damage: Damage, suffix: str) -> None:
    before = world.content()
    [key] = (world.folder / "store/keys").glob(f"*{suffix}")
    damage(key)
    with world.open() as store:
        assert repair(store) == [
            f"keys/{key.name} was put back from {key.stem}{'.copy' if suffix == '.json' else '.json'}"
        ]
        assert check(store).problems == []
    assert world.content() == before


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_copy_is_passed_over_for_its_twin(world: World, which: int) -> None:
    before = world.content()
    with world.open() as store:
        found = [
            (row["id"].tobytes(), names[int(row["pack"])], int(row["offset"]) + int(row["stored"]) - 9)
            for names, rows in store.index.rows()
            for row in rows[rows["kind"] == CHUNK_POINT]
        ]
    assert len(found) == 6, "two for each point"
    for pack, at in [sorted((p, at) for i, p, at in found if i == chunk)[which] for chunk in {i for i, _, _ in found}]:
        path = world.folder / "store" / path_of(pack)
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    for point in world.points():
        point.unlink()
    with world.open() as store:
        assert len(repair(store)) == 3
    assert world.content() == before


def test_a_point_that_was_forgotten_stays_forgotten(world: World) -> None:
    gone = world.points()[0]
    with world.open() as store:
        store.tell("prune", Instant(1), forgotten=[str(gone.relative_to(world.folder / "store"))])
        gone.unlink()
        assert repair(store) == []
    assert not gone.exists()


def test_a_copy_of_another_store_is_no_copy(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    victim = world.points()[0]
    victim.write_bytes(other.points()[0].read_bytes())
    with world.open() as store:
        with pytest.raises(StoreDamage):
            store.load_point(str(victim.relative_to(world.folder / "store")))
        assert len(repair(store)) == 1
        assert len(list(store.points())) == 3
