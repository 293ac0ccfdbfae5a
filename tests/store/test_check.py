"""Check: levels, parts, a rate, going on after an interruption, and what is owed; refill from twins and from other stores."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import blake3
import pytest

from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.model import MiB
from hvbackup.store.check import check as check_module
from hvbackup.store.check.check import Wanted, check
from hvbackup.store.check.ledger import DEBT_NS, Ledger, Level
from hvbackup.store.check.refill import refill
from hvbackup.store.check.verify import Throttle
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format.keys import Secret
from hvbackup.store.reclaim.repack import kind_of
from hvbackup.store.store import Store
from tests.store.test_damage import flip
from tests.world import BLOCK, KEY, OTHER_KEY, World

NOW = 1_800_000_000 * 10**9
SECRETS = pytest.mark.parametrize("secret", [None, KEY], ids=["plain", "encrypted"])


def many_packs(path: Path, secret: Secret | None, captures: int = 6) -> World:
    """Each capture makes packs of its own."""
    world = World(path, secret, disks={"vda": FakeDisk(8 * BLOCK + 512), "vdb": FakeDisk(4 * BLOCK)})
    return world.life(captures)


def data_packs(store: Store) -> list[str]:
    return [n for n in packs.list_packs(store.files) if kind_of(store, n) == f.KIND_DATA]


def spoil(store: Store, pack: str, record: int = 0) -> int:
    """Flip a bit in the frame of a record; returns its offset."""
    offset, stored = list(packs.records(packs.read_footer(store.files, pack)))[record]
    flip(store.files.path(packs.path_of(pack)), offset + stored - 17)
    store.files.forget(packs.path_of(pack))
    return offset


@SECRETS
@pytest.mark.parametrize("level", [Level.AUTHENTICATE, Level.DEEP])
def test_a_damaged_record_is_found_at_both_levels_and_named_with_all_it_takes(
    tmp_path: Path, secret: Secret | None, level: Level
) -> None:
    world = many_packs(tmp_path, secret)
    with world.opened() as store:
        bad = data_packs(store)[0]
        offset = spoil(store, bad)
        assert check(store).problems == [], "the quick check does not read contents"
        report = check(store, Wanted(level, NOW))
        assert [p.what for p in report.problems if p.kind == "chunk" and bad in p.what]
        assert store.index.damaged == {(bad, offset)}
        lost = [p for p in report.problems if p.kind == "disk"]
        assert lost
        for problem in lost:
            point = next(p for p in store.points() if p.id == problem.point)
            view = store.view(next(d for d in point.disks if d.disk.id == problem.disk))
            for start, length in problem.extents:
                with pytest.raises(Exception, match="Chunk"):
                    view.read_into(start, memoryview(bytearray(length)))


def test_what_was_read_is_counted_and_only_what_was_not_read_is_owed(tmp_path: Path) -> None:
    world = many_packs(tmp_path, KEY)
    with world.opened() as store:
        owed = check(store, Wanted(Level.QUICK, NOW))
        assert owed.debt_bytes == owed.total_bytes > 0
        done = check(store, Wanted(Level.AUTHENTICATE, NOW))
        assert done.debt_bytes == 0
        assert done.read_bytes > 0.8 * done.total_bytes
        later = check(store, Wanted(Level.QUICK, NOW + DEBT_NS + 1))
        assert later.debt_bytes == later.total_bytes


def test_samples_get_round_to_everything(tmp_path: Path) -> None:
    world = many_packs(tmp_path, KEY)
    with world.opened() as store:
        bad = data_packs(store)[-1]
        spoil(store, bad)
        found: set[str] = set()
        for day in range(12):
            report = check(store, Wanted(Level.DEEP, NOW + day, sample=0.2))
            found |= {p.what for p in report.problems if p.kind == "chunk"}
            assert report.read_bytes < 0.6 * report.total_bytes
        assert any(bad in what for what in found)
        assert check(store, Wanted(Level.QUICK, NOW + 13)).debt_bytes == 0
        assert store.index.damaged, "a sample that did not look there takes nothing back"


def test_a_check_that_was_interrupted_goes_on_and_forgets_nothing_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(check_module, "THREADS", 1)
    world = many_packs(tmp_path, KEY)
    read: list[str] = []
    real = check_module.verify

    def verify(store: Store, pack: str, *more: object) -> object:
        read.append(pack)
        if len(read) == 9:
            raise KeyboardInterrupt
        return real(store, pack, *more)  # type: ignore[arg-type]

    with world.opened() as store:
        every = packs.list_packs(store.files)
        bad = next(p for p in every[:4] if p)
        spoil(store, bad)
        monkeypatch.setattr(check_module, "verify", verify)
        with pytest.raises(KeyboardInterrupt):
            check(store, Wanted(Level.DEEP, NOW))
    first = list(read)
    read.clear()
    monkeypatch.setattr(check_module, "verify", lambda *a: read.append(a[1]) or real(*a))
    with world.opened() as store:
        report = check(store, Wanted(Level.DEEP, NOW + 5, resume=True))
        assert set(read) | set(first) == set(every)
        assert len(read) < len(every)
        assert {place[0] for place in store.index.damaged} == {bad}
        assert report.debt_bytes == 0
        read.clear()
        check(store, Wanted(Level.DEEP, NOW + 6, resume=True))
        assert set(read) == set(every), "that check had ended: a new one begins"


def test_only_what_a_machine_or_point_needs_is_read(tmp_path: Path) -> None:
    world = many_packs(tmp_path, KEY)
    with world.opened() as store:
        points = list(store.points())
        whole = check(store, Wanted(Level.DEEP, NOW))
        one = check(store, Wanted(Level.DEEP, NOW, point=points[0].id))
        assert (one.points, one.problems) == (1, [])
        assert 0 < one.read_bytes < whole.read_bytes
        everything = check(store, Wanted(Level.DEEP, NOW, machine=points[0].machine.id))
        assert (everything.points, everything.problems) == (len(points), [])
        newest_only = set(data_packs(store)) - _needed(store, points[0])
        spoil(store, newest_only.pop())
        assert check(store, Wanted(Level.DEEP, NOW, point=points[0].id)).problems == []
        assert check(store, Wanted(Level.DEEP, NOW, machine=points[0].machine.id)).lost


def _needed(store: Store, point: object) -> set[str]:
    ids = [c.tobytes() for d in point.disks for _, ids in store.view(d).leaves() for c in ids if c.any()]  # type: ignore[attr-defined]
    return {place.pack for chunk in ids for place in store.index.everywhere(chunk)}


def test_the_rate_is_kept() -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    throttle = Throttle(10 * MiB, lambda: now[0], sleep)
    for _ in range(11):
        throttle.take(5 * MiB)
    assert now[0] == pytest.approx(5.0)


@pytest.mark.parametrize("how", ["cut", "garbage", "flip", "gone"])
def test_a_damaged_ledger_means_that_nothing_was_verified(tmp_path: Path, how: str) -> None:
    world = many_packs(tmp_path, None, 2)
    with world.opened() as store:
        check(store, Wanted(Level.DEEP, NOW))
        path = store.state.path("verified")
        data = path.read_bytes()
        if how == "gone":
            path.unlink()
        else:
            changed = {
                "cut": data[:-5],
                "garbage": random.Random(1).randbytes(999),
                "flip": data[:40] + b"x" + data[41:],
            }
            path.write_bytes(changed[how])
        pack = packs.list_packs(store.files)[0]
        assert Ledger(store.state).when(pack) == 0
        assert check(store, Wanted(Level.QUICK, NOW)).debt_bytes > 0


def test_a_stray_file_among_the_packs_stops_nothing(tmp_path: Path) -> None:
    world = many_packs(tmp_path, KEY, 2)
    (world.store_path / "packs" / "00").mkdir(exist_ok=True)
    (world.store_path / "packs" / "00" / "no name of ours.pack").write_bytes(b"stray")
    with world.opened() as store:
        assert check(store, Wanted(Level.DEEP, NOW)).problems == []
        world.check_all(store)


# --- refill -----------------------------------------------------------------------------------------------------------


def test_pages_with_one_good_copy_get_another(tmp_path: Path) -> None:
    world = many_packs(tmp_path, KEY, 3)
    with world.opened() as store:
        metas = [n for n in packs.list_packs(store.files) if kind_of(store, n) == f.KIND_META]
        store.files.remove(packs.path_of(metas[0]))
    with world.opened() as store:
        assert check(store, deep=True).problems == []
        [line] = refill(store, None)
        assert "two again" in line
        assert refill(store, None) == []
    for name in metas[1:]:
        (world.store_path / packs.path_of(name)).rename(tmp_path / "aside")
        with world.opened(owner=False) as store:
            world.check_all(store)
        (tmp_path / "aside").rename(world.store_path / packs.path_of(name))


@pytest.mark.parametrize("same", [True, False], ids=["same secrets", "other secrets"])
def test_lost_blocks_come_back_from_another_store(tmp_path: Path, same: bool) -> None:
    world = many_packs(tmp_path / "a", KEY, 3)
    if same:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        other = World(tmp_path / "b", KEY, disks=world.disks)
    else:
        other = World(tmp_path / "b", OTHER_KEY, disks=world.disks).init()
        with other.opened() as store:
            other.capture(store)
    with world.opened() as store, other.opened(owner=False) as second:
        newest = list(store.points())[-1]
        for pack in data_packs(store):
            store.files.remove(packs.path_of(pack))
        store.index.rebuild()
        assert check(store).lost
        [line] = refill(store, second)
        assert "came back" in line
    with world.opened() as store:
        if same:
            assert check(store, deep=True).problems == []
            world.check_all(store)
        else:
            world.check_point(store, newest)


def test_a_damaged_segment_is_named_as_what_moments_need(tmp_path: Path) -> None:
    world = many_packs(tmp_path, KEY, 1)
    machine = world.hv.machine("m1").model()
    with world.opened() as store:
        folder = f"journals/{store.ring.machine_name(machine.id)}"
        path = seal_a_segment(store, folder)
        clean = check(store, Wanted(Level.DEEP, NOW))
        assert (clean.segments, clean.problems) == (1, [])
        offset, stored = next(packs.records(packs.read_footer(store.files, path)))
        flip(store.files.path(path), offset + stored - 17)
        store.files.forget(path)
        for level in (Level.AUTHENTICATE, Level.DEEP):
            [problem] = check(store, Wanted(level, NOW)).problems
            assert (problem.kind, problem.lost) == ("segment", True)
            assert path in problem.what
        assert check(store).problems == []
        store.files.replace(path, b"no segment")
        assert [p.kind for p in check(store).problems] == ["segment"]


def seal_a_segment(store: Store, folder: str) -> str:
    """A file as the journal seals them, as far as its records go."""
    path = f"{folder}/00000001-00000000000000000002.seg"
    writer = packs.PackWriter(store.files, store.ring, f.KIND_SEGMENT, path)
    for what in (f.CHUNK_FACTS, f.CHUNK_FACT_INDEX):
        data = random.Random(what).randbytes(5000)
        writer.add(what, f.CODEC_RAW, data, [blake3.blake3(data, key=store.ring.block_key).digest()], [len(data)])
    writer.seal()
    return path


def test_a_check_that_writes_nothing_down_says_what_is_lost_as_well(tmp_path: Path) -> None:
    """As beside another check: which points need what is damaged is asked of the index, which must know."""
    world = World(tmp_path).life(1)
    with world.opened(owner=False) as store:
        pack = data_packs(store)[0]
        path = store.files.path(packs.path_of(pack))
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.write_bytes(data)
    with world.opened(owner=False) as store:
        lost = [p for p in check(store, deep=True).problems if p.lost]
        assert [p.kind for p in lost] == ["disk"]
        assert lost[0].extents
    with world.opened(owner=False) as store:
        assert store.index.damaged == set()
