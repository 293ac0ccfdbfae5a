"""The stranger's reader of `docs/format.md` reads what hvbackup writes, and notices what was changed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvbackup import capture
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.model import KiB
from hvbackup.store.format import keys
from tests.world import World

READER = Path(__file__).parents[2] / "labs" / "readpoint.py"
KEY_TEXT = keys.new_key_text()
SECRETS = {
    "key file": keys.parse_key_text(KEY_TEXT, "the key file"),
    "passphrase": keys.passphrase("correct horse"),
    "plain": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def a_life(path: Path, secret: keys.Secret | None, block: int = 64 * KiB) -> World:
    """Points of two disks: one of an odd length that needs two levels of map pages, one that grows and shrinks."""
    large, other = FakeDisk(300 * block + 1536), FakeDisk(2 * block)
    world = World(path, secret, {"vda": large, "vdb": other}, block=block).init()
    with world.opened() as store:
        for size in (2 * block, 5 * block + 512, block // 2):
            world.disks["vdb"].resize(size)
            world.scribble(largest=3 * block)
            large.write(large.size - 700, b"the tail")
            world.capture(store)
    return world


def read(world: World, *what: str, given: tuple[str, ...] = (), check: bool = True) -> str:
    command = [sys.executable, "-I", str(READER), str(world.store_path), *given, *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout if check else f"{done.returncode}: {done.stderr}"


def given_for(kind: str, folder: Path) -> tuple[str, ...]:
    """The arguments that open a store."""
    (folder / "key").write_text(f"# a comment\n{KEY_TEXT}\n")
    return {"key file": ("--key-file", str(folder / "key")), "passphrase": ("--passphrase", "correct horse")}.get(
        kind, ()
    )


@pytest.mark.parametrize("block", [64 * KiB, 256 * KiB], ids=["64k", "256k"])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.walk if k == "passphrase" else ()) for k in SECRETS]
)
def test_every_disk_of_every_point_is_read_bit_for_bit(
    folder: Path, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "GROUP_BLOCKS", 3)  # whatever the writer does now: a record may hold several blocks
    world = a_life(folder, SECRETS[kind], block)
    given = given_for(kind, folder)
    lines = read(world, "list", given=given).splitlines()
    assert len(lines) == len(world.oracle) == 3
    for line in lines:
        point, name, *disks = line.split()
        expected = world.oracle[point[-16:]]  # type: ignore[index]
        assert name == "m1"
        assert disks == [f"{disk}:{len(content)}" for disk, content in expected.items()]
        for disk, content in expected.items():
            read(world, point, disk, str(folder / "out"), given=given)
            assert (folder / "out").read_bytes() == content


def test_an_empty_disk_takes_no_room(folder: Path) -> None:
    world = World(folder, None, {"vda": FakeDisk(64 * KiB * 1000 + 1)}).init()
    with world.opened() as store:
        world.capture(store)
    point = read(world, "list").split()[0]
    read(world, point, "vda", str(folder / "out"))
    assert (folder / "out").stat().st_size == 64 * KiB * 1000 + 1
    assert (folder / "out").stat().st_blocks == 0


@pytest.fixture
def world(folder: Path) -> World:
    return a_life(folder, SECRETS["key file"])


@pytest.mark.parametrize("wrong", ["none", "other key", "passphrase"])
def test_a_wrong_key_opens_nothing(world: World, folder: Path, wrong: str) -> None:
    (folder / "other").write_text(keys.new_key_text())
    given = {"none": (), "other key": ("--key-file", str(folder / "other")), "passphrase": ("--passphrase", "x")}[wrong]
    assert "no key in keys/ opens" in read(world, "list", given=given, check=False)


def test_a_changed_point_is_refused(world: World, folder: Path) -> None:
    file = next(iter(world.store_path.glob("points/*/*")))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "InvalidSignature" in read(world, "list", given=given_for("key file", folder), check=False)


def test_a_point_under_another_name_is_refused(world: World, folder: Path) -> None:
    old, new = sorted(world.store_path.glob("points/*/*"))[:2]
    new.write_bytes(old.read_bytes())
    assert "InvalidSignature" in read(world, "list", given=given_for("key file", folder), check=False)


def test_a_page_is_read_from_its_second_copy(world: World, folder: Path) -> None:
    """One of the two packs of pages is gone, with every page in it."""
    given = given_for("key file", folder)
    metas = [p for p in world.store_path.glob("packs/*/*.pack") if p.read_bytes()[5] == 2]
    first = min(metas, key=lambda p: p.stat().st_mtime_ns)
    first.write_bytes(first.read_bytes()[:-1])
    for line in read(world, "list", given=given).splitlines():
        point = line.split()[0]
        read(world, point, "vda", str(folder / "out"), given=given)
        assert (folder / "out").read_bytes() == world.oracle[point[-16:]]["vda"]  # type: ignore[index]


def test_a_lost_block_is_named(world: World, folder: Path) -> None:
    given = given_for("key file", folder)
    for pack in world.store_path.glob("packs/*/*.pack"):
        if pack.read_bytes()[5] == 1:
            pack.unlink()
    point = read(world, "list", given=given).splitlines()[-1].split()[0]
    assert re.search(
        r"chunk [0-9a-f]{64} is lost", read(world, point, "vda", str(folder / "out"), given=given, check=False)
    )


def test_the_reader_is_a_stranger() -> None:
    """It stands on three packages and the standard library."""
    found = set()
    for node in ast.walk(ast.parse(READER.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"zstandard", "blake3", "cryptography"}
