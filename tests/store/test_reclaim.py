"""Reclaim against an oracle: what is needed stays, what is not goes, beside writers and readers, and nothing at a doubt."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import blake3
import pytest

from hvbackup.errors import Busy, StoreDamage
from hvbackup.model import Instant, RecoveryPoint
from hvbackup.store.check.check import Wanted, check
from hvbackup.store.check.ledger import Level
from hvbackup.store.chunks import condemned, writer, writers
from hvbackup.store.chunks.condemned import CONDEMNED
from hvbackup.store.chunks.writers import LEASE_SECONDS
from hvbackup.store.format.pack import list_packs, path_of
from hvbackup.store.index.generation import PAGE, ROW
from hvbackup.store.keep import forget
from hvbackup.store.reclaim import reclaim
from hvbackup.store.reclaim.mark import mark
from hvbackup.store.reclaim.reclaim import Options, Reclaimed, choose
from hvbackup.store.shelves import pins
from hvbackup.store.shelves.settings import HOUR_NS, Settings
from hvbackup.store.store import Store
from tests.world import BLOCK, KEY, World

GONE_AT_ONCE = Settings(trash_ns=0)
NOW = Options(grace_ns=0, garbage_share=0.0)


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("chunks.writer", "reclaim.repack"):
        monkeypatch.setattr(f"hvbackup.store.{module}.PACK_BYTES", 2 * BLOCK)


def drop(world: World, store: Store, points: list[RecoveryPoint]) -> None:
    """These points are gone for good."""
    with forget.alone(store):
        forget.forget(store, [store.path_of(p) for p in points], GONE_AT_ONCE, world.clock(), why="test", by="me")
    for p in points:
        world.oracle.pop(p.id, None)


def run(world: World, store: Store, **changes: object) -> Reclaimed:
    return reclaim.reclaim(store, replace(NOW, clock=world.clock, **changes))  # type: ignore[arg-type]


def check_sound(world: World, store: Store) -> None:
    """Exactly the points of the oracle, whole; every page in two packs; nothing wrong; nothing condemned."""
    world.check_all(store)
    assert [p.what for p in check(store, Wanted(level=Level.DEEP)).problems] == []
    assert CONDEMNED.names(store.files) == []


def garbage(world: World, store: Store) -> int:
    """Bytes of plain chunks that nobody needs."""
    return sum(s.total - s.live for s in mark(store, world.clock()).shares().values())


@pytest.mark.parametrize("secret", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("which", [[0], [1, 2], [3], [0, 1, 2, 3]], ids=str)
def test_what_is_not_needed_goes_and_what_is_stays(tmp_path: Path, secret: object, which: list[int]) -> None:
    world = World(tmp_path, secret).life(4)  # type: ignore[arg-type]
    with world.opened() as store:
        points = list(store.points())
        before = set(list_packs(store.files))
        drop(world, store, [points[i] for i in which])
        done = run(world, store)
        assert done.removed_packs > 0
        assert done.removed_bytes > 0
    with world.opened() as store:
        check_sound(world, store)
        assert garbage(world, store) == 0
        assert set(list_packs(store.files)) != before
        again = run(world, store)
        assert (again.condemned, again.removed_packs) == (0, 0)
        if len(which) == 4:
            assert list_packs(store.files) == []
        world.scribble()
        world.capture(store)
        check_sound(world, store)


def test_pages_and_copies_of_points_stay_in_two_packs(tmp_path: Path) -> None:
    world = World(tmp_path).life(3)
    with world.opened() as store:
        points = list(store.points())
        drop(world, store, points[:2])
        run(world, store)
    with world.opened() as store:
        for folder in store.machine_folders():
            for path in store.point_paths(folder):
                copy = writer.point_copy(path, store.files.read(path))
                assert len({p.pack for p in store.index.everywhere(blake3.blake3(copy).digest())}) == 2
        [point] = store.points()
        for root in point.disks:
            assert len({p.pack for p in store.index.everywhere(root.root)}) == 2
        for pack in list_packs(store.files):  # any one pack of pages may be lost
            if store.files.read_at(path_of(pack), 5, 1) == b"\2":
                store.files.remove(path_of(pack))
                break
    with world.opened() as store:
        world.check_all(store)


def test_what_is_copied_is_encrypted_anew(tmp_path: Path) -> None:
    """No two packs have the same salt, and no two records of a pack the same ordinal: no nonce meets a key twice."""
    world = World(tmp_path, KEY).life(3)
    salts: dict[bytes, str] = {}

    def note(store: Store) -> None:
        for pack in list_packs(store.files):
            data = store.files.read(path_of(pack))
            assert salts.setdefault(data[24:56], pack) == pack
            rows = store.index.packs and [
                r for names, rows in store.index.rows() for r in rows if names[r["pack"]] == pack
            ]
            ordinals = [data[at + 4 : at + 8] for at in {int(r["offset"]) for r in rows}]
            assert len(set(ordinals)) == len(ordinals) > 0

    with world.opened() as store:
        note(store)
        drop(world, store, list(store.points())[:2])
        before = len(salts)
        assert run(world, store).copied_bytes > 0
    with world.opened() as store:
        note(store)
        assert len(salts) > before
        check_sound(world, store)


def test_the_threshold_decides_what_is_copied(tmp_path: Path) -> None:
    world = World(tmp_path).life(3)
    with world.opened() as store:
        drop(world, store, list(store.points())[:1])
        shares = mark(store, world.clock()).shares()
        assert set(choose(store, shares, 1.0)) == {p for p, s in shares.items() if not s.live}
        assert set(choose(store, shares, 0.0)) == {p for p, s in shares.items() if s.garbage}
        some = choose(store, shares, 0.5)
        assert {p for p in shares if shares[p].garbage >= 0.5} == set(some)
        assert run(world, store, garbage_share=1.0).copied_bytes == 0


def test_a_pin_keeps_what_is_read_although_its_point_is_gone(tmp_path: Path) -> None:
    world = World(tmp_path, KEY).life(2)
    with world.opened() as store:
        first = next(store.points())
        content = world.oracle[first.id]
        pin = pins.take(store, [first], "a reader", world.clock(), lasting=True)
        store.tell("forget", world.clock(), forgotten=[store.path_of(first)])
        store.files.remove(store.path_of(first))  # behind our back
        del world.oracle[first.id]
        run(world, store)
        world.oracle[first.id] = content
        world.check_point(store, first)
        del world.oracle[first.id]
        pins.drop(store, pin.id)
        assert run(world, store).removed_packs > 0
        check_sound(world, store)


def test_the_trash_is_a_root(tmp_path: Path) -> None:
    world = World(tmp_path, KEY).life(3)
    with world.opened() as store:
        points = list(store.points())
        with forget.alone(store):
            forget.forget(
                store, [store.path_of(p) for p in points], Settings(trash_ns=HOUR_NS), world.clock(), why="", by=""
            )
        run(world, store)
        with forget.alone(store):
            for there in forget.trash(store):
                forget.undo(store, there, world.clock(), by="")
        check_sound(world, store)


# -- beside writers ------------------------------------------------------------------------------------------------------------


def test_reclaim_waits_for_a_writer_that_began_before(tmp_path: Path) -> None:
    world = World(tmp_path).life(2)
    with world.opened() as store, Store.open(world.store_path, tmp_path / "far", kernel=world.kernel) as far:
        [base, _] = list(store.points())
        early = far.writer()
        drop(world, store, [base])
        done = run(world, store)
        assert done.waiting_for == [early.lease.id]
        assert done.removed_packs == 0
        assert run(world, store).waiting_for == [early.lease.id], "also in another run"
        early.abandon()
        assert run(world, store).removed_packs > 0
        check_sound(world, store)


def test_a_writer_that_began_before_may_take_anything_from_what_is_condemned(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store, Store.open(world.store_path, tmp_path / "far", kernel=world.kernel) as far:
        [base] = store.points()
        early = far.writer()
        drop(world, store, [base])
        run(world, store)  # everything is condemned now
        again = replace(base, id="f" * 16, t=Instant(base.t + 1))  # type: ignore[arg-type]
        far.commit(again, early)  # it takes all of it, from the map it builds upon
        far.tell("capture", again.t, point=far.path_of(again), machine=again.machine.id)
        world.oracle[again.id] = world.content()
        done = run(world, store)
        assert done.waiting_for == []
        check_sound(world, store)


def test_what_a_writer_builds_upon_stays_although_it_is_forgotten_meanwhile(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store, Store.open(world.store_path, tmp_path / "far", kernel=world.kernel) as far:
        [base] = store.points()
        marker = condemned.new(frozenset(list_packs(store.files)), world.clock())
        CONDEMNED.put(store.files, store.ring, marker.id, marker)
        late = far.writer()  # it knows what is condemned, and builds upon a point whose chunks all are
        assert far.parent(base.machine.id, late) == base
        drop(world, store, [base])
        assert run(world, store).waiting_for == []
        again = replace(base, id="f" * 16, t=Instant(base.t + 1))  # type: ignore[arg-type]
        far.commit(again, late)
        far.tell("capture", again.t, point=far.path_of(again), machine=again.machine.id)
        world.oracle[again.id] = world.content()
    with world.opened() as store:
        world.check_all(store)


def test_a_writer_that_sleeps_longer_than_its_lease_makes_no_point(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    hours = [0.0]
    with world.opened() as store, Store.open(world.store_path, tmp_path / "far", kernel=world.kernel) as far:
        [base] = store.points()
        sleepy = far.writer()
        sleepy.lease._clock = lambda: (hours[0], hours[0])
        sleepy.lease._written = (0.0, 0.0)
        drop(world, store, [base])

        def sleep(_seconds: float) -> None:
            hours[0] += LEASE_SECONDS / 4

        done = run(world, store, wait=True, sleep=sleep, steady=lambda: hours[0])
        assert done.removed_packs > 0
        with pytest.raises(Busy):
            far.commit(replace(base, id="f" * 16), sleepy)  # type: ignore[arg-type]
        sleepy.abandon()
        assert store.files.names(writers.FOLDER) == []


@pytest.mark.parametrize("step", ["look", "choose", "wait", "mark", "copy", "remove"])
@pytest.mark.parametrize("how", ["the same again", "something new", "nothing changed"])
def test_captures_of_another_machine_at_every_step_of_reclaim(tmp_path: Path, step: str, how: str) -> None:
    """The far machine has an index of its own, which knows all that is about to go."""
    world = World(tmp_path, KEY).life(2)
    with world.opened() as store:
        far = World(tmp_path, KEY, world.disks, seed=7)
        far.hv, far.clock, far.oracle = world.hv, world.clock, world.oracle
        with Store.open(world.store_path, tmp_path / "far", [KEY], kernel=world.kernel) as there:
            points = list(store.points())
            first = world.oracle[points[0].id]
            drop(world, store, points[:1] if how == "nothing changed" else points)

            def capture(now: str) -> None:
                if now != step:
                    return
                for name, disk in world.disks.items():
                    if how == "the same again":
                        disk.write(0, first[name])
                if how == "something new":
                    far.scribble()
                far.capture(there, full=True)

            run(world, store, say=capture)
    with world.opened() as store:
        world.check_all(store)
        assert [p.what for p in check(store).problems] == []
        run(world, store)
        check_sound(world, store)
        assert garbage(world, store) == 0


def test_two_hosts_that_reclaim_at_once_remove_one_copy_and_keep_one(tmp_path: Path) -> None:
    """Every chunk is in two packs; each host has condemned the packs that the other counts upon."""
    world = World(tmp_path).life(1)
    with world.opened() as store:
        from hvbackup.store.reclaim.repack import repack

        old = list_packs(store.files)
        made = repack(store, old).made
        assert made
        with Store.open(world.store_path, tmp_path / "far", kernel=world.kernel) as far:
            theirs = condemned.new(frozenset(made), world.clock())
            ours = condemned.new(frozenset(old), world.clock())
            CONDEMNED.put(store.files, store.ring, ours.id, ours)

            def other(step: str) -> None:
                if step == "copy":  # they finish while we are between our mark and our copy
                    CONDEMNED.put(far.files, far.ring, theirs.id, theirs)
                    reclaim.reclaim(far, replace(NOW, clock=world.clock))

            run(world, store, say=other)
    with world.opened() as store:
        world.check_all(store)
        run(world, store)
        check_sound(world, store)


def test_an_index_that_knows_packs_that_others_removed_counts_them_for_nothing(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store:
        from hvbackup.store.reclaim.repack import repack

        old = list_packs(store.files)
        made = repack(store, old).made
        with Store.open(world.store_path, tmp_path / "far", kernel=world.kernel) as far:
            ours = condemned.new(frozenset(old), world.clock())
            CONDEMNED.put(far.files, far.ring, ours.id, ours)

            def other(step: str) -> None:
                for pack in made if step == "wait" else ():  # by a third host, in order
                    store.files.remove(path_of(pack))

            reclaim.reclaim(far, replace(NOW, clock=world.clock, say=other))
    with world.opened() as store:
        check_sound(world, store)


# -- doubts --------------------------------------------------------------------------------------------------------------------


def damage_point(store: Store) -> None:
    store.files.replace(store.path_of(next(store.points())), b"garbage")


def lose_point(store: Store) -> None:
    store.files.remove(store.path_of(next(store.points())))


def lose_pages(store: Store) -> None:
    root = next(store.points()).disks[0].root
    for pack, offset, *_ in store.index.everywhere(root):
        data = bytearray(store.files.read(path_of(pack)))
        at = offset + 70
        data[at : at + 4] = bytes(b ^ 255 for b in data[at : at + 4])
        store.files.replace(path_of(pack), data)


def damage_list(store: Store) -> None:
    store.files.replace("condemned/0123456789abcdef", b"garbage")


def damage_pin(store: Store) -> None:
    store.files.replace("pins/0123456789abcdef", b"garbage")


def damage_record(store: Store) -> None:
    store.files.replace(f"runs/{store.runs.writer}/{0:010d}", b"garbage")


@pytest.mark.parametrize("doubt", [damage_point, lose_point, lose_pages, damage_list, damage_pin, damage_record])
def test_nothing_is_removed_at_a_doubt(tmp_path: Path, doubt: Callable[[Store], None]) -> None:
    world = World(tmp_path).life(3)
    with world.opened() as store:
        drop(world, store, list(store.points())[1:2])
        before = list_packs(store.files)
        doubt(store)
    with world.opened() as store:
        with pytest.raises(StoreDamage):
            run(world, store)
        assert list_packs(store.files) == before


def test_a_damaged_chunk_keeps_its_pack(tmp_path: Path) -> None:
    world = World(tmp_path).life(3)
    with world.opened() as store:
        points = list(store.points())
        drop(world, store, points[:2])
        marks = mark(store, world.clock())
        sparse = [p for p, s in marks.shares().items() if s.live and s.garbage]
        pack = next(p for p in sparse if store.files.read_at(path_of(p), 5, 1) == b"\1")
        chunk = sorted(marks.homes_in([pack])[pack])[0]
        [place] = [p for p in store.index.everywhere(chunk) if p.pack == pack]
        data = bytearray(store.files.read(path_of(pack)))
        at = place.offset + place.stored - 20
        data[at] ^= 1
        store.files.replace(path_of(pack), data)
        done = run(world, store)
        assert any(pack in line for line in done.kept)
        assert pack in list_packs(store.files)
        assert run(world, store).removed_packs == 0
        assert pack in list_packs(store.files)


def test_a_damaged_cache_of_the_index_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("index.generation", "index.generations"):  # else all of a small file is looked at when it is opened
        monkeypatch.setattr(f"hvbackup.store.{module}.SUM_BYTES", 512)
    world = World(tmp_path).life(3)
    with world.opened() as store:
        drop(world, store, list(store.points())[:1])
        [*files] = [store.state.path(f"index/{n}") for n in store.state.names("index")]
        rows = range(PAGE, PAGE + store.index.chunks * ROW.itemsize)  # what comes before is looked at when it is opened
    rng = random.Random(1)
    for _ in range(12):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "store", copy / "store")
        shutil.copytree(tmp_path / "state", copy / "state")
        for file in files:
            path = copy / file.relative_to(tmp_path)
            data = bytearray(path.read_bytes())
            for _ in range(8):
                data[rng.choice(rows)] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        other = World(copy)
        other.oracle, other.clock = world.oracle, world.clock
        with other.opened() as store:
            run(other, store)
        shutil.rmtree(copy / "state")
        with other.opened() as store:
            other.check_all(store)
        shutil.rmtree(copy)


def test_the_grace_is_waited_for(tmp_path: Path) -> None:
    world = World(tmp_path).life(2)
    with world.opened() as store:
        drop(world, store, list(store.points())[:1])
        done = run(world, store, grace_ns=HOUR_NS)
        assert done.removed_packs == 0
        assert done.until is not None
        assert run(world, store, grace_ns=HOUR_NS).removed_packs == 0
        world.clock.now += HOUR_NS - 10**9
        assert run(world, store, grace_ns=HOUR_NS).removed_packs == 0
        world.clock.now += 10**9
        assert run(world, store, grace_ns=HOUR_NS).removed_packs > 0
        check_sound(world, store)


def test_one_reclaim_at_a_time_on_a_host(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store, store.state.owner(reclaim.RECLAIM_LOCK, "test"), pytest.raises(Busy):
        run(world, store)
