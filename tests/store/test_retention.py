"""Retention: tables of what restic and Proxmox Backup Server keep, calendars with odd days, and properties of every plan."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import UsageError
from hvbackup.model import SECOND, Instant
from hvbackup.store.keep.retention import PERIODS, RULES, UNLIMITED, Candidate, Count, Policy, Span, plan

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone=UTC) -> Instant:  # type: ignore[no-untyped-def]
    return Instant(int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()) * SECOND)


def points(*texts: str, zone=UTC) -> list[Candidate]:  # type: ignore[no-untyped-def]
    return [Candidate(text, at(text, zone)) for text in texts]


def kept(found: list[Candidate], policy: Policy, must: dict[str, list[str]] | None = None) -> list[str]:
    """The keys that stay, oldest first."""
    return sorted(d.key for d in plan(found, policy, must or {}) if d.keep)


# Points at 4 days of a week, two a day, as both programs' manuals like to show them.
WEEK = points(
    "2026-11-16T08:00", "2026-11-16T20:00", "2026-11-17T08:00", "2026-11-17T20:00",
    "2026-11-20T08:00", "2026-11-20T20:00", "2026-11-22T08:00", "2026-11-22T20:00",
)  # fmt: skip
# One a day through two months, at noon.
DAYS = points(*[f"{datetime(2026, 10, 1) + timedelta(days=i):%Y-%m-%dT12:00}" for i in range(60)])  # noqa: DTZ001

RESTIC = [
    ("last", WEEK, Policy(last=3), ["2026-11-20T20:00", "2026-11-22T08:00", "2026-11-22T20:00"]),
    ("days without points don't count", WEEK, Policy(daily=3), ["2026-11-17T20:00", "2026-11-20T20:00", "2026-11-22T20:00"]),
    ("rules share points", WEEK, Policy(last=2, daily=2), ["2026-11-20T20:00", "2026-11-22T08:00", "2026-11-22T20:00"]),
    (
        "a rule that is not used up keeps the oldest", WEEK, Policy(daily=7),
        ["2026-11-16T08:00", "2026-11-16T20:00", "2026-11-17T20:00", "2026-11-20T20:00", "2026-11-22T20:00"],
    ),
    (
        "two months and four to keep", DAYS, Policy(monthly=4),
        ["2026-10-01T12:00", "2026-10-31T12:00", "2026-11-29T12:00"],
    ),
    ("unlimited", DAYS, Policy(monthly=UNLIMITED), ["2026-10-01T12:00", "2026-10-31T12:00", "2026-11-29T12:00"]),
    (
        "daily and weekly overlap", DAYS, Policy(daily=3, weekly=2),
        ["2026-11-22T12:00", "2026-11-27T12:00", "2026-11-28T12:00", "2026-11-29T12:00"],
    ),
    ("within, from the newest point on", WEEK, Policy(within=Span.parse("2d")), ["2026-11-22T08:00", "2026-11-22T20:00"]),
    (
        "within is exact: as old as that is not within", WEEK, Policy(within=Span.parse("2d12h")),
        ["2026-11-20T20:00", "2026-11-22T08:00", "2026-11-22T20:00"],
    ),
    (
        "within by a minute more", WEEK, Policy(within=Span.parse("2d12h1min")),
        ["2026-11-20T08:00", "2026-11-20T20:00", "2026-11-22T08:00", "2026-11-22T20:00"],
    ),
]  # fmt: skip

PROXMOX = [
    ("last", WEEK, Policy(last=3), ["2026-11-20T20:00", "2026-11-22T08:00", "2026-11-22T20:00"]),
    (
        "daily begins where last ended", WEEK, Policy(last=2, daily=2),
        ["2026-11-17T20:00", "2026-11-20T20:00", "2026-11-22T08:00", "2026-11-22T20:00"],
    ),
    (
        "no oldest point is added", WEEK, Policy(daily=7),
        ["2026-11-16T20:00", "2026-11-17T20:00", "2026-11-20T20:00", "2026-11-22T20:00"],
    ),
    (
        "weekly looks only at weeks that daily left", DAYS, Policy(daily=3, weekly=2),
        ["2026-11-15T12:00", "2026-11-22T12:00", "2026-11-27T12:00", "2026-11-28T12:00", "2026-11-29T12:00"],
    ),
    (
        "monthly likewise", DAYS, Policy(daily=2, monthly=1), ["2026-10-31T12:00", "2026-11-28T12:00", "2026-11-29T12:00"],
    ),
    ("unlimited", DAYS, Policy(monthly=UNLIMITED), ["2026-10-31T12:00", "2026-11-29T12:00"]),
]  # fmt: skip


@pytest.mark.parametrize(("found", "policy", "expected"), [t[1:] for t in RESTIC], ids=[t[0] for t in RESTIC])
def test_what_restic_would_keep(found: list[Candidate], policy: Policy, expected: list[str]) -> None:
    assert kept(found, policy) == expected


@pytest.mark.parametrize(("found", "policy", "expected"), [t[1:] for t in PROXMOX], ids=[t[0] for t in PROXMOX])
def test_what_proxmox_would_keep(found: list[Candidate], policy: Policy, expected: list[str]) -> None:
    assert kept(found, replace(policy, count=Count.PROXMOX)) == expected


DAILY = Policy(daily=1, zone=BERLIN)
CALENDAR = [
    # A day begins at midnight of the zone: 23:30 UTC on the 14th is the 15th in Berlin.
    ("midnight", Policy(daily=2, zone=BERLIN), ["2026-11-14T22:59", "2026-11-14T23:01", "2026-11-15T22:59"], {1}),
    ("midnight in UTC", Policy(daily=2), ["2026-11-14T22:59", "2026-11-14T23:01", "2026-11-15T22:59"], {0}),
    ("the last second of a day", Policy(daily=1), ["2026-11-14T23:59:59", "2026-11-15T00:00:00"], {0}),
    # ISO weeks: Monday 2027-01-04 begins week 1 of 2027; 2027-01-01 to 03 belong to week 53 of 2026.
    ("week 53", Policy(weekly=1), ["2027-01-03T23:59:59", "2027-01-04T00:00:00"], {0}),
    ("new year in a week", Policy(weekly=2), ["2026-12-28T00:00", "2027-01-01T12:00", "2027-01-03T12:00"], {0, 1}),
    ("new year", Policy(yearly=1), ["2026-12-31T23:59:59", "2027-01-01T00:00:00"], {0}),
    ("february", Policy(monthly=1), ["2028-02-29T23:59:59", "2028-03-01T00:00:00"], {0}),
    # 2026-10-25 has 25 hours in Berlin: 02:30 comes twice, at 00:30 and 01:30 UTC.
    ("the repeated hour is two", Policy(hourly=2, zone=BERLIN), ["2026-10-25T00:30", "2026-10-25T01:30"], set()),
    ("a day of 25 hours is one", Policy(daily=1, zone=BERLIN), ["2026-10-24T22:00", "2026-10-25T22:59"], {0}),
    ("and ends where it ends", Policy(daily=1, zone=BERLIN), ["2026-10-25T22:59:59", "2026-10-25T23:00:00"], {0}),
    # 2026-03-29 has 23: from 01:59 to 03:00.
    ("a day of 23 hours", DAILY, ["2026-03-28T22:59:59", "2026-03-28T23:00:00", "2026-03-29T21:59:59"], {0, 1}),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "texts", "gone"), [t[1:] for t in CALENDAR], ids=[t[0] for t in CALENDAR])
def test_calendars(policy: Policy, texts: list[str], gone: set[int]) -> None:
    decisions = {d.key: d.keep for d in plan(points(*texts), replace(policy, count=Count.PROXMOX), {})}
    assert {i for i, text in enumerate(texts) if not decisions[text]} == gone


def test_within_follows_the_calendar() -> None:
    base = at("2026-03-31T12:00", BERLIN)
    assert Span.parse("1mo").before(base, BERLIN) == at("2026-02-28T12:00", BERLIN)
    assert Span.parse("2d").before(base, BERLIN) == at("2026-03-29T12:00", BERLIN)
    assert Span.parse("3d").before(base, BERLIN) == at("2026-03-28T12:00", BERLIN), "71 hours, because one was left out"
    assert Span.parse("72h").before(base, BERLIN) == at("2026-03-28T11:00", BERLIN)
    assert Span.parse("1y1mo1w").before(base, BERLIN) == at("2025-02-21T12:00", BERLIN)
    assert Span.parse("9999y").before(base, BERLIN) == 0


@pytest.mark.parametrize("text", ["", "d", "30", "1m", "5m3d", "1y 2mo", "-3d", "3days", "1.5d"])
def test_no_stretch_of_time(text: str) -> None:
    with pytest.raises(UsageError, match="no stretch of time"):
        Span.parse(text)


def test_a_policy_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="No rule"):
        plan(WEEK, Policy(), {})


def test_what_must_stay_stays_with_its_reasons_and_counts_like_any_other() -> None:
    must = {"2026-11-16T08:00": ["held: audit"]}
    decisions = {d.key: d for d in plan(WEEK, Policy(last=1), must)}
    assert decisions["2026-11-16T08:00"].reasons == ("held: audit",)
    assert decisions["2026-11-22T20:00"].reasons == ("last 1/1",)
    assert decisions["2026-11-20T08:00"].reasons == ("no rule keeps it",)
    assert [k for k, d in decisions.items() if d.keep] == ["2026-11-22T20:00", "2026-11-16T08:00"]


def test_tags() -> None:
    found = [Candidate("a", at("2026-01-01T00:00"), tags=frozenset({"gold"})), *WEEK]
    assert kept(found, Policy(tags=frozenset({"gold", "silver"}))) == ["a"]


def test_groups_are_apart() -> None:
    found = [Candidate(f"{g}{p.key}", p.t, g) for g in ("a", "b") for p in WEEK]
    assert kept(found, Policy(last=1)) == ["a2026-11-22T20:00", "b2026-11-22T20:00"]


policies = st.builds(
    Policy,
    **{name: st.integers(-1, 5) for name in RULES},
    zone=st.sampled_from([UTC, BERLIN, ZoneInfo("Pacific/Apia"), ZoneInfo("America/St_Johns")]),
    count=st.sampled_from(Count),
)
times = st.lists(st.integers(0, 3 * 366 * 24 * 60), max_size=60, unique=True)


@given(times, policies)
def test_every_rule_keeps_as_many_periods_as_it_says_and_the_newest_point_of_each(
    minutes: list[int], policy: Policy
) -> None:
    if not policy.keeps_something():
        return
    start = at("2024-10-01T00:00")
    found = [Candidate(f"{m:07d}", Instant(start + m * 60 * SECOND)) for m in minutes]
    decisions = plan(found, policy, {})
    assert [d.key for d in decisions] == sorted((c.key for c in found), reverse=True)
    assert all(d.reasons for d in decisions)
    of = {c.key: c for c in found}
    for name, n in policy.rules():
        mine = [d.key for d in decisions if any(r.removeprefix("oldest ").startswith(f"{name} ") for r in d.reasons)]
        periods = [PERIODS[name](of[k], policy.zone) for k in mine]
        assert n == UNLIMITED or len(mine) <= n
        for key, period in zip(mine, periods, strict=True):
            newer = [c.key for c in found if c.t > of[key].t and PERIODS[name](c, policy.zone) == period]
            assert not newer or key == decisions[-1].key, "not the newest of its period, nor the oldest of all"
    if policy.count is Count.RESTIC and found:
        assert decisions[0].keep
