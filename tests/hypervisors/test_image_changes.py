"""Lists of changed extents: what is taken, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup import extents
from hvbackup.errors import UsageError
from hvbackup.hypervisors import changedlist
from hvbackup.model import Continuity, LeaseId, Token

SIZE = 1 << 30


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "changed"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "0 512\n4096 10\n",
        "# what the array said\n\n0x0\t0x200   # header\n4096 10",
        '[{"offset": 0, "length": 512}, {"offset": 4096, "length": 10, "type": 1, "description": "dirty"}]',
        ' \n [{"offset":0,"length":512},{"offset":4096,"length":10},{"offset":4098,"length":3},{"offset":9,"length":0}]',
    ],
)
def test_both_forms_say_the_same(tmp_path: Path, text: str) -> None:
    assert changedlist.read(written(tmp_path, text), SIZE).tolist() == [[0, 512], [4096, 10]]


@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).filter(lambda e: sum(e) <= SIZE)))
def test_every_extent_survives_both_forms(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("lists")
    lines = written(folder, "".join(f"{offset} {length}\n" for offset, length in ranges))
    assert np.array_equal(changedlist.read(lines, SIZE), extents.spans(ranges))
    listed = written(folder, json.dumps([{"offset": offset, "length": length} for offset, length in ranges]))
    assert np.array_equal(changedlist.read(listed, SIZE), extents.spans(ranges))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 512\n4096\n", "changed, line 2: '4096' is not"),
        ("0 512\n\n1 2 3\n", "line 3"),
        ("0 512\nzero 1\n", "line 2"),
        ("010 512\n", "line 1"),  # octal or not? refused
        ("-1 512\n", "line 1: offset -1"),
        ("0 -5\n", "line 1"),
        (f"0 1\n{SIZE} 1\n", f"line 2: ends at byte {SIZE + 1}, beyond the end of the disk at {SIZE}"),
        ("[\n{]", "changed, line 2: not a JSON list"),
        ('[{"offset": 0, "length": 1}, {"offset": 0}]', "extent 2"),
        ('[{"offset": 0, "length": 1.5}]', "extent 1"),
        ('[{"offset": true, "length": "1"}]', "extent 1"),
        ("[1]", "extent 1"),
        ("[" * 100_000, "not a JSON list"),
        ("0 512\n\u00e4 1\n", "not ASCII"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match="changed") as caught:
        changedlist.read(written(tmp_path, text), SIZE)
    assert words in str(caught.value)


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: can't read this list"):
        changedlist.read(tmp_path / "nowhere", SIZE)


def test_a_list_that_is_too_long_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "changed"
    with path.open("wb") as file:
        file.truncate(changedlist.FILE_MAX_BYTES + 1)
    with pytest.raises(UsageError, match="at most"):
        changedlist.read(path, SIZE)


def test_without_a_point_a_list_refers_to_nothing() -> None:
    changes = changedlist.changes(extents.spans([(0, 10)]), None, extents.spans([(5, 20)]), 100, "")
    assert changes.continuity is Continuity.UNKNOWN
    assert changes.data.tolist() == [[5, 20]]
    assert changes.zero.tolist() == [[0, 5], [25, 75]]


def test_a_grown_tail_counts_as_changed() -> None:
    since = changedlist.mark(LeaseId("a"), 60)
    changes = changedlist.changes(extents.spans([(0, 10)]), since, extents.spans([(5, 20), (90, 10)]), 100, "")
    assert changes.continuity is Continuity.INCREMENTAL
    assert changes.data.tolist() == [[5, 5], [90, 10]]
    assert changes.zero.tolist() == [[0, 5], [60, 30]]


@pytest.mark.parametrize("life", ["", "size=", "size=x", "something else"])
def test_a_token_without_a_size_adds_no_tail(life: str) -> None:
    assert changedlist.size_at(Token("other", "x", life), 100) == 100
