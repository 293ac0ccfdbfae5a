"""Moments as people write them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup import moments
from hvbackup.errors import NotFound, UsageError
from hvbackup.model import SECOND, Consistency, Instant, Machine, MachineId, PointId, RecoveryPoint

MACHINE = Machine(MachineId("m"), "web1", "fake")
NOW = Instant(1_795_356_187_500_000_000)  # 2026-11-22 14:03:07.5 UTC


def at(text: str, zone: str = "UTC") -> int | None:
    """What the text means, where the local zone is this one."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = zone
    time.tzset()
    try:
        return moments.parse(text, NOW).t
    finally:
        os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
        time.tzset()


def utc(*parts: int, ns: int = 0) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp()) * SECOND + ns  # type: ignore[arg-type,misc]


@pytest.mark.parametrize(
    ("text", "zone", "t"),
    [
        ("2026-11-22T14:03:07Z", "UTC", utc(2026, 11, 22, 14, 3, 7, ns=SECOND - 1)),
        ("2026-11-22T14:03:07.25Z", "UTC", utc(2026, 11, 22, 14, 3, 7, ns=250_000_000)),
        ("2026-11-22T14:03:07.123456789+01:00", "UTC", utc(2026, 11, 22, 13, 3, 7, ns=123_456_789)),
        ("2026-11-22 14:03:07 UTC", "Europe/Berlin", utc(2026, 11, 22, 14, 3, 7, ns=SECOND - 1)),
        ("2026-11-22 14:03", "Europe/Berlin", utc(2026, 11, 22, 13, 3)),
        ("2026-11-22 14:03 CET", "Europe/Berlin", utc(2026, 11, 22, 13, 3)),
        ("2026-11-22", "UTC", utc(2026, 11, 22)),
        ("2026-10-25 02:30:00 CEST", "Europe/Berlin", utc(2026, 10, 25, 0, 30, 0, ns=SECOND - 1)),
        ("2026-10-25 02:30:00 CET", "Europe/Berlin", utc(2026, 10, 25, 1, 30, 0, ns=SECOND - 1)),
        ("-10m", "UTC", NOW - 600 * SECOND),
        ("-1h30m", "UTC", NOW - 5400 * SECOND),
        ("-2d", "UTC", NOW - 172_800 * SECOND),
        ("-1w", "UTC", NOW - 604_800 * SECOND),
        ("latest", "UTC", None),
    ],
)
def test_every_form_is_understood(text: str, zone: str, t: int | None) -> None:
    assert at(text, zone) == t


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "10m", "-10", "2026-13-01", "2026-11-22 25:00", "2026-11-22 14:03 EST", "abc", "99999-01-01"],
)
def test_everything_else_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(UsageError, match="-10m"):
        at(text, "Europe/Berlin")


def test_moments_of_a_journal_have_numbers_and_tags() -> None:
    assert moments.parse("seq:17", NOW).seq == 17
    assert moments.parse("tag: before update ", NOW).tag == "before update"
    for text in ("seq:", "seq:-1", "tag: "):
        with pytest.raises(UsageError):
            moments.parse(text, NOW)


def points(*ts: int) -> list[RecoveryPoint]:
    return [RecoveryPoint(PointId(f"{n:016x}"), MACHINE, Instant(t), Consistency.CRASH, ()) for n, t in enumerate(ts)]


def pick(found: list[RecoveryPoint], text: str) -> RecoveryPoint:
    return moments.pick(found, moments.parse(text, NOW), "web1", moments.local)


@given(st.lists(st.integers(0, 2**62), min_size=1, unique=True).map(sorted), st.integers(0, 2**62))
def test_the_newest_point_at_or_before_is_picked(ts: list[int], t: int) -> None:
    moment = moments.Moment("then", Instant(t))
    if t < ts[0]:
        with pytest.raises(NotFound, match=f"{0:016x}"):
            moments.pick(points(*ts), moment, "web1", str)
    else:
        assert moments.pick(points(*ts), moment, "web1", str).t == max(s for s in ts if s <= t)


@given(st.integers(0, 4_000_000_000 * SECOND))
def test_what_is_printed_finds_its_point(t: int) -> None:
    [point] = found = points(t)
    for text in (moments.rfc3339(Instant(t)), moments.local(Instant(t))):
        assert pick(found, text) is point


def test_an_id_or_its_beginning_names_one_point() -> None:
    found = [RecoveryPoint(PointId(i), MACHINE, NOW, Consistency.CRASH, ()) for i in ("abcd" * 4, "abce" * 4)]
    assert pick(found, "abcd") is found[0]
    assert pick(found, "ABCE" * 4) is found[1]
    with pytest.raises(NotFound, match="nearest ids are abcdabcdabcdabcd and abceabceabceabce"):
        pick(found, "abcdf")
    found.append(RecoveryPoint(PointId("abcd0000abcdabcd"), MACHINE, NOW, Consistency.CRASH, ()))
    with pytest.raises(UsageError, match="2 points of machine web1 begin with abcd"):
        pick(found, "abcd")


def test_a_machine_without_readable_points_is_said() -> None:
    with pytest.raises(NotFound, match="no readable point"):
        pick([], "latest")


@pytest.fixture(autouse=True)
def _zone() -> Iterator[None]:
    yield
    time.tzset()
