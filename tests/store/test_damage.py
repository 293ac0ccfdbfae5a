"""Every kind of file in a store, damaged in every way: what is lost is named exactly, and everything else still reads.

Deleted, cut short, one bit flipped, put under the name of another file of its kind.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvbackup.errors import KeyRefused, PointDamaged, StoreDamage, StoreMissing
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.leases import Leases
from hvbackup.model import DiskRoot, Status
from hvbackup.store.check.check import Wanted, check
from hvbackup.store.check.ledger import Level
from hvbackup.store.format import keys, pack, parity
from hvbackup.store.format import layout as f
from hvbackup.store.store import Store
from tests.world import BLOCK, KEY, OTHER_KEY, World, contents

pytestmark = pytest.mark.walk

Lost = set[tuple[str, str]]  # (point, disk)
SECRETS = pytest.mark.parametrize("secret", [None, KEY], ids=["plain", "encrypted"])


@dataclass
class Origin:
    """A whole store, and which points need which bytes of its packs."""

    world: World
    flips: int  # places in each file where a bit is flipped, spread over it
    records: dict[str, list[tuple[int, int, Lost]]] = field(default_factory=dict)  # pack -> offset, end, who needs it

    def files(self, *kinds: str) -> list[str]:
        """The files of these kinds."""
        return [name for name in self.everything() if kind_of(self.world.path, name) in kinds]

    def everything(self) -> list[str]:
        return sorted(str(p.relative_to(self.world.path)) for p in self.world.path.rglob("*") if p.is_file())

    def needing(self, name: str, first: int, last: int) -> Lost:
        """Who needs any of these bytes of a data pack; all bytes stand or fall with the header."""
        found: Lost = set()
        for offset, end, who in self.records.get(Path(name).stem, []):
            if first < f.HEADER_BYTES or (offset <= last and first < end):
                found |= who
        return found


def kind_of(root: Path, name: str) -> str:
    """What a file is: its folder, and for packs what is in them."""
    parts = name.split("/")
    if parts[0] == "state":
        return f"state {parts[-1] if not parts[-1].endswith('.idx') else 'index'}"
    if name.endswith(pack.PARITY_SUFFIX):
        return "parity"
    if parts[1] == "packs":
        return "data pack" if (root / name).read_bytes()[5] == f.KIND_DATA else "meta pack"
    return parts[1]


@pytest.fixture(
    params=[
        pytest.param((None, 8), id="plain"),
        pytest.param((KEY, 8), id="encrypted"),
        pytest.param((None, 500), id="plain, everywhere", marks=pytest.mark.soak),
        pytest.param((KEY, 500), id="encrypted, everywhere", marks=pytest.mark.soak),
    ]
)
def origin(request: pytest.FixtureRequest, ram: Path) -> Origin:
    """Four points, one lease of a run that died, and something in each file that STATE can have."""
    secret, flips = request.param
    world = World(ram / "origin", secret, disks={"vda": FakeDisk(4 * BLOCK + 512), "vdb": FakeDisk(2 * BLOCK)})
    world.life(4)
    found = Origin(world, flips)
    with world.opened() as store:
        Leases(store, world.clock).take(world.hv.machine("m1").model().id, "fake:")
        check(store, Wanted(Level.AUTHENTICATE, world.clock()))
        store.index.set_damaged({("0" * 64, 64)})
        store.set_damaged_disks([("points/none", "vda")])  # type: ignore[list-item]
        users = needs(store)
        for name in pack.list_packs(store.files):
            if kind_of(world.path, f"store/{pack.path_of(name)}") == "data pack":
                rows = pack.read_footer(store.files, name)
                for offset, stored in pack.records(rows):
                    chunks = rows["id"][rows["offset"] == offset]
                    who = {u for c in chunks for u in users.get(c.tobytes(), set())}
                    found.records.setdefault(name, []).append((offset, offset + stored, who))
    return found


def needs(store: Store) -> dict[bytes, Lost]:
    """Chunk -> the disks of points that hold it."""
    found: dict[bytes, Lost] = {}
    for point in store.points():
        for root in point.disks:
            for _, ids in store.view(root).leaves():
                for chunk in ids:
                    found.setdefault(chunk.tobytes(), set()).add((point.id, root.disk.id))
    return found


def damaged(origin: Origin, name: str, number: int) -> tuple[World, Path]:
    """A copy of the world, and one file of it to damage."""
    path = origin.world.path.parent / f"copy{number}"
    shutil.copytree(origin.world.path, path)
    copy = World(path, origin.world.secret, origin.world.disks, oracle=dict(origin.world.oracle))
    copy.clock.now = origin.world.clock.now
    return copy, path / name


def lost_in(store: Store, world: World) -> Lost:
    """What can't be read; everything that can be is compared with the oracle, block by block."""
    lost: Lost = set()
    for point in store.points():
        for root in point.disks:
            if not reads(store, root, world.oracle[point.id][root.disk.id]):
                lost.add((point.id, root.disk.id))
    return lost


def reads(store: Store, root: DiskRoot, expected: bytes) -> bool:
    view, whole = store.view(root), True
    for start in range(0, root.disk.size, BLOCK):
        buffer = bytearray(min(BLOCK, root.disk.size - start))
        try:
            view.read_into(start, memoryview(buffer))
        except StoreDamage:
            whole = False
        else:
            assert buffer == expected[start : start + BLOCK]
    return whole


def named(store: Store, world: World) -> tuple[Lost, list[str]]:
    """The disks that a deep check calls lost, and all its sentences."""
    report = check(store, deep=True)
    sentences = [p.what for p in report.problems]
    lost = {
        (p, d) for p in world.oracle for d in world.disks
        for s in sentences if s.startswith(f"Point {p} ") and f": disk {d} has lost " in s
    }  # fmt: skip
    assert report.lost == any(p.lost for p in report.problems)
    return lost, sentences


def spread(size: int, count: int) -> list[int]:
    """Places in a file: its first and last bytes, and some between."""
    places = {0, 4, 8, 30, 61, size // 2, size - 1, size - 40, *range(0, size, max(1, size // count))}
    return sorted(places & set(range(size)))


def flip(path: Path, at: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def ways(origin: Origin, name: str) -> Iterator[tuple[World, Path, str, tuple[int, int]]]:
    """A fresh copy for each way of damaging one file, done; how, and the bytes (first, last) it touched."""
    size = (origin.world.path / name).stat().st_size
    flips = [f"flip {at}" for at in spread(size, origin.flips)]
    for number, how in enumerate(["deleted", "emptied", "cut", *flips]):
        world, path = damaged(origin, name, number)
        if how == "deleted":
            path.unlink()
            touched = (0, size)
        elif how in ("emptied", "cut"):
            keep = 0 if how == "emptied" else size // 2
            path.write_bytes(path.read_bytes()[:keep])
            touched = (keep, size)
        else:
            at = int(how.split()[1])
            flip(path, at, number % 8)
            touched = (at, at)
        yield world, path, how, touched
        shutil.rmtree(world.path)


def test_a_damaged_data_pack_takes_what_needs_its_bytes_and_nothing_else(origin: Origin) -> None:
    encrypted = origin.world.secret is not None
    for name in origin.files("data pack"):
        for world, _, how, touched in ways(origin, name):
            with world.opened() as store:
                lost = lost_in(store, world)
                expected = origin.needing(name, *touched)
                assert lost <= expected, how
                # A bit that nothing depends on may flip unnoticed by readers where there is no tag.
                assert lost == expected or (how.startswith("flip") and not encrypted), how
                told, sentences = named(store, world)
                assert told == lost, how
                assert any(Path(name).stem in s for s in sentences) or lost == set() or how == "deleted", how
            with world.opened() as store:
                heal(store, world)


def heal(store: Store, world: World) -> None:
    """After a check, the next capture stores again what is lost, and is whole itself."""
    outcome = world.capture(store)
    point = outcome.point
    assert point is not None
    assert contents(store, point) == world.oracle[point.id]


def test_one_damaged_meta_pack_costs_nothing(origin: Origin) -> None:
    encrypted = origin.world.secret is not None
    for name in origin.files("meta pack"):
        for world, _, how, _ in ways(origin, name):
            with world.opened() as store:
                assert lost_in(store, world) == set(), how
                told, sentences = named(store, world)
                assert told == set(), how
                noticed = any(Path(name).stem in s for s in sentences)
                assert noticed or how == "deleted" or (how.startswith("flip") and not encrypted), how
                heal(store, world)


def test_a_damaged_point_is_named_and_the_others_read(origin: Origin) -> None:
    for name in origin.files("points"):
        point = name.rsplit("-", 1)[1]
        for world, _, how, _ in ways(origin, name):
            with world.opened() as store:
                assert {p.id for p in store.points()} == set(world.oracle) - {point}, how
                assert lost_in(store, world) == set(), how
                stored = name.removeprefix("store/")
                with pytest.raises(StoreDamage, match=stored):
                    store.load_point(stored)
                _, sentences = named(store, world)
                assert any(stored in s for s in sentences), how
                heal(store, world)


def test_a_damaged_run_record_is_named_and_takes_nothing(origin: Origin) -> None:
    for name in origin.files("runs"):
        for world, _, how, _ in ways(origin, name):
            with world.opened() as store:
                assert store.runs.problems(), how
                assert named(store, world)[1], how
                assert lost_in(store, world) == set(), how
                heal(store, world)


def test_a_damaged_lease_is_settled_all_the_same(origin: Origin) -> None:
    for name in origin.files("leases"):
        for world, _, how, _ in ways(origin, name):
            with world.opened() as store:
                assert lost_in(store, world) == set(), how
                heal(store, world)
                world.check_settled(store)


def test_one_damaged_copy_of_a_key_costs_nothing(origin: Origin) -> None:
    for name in origin.files("keys"):
        for world, path, how, _ in ways(origin, name):
            with world.opened() as store:
                assert lost_in(store, world) == set(), how
                assert any(path.stem in s for s in named(store, world)[1]), how


def test_without_any_whole_copy_of_a_key_nothing_opens_and_nothing_is_written(origin: Origin) -> None:
    first, second = origin.files("keys")
    for world, path, how, _ in ways(origin, first):
        shutil.copy(path, world.path / second) if path.exists() else (world.path / second).unlink()
        before = set(world.path.rglob("*"))
        with pytest.raises(StoreMissing, match=r"keys/"):
            world.open()
        assert set(world.path.rglob("*")) == before, how


def test_a_damaged_description_is_refused_or_harmless(origin: Origin) -> None:
    for world, _, how, _ in ways(origin, "store/HVBACKUP"):
        try:
            store = world.open()
        except (StoreMissing, KeyRefused):
            continue
        assert how.startswith("flip")
        with store:
            assert lost_in(store, world) == set(), how


def test_damaged_state_costs_nothing(origin: Origin) -> None:
    kinds = {kind_of(origin.world.path, n) for n in origin.everything() if n.startswith("state/")}
    assert kinds >= {
        "state index",
        "state head.json",
        "state owner.lock",
        "state damaged.json",
        "state damaged-disks.json",
        "state verified",
    }
    for name in origin.files(*kinds):
        for world, _, how, _ in ways(origin, name):
            world.clock.now += 3600 * 10**9  # the lease may be of a writer that is forgotten now
            with world.opened() as store:
                assert lost_in(store, world) == set(), (name, how)
                assert named(store, world) == (set(), []), (name, how)
                heal(store, world)
                world.check_settled(store)


def test_damaged_parity_costs_nothing_and_is_named(origin: Origin) -> None:
    with origin.world.opened() as store:
        parity.cover(store.files)
    names = origin.files("parity")
    assert len(names) == len(origin.files("data pack", "meta pack"))
    for name in names[:2]:
        for world, _, how, _ in ways(origin, name):
            with world.opened() as store:
                assert lost_in(store, world) == set(), how
                told, sentences = named(store, world)
                assert told == set(), how
                assert [Path(name).stem in s for s in sentences] == ([] if how == "deleted" else [True]), how
                parity.cover(store.files)


@pytest.mark.parametrize("name", ["damaged.json", "damaged-disks.json", "head.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"[1]", b"null", b"7", b'[["a"]]', b'"', b"[" * 100_000, b"\xff"]
)
def test_any_json_in_state_is_survived(ram: Path, name: str, content: bytes) -> None:
    world = World(ram / "w").life(1)
    with world.opened() as store:
        state = store.state.path(name)
    state.write_bytes(content)
    with world.opened() as store:
        assert world.capture(store).status is Status.OK
        world.check_all(store)
        world.check_settled(store)


@pytest.mark.parametrize("kind", ["data pack", "meta pack", "points", "runs", "keys", "state index"])
def test_files_under_each_others_names(origin: Origin, kind: str) -> None:
    names = origin.files(kind)
    for number, (one, other) in enumerate(itertools.pairwise(names)):
        world, first = damaged(origin, one, number)
        second = world.path / other
        first.rename(world.path / "aside")
        second.rename(first)
        (world.path / "aside").rename(second)
        with world.opened() as store:
            found = {p.id for p in store.points()}
            if kind == "points":
                assert found == set(world.oracle) - {one.rsplit("-", 1)[1], other.rsplit("-", 1)[1]}
            assert lost_in(store, world) == set()
            if kind in ("runs", "points"):
                assert named(store, world)[1]


@SECRETS
def test_stray_files_and_folders_are_passed_over(ram: Path, secret: keys.Secret | None) -> None:
    world = World(ram / "w", secret).life(2)
    for folder in ("packs", "points", "runs", "keys", "leases", "."):
        (world.store_path / folder / "README").write_text("not ours")
        (world.store_path / folder / "lost+found").mkdir()
    for folder in ("packs", "points", "runs"):
        for inside in list((world.store_path / folder).iterdir()):
            if inside.is_dir():
                (inside / "stray").write_text("not ours")
                (inside / "stray folder").mkdir()
    with world.opened() as store:
        world.check_all(store)
        assert world.capture(store).point is not None
        world.check_all(store)


def test_a_point_of_another_machine_or_moment_is_refused(ram: Path) -> None:
    world = World(ram / "w").life(2)
    folder = next((world.store_path / "points").iterdir())
    oldest, newest = sorted(folder.iterdir())
    later = folder / ("9" + newest.name[1:])
    shutil.copy(oldest, later)
    with world.opened() as store:
        world.check_all(store)
        with pytest.raises(PointDamaged, match=later.name):
            store.load_point(f"points/{folder.name}/{later.name}")


def test_a_key_file_of_json_that_is_none_is_passed_over(ram: Path) -> None:
    world = World(ram / "w", KEY).life(1)
    record = json.loads(next((world.store_path / "keys").glob("*.json")).read_text())
    hostile = {**record, "kind": "passphrase", "kdf": {"name": "argon2id", "iterations": 1 << 40, "memory_kib": 1 << 40,
                                                       "lanes": 4, "salt": "00" * 16}}  # fmt: skip
    hostile["check"] = keys._digest(hostile)
    worse = [
        {**record, "kdf": kdf, "kind": kind} for kdf in ([], {}, 0, "", {"salt": 5}) for kind in ("file", "passphrase")
    ]
    for one in worse:
        one["check"] = keys._digest(one)
    for number, content in enumerate([hostile, [], {}, {"id": 1}, None, {**record, "bundle": 5}, *worse]):
        (world.store_path / "keys" / f"{number}.json").write_text(json.dumps(content))
    world.secret = keys.passphrase("any")
    with pytest.raises(KeyRefused):
        world.open()
    world.secret = OTHER_KEY
    with pytest.raises(KeyRefused):
        world.open()
    world.secret = KEY
    with world.opened() as store:
        world.check_all(store)
