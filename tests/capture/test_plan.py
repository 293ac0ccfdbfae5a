"""What is read of a disk: the pure decisions of a capture, against sets of blocks."""

from __future__ import annotations

import random
from pathlib import Path

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup import capture as capture_module
from hvbackup import extents
from hvbackup.capture import batches, plan
from hvbackup.extents import Spans
from hvbackup.hypervisors import Changes
from hvbackup.hypervisors.fake import FakeDisk
from hvbackup.model import Continuity
from hvbackup.sampling import sampled
from tests.world import BLOCK, World, contents

GRAIN = 16  # a small block, so that sets of bytes stay small
ranges = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), max_size=6).map(extents.spans)
sizes = st.integers(1, 220)


def members(a: Spans) -> set[int]:
    return {i for start, length in a.tolist() for i in range(start, start + length)}


def cells(positions: set[int]) -> set[int]:
    return {i // GRAIN for i in positions}


@given(ranges, ranges, sizes, sizes | st.none(), st.sampled_from(Continuity))
def test_a_plan_covers_everything_that_may_differ(
    data: Spans, zero: Spans, size: int, parent_size: int | None, continuity: Continuity
) -> None:
    zero = extents.subtract(zero, data)
    found = plan(Changes(continuity, data, zero), size, parent_size, GRAIN)
    read, zeroed, kept = (members(a) for a in (found.read, found.zero, found.unchanged))
    inside = set(range(size))
    assert read | zeroed | kept <= inside
    assert not read & zeroed
    assert not kept & (read | zeroed)
    for a in (read, zeroed, kept):
        assert a == {i for i in inside if i // GRAIN in cells(a)}, "whole blocks"
    assert members(data) & inside <= read
    assert zeroed <= members(zero), "a block is zero only where all of it is known to be"
    assert members(zero) & inside <= read | zeroed
    if continuity is Continuity.INCREMENTAL:
        assert kept == inside - read - zeroed
    else:
        assert kept == set()
    if parent_size is not None and parent_size != size:
        # Whatever the tracker says: the tail is new, and the block at the smaller end was padded.
        edge = min(size, parent_size) // GRAIN * GRAIN
        assert set(range(edge, size)) <= read | zeroed
    assert found.how == (
        "incremental" if continuity is Continuity.INCREMENTAL else "full" if parent_size is None else "compared"
    )


@given(ranges, sizes, st.integers(1, 4))
def test_batches_hold_everything_in_order_and_never_too_much(read: Spans, size: int, room: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module, "BATCH_BYTES", room * GRAIN)
        read = extents.align(extents.clip(read, 0, size), GRAIN, size)
        several = list(batches(read, GRAIN))
    flat = [run for batch in several for run in batch]
    assert flat == sorted(flat)
    assert members(extents.spans(flat)) == members(read)
    assert sum(length for _, length in flat) == extents.total(read)
    assert all(sum(-(-n // GRAIN) for _, n in batch) <= room for batch in several)
    assert all(batch for batch in several)


@given(ranges, sizes, st.integers(0, 20), st.integers())
def test_a_sample_is_of_whole_blocks_of_the_set_each_once(unchanged: Spans, size: int, count: int, seed: int) -> None:
    unchanged = extents.align(extents.clip(unchanged, 0, size), GRAIN, size)
    found = sampled(unchanged, GRAIN, count, random.Random(seed))
    assert members(found) <= members(unchanged)
    assert {i for i in range(size) if i // GRAIN in cells(members(found))} == members(found)
    assert len(cells(members(found))) == min(count, len(cells(members(unchanged))))


def test_the_short_last_block_is_padded_with_zeroes_whatever_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "BATCH_BYTES", BLOCK)
    monkeypatch.setattr(capture_module, "THREADS", 1)
    world = World(tmp_path, disks={"vda": FakeDisk(3 * BLOCK + 512)}).init()
    disk = world.disks["vda"]
    disk.write(0, world.rng.randbytes(disk.size))
    with world.opened() as store:
        point = world.capture(store).point
        assert point is not None
        expected = bytes(disk.content[3 * BLOCK :]) + bytes(BLOCK - 512)
        digest = blake3.blake3(expected, key=store.ring.block_key).digest()
        assert store.view(point.disks[0]).map.ids(3, 1).tobytes() == digest
        assert contents(store, point) == world.content()
