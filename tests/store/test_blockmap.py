"""Block maps against a dictionary: any edits, any sizes, any change of depth."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.model import ZERO_CHUNK, ChunkId
from hvbackup.store.format.blockmap import BlockMap, Ids, MapEditor, depth_of
from hvbackup.store.format.layout import PAGE_IDS

SIZES = [1, 2, 255, 256, 257, 511, 512, 513, 65_535, 65_536, 65_537, 70_000, 1 << 20, (1 << 24) + 1, 1 << 30]
Model = dict[int, int]  # block -> a number that stands for its content; absent is zero


@dataclass
class Pages:
    """Pages in memory, and which were asked for."""

    stored: dict[ChunkId, bytes] = field(default_factory=dict)
    loaded: list[ChunkId] = field(default_factory=list)

    def put(self, page: bytes) -> ChunkId:
        assert any(page), "an empty page is stored nowhere"
        chunk = ChunkId(hashlib.sha256(page).digest())
        self.stored[chunk] = page
        return chunk

    def load(self, chunk: ChunkId) -> bytes:
        self.loaded.append(chunk)
        return self.stored[chunk]

    def map(self, root: ChunkId, blocks: int) -> BlockMap:
        return BlockMap(root, blocks, self.load)


def content(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest() if number else bytes(32)


def ids_of(numbers: list[int]) -> Ids:
    return np.frombuffer(b"".join(content(n) for n in numbers), np.uint8).reshape(-1, 32)


@dataclass(frozen=True)
class Edit:
    """The next map: its size, ranges to zero, then runs of blocks in ascending order."""

    blocks: int
    zero: list[tuple[int, int]]
    put: list[tuple[int, list[int]]]


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    blocks = draw(st.sampled_from(SIZES) | st.integers(1, 2000))
    # Interesting places are near the borders of pages and at both ends.
    near = st.sampled_from([0, 255, 256, 257, 512, 65_535, 65_536, 131_072, blocks - 1, blocks // 2]) | st.integers(
        0, blocks
    )
    places = near.map(lambda place: min(max(place, 0), blocks - 1))
    zero = [
        (
            at,
            min(
                draw(st.sampled_from([1, 2, 255, 256, 257, 65_536, 70_000, blocks]) | st.integers(1, 600)), blocks - at
            ),
        )
        for at in draw(st.lists(places, max_size=4))
    ]
    runs, end = [], 0
    for at in sorted(draw(st.lists(places, max_size=6))):
        if at >= end:
            values = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)) * draw(st.sampled_from([1, 1, 60]))
            values = values[: blocks - at]
            runs.append((at, values))
            end = at + len(values)
    return Edit(blocks, zero, runs)


def apply(pages: Pages, base: BlockMap | None, edit: Edit) -> BlockMap:
    editor = MapEditor(base, edit.blocks, pages.load, pages.put)
    for first, count in edit.zero:
        editor.zero(first, count)
    for first, numbers in edit.put:
        editor.put(first, ids_of(numbers))
    return pages.map(editor.finish(), edit.blocks)


def imitate(model: Model, edit: Edit) -> Model:
    out = {b: n for b, n in model.items() if b < edit.blocks}
    for first, count in edit.zero:
        out = {b: n for b, n in out.items() if not first <= b < first + count}
    for first, numbers in edit.put:
        for i, number in enumerate(numbers):
            out[first + i] = number
    return {b: n for b, n in out.items() if n}


def as_model(tree: BlockMap) -> dict[int, bytes]:
    return {
        first + i: ids[i].tobytes() for first, ids in tree.leaves() for i in np.flatnonzero(ids.any(axis=1)).tolist()
    }


@given(st.lists(edits(), min_size=1, max_size=5), st.data())
def test_maps_equal_a_dictionary(several: list[Edit], data: st.DataObject) -> None:
    pages, tree, model = Pages(), None, Model()
    history: list[tuple[BlockMap, Model]] = []
    for edit in several:
        tree, model = apply(pages, tree, edit), imitate(model, edit)
        history.append((tree, model))
    for old, expected in history:  # maps are immutable: the older ones still say what they said
        assert as_model(old) == {b: content(n) for b, n in expected.items()}
        assert (old.root == ZERO_CHUNK) == (not expected)
        first = data.draw(st.integers(0, old.blocks - 1))
        count = data.draw(st.integers(0, min(700, old.blocks - first)))
        assert old.ids(first, count).tolist() == ids_of([expected.get(first + i, 0) for i in range(count)]).tolist()


@given(st.lists(edits(), min_size=2, max_size=4))
def test_diff_equals_the_naive_one_and_reads_no_shared_page(several: list[Edit]) -> None:
    pages, tree = Pages(), None
    maps, models = [], [Model()]
    for edit in several:
        tree = apply(pages, tree, edit)
        maps.append(tree)
        models.append(imitate(models[-1], edit))
    for a, one in zip(maps, models[1:], strict=True):
        for b, other in zip(maps, models[1:], strict=True):
            expected = sorted(i for i in {*one, *other} if one.get(i) != other.get(i))
            pages.loaded.clear()
            assert a.diff(b).tolist() == expected
            if a.depth == b.depth and not expected:
                assert pages.loaded == []


@given(edits(), edits())
def test_equal_maps_have_equal_roots_however_they_were_made(one: Edit, other: Edit) -> None:
    pages = Pages()
    edited = apply(pages, apply(pages, None, one), other)
    model = imitate(imitate({}, one), other)
    runs = [(b, [n]) for b, n in sorted(model.items())]
    assert edited.root == apply(pages, None, Edit(other.blocks, [], runs)).root


@given(edits(), st.integers(0, 3000), st.integers(1, 3000))
def test_leaves_in_a_range_are_those_that_touch_it(edit: Edit, first: int, count: int) -> None:
    tree = apply(Pages(), None, edit)
    everything = [n for n, _ in tree.leaves()]
    lo, hi = first, first + count
    assert [n for n, _ in tree.leaves_backwards()] == everything[::-1]
    assert [n for n, _ in tree.leaves_in(lo, hi)] == [n for n in everything if n < hi and n + PAGE_IDS > lo]


@given(edits())
def test_pages_lists_every_page_that_a_reader_needs(edit: Edit) -> None:
    pages = Pages()
    tree = apply(pages, None, edit)
    listed = {page for page, _ in tree.pages()}
    pages.loaded.clear()
    as_model(tree)
    assert set(pages.loaded) == listed
    assert all(level < tree.depth for _, level in tree.pages())


@pytest.mark.parametrize(
    ("blocks", "depth"),
    [(0, 1), (1, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 3), (1 << 24, 3), ((1 << 24) + 1, 4)],
)
def test_the_depth_follows_from_the_number_of_blocks(blocks: int, depth: int) -> None:
    assert depth_of(blocks) == depth


def test_a_sparse_disk_of_64_tib_costs_a_few_pages() -> None:
    pages = Pages()
    blocks = (64 << 40) // (64 << 10)
    tree = apply(pages, None, Edit(blocks, [(0, blocks)], [(0, [1]), (blocks // 2, [2]), (blocks - 1, [3])]))
    assert len(pages.stored) <= 3 * tree.depth
    smaller = apply(pages, tree, Edit(1, [], []))
    assert as_model(smaller) == {0: content(1)}
