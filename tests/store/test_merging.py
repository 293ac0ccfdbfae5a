"""Which segments belong into one file."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from hvbackup.model import Instant
from hvbackup.store.journal import journal
from hvbackup.store.journal.journal import LOG, SEGMENT, Name
from hvbackup.store.journal.merging import HOUR_NS, MERGED_MAX_BYTES, mergeable
from hvbackup.store.journal.tables import Arrays, Summary

pytestmark = pytest.mark.walk

NOON = 100 * HOUR_NS
Given = tuple[Name, Summary, int]


def segment(
    first: int, *, epoch: int = 1, at: int = NOON, size: int = 1000, suffix: str = SEGMENT, disk: str = "a"
) -> Given:
    """Ten facts."""
    summary = Summary(first, 10, 1, first + 9, first + 9, Instant(at), Instant(at), [], {0: disk}, Arrays())
    return Name(epoch, first, suffix), summary, size


def firsts(given: Collection[Given], covered: Collection[int]) -> list[list[int]]:
    return [[n.first for n in group] for group in mergeable(list(given), covered)]


def test_neighbours_of_an_hour_are_one_group() -> None:
    assert firsts([segment(1), segment(11), segment(21)], {30}) == [[1, 11, 21]]


def test_what_no_point_holds_is_left_alone() -> None:
    assert firsts([segment(1), segment(11), segment(21), segment(31)], {20}) == [[1, 11]]


@pytest.mark.parametrize(
    "other",
    [
        segment(21, epoch=2),
        segment(22, epoch=1),
        segment(21, at=NOON + HOUR_NS),
        segment(21, size=MERGED_MAX_BYTES),
        segment(21, disk="b"),
    ],
    ids=["another epoch", "a number is missing", "another hour", "too large", "another disk"],
)
def test_what_divides(other: Given) -> None:
    after = segment(other[0].first + 10, epoch=other[0].epoch, at=int(other[1].first_t), disk=other[1].disks[0])
    assert firsts([segment(1), segment(11), other, after], {100})[0] == [1, 11]


def test_a_point_divides_or_its_segments_could_never_go() -> None:
    given = [segment(1), segment(11), segment(21), segment(31)]
    assert firsts(given, {20, 40}) == [[1, 11], [21, 31]]
    assert firsts(given, {20, 21, 40}) == [[1, 11], [21, 31]], "one inside of a segment divides nothing"


def test_a_merged_file_hides_its_parts_and_no_other() -> None:
    merged = Name(1, 1, SEGMENT, 20)
    names = [
        merged,
        Name(1, 1, SEGMENT),
        Name(1, 11, SEGMENT),
        Name(1, 11, LOG),
        Name(1, 21, SEGMENT),
        Name(2, 11, SEGMENT),
    ]
    assert journal.uncovered(names) == [merged, Name(1, 21, SEGMENT), Name(2, 11, SEGMENT)]
    assert [journal.parse_name(str(n)) for n in names] == names
    assert journal.uncovered([Name(1, 1, SEGMENT, 40), *names])[:1] == [Name(1, 1, SEGMENT, 40)], "merged again"
