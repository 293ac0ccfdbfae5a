"""Counts: they choose what a mark would choose, never decide what is removed, and are not believed when in doubt."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from hvbackup.errors import StoreDamage
from hvbackup.files import Files
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.model import Instant, RecoveryPoint
from hvbackup.store.check.check import Wanted, check
from hvbackup.store.check.ledger import Level
from hvbackup.store.chunks.writers import COUNTS
from hvbackup.store.format.pack import list_packs, path_of
from hvbackup.store.keep import forget
from hvbackup.store.reclaim import counts, reclaim
from hvbackup.store.reclaim.mark import Marks, mark
from hvbackup.store.reclaim.reclaim import Options, Reclaimed
from hvbackup.store.shelves.settings import HOUR_NS, Settings
from hvbackup.store.store import Store
from tests.world import BLOCK, World

GONE_AT_ONCE = Settings(trash_ns=0)
BELIEVING = Options(grace_ns=0, garbage_share=0.0, counts_age_ns=HOUR_NS)
BLOCKS = 600  # three leaves


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("chunks.writer", "reclaim.repack"):
        monkeypatch.setattr(f"hvbackup.store.{module}.PACK_BYTES", 4 * BLOCK)


def world_of(path: Path, blocks: int = BLOCKS) -> World:
    """One disk whose blocks all differ, here and there zero."""
    world = World(path, disks={"vda": FakeDisk(blocks * BLOCK)}).init()
    rng = random.Random(5)
    for i in range(0, blocks, 3):
        world.disks["vda"].write(i * BLOCK, rng.randbytes(16))
    return world


def captured(world: World, store: Store, changed: int = 20) -> RecoveryPoint:
    for _ in range(changed):
        world.disks["vda"].write(world.rng.randrange(world.disks["vda"].size // BLOCK) * BLOCK, world.rng.randbytes(16))
    point = world.capture(store).point
    assert point is not None
    return point


def drop(world: World, store: Store, points: list[RecoveryPoint], settings: Settings = GONE_AT_ONCE) -> None:
    with forget.alone(store):
        forget.forget(store, [store.path_of(p) for p in points], settings, world.clock(), why="test", by="me")
    for p in points:
        world.oracle.pop(p.id, None)


def run(world: World, store: Store, **changes: object) -> Reclaimed:
    return reclaim.reclaim(store, replace(BELIEVING, clock=world.clock, **changes))  # type: ignore[arg-type]


def kept(world: World, store: Store) -> counts.Counts:
    """What a mark finds, for later guesses."""
    marks = mark(store, world.clock())
    counts.save(store, counts.Counts(world.clock(), marks.shares(), marks.points))
    found = counts.load(store)
    assert found is not None
    return found


def guessed(store: Store, known: counts.Counts) -> dict[str, int]:
    found = counts.guess(store, known, lambda _: None)
    assert found is not None
    return {pack: share.live for pack, share in found.shares.items()}


def marked(world: World, store: Store) -> dict[str, int]:
    return {pack: share.live for pack, share in mark(store, world.clock()).shares().items()}


def of_blocks(store: Store, live: dict[str, int]) -> dict[str, int]:
    """Packs of blocks only: copies of points are not guessed at."""
    return {pack: n for pack, n in live.items() if store.files.read_at(path_of(pack), 5, 1) == b"\1"}


FORGOTTEN = [[0], [4], [2], [1, 2], [0, 1, 2, 3], [1, 3], [3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("which", FORGOTTEN, ids=str)
def test_a_guess_is_what_a_mark_finds(tmp_path: Path, which: list[int]) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        points = [captured(world, store) for _ in range(5)]
        known = kept(world, store)
        assert guessed(store, known) == marked(world, store)
        drop(world, store, [points[i] for i in which])
        guess, truth = guessed(store, known), marked(world, store)
        assert of_blocks(store, guess) == of_blocks(store, truth)
        assert guess != {pack: known.shares[pack].live for pack in guess}


def test_points_that_came_after_the_mark_are_counted_when_they_go(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        first = captured(world, store)
        run(world, store)
        second, third = captured(world, store), captured(world, store)
        assert run(world, store).condemned == 0
        drop(world, store, [second])
        known = counts.load(store)
        assert known is not None
        assert of_blocks(store, guessed(store, known)) == of_blocks(store, marked(world, store))
        assert run(world, store).removed_packs > 0
        assert [p.id for p in store.points()] == [first.id, third.id]
        world.check_all(store)


def test_the_trash_counts_as_there(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        points = [captured(world, store) for _ in range(2)]
        known = kept(world, store)
        drop(world, store, points[:1], Settings(trash_ns=HOUR_NS))
        assert guessed(store, known) == {pack: share.live for pack, share in known.shares.items()}


def test_a_disk_that_was_resized(tmp_path: Path) -> None:
    world = world_of(tmp_path, 200)
    with world.opened() as store:
        first = captured(world, store)
        world.disks["vda"].resize(600 * BLOCK)  # a level more
        captured(world, store)
        known = kept(world, store)
        drop(world, store, [first])
        assert of_blocks(store, guessed(store, known)) == of_blocks(store, marked(world, store))


def test_nothing_is_marked_when_there_is_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        captured(world, store)
        assert run(world, store).condemned == 0
        monkeypatch.setattr(reclaim, "mark", None)
        assert run(world, store).condemned == 0
        captured(world, store)
        assert run(world, store).condemned == 0


def test_counts_are_not_believed_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        captured(world, store)
        run(world, store)
        calls = count_marks(monkeypatch)
        run(world, store)
        assert calls == []
        world.clock.now += HOUR_NS
        run(world, store)
        assert len(calls) == 1
        world.clock.now -= 2 * HOUR_NS  # the clock was set back: nobody knows how old they are
        run(world, store)
        assert len(calls) == 2


def count_marks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []

    def counted(*args: object) -> Marks:
        calls.append(args)
        return mark(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reclaim, "mark", counted)
    return calls


def test_a_guess_that_is_too_high_condemns_nothing(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        captured(world, store)
        run(world, store)
        known = counts.load(store)
        assert known is not None
        before = set(list_packs(store.files))
        nothing = {pack: replace(share, live=0) for pack, share in known.shares.items()}
        counts.save(store, replace(known, shares=nothing))
        done = run(world, store)
        assert (done.condemned, done.copied_bytes, done.removed_packs) == (0, 0, 0)
        assert set(list_packs(store.files)) == before
        assert reclaim.CONDEMNED.names(store.files) == []
        known = counts.load(store)
        assert known is not None
        assert sum(s.live for s in known.shares.values()) > 0, "the mark has put it right"
        world.check_all(store)


def test_packs_of_a_block_that_moved_stay(tmp_path: Path) -> None:
    """Two parts of a disk change places: a guess calls both dead, a mark finds them."""
    world = world_of(tmp_path)
    disk = world.disks["vda"]
    with world.opened() as store:
        first = captured(world, store)
        run(world, store)
        blocks = of_blocks(store, marked(world, store)).keys()
        first_part, other_part = (bytes(disk.content[at * BLOCK : (at + 150) * BLOCK]) for at in (0, 300))
        disk.write(0, other_part)
        disk.write(300 * BLOCK, first_part)
        captured(world, store)
        drop(world, store, [first])
        done = run(world, store, garbage_share=0.2)
        assert "look through" in done.seconds, "the guess was too high"
        assert blocks <= set(list_packs(store.files))
        world.check_all(store)
        assert [p.what for p in check(store, Wanted(level=Level.DEEP)).problems] == []


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "gone", "other"])
def test_damaged_counts_are_nothing(tmp_path: Path, how: str) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        captured(world, store)
        kept(world, store)
        data = store.state.read(COUNTS)
        changed = {
            "cut": data[:-1],
            "flipped": bytes([*data[:200], data[200] ^ 1, *data[201:]]),
            "empty": b"",
            "other": b"hvL9" + data[4:],
        }
        if how == "gone":
            store.state.remove(COUNTS)
        else:
            store.state.replace(COUNTS, changed[how])
        assert counts.load(store) is None


def test_what_cant_be_read_is_for_a_mark_to_judge(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        first = captured(world, store)
        captured(world, store)
        known = kept(world, store)
        drop(world, store, [first])
        for pack in list_packs(store.files):
            if store.files.read_at(path_of(pack), 5, 1) == b"\2":
                store.files.remove(path_of(pack))
    with world.opened() as store:
        assert counts.guess(store, known, lambda _: None) is None
        with pytest.raises(StoreDamage):
            run(world, store)


@pytest.mark.walk
def test_of_very_many_pages_a_sample_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(tmp_path, 40 * 256)
    with world.opened() as store:
        first = captured(world, store, 1)
        captured(world, store, 2000)
        known = kept(world, store)
        drop(world, store, [first])
        exact = sum(known.shares[p].live - n for p, n in guessed(store, known).items())
        monkeypatch.setattr(counts, "LEAVES", 10)
        read = []
        sampled = counts.guess(store, known, read.append)
        assert sampled is not None
        assert 0 < len(read) <= 25
        found = sum(known.shares[p].live - s.live for p, s in sampled.shares.items())
        assert exact / 4 < found < exact * 2


def test_a_writer_that_died_here_makes_counts_void(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        captured(world, store)
        run(world, store)
        lease = store.writer().lease  # its process "dies": the lock goes, the lease stays
        lease._exit.close()
        assert store.state.exists(COUNTS)
        store.writer().abandon()
        assert not store.state.exists(COUNTS)


def test_counts_are_a_cache(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    with world.opened() as store:
        first = captured(world, store)
        captured(world, store)
        run(world, store)
        drop(world, store, [first])
        assert isinstance(store.state, Files)
        store.state.remove(COUNTS)
        assert run(world, store).removed_packs > 0
        known = counts.load(store)
        assert known is not None
        assert known.t <= Instant(world.clock.now)
        assert set(known.points) == {store.path_of(p) for p in store.points()}
