"""stats, size: what machines cost, and what a policy would need."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvbackup.cli.continuous import stretch
from hvbackup.cli.invocation import now, session_of
from hvbackup.cli.output import Out, count, duration, size, table
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.cli.retention import RULES, add_rules, policy_of
from hvbackup.errors import UsageError

if TYPE_CHECKING:
    from hvbackup.service.sizing import Need, Trend
    from hvbackup.service.stats import MachineStats, Sized, Stats

SIZE = """\
Say how much room a policy needs: what the newest state takes, what changes between the points that are kept, the journal's
window, and 10 %.  All of it is measured on the machines of this store, so it needs two points of each.
"""


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    verb = add_verb(verbs, "stats", "what each machine costs, how the store grows, and when its disk is full")
    verb.add_argument("machine", nargs="*", metavar="MACHINE", help="only these (default: all)")
    verb.add_argument("--days", type=int, default=30, metavar="N", help="how far to look back (default: 30)")
    verb.set_defaults(run=stats)
    verb = add_verb(verbs, "size", "how much room a policy needs", SIZE, RULES)
    verb.add_argument("machine", nargs="*", metavar="MACHINE", help="only these (default: all)")
    add_rules(verb)
    verb.add_argument("--every", default="", metavar="TIME", help="between two points (default: as now)")
    verb.add_argument("--window", default="0", metavar="TIME", help="of the journal: 24h (default: none)")
    verb.set_defaults(run=size_)


def stats(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup stats [MACHINE…]`."""
    from hvbackup.service import stats as service

    if args.days < 1:
        raise UsageError("--days is a number of days, at least 1")
    found = service.stats(session_of(args), args.machine, now(), args.days)
    out.answer(service.stats_shape(found), _stats_lines(found))
    out.warn_all(found.notes)
    return 0


def _stats_lines(found: Stats) -> Iterator[str]:
    head = ("MACHINE", "POINTS", "SIZE", "CHANGED/DAY", "STORED/DAY", "STORED", "REDUCTION", "JOURNAL")
    yield from table(head, [_stats_row(m) for m in found.machines], tuple(range(1, len(head))))
    yield ""
    yield from _room_lines(found.used_bytes, found.free_bytes, found.trend)


def _stats_row(m: MachineStats) -> Sequence[str]:
    from hvbackup.service.stats import reduction

    c, part = m.costs, reduction(m)
    return (
        m.history.machine.name,
        str(len(m.history.points)),
        size(m.size_bytes),
        size(m.per_day(c.changed_bytes)) if m.days else "-",
        size(m.per_day(c.stored_bytes)) if m.days else "-",
        size(c.first_stored_bytes + c.stored_bytes),
        f"{100 * part:.1f} %" if part is not None else "-",
        size(c.journal_bytes) if c.journal_bytes is not None else "-",
    )


def _room_lines(used: int, free: int, trend: Trend) -> Iterator[str]:
    yield f"The store takes {size(used)}, and {size(free)} are free on its disk"
    days = count(trend.days, "day")
    when = f"full on {trend.full}" if trend.full else "not full within a lifetime"
    yield f"It grew by {size(trend.per_day_bytes)} a day in the last {days}; at that rate the disk is {when}"


def size_(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup size --keep-…`."""
    from hvbackup.service import stats as service

    every = stretch(args.every) if args.every else 0
    if args.every and every < 1_000_000_000:
        raise UsageError("--every is at least 1s")
    found = service.size(session_of(args), args.machine, policy_of(args), stretch(args.window), every, now())
    out.answer(service.sized_shape(found), _size_lines(found))
    out.warn_all(found.notes)
    return 0


def _size_lines(found: Sized) -> Iterator[str]:
    head = ("MACHINE", "EVERY", "KEPT", "DATA", "CHANGED/DAY", "REDUCTION", "BASE", "POINTS", "JOURNAL", "TOTAL + 10 %")
    rows = [_size_row(n) for n in found.needs]
    yield from table(head, rows, tuple(range(1, len(head))))
    yield ""
    room = found.used_bytes + found.free_bytes
    missing = found.total_bytes - room
    verdict = f"which the disk has: {size(room)}" if missing <= 0 else f"{size(missing)} more than the disk has for it"
    yield f"In total {size(found.total_bytes)}, {verdict}"
    yield from _room_lines(found.used_bytes, found.free_bytes, found.trend)


def _size_row(n: Need) -> Sequence[str]:
    m = n.measured
    return (
        m.name,
        duration(m.interval_ns / 1_000_000_000),
        str(n.kept),
        size(m.data_bytes),
        size(m.day_bytes),
        f"{100 * (1 - m.share):.1f} %",
        size(n.base_bytes),
        size(n.points_bytes),
        size(n.journal_bytes),
        size(n.total_bytes),
    )
