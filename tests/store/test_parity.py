"""Parity: what it mends, what it refuses, and that it never gives anything but the pack that was."""

from __future__ import annotations

import random
from pathlib import Path

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import StoreDamage
from hvbackup.files import Files
from hvbackup.store.check.check import check
from hvbackup.store.format import pack as packs
from hvbackup.store.format import parity
from hvbackup.store.format.parity import BLOCK_BYTES, DATA_SHARDS, PARITY_SHARDS
from tests.store.mortal import Dies, Mortal
from tests.store.test_check import many_packs
from tests.world import KEY, CarelessKernel


def a_pack(files: Files, size: int, seed: int = 1) -> tuple[str, bytes]:
    data = random.Random(seed).randbytes(size)
    name = blake3.blake3(data).hexdigest()
    files.replace(packs.path_of(name), data)
    return name, data


@pytest.fixture
def files(ram: Path) -> Files:
    return Files(ram / "store", CarelessKernel())


def damage(files: Files, name: str, change: object) -> None:
    path = files.path(packs.path_of(name))
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))  # type: ignore[operator]
    files.forget(packs.path_of(name))


def zeroed(first: int, length: int) -> object:
    def change(data: bytearray) -> bytearray:
        data[first : first + length] = bytes(len(data[first : first + length]))
        return data

    return change


SIZE = 1_500_000
SHARD = -(-SIZE // (DATA_SHARDS * BLOCK_BYTES)) * BLOCK_BYTES
WAYS = {
    "a bit": lambda d: d[:700_000] + bytes([d[700_000] ^ 4]) + d[700_001:],
    "the header": zeroed(0, 64),
    "the end cut off": lambda d: d[: SIZE - PARITY_SHARDS * SHARD + BLOCK_BYTES * DATA_SHARDS],
    "a tenth in one piece": zeroed(300_000, PARITY_SHARDS * SHARD - BLOCK_BYTES),
    "two ranges": lambda d: zeroed(50_000, SHARD - BLOCK_BYTES)(zeroed(900_000, SHARD - BLOCK_BYTES)(d)),  # type: ignore[operator]
    "something behind it": lambda d: d + b"more",
}


@pytest.mark.parametrize("how", WAYS)
def test_what_is_damaged_is_mended(files: Files, how: str) -> None:
    name, data = a_pack(files, SIZE)
    parity.cover(files)
    damage(files, name, WAYS[how])
    assert "mended" in parity.repair(files, name)
    assert files.read(packs.path_of(name)) == data
    assert parity.repair(files, name) == ""


@pytest.mark.parametrize("size", [1, 100, BLOCK_BYTES, BLOCK_BYTES * DATA_SHARDS, BLOCK_BYTES * DATA_SHARDS + 1])
def test_packs_of_any_size(files: Files, size: int) -> None:
    name, data = a_pack(files, size)
    parity.cover(files)
    assert parity.is_whole(files, name)
    damage(files, name, lambda d: bytes([d[0] ^ 1]) + bytes(d[1:]))
    parity.repair(files, name)
    assert files.read(packs.path_of(name)) == data


def test_a_damaged_block_of_the_parity_is_done_without(files: Files) -> None:
    name, data = a_pack(files, SIZE)
    parity.cover(files)
    front, _ = parity._front_of(files.read(packs.parity_of(name)), name)
    sidecar = bytearray(files.read(packs.parity_of(name)))
    sidecar[front.size + 3] ^= 1  # the first block of the first parity shard, in the stripe that is damaged below
    files.replace(packs.parity_of(name), sidecar)
    damage(files, name, zeroed(10, 100))
    assert "1 of its blocks" in parity.repair(files, name)
    assert files.read(packs.path_of(name)) == data


def test_too_much_is_refused_and_nothing_is_touched(files: Files) -> None:
    name, _ = a_pack(files, SIZE)
    parity.cover(files)
    damage(files, name, zeroed(100_000, 3 * SHARD))
    before = files.read(packs.path_of(name))
    with pytest.raises(StoreDamage, match="too much"):
        parity.repair(files, name)
    assert files.read(packs.path_of(name)) == before


def test_the_parity_of_another_pack_is_refused(files: Files) -> None:
    one, _ = a_pack(files, SIZE)
    two, _ = a_pack(files, SIZE, seed=2)
    parity.cover(files)
    files.replace(packs.parity_of(one), files.read(packs.parity_of(two)))
    assert not parity.is_whole(files, one)
    damage(files, one, WAYS["a bit"])
    before = files.read(packs.path_of(one))
    with pytest.raises(StoreDamage, match=two):
        parity.repair(files, one)
    assert files.read(packs.path_of(one)) == before


@given(st.data())
def test_whatever_is_damaged_of_both_the_pack_is_what_it_was_or_stays_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    files = Files(tmp_path_factory.mktemp("store"), CarelessKernel())
    name, whole = a_pack(files, data.draw(st.integers(1, 200_000)))
    parity.cover(files)
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    for path in (packs.path_of(name), packs.parity_of(name)):
        content = bytearray(files.read(path))
        for _ in range(data.draw(st.integers(0, 4))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        files.replace(
            path,
            content[: data.draw(st.integers(len(content) - 3000, len(content)))] if rng.random() < 0.3 else content,
        )
    before = files.read(packs.path_of(name))
    try:
        parity.repair(files, name)
    except StoreDamage:
        assert files.read(packs.path_of(name)) == before
    else:
        assert files.read(packs.path_of(name)) == whole


@given(st.data())
def test_a_head_that_lies_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    files = Files(tmp_path_factory.mktemp("store"), CarelessKernel())
    name, whole = a_pack(files, 5_000)
    numbers = st.integers(0, 255)
    size = data.draw(st.integers(0, 20_000) | st.integers(0, (1 << 64) - 1))
    block = data.draw(st.sampled_from([0, 1, 512, 4096, 1 << 20, (1 << 32) - 1]))
    head = parity.HEAD.pack(b"hvP1", data.draw(numbers), data.draw(numbers), 0, block, size, bytes.fromhex(name))
    body = head + data.draw(st.binary(max_size=600))
    body += blake3.blake3(body).digest()
    files.replace(packs.parity_of(name), body + data.draw(st.binary(max_size=3000)))
    assert not parity.is_whole(files, name)
    damage(files, name, zeroed(10, 5))
    with pytest.raises(StoreDamage):
        parity.repair(files, name)
    assert files.read(packs.path_of(name)) != whole


def test_every_pack_of_a_store_is_covered_and_mended(tmp_path: Path) -> None:
    world = many_packs(tmp_path, KEY, 3)
    with world.opened() as store:
        done = parity.cover(store.files)
        every = packs.list_packs(store.files)
        assert done.made == len(every)
        assert parity.cover(store.files).made == 0
        for name in every:
            damage(store.files, name, WAYS["the header"])
    with world.opened() as store:
        assert check(store).lost
        assert all(parity.repair(store.files, name) for name in every)
    with world.opened() as store:
        assert check(store, deep=True).problems == []
        world.check_all(store)
        for path in packs.files_of(every[0]):
            store.files.remove(path)
        assert every[0] not in list(parity.sidecars(store.files))


def test_killed_at_every_step_packs_are_whole_or_as_they_were(ram: Path) -> None:
    for step in range(60):
        mortal = Mortal()
        files = Files(ram / str(step), mortal)
        made = dict(a_pack(files, 60_000, seed=n) for n in range(3))
        mortal.left = step
        ended = True
        try:
            parity.want(files)
            parity.cover(files)
            for name in made:
                damage(files, name, zeroed(10_000, 4_000))
                parity.repair(files, name)
        except Dies:
            ended = False
        again = Files(ram / str(step), CarelessKernel())
        again.sweep()
        for name, data in made.items():
            if again.read(packs.path_of(name)) != data:
                parity.repair(again, name)
            assert again.read(packs.path_of(name)) == data
        parity.cover(again)
        assert all(parity.is_whole(again, name) for name in made)
        if ended:
            break
    assert step > 10


def test_a_damaged_pack_gets_no_parity_and_a_lonely_sidecar_goes(files: Files) -> None:
    name, _ = a_pack(files, SIZE)
    other, _ = a_pack(files, SIZE, seed=3)
    parity.cover(files)
    files.remove(packs.path_of(other))
    files.remove(packs.parity_of(name))
    damage(files, name, WAYS["a bit"])
    done = parity.cover(files)
    assert (done.made, done.removed, done.damaged) == (0, 1, (name,))
    assert parity.drop(files) == 0


def test_the_golden_parity_mends_the_golden_pack(files: Files) -> None:
    golden = Path(__file__).parents[1] / "golden" / "pack-with-parity.pack"
    data, sidecar = golden.read_bytes(), golden.with_suffix(".parity").read_bytes()
    name = blake3.blake3(data).hexdigest()
    assert parity.made(data) == sidecar
    spoilt = bytearray(data)
    spoilt[9_000:13_000] = bytes(4_000)
    files.replace(packs.path_of(name), spoilt)
    files.replace(packs.parity_of(name), sidecar)
    parity.repair(files, name)
    assert files.read(packs.path_of(name)) == data
