"""The index against a dictionary: adding, merging, damaged places, vanished packs, and caches in any state."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from hvbackup.files import Files
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format.keys import Keyring
from hvbackup.store.index import generation as g
from hvbackup.store.index import generations
from hvbackup.store.index import index as index_module
from hvbackup.store.index.generation import Generation
from hvbackup.store.index.index import NOWHERE, Index
from tests.store.mortal import Dies, Mortal
from tests.world import CarelessKernel

RING = Keyring.generate(bytes(16), encrypted=False)
Known = dict[bytes, set[tuple[str, int]]]  # chunk -> the places that hold it


def chunk(number: int) -> bytes:
    """An id; many share their first 8 bytes, and their filter bits."""
    return bytes([number % 3] * 8) + number.to_bytes(4, "big") * 2 + bytes([7] * 16)


@dataclass
class Bench:
    """A store with nothing but packs, and an index over it."""

    files: Files
    state: Files
    index: Index = field(init=False)

    def __post_init__(self) -> None:
        self.reopen()

    def reopen(self, *, keep: bool = True) -> None:
        self.index = Index(self.files, self.state, keep=keep)
        self.index.sync()

    def write(self, numbers: list[int]) -> tuple[str, np.ndarray]:
        """A pack with these chunks is in the store; the index does not know."""
        writer = packs.PackWriter(self.files, RING, f.KIND_DATA)
        for number in numbers:
            writer.add(f.CHUNK_BLOCK, f.CODEC_RAW, b"x", [chunk(number)], [1])
        return writer.seal()

    def check(self, known: Known, damaged: set[tuple[str, int]], numbers: range = range(60)) -> None:
        ids = [chunk(n) for n in numbers]
        found = self.index.lookup(np.frombuffer(b"".join(ids), "V32"))
        for one, row in zip(ids, found, strict=True):
            places = known.get(one, set()) - damaged
            if not places:
                assert row["pack"] == NOWHERE
            else:
                assert (self.index.packs[int(row["pack"])], int(row["offset"])) in places
            everywhere = {place[:2] for place in self.index.everywhere(one)}
            assert everywhere == known.get(one, set()), "a reader looks at damaged places too"


@contextmanager
def bench() -> Iterator[Bench]:
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        kernel = CarelessKernel()
        yield Bench(Files(f"{path}/store", kernel), Files(f"{path}/state", kernel))


class IndexLife(RuleBasedStateMachine):
    """Any order of everything that can happen to an index."""

    written = Bundle("written")

    @initialize()
    def begin(self) -> None:
        self.context = bench()
        self.bench = self.context.__enter__()
        self.known: Known = {}
        self.damaged: set[tuple[str, int]] = set()
        self.rng = random.Random(5)

    def teardown(self) -> None:
        self.context.__exit__(None, None, None)

    def _learn(self, name: str, rows: np.ndarray) -> None:
        for row in rows:
            self.known.setdefault(row["id"].tobytes(), set()).add((name, int(row["offset"])))

    @rule(target=written, numbers=st.lists(st.integers(0, 59), min_size=1, max_size=8, unique=True))
    def add(self, numbers: list[int]) -> str:
        name, rows = self.bench.write(numbers)
        self.bench.index.add(name, rows)
        self._learn(name, rows)
        return name

    @rule(target=written, count=st.integers(1, 40))
    def add_many(self, count: int) -> object:
        return multiple(*(self.add([self.rng.randrange(60)]) for _ in range(count)))

    @rule(numbers=st.lists(st.integers(0, 59), min_size=1, max_size=4, unique=True))
    def somebody_else_writes(self, numbers: list[int]) -> None:
        self._learn(*self.bench.write(numbers))
        self.bench.index.sync()

    @rule(keep=st.booleans())
    def reopen(self, keep: bool) -> None:
        self.bench.reopen(keep=keep)
        self.damaged &= {p for places in self.known.values() for p in places}

    @rule(name=written)
    def a_pack_vanishes(self, name: str) -> None:
        self.bench.files.remove(packs.path_of(name))
        self.known = {c: {p for p in places if p[0] != name} for c, places in self.known.items()}
        self.damaged = {p for p in self.damaged if p[0] != name}
        self.bench.reopen()

    # What is drawn does not depend on how many files there are: that follows from the names of packs, which are random.

    @rule(picks=st.lists(st.integers(0, 999), max_size=5))
    def places_are_damaged(self, picks: list[int]) -> None:
        places = sorted({p for several in self.known.values() for p in several})
        if places:
            self.damaged = {places[pick % len(places)] for pick in picks}
            self.bench.index.set_damaged(self.damaged)

    @rule(how=st.sampled_from(["delete", "cut", "empty", "garbage", "swap"]), pick=st.integers(0, 999))
    def a_cache_file_is_damaged(self, how: str, pick: int) -> None:
        names = self.bench.state.names("index")
        if not names:
            return
        path = self.bench.state.path(f"index/{names[pick % len(names)]}")
        if how == "delete":
            path.unlink()
        elif how == "swap":
            other = self.bench.state.path(f"index/{names[0]}")
            path.write_bytes(other.read_bytes())
        else:
            whole = path.read_bytes()
            path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"\xff" * len(whole)}[how])
        self.bench.reopen()

    @rule()
    def reread(self) -> None:
        self.bench.index.reread()
        assert not self.bench.index.reread()

    @invariant()
    def says_what_the_packs_say(self) -> None:
        if hasattr(self, "bench"):
            self.bench.check(self.known, self.damaged)


TestIndexLife = IndexLife.TestCase
TestIndexLife.settings = settings(stateful_step_count=12)


class LargeIndexLife(IndexLife):
    """The same where a handful of chunks is a large index: runs, merges and files piece by piece."""

    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        for module, name, value in (
            (index_module, "RUN_ROWS", 9),
            (index_module, "MEMORY_ROWS", 3),
            (index_module, "GONE_SHARE", 1),
            (generations, "PIECE_ROWS", 5),
            (g, "PIECE_ROWS", 5),
            (generations, "BUCKET_ROWS", 2),
        ):
            self.patch.setattr(module, name, value)
        IndexLife.begin(self)

    def teardown(self) -> None:
        super().teardown()
        self.patch.undo()


TestLargeIndexLife = LargeIndexLife.TestCase
TestLargeIndexLife.pytestmark = [pytest.mark.walk]
TestLargeIndexLife.settings = settings(stateful_step_count=12)


def test_a_hit_is_the_whole_id_and_not_its_beginning() -> None:
    with bench() as b:
        name, rows = b.write([0, 3, 6, 9])
        b.index.add(name, rows)
        assert len({chunk(n)[:8] for n in (0, 3, 6, 9, 12)}) == 1
        found = b.index.lookup(np.frombuffer(chunk(12) + chunk(9), "V32"))
        assert found["pack"].tolist() == [NOWHERE, 0]


def test_a_damaged_place_is_passed_over_for_another_copy() -> None:
    with bench() as b:
        first, rows = b.write([1, 2])
        b.index.add(first, rows)
        second, rows = b.write([2])
        b.index.add(second, rows)
        places = {p.pack: p.offset for p in b.index.everywhere(chunk(2))}
        b.index.set_damaged({(first, places[first])})
        row = b.index.lookup(np.frombuffer(chunk(2), "V32"))[0]
        assert b.index.packs[int(row["pack"])] == second
        b.reopen()
        assert b.index.damaged == {(first, places[first])}


def test_generations_stay_few_and_on_disk() -> None:
    with bench() as b:
        for number in range(5 * index_module.GENERATIONS_MAX):
            b.index.add(*b.write([number]))
        b.index.sync()
        assert len(b.state.names("index")) <= index_module.GENERATIONS_MAX
        b.reopen()
        assert len(b.state.names("index")) <= index_module.GENERATIONS_MAX
        assert b.index.chunks == 5 * index_module.GENERATIONS_MAX
        assert sum(len(rows) for _, rows in b.index.rows()) == b.index.chunks


def test_a_large_generation_is_kept_when_few_of_its_packs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench() as b:
        names = [b.write([n, n + 1])[0] for n in range(0, 40, 2)]
        b.reopen()
        [file] = b.state.names("index")
        monkeypatch.setattr(index_module, "RUN_ROWS", 10)
        b.files.remove(packs.path_of(names[0]))
        b.reopen()
        assert b.state.names("index") == [file], "writing it again would cost more than it saves"
        for number in range(40):
            ids = np.frombuffer(chunk(number), "V32")
            assert (b.index.lookup(ids)[0]["pack"] == NOWHERE) == (number < 2)
            assert len(b.index.everywhere(chunk(number))) == (number >= 2)
        assert sum(len(rows) for _, rows in b.index.rows()) == 38
        assert names[0] not in b.index.known()
        for name in names[1:4]:
            b.files.remove(packs.path_of(name))
        b.reopen()
        assert b.state.names("index") != [file]
        assert b.index.chunks == 32


def test_killed_at_every_step_of_a_rebuild_and_its_merges_the_next_one_knows_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_module, "RUN_ROWS", 5)
    monkeypatch.setattr(index_module, "MEMORY_ROWS", 2)
    monkeypatch.setattr(generations, "PIECE_ROWS", 4)
    for step in range(200):
        with bench() as b:
            known: Known = {}
            for number in range(0, 60, 2):
                name, rows = b.write([number, number + 1])
                for row in rows:
                    known.setdefault(row["id"].tobytes(), set()).add((name, int(row["offset"])))
            mortal = Mortal()
            dying = Index(b.files, Files(b.state.root, mortal), keep=True)
            mortal.left = step
            try:
                dying.sync()
            except Dies:
                ended = False
            else:
                ended = True
            b.state.sweep()
            b.reopen()
            b.check(known, set())
            assert b.index.chunks == 60
            if ended:
                break
    assert step > 20


def test_a_reader_writes_nothing_down() -> None:
    with bench() as b:
        for number in range(2 * index_module.GENERATIONS_MAX):
            b.write([number])
        b.reopen(keep=False)
        assert b.state.names("index") == []
        assert b.index.chunks == 2 * index_module.GENERATIONS_MAX


def test_a_pack_nobody_can_read_is_named_and_the_others_serve() -> None:
    with bench() as b:
        bad, _ = b.write([1])
        good, rows = b.write([2])
        b.files.path(packs.path_of(bad)).write_bytes(b"nothing of ours")
        b.reopen()
        assert b.index.unreadable == [bad]
        b.check({chunk(2): {(good, int(rows["offset"][0]))}}, set())


def test_a_pack_that_is_reclaimed_while_packs_are_listed_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench() as b:
        gone, _ = b.write([1])
        stays, _ = b.write([2])
        b.files.remove(packs.path_of(gone))
        monkeypatch.setattr(packs, "list_packs", lambda _: sorted([gone, stays]))
        assert b.index.catch_up()
        assert b.index.known() == {stays}
        b.reopen()
        assert (b.index.known(), b.index.unreadable) == ({stays}, [])


@given(st.integers(0, 1 << 32), st.integers(1, 400))
def test_a_generation_is_the_same_in_however_many_pieces_it_was_written(seed: int, count: int) -> None:
    rng = random.Random(seed)
    rows = np.zeros(count, f.ROW)
    rows["id"] = np.frombuffer(
        b"".join(bytes([rng.choice((0, 7, 255))]) + rng.randbytes(31) for _ in range(count)), "V32"
    )
    rows["offset"] = range(count)
    whole = generations.sort(g.rows_of(rows, 0))
    cuts = sorted(rng.randrange(count + 1) for _ in range(rng.randrange(6)))
    pieces = [whole[a:b] for a, b in itertools.pairwise([0, *cuts, count])]
    out = generations._Memory()
    generations.write(out, {"p" * 64: bytes(8)}, count, pieces, None, g.FILTER_BITS_PER_CHUNK_SMALL)
    made = generation_of(rows)
    assert bytes(out) == made.content
    found = made.find(g.Asked.of(rows["id"]), set())
    assert found is not None
    assert (made.rows["id"][found] == rows["id"]).all()
    assert all(
        list(made.places(chunk)) == [row]
        for chunk, row in zip(map(bytes, rows["id"].tolist()), found.tolist(), strict=True)
    )
    strangers = np.frombuffer(rng.randbytes(32 * 100), "V32")
    none = made.find(g.Asked.of(strangers), set())
    assert none is None or (none == -1).all()


@given(st.binary(max_size=400))
def test_loading_any_bytes_as_a_generation(data: bytes) -> None:
    with TemporaryDirectory() as path:
        file = Path(path) / "x.idx"
        file.write_bytes(data)
        assert Generation.open_at(str(file)) is None


def generation_of(rows: np.ndarray, name: str = "p" * 64) -> Generation:
    made = generations.small({name: bytes(8)}, g.rows_of(rows, 0))
    made.ordinals = np.array([0, NOWHERE], np.uint32)
    return made


@pytest.mark.parametrize("count", [0, 1, 100, 5000])
def test_a_generation_comes_back_from_its_file(tmp_path: Path, count: int) -> None:
    rows = np.zeros(count, f.ROW)
    rows["id"] = [chunk(n) for n in range(count)]
    made = generation_of(rows)
    (tmp_path / "x.idx").write_bytes(made.content)
    loaded = Generation.open_at(str(tmp_path / "x.idx"))
    assert loaded is not None
    assert loaded.packs == made.packs
    assert loaded.rows.tobytes() == made.rows.tobytes()
    assert loaded.holds()
