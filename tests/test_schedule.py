"""Calendar expressions against an oracle that tries every minute, and what is due whatever the clock does."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import UsageError
from hvbackup.model import SECOND, Instant
from hvbackup.schedule import BACKOFF_SECONDS, Calendar, Past, Window, due, interval_for, parse, stretch

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = [BERLIN, ZoneInfo("UTC"), ZoneInfo("America/New_York"), ZoneInfo("Australia/Lord_Howe")]
YEAR_2026 = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
INSTANTS = st.integers(0, 366 * 86400).map(lambda s: Instant((YEAR_2026 + s) * SECOND))
EXPRESSIONS = ["daily", "hourly", "22:00", "Mon..Fri 22:00", "*:0/15", "Sat *-*-1..7 03:00", "Fri..Mon 1:30", "monthly"]
EXPRESSIONS += ["*-3,10-25..31 2:30", "Sun 02:30", "*:45"]


def at(zone: ZoneInfo, *parts: int, fold: int = 0) -> Instant:
    return Instant(int(datetime(*parts, tzinfo=zone, fold=fold).timestamp()) * SECOND)  # type: ignore[arg-type]


def local(t: int, zone: ZoneInfo) -> datetime:
    return datetime.fromtimestamp(t / SECOND, zone)


@given(st.sampled_from(EXPRESSIONS), INSTANTS, st.sampled_from(ZONES))
def test_the_next_time_is_later_fits_the_words_and_none_is_left_out(text: str, t: Instant, zone: ZoneInfo) -> None:
    when = parse(text)
    found = when.after(t, zone)
    assert found > t
    assert isinstance(when, Calendar)
    assert fits(when, found, zone)
    step = 60 * SECOND
    minute = (t // step + 1) * step
    for candidate in range(minute, min(found, minute + 600 * step), step):
        assert not fits(when, candidate, zone) or repeated(candidate, zone), local(candidate, zone)


def fits(when: Calendar, t: int, zone: ZoneInfo) -> bool:
    """Also a time that the clocks left out: it is found where its distance from midnight puts it."""
    found = local(t, zone)
    on = found.weekday() in when.weekdays and found.month in when.months and found.day in when.days
    exact = found.time().replace(tzinfo=None, fold=0) in when.times
    before = local(t - 3 * 3600 * SECOND, zone)
    moved = found.utcoffset() != before.utcoffset() and found.hour <= 4
    return on and (exact or moved)


def repeated(t: int, zone: ZoneInfo) -> bool:
    """A change of the clocks is near: what happens twice, or nowhere, is tested by its own."""
    return local(t - 4 * 3600 * SECOND, zone).utcoffset() != local(t + 4 * 3600 * SECOND, zone).utcoffset()


def test_a_time_that_the_clocks_leave_out_happens_all_the_same() -> None:
    found = parse("02:30").after(at(BERLIN, 2026, 3, 29, 0, 0), BERLIN)
    assert local(found, BERLIN) == datetime(2026, 3, 29, 3, 30, tzinfo=BERLIN)


def test_a_time_that_comes_twice_happens_once_but_every_quarter_does_not_pause_for_an_hour() -> None:
    once = parse("02:30").after(at(BERLIN, 2026, 10, 25, 2, 30), BERLIN)
    assert local(once, BERLIN).day == 26
    t, seen = at(BERLIN, 2026, 10, 25, 1, 59), []
    for _ in range(9):
        t = parse("*:0/15").after(t, BERLIN)
        seen.append(t)
    assert {b - a for a, b in itertools.pairwise(seen)} == {15 * 60 * SECOND}


@pytest.mark.parametrize(
    "text",
    ["", "Mo 3", "25:00", "foo", "0s", "12", "Mon Tue 3:00", "*-13-1", "*:0/0", "1:2:3:4", "5..3:00", "Montag 3:00"],
)
def test_what_is_no_schedule_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"Mon\.\.Fri 22:00|too short"):
        parse(text)


def test_what_never_happens_is_refused_and_a_leap_day_is_found() -> None:
    with pytest.raises(UsageError, match="never happens"):
        parse("*-02-30").after(at(BERLIN, 2026, 1, 1), BERLIN)
    assert local(parse("*-02-29").after(at(BERLIN, 2026, 1, 1), BERLIN), BERLIN).year == 2028


@given(
    st.sampled_from([*EXPRESSIONS, "15m", "4h"]), INSTANTS, st.integers(-400 * 86400, 400 * 86400), st.integers(0, 3),
    st.sampled_from(ZONES),
)  # fmt: skip
def test_no_clock_jump_makes_a_task_wait_longer_than_its_own_rhythm(
    text: str, now: Instant, jump: int, failures: int, zone: ZoneInfo
) -> None:
    """Whatever the clock did since the last run, forward or back: the task is due at the latest when a fresh one would be."""
    last = Instant(max(SECOND, now + jump * SECOND))
    when = parse(text)
    next_ = due(when, Past(last, last, last, failures), now, zone)
    assert next_ <= when.after(now, zone)
    if not failures and when.after(min(last, now), zone) <= now:
        assert next_ <= now, "what was missed is due now, once"


def test_what_failed_is_tried_again_ever_later_but_never_later_than_planned() -> None:
    now, zone = at(BERLIN, 2026, 5, 5, 12, 0), BERLIN
    pauses = [due(parse("daily"), Past(now, now, 0, n), now, zone) - now for n in range(1, 9)]
    assert pauses[:6] == [s * SECOND for s in BACKOFF_SECONDS]
    assert pauses[5:] == [BACKOFF_SECONDS[-1] * SECOND] * 3
    assert due(parse("30s"), Past(now, now, 0, 4), now, zone) == now + 30 * SECOND


def test_the_first_run_is_now_and_a_spread_moves_each_key_by_its_own_share() -> None:
    now = at(BERLIN, 2026, 5, 5, 12, 0)
    assert due(parse("daily"), Past(), now, BERLIN) == now
    past = Past(now, now, now)
    hour = 3600 * SECOND
    times = {due(parse("daily"), past, now, BERLIN, hour, f"m{n}") for n in range(200)}
    midnight = at(BERLIN, 2026, 5, 6)
    assert len(times) == 200
    assert all(midnight <= t < midnight + hour for t in times)


def test_an_rpo_is_kept_with_the_time_a_run_takes() -> None:
    hour = 3600 * SECOND
    assert interval_for(hour, 0).ns == hour // 2
    assert interval_for(hour, hour // 10).ns == hour - hour // 5
    assert interval_for(hour, 2 * hour).ns == hour // 2


def test_windows_hold_on_their_days_also_past_midnight() -> None:
    office, night = Window.parse("Mon..Fri 08:00-18:00"), Window.parse("Fri 22:00-06:00")
    assert office == Window(frozenset(range(5)), time(8), time(18))
    assert office.holds(at(BERLIN, 2026, 11, 24, 8, 0), BERLIN)
    assert not office.holds(at(BERLIN, 2026, 11, 24, 18, 0), BERLIN)
    assert not office.holds(at(BERLIN, 2026, 11, 22, 12, 0), BERLIN)
    assert night.holds(at(BERLIN, 2026, 11, 28, 5, 59), BERLIN)
    assert not night.holds(at(BERLIN, 2026, 11, 27, 5, 59), BERLIN)
    with pytest.raises(UsageError, match=r"Mon\.\.Fri 08:00-18:00"):
        Window.parse("always")


def test_stretches() -> None:
    assert stretch("1h30m") == 5400 * SECOND
    assert stretch("0.5s") == SECOND // 2
    with pytest.raises(UsageError):
        stretch("soon")
