"""Writers' leases and condemned packs: nothing is referred to that reclaim may remove, and reclaim waits for who may not know."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import blake3
import pytest

from hvbackup.errors import Busy
from hvbackup.model import Instant, PointId
from hvbackup.store.chunks import condemned, writers
from hvbackup.store.chunks.condemned import CONDEMNED
from hvbackup.store.chunks.writers import LEASE_SECONDS, RENEW_SECONDS, Wait, leases
from hvbackup.store.format import layout as f
from hvbackup.store.format.pack import list_packs, path_of
from hvbackup.store.store import Store
from tests.world import CarelessKernel, World

BLOCK_BYTES = 64 * 1024


class Hours:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> tuple[float, float]:
        return self.now, self.now


def condemn_all(store: Store) -> condemned.Condemned:
    found = condemned.new(frozenset(list_packs(store.files)), Instant(1))
    CONDEMNED.put(store.files, store.ring, found.id, found)
    return found


def test_nothing_new_refers_to_a_condemned_pack(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    content = world.content()
    with world.opened() as store:
        condemn_all(store)
        before = set(list_packs(store.files))
        for disk in world.disks.values():  # zeroes now; the same again later
            disk.write(0, bytes(disk.size))
        world.capture(store)
        for name, disk in world.disks.items():
            disk.write(0, content[name])
        world.capture(store)
        for pack in before:
            store.files.remove(path_of(pack))
    with world.opened() as store:
        newest = store.newest(world.hv.machine("m1").model().id)
        assert newest
        world.check_point(store, newest)


def test_nothing_new_refers_to_a_pack_that_vanished_since_the_index_was_made(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store:
        for path in store.point_paths(store.machine_folders()[0]):
            store.files.remove(path)
        for pack in list_packs(store.files):  # reclaimed by somebody else while we were open
            store.files.remove(path_of(pack))
        world.capture(store)
    with world.opened() as store:
        newest = store.newest(world.hv.machine("m1").model().id)
        assert newest
        world.check_point(store, newest)


def test_a_damaged_list_makes_everything_be_stored_again(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store:
        found = condemn_all(store)
        store.files.replace(f"condemned/{found.id}", b"garbage")
        outcome = world.capture(store, full=True)
        assert outcome.figures.stored_bytes > 0
        writer = store.writer()
        assert writer.lease.avoids(store.index.rows().__iter__().__next__()[1]["pack"]).all()
        writer.abandon()


def test_the_lease_is_there_while_a_writer_writes_and_gone_after(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store:
        writer = store.writer()
        assert [v.id for v in leases(store.files, store.ring)] == [writer.lease.id]
        writer.abandon()
        assert not list(leases(store.files, store.ring))
        assert store.state.names("writers") == []


def test_the_lease_of_a_dead_writer_of_this_machine_goes_with_the_next(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store:
        dead = store.writer()
        dead.lease._exit.close()  # as the system does with the locks of a process that is killed
        alive = store.writer()
        assert [v.id for v in leases(store.files, store.ring)] == [alive.lease.id]
        third = store.writer()
        assert {v.id for v in leases(store.files, store.ring)} == {alive.lease.id, third.lease.id}


class SlowDisk(CarelessKernel):
    """A disk on which the commit of a point takes longer than a lease."""

    def __init__(self, clock: Hours) -> None:
        self._clock, self.committed = clock, False

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        if "/points/" in new:
            self.committed = True
            self._clock.now += LEASE_SECONDS + 1


@pytest.mark.parametrize("slow_disk", [False, True], ids=["before the point", "between the point and its end"])
def test_a_lease_that_ran_out_makes_no_point(tmp_path: Path, slow_disk: bool) -> None:
    world, clock = World(tmp_path).life(1), Hours()
    kernel = world.kernel = SlowDisk(clock)
    with world.opened() as store:
        [base] = store.points()
        writer = store.writer()
        writer.lease._clock, writer.lease._written = clock, clock()
        clock.now += 0 if slow_disk else LEASE_SECONDS + 1
        with pytest.raises(Busy, match="longer than a writer's lease holds"):
            store.commit(replace(base, id=PointId("0" * 16), t=Instant(base.t + 1)), writer)
        writer.abandon()
        assert [p.id for p in store.points()] == [base.id]
        assert kernel.committed == slow_disk


def test_a_lease_is_renewed_while_the_writer_works(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store:
        writer, clock = store.writer(), Hours()
        writer.lease._clock, writer.lease._written = clock, clock()
        before = [v.data for v in leases(store.files, store.ring)]
        clock.now = RENEW_SECONDS - 1
        writer.lease.renew()
        assert [v.data for v in leases(store.files, store.ring)] == before
        clock.now = RENEW_SECONDS + 1
        writer.lease.renew()
        assert [v.data for v in leases(store.files, store.ring)] != before
        clock.now += LEASE_SECONDS - 1
        writer.lease.confirm()
        clock.now += 2
        with pytest.raises(Busy):
            writer.lease.renew()
        writer.abandon()


def test_reclaim_waits_for_writers_that_may_not_know(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store, Store.open(world.store_path, tmp_path / "other", kernel=world.kernel) as far:
        early = far.writer()
        found = condemn_all(store)
        wait = Wait(store.files, store.state, store.ring, store.runs.writer, found.id)
        assert wait.rest(0.0) == [early.lease.id]
        late = far.writer()
        assert wait.rest(1.0) == [early.lease.id], "who began after the list knows of it"
        early.lease._write()  # renewed
        assert wait.rest(2.0) == [early.lease.id]
        assert wait.rest(2.0 + LEASE_SECONDS) == [early.lease.id]
        early.abandon()
        assert wait.rest(3.0) == []
        late.abandon()


def test_reclaim_waits_no_longer_than_a_lease_lasts_and_not_for_its_own_dead(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store, Store.open(world.store_path, tmp_path / "other", kernel=world.kernel) as far:
        lost, dead = far.writer(), store.writer()
        dead.lease._exit.close()
        store.files.replace("writers/0123456789abcdef", b"not a lease")
        found = condemn_all(store)
        wait = Wait(store.files, store.state, store.ring, store.runs.writer, found.id)
        assert wait.rest(0.0) == sorted([lost.lease.id, "0123456789abcdef"])
        assert wait.rest(LEASE_SECONDS + RENEW_SECONDS + 1) == []
        assert store.files.names(writers.FOLDER) == []


def test_what_does_not_shrink_is_not_tried_for_long_and_what_does_is_found_again(tmp_path: Path) -> None:
    """Random blocks, then blocks of which one in three shrinks, then text: each comes back, and takes the room it needs."""
    rng = random.Random(9)
    text = b"".join(b"line %d of a log\n" % n for n in range(5000))[:BLOCK_BYTES]
    kinds = [False] * 20 + [n % 3 == 0 for n in range(30)] + [True] * 10
    plains = [
        n.to_bytes(4, "big") + (text if shrinks else rng.randbytes(BLOCK_BYTES))[4:] for n, shrinks in enumerate(kinds)
    ]
    with World(tmp_path).init().opened() as store:
        writer = store.writer()
        ids = [blake3.blake3(plain, key=store.ring.block_key).digest() for plain in plains]
        codecs = []
        for at in range(0, len(plains), 10):
            groups = [([memoryview(p)], [i]) for p, i in zip(plains[at : at + 10], ids[at : at + 10], strict=True)]
            for frame in writer.compress(groups):
                codecs.append(frame.codec)
                writer.put_blocks(frame)
        writer.seal()
        assert [codec == f.CODEC_ZSTD for codec in codecs] == kinds
        assert [store.chunks.block(i) for i in ids] == plains
        writer.abandon()
