"""prune, forget, hold, holds, release, approve, settings, reclaim: which points stay, which go, and who says so."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hvbackup.cli.invocation import now, session_of
from hvbackup.cli.output import Out, count, parse_size, size, table
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.cli.through import COUNTED
from hvbackup.errors import UsageError
from hvbackup.model import Instant

if TYPE_CHECKING:
    from hvbackup.service.reclaim import Freed, Sizes
    from hvbackup.store.keep.retention import Policy

SECOND_NS = 1_000_000_000
RULES = """\
rules:
  A number, or "all".  A rule keeps the newest point of each of the last N hours (days, ...) that have one.
  Days and weeks are those of --zone; weeks begin on Monday.
  --count restic    every rule looks at all points (the default)
  --count proxmox   every rule looks only at what the rules before it did not keep
  The newest good point of a machine, points that are held or read, those younger than the store's minimum age, and those
  that a journal's moments build upon always stay.
"""


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    _add_prune(verbs)
    _add_forget(verbs)
    verb = add_verb(verbs, "hold", "let nobody forget a point")
    verb.add_argument("point", nargs="+", metavar="POINT", help="its id, or its beginning")
    verb.add_argument(
        "--until", default="", metavar="DAY", help="2027-01-01, or a moment (default: until it is released)"
    )
    verb.add_argument("--why", default="", metavar="TEXT", help="for whoever wonders later")
    verb.set_defaults(run=hold)
    add_verb(verbs, "holds", "list holds, pins, and what waits for a second operator").set_defaults(run=holds)
    verb = add_verb(verbs, "release", "end a hold, or a pin that a dead reader left")
    verb.add_argument("name", metavar="HOLD", help="as `holds` has it")
    verb.set_defaults(run=release)
    verb = add_verb(verbs, "approve", "let what another operator asked for be done")
    verb.add_argument("name", metavar="REQUEST", help="as `holds` has it")
    verb.set_defaults(run=approve)
    _add_settings(verbs)
    _add_reclaim(verbs)


# -- prune -----------------------------------------------------------------------------------------------------------------


def _add_prune(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "prune",
        "forget points that no rule keeps",
        "Forget the points of machines that no rule keeps.  They go to the trash; `reclaim` frees their space later.",
        RULES,
    )
    verb.add_argument("machine", nargs="*", metavar="MACHINE", help="only these (default: all)")
    add_rules(verb)
    verb.add_argument(
        "--group-by",
        default="machine",
        choices=("machine", "consistency", "disks"),
        help="apply the rules to each group",
    )
    verb.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="before holds are looked at again")
    verb.add_argument("--dry-run", action="store_true", help="say what would go and why, and do nothing")
    verb.set_defaults(run=prune)


def add_rules(verb: argparse.ArgumentParser) -> None:
    """The options that say what is to be kept."""
    for name in COUNTED:
        verb.add_argument(f"--keep-{name}", type=_number, default=0, metavar="N", help=f"{name} points to keep")
    verb.add_argument("--keep-within", default="", metavar="TIME", help="all within 30d (2w, 1y6mo) of the newest")
    verb.add_argument("--keep-tag", action="append", default=[], metavar="NAME", help="all that have this tag")
    verb.add_argument("--zone", default="", metavar="ZONE", help="such as Europe/Berlin (default: this machine's)")
    verb.add_argument("--count", default="restic", choices=("restic", "proxmox"), help="how rules count")


def _number(text: str) -> int:
    if text in ("all", "unlimited"):
        return -1
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number of points; write 7, or all")
    return int(text)


def policy_of(args: argparse.Namespace) -> Policy:
    """What the options of `add_rules` say.  Raises UsageError."""
    from hvbackup.service.retention import zone
    from hvbackup.store.keep.retention import Count, Policy, Span

    counts = {name: getattr(args, f"keep_{name}") for name in COUNTED}
    within = Span.parse(args.keep_within) if args.keep_within else None
    return Policy(**counts, within=within, tags=frozenset(args.keep_tag), zone=zone(args.zone), count=Count(args.count))


def prune(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup prune [MACHINE…]`."""
    from hvbackup.cli import through
    from hvbackup.service import retention, shapes_retention

    policy, moment, wait = policy_of(args), now(), _seconds(args.wait)
    if args.dry_run:
        found = retention.dry_run(session_of(args), args.machine, policy, args.group_by, moment)
        plans = [shapes_retention.plan(p) for p in found]
        out.answer({"dry_run": True, "plans": plans}, _plan_lines(plans))
        return 0
    if (made := through.prune(args, out)) is not None:
        shown, code = made
        out.answer(shown, [*_plan_lines(shown["plans"]), *_done_lines(shown)] if "plans" in shown else [])
        return code
    done = shapes_retention.done(
        retention.prune(session_of(args), args.machine, policy, args.group_by, moment, wait_seconds=wait)
    )
    out.answer(done, [*_plan_lines(done["plans"]), *_done_lines(done)])
    return 0


def _seconds(value: float) -> float:
    if not 0 <= value <= 3600:
        raise UsageError("--wait is a number of seconds, from 0 to 3600")
    return value


def _plan_lines(plans: Iterable[dict[str, Any]]) -> Iterator[str]:
    for p in plans:
        yield f"{p['machine']['name']}" + (f" ({p['group']})" if p["group"] else "") + ":"
        yield from table(("TIME", "POINT", "", "WHY"), [_judged_row(j) for j in p["points"]])


def _judged_row(j: dict[str, Any]) -> tuple[str, str, str, str]:
    return (_local(j["time"]), j["id"], "keep" if j["keep"] else "forget", ", ".join(j["reasons"]))


def _local(time: str) -> str:
    """A time of an answer, as people read it."""
    from hvbackup import moments

    t = moments.parse(time, Instant(0)).t
    assert t is not None
    return moments.local(t)


def _done_lines(done: dict[str, Any]) -> Iterator[str]:
    if done["request"]:
        yield _waiting(done["request"]["id"])
        return
    found = done["forgotten"]
    if not found or not found["points"]:
        yield "Nothing was forgotten"
    elif found["until"] is not None:
        yield (
            f"{count(len(found['points']), 'point')} forgotten; `hvbackup forget --undo POINT` has one back until "
            f"{_local(found['until'])}, and `hvbackup reclaim` frees the space after that"
        )
    for lost in found.get("lost", ()) if found else ():
        yield f"Point {lost} could not be read: it is not in the trash, and can't be had back"
    for kept in found["kept"] if found else ():
        yield f"Point {kept['id']} stays after all: {'; '.join(kept['reasons'])}"


def _waiting(request: str) -> str:
    return f"This waits for a second operator: `hvbackup approve {request}`"


# -- forget ----------------------------------------------------------------------------------------------------------------


def _add_forget(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "forget",
        "forget points by their ids, or have them back",
        "Forget points by their ids.  Any point may go, in any order: no other needs it.  It stays in the trash for a while.",
    )
    verb.add_argument("point", nargs="*", metavar="POINT", help="its id, or its beginning")
    verb.add_argument("--undo", action="store_true", help="have these back out of the trash")
    verb.add_argument("--list", action="store_true", help="list what is in the trash")
    verb.add_argument("--even-newest", action="store_true", help="also a machine's newest good point")
    verb.add_argument("--why", default="", metavar="TEXT", help="for whoever wonders later")
    verb.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="before holds are looked at again")
    verb.set_defaults(run=forget)


def forget(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup forget POINT…`, `forget --undo POINT…`, `forget --list`."""
    from hvbackup.moments import local
    from hvbackup.service import retention, shapes_retention

    if args.list == bool(args.point) or (args.list and args.undo):
        raise UsageError("Say which points, or --list; see hvbackup forget --help")
    session = session_of(args)
    if args.list:
        there = retention.trash(session)
        rows = [(t.id, local(t.tombstone.t), local(t.tombstone.until), t.tombstone.by, t.tombstone.why) for t in there]
        lines = table(("POINT", "FORGOTTEN", "KEPT UNTIL", "BY", "WHY"), rows) if rows else ["The trash is empty"]
        out.answer({"trash": [shapes_retention.trashed(t) for t in there]}, lines)
        return 0
    if args.undo:
        back = retention.undo(session, args.point, now())
        out.answer({"restored": [t.id for t in back]}, [f"Point {t.id} is back" for t in back])
        return 0
    wait = _seconds(args.wait)
    done = shapes_retention.done(
        retention.forget(session, args.point, now(), why=args.why, even_newest=args.even_newest, wait_seconds=wait)
    )
    out.answer(done, _done_lines(done))
    return 0


# -- holds -----------------------------------------------------------------------------------------------------------------


def hold(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup hold POINT…`."""
    from hvbackup import moments
    from hvbackup.service import retention, shapes_retention

    moment = now()
    until = moments.parse(args.until, moment).t if args.until else None
    if args.until and until is None:
        raise UsageError(f"{args.until} is no day; write 2027-01-01")
    made = retention.hold(session_of(args), args.point, moment, until=until, why=args.why)
    lines = [f"Hold {h.id}: point {h.point.rsplit('-', 1)[1]} is {h.reason()}" for h in made]
    out.answer({"holds": [shapes_retention.hold(h) for h in made]}, lines)
    return 0


def holds(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup holds`."""
    from hvbackup.service import retention, shapes_retention

    found = retention.claims(session_of(args), now())
    rows = [(h.id, "hold", h.point.rsplit("-", 1)[1], h.reason(), h.by) for h in found.holds]
    rows += [(p.id, "pin", ", ".join(x.rsplit("-", 1)[1] for x in p.points), p.reason(), "") for p in found.pins]
    rows += [(r.id, "request", r.action, r.why, str(r.by)) for r in found.requests]
    lines = table(("ID", "KIND", "WHAT", "WHY", "BY"), rows) if rows else ["Nothing is held or read, and nothing waits"]
    out.answer(shapes_retention.claims(found), lines)
    return 0


def release(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup release HOLD`."""
    from hvbackup.service import retention, shapes_retention

    found, request = retention.release(session_of(args), args.name, now())
    shown = {"released": args.name if found else None, "request": shapes_retention.request(request)}
    out.answer(shown, [_waiting(request.id) if request else f"{args.name} is released"])
    return 0


def approve(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup approve REQUEST`."""
    from hvbackup.service import retention, shapes_retention

    request, forgotten = retention.approve(session_of(args), args.name, now())
    shown = {"approved": shapes_retention.request(request), "forgotten": shapes_retention.forgotten(forgotten)}
    lines = [f"Approved and done: {request.action}, asked for by {request.by}"]
    if forgotten:
        lines.append(f"{count(len(forgotten.points), 'point')} forgotten")
    out.answer(shown, lines)
    return 0


# -- settings --------------------------------------------------------------------------------------------------------------


def _add_settings(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "settings",
        "what the store demands of who forgets",
        "Show or change what the store demands of whoever wants to forget something.",
    )
    verb.add_argument("--min-age", default="", metavar="TIME", help="no point is forgotten before it is so old")
    verb.add_argument("--trash", default="", metavar="TIME", help="how long forgotten points can be had back (24h)")
    verb.add_argument("--immutable", choices=("on", "off"), help="files can't be changed by anybody (chattr +i)")
    verb.add_argument("--two-person", choices=("on", "off"), help="forgetting waits for a second operator")
    verb.set_defaults(run=settings)


def span_ns(text: str) -> int:
    """A stretch of time in nanoseconds; its calendar parts as 365 and 30 days.  Raises UsageError."""
    from hvbackup.store.keep.retention import Span

    span = Span.parse(text)
    years, months = divmod(span.months, 12)
    return ((365 * years + 30 * months + span.days) * 86400 + span.seconds) * SECOND_NS


def settings(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup settings`."""
    from hvbackup.service import retention, shapes_retention

    changes: dict[str, Any] = {}
    if args.min_age:
        changes["min_age_ns"] = span_ns(args.min_age)
    if args.trash:
        changes["trash_ns"] = span_ns(args.trash)
    if args.immutable:
        changes["immutable"] = args.immutable == "on"
    if args.two_person:
        changes["two_person"] = args.two_person == "on"
    found, request = retention.change_settings(session_of(args), changes, now())
    shown = {"settings": shapes_retention.settings(found), "request": shapes_retention.request(request)}
    out.answer(shown, [_waiting(request.id)] if request else shapes_retention.settings_lines(found))
    return 0


# -- reclaim ---------------------------------------------------------------------------------------------------------------


def _add_reclaim(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "reclaim",
        "free the space of what was forgotten",
        "Free the space of what was forgotten.  Safe beside everything else, also on other hosts; a run that is killed is gone\n"
        "on with by the next one.  A run that has to wait for somebody ends and says so, unless you say --wait.",
    )
    verb.add_argument("--dry-run", action="store_true", help="say how much is needed by nobody, and do nothing")
    verb.add_argument("--wait", action="store_true", help="for writers that began before, and for the grace to pass")
    verb.add_argument("--grace", default="15min", metavar="TIME", help="from the copy of a pack to its removal (15min)")
    verb.add_argument(
        "--garbage", type=float, default=20, metavar="PERCENT", help="of a pack, to be worth copying it (20)"
    )
    verb.add_argument("--rate", default="", metavar="SIZE", help="read no more than this in a second")
    verb.add_argument("--empty-trash", action="store_true", help="now, although its time has not passed")
    verb.add_argument(
        "--exact", action="store_true", help="look through everything first, although the last week's counts would do"
    )
    verb.set_defaults(run=reclaim)


def reclaim(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup reclaim`."""
    from hvbackup.service import reclaim as service

    if not 0 <= args.garbage <= 100:
        raise UsageError("--garbage is a part of a pack in percent, from 0 to 100")
    wish = service.Wish(
        garbage_share=args.garbage / 100,
        grace_ns=0 if args.grace in ("0", "") else span_ns(args.grace),
        wait=args.wait,
        bytes_per_second=parse_size(args.rate),
        empty_trash=args.empty_trash,
        exact=args.exact,
    )
    if args.dry_run:
        found = service.dry_run(session_of(args), wish)
        out.answer(asdict(found), _size_lines(found))
        return 0
    freed = service.reclaim(session_of(args), wish, now())
    out.answer(service.shape(freed), _freed_lines(freed))
    out.warn_all(freed.done.kept)
    return 0


def _size_lines(found: Sizes) -> Iterator[str]:
    garbage = found.total - found.live
    share = 100 * garbage / found.total if found.total else 0
    yield f"{size(garbage)} of {size(found.total)} ({share:.1f} %) in {count(found.packs, 'pack')} are needed by nobody"
    yield f"  {count(found.dead_packs, 'pack')} hold nothing else; {count(found.chosen, 'pack')} would be condemned"


def _freed_lines(freed: Freed) -> Iterator[str]:
    from hvbackup.moments import local

    done = freed.done
    if freed.emptied:
        yield f"{count(len(freed.emptied), 'point')} gone for good from the trash"
    if done.condemned:
        yield f"{count(done.condemned, 'pack')} condemned"
    if done.copied_bytes:
        yield f"{size(done.copied_bytes)} that are needed copied out of condemned packs"
    if done.waiting_for:
        yield f"{count(len(done.waiting_for), 'writer')} began before that; a run after their end goes on (or --wait)"
    if done.until is not None:
        yield f"The condemned packs are removed by a run after {local(done.until)} (or --wait)"
    yield f"{size(done.removed_bytes)} freed, in {count(done.removed_packs, 'pack')}"
