"""backup, points: machines into the store, and what is there of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvbackup.cli.invocation import session_of
from hvbackup.cli.output import Out, count, duration, size, table
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.cli.progress import Progress

if TYPE_CHECKING:
    from hvbackup.service.backup import Planned, Run
    from hvbackup.service.inventory import History, Inventory

LAST = 1000  # points that are listed; reading them takes a quarter of a second
SOURCES = """\
sources:
  qemu:/run/vm/qmp.sock                  the machine of a running QEMU
  image:/srv/vm.qcow2,/srv/data.raw      the disks of a machine that is switched off
  nbd://host:port/export                 any NBD export; also nbds://, nbd+unix:///export?socket=/path
"""


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    verb = add_verb(
        verbs,
        "backup",
        "make a recovery point of each machine of a source",
        "Make a recovery point of each machine of a source: everything the first time, then only what changed.",
        SOURCES,
    )
    verb.add_argument("source", nargs="+", metavar="SOURCE", help="where the machine is; several are done one by one")
    verb.add_argument("--name", default="", metavar="NAME", help="what people call the machine")
    verb.add_argument("--disk", action="append", default=[], metavar="DISK", help="only this disk; may be repeated")
    verb.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="MACHINE",
        help="only this machine of the source; may be repeated",
    )
    verb.add_argument("--machine", metavar="FILE", help="the machine's configuration, where it can't be asked")
    verb.add_argument("--changed", metavar="FILE", help="a list of what changed since the newest point")
    verb.add_argument("--tag", action="append", default=[], metavar="NAME", help="name the point; may be repeated")
    verb.add_argument("--full", action="store_true", help="read and compare everything, whatever the tracker says")
    verb.add_argument(
        "--consistency",
        default="auto",
        metavar="LEVEL",
        choices=("auto", "crash", "filesystem", "application"),
        help="crash: leave the guest alone; filesystem, application: the least wanted; auto: the best there is",
    )
    _add_freezing(verb)
    verb.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    verb.set_defaults(run=backup)
    verb = add_verb(verbs, "points", "list what can be recovered")
    verb.add_argument("machine", nargs="?", default="", metavar="MACHINE", help="only this one")
    verb.add_argument(
        "--last",
        type=_number,
        default=LAST,
        metavar="N",
        help=f"at most the newest N points in all ({LAST}); a number, or all",
    )
    verb.set_defaults(run=points)


def _number(text: str) -> int:
    """How many points are listed."""
    if text == "all":
        return sys.maxsize
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of points; write 100, or all")
    return int(text)


def _add_freezing(verb: argparse.ArgumentParser) -> None:
    """What has to do with the guest at the moment of the snapshot."""
    verb.add_argument(
        "--agent", metavar="PATH", help="the socket of the machine's guest agent, where QEMU does not know"
    )
    verb.add_argument(
        "--exclude-mountpoint", action="append", default=[], metavar="PATH", help="not frozen; may be repeated"
    )
    verb.add_argument(
        "--freeze-limit", type=float, metavar="SECONDS", help="a frozen guest is let go then, whatever happens (10)"
    )
    verb.add_argument(
        "--hook", action="append", default=[], metavar="PATH", help="run this program, or those in this directory"
    )
    verb.add_argument("--hook-optional", action="store_true", help="a hook that fails before the freeze is a warning")
    verb.add_argument("--hook-timeout", type=float, default=60.0, metavar="SECONDS", help="kill a hook then (60)")


# -- backup ----------------------------------------------------------------------------------------------------------------


def backup(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup backup SOURCE…`."""
    from hvbackup.cli import through

    if (code := through.backup(args, out)) is not None:
        return code
    from hvbackup.service import backup as service
    from hvbackup.service import parity, shapes

    progress = Progress(out)
    request = service.Request(
        sources=args.source,
        name=args.name,
        disks=args.disk,
        only=args.only,
        machine_file=Path(args.machine) if args.machine else None,
        changed=Path(args.changed) if args.changed else None,
        consistency=args.consistency,
        full=args.full,
        tags=args.tag,
        agent=Path(args.agent) if args.agent else None,
        exclude_mountpoints=args.exclude_mountpoint,
        freeze_limit_seconds=args.freeze_limit,
        hooks=[Path(hook) for hook in args.hook],
        hooks_optional=args.hook_optional,
        hook_timeout_seconds=args.hook_timeout,
        progress=lambda m, p: progress(f"{m.name} {p.disk}", p.done_bytes, p.total_bytes),
    )
    if args.dry_run:
        plans = service.dry_run(session_of(args), request)
        shown = {"status": "planned", "runs": [shapes.planned(p) for p in plans]}
        out.answer(shown, (line for p in plans for line in _plan_lines(p)))
        return 0
    with progress:
        runs = service.backup(session_of(args), request)
    uncovered = parity.keep_covered(session_of(args))
    verdict = service.verdict(runs)
    shown = shapes.runs(runs) | ({"error": shapes.error(verdict)} if verdict else {})
    out.answer(shown, (line for r in runs for line in _run_lines(r)))
    for r in runs:
        out.warn_all(r.outcome.notes if r.outcome else ())
        if r.error and len(runs) > 1:
            out.error(r.error)
    out.warn_all(uncovered)
    if verdict:
        return out.fail(verdict)
    return 0


def _run_lines(run: Run) -> Iterator[str]:
    if run.outcome is None or run.outcome.point is None:
        return
    from hvbackup.moments import local

    point, figures = run.outcome.point, run.outcome.figures
    hows = ", ".join(f"{d.disk.id} {d.how}" for d in point.disks)
    yield f"{point.machine.name}: point {point.id} of {local(point.t)}, {point.consistency}-consistent ({hows})"
    yield (
        f"  read {size(figures.read_bytes)}, changed {size(figures.changed_bytes)}, new {size(figures.new_bytes)}, "
        f"stored {size(figures.stored_bytes)} in {duration(figures.seconds)}"
    )
    if figures.frozen_seconds:
        yield f"  frozen for {figures.frozen_seconds:.3f} s, after {figures.freezing_seconds:.3f} s of freezing"
    yield from (f"  {remark}" for remark in run.outcome.remarks)


def _plan_lines(plan: Planned) -> Iterator[str]:
    from hvbackup.moments import local

    base = f"builds on {plan.newest.id} of {local(plan.newest.t)}" if plan.newest else "would be its first point"
    yield f"{plan.machine.name} ({plan.machine.id}): {base}"
    for disk in plan.machine.disks:
        how = "what changed, if its tracker still proves it" if disk.id in plan.known else "everything allocated"
        yield f"  {disk.id}  {size(disk.size)}  {disk.path}: {how}"


# -- points ----------------------------------------------------------------------------------------------------------------


def points(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup points [MACHINE]`."""
    from hvbackup.service import look, shapes

    found = look.points(session_of(args), args.machine, args.last)
    shown = [shapes.point(p) for h in found.machines for p in h.points]
    answer = {"points": shown, "total": found.total, "notes": found.notes}
    out.answer(answer, [*_point_lines(found.machines), *_more_lines(found)])
    out.warn_all(found.notes)
    return 0


def _more_lines(found: Inventory) -> list[str]:
    """How many points were left out."""
    more = found.total - len(found.notes) - sum(len(h.points) for h in found.machines)
    return [f"and {count(more, 'older point')}: name a machine, or use --last N or --last all"] if more > 0 else []


def _point_lines(machines: list[History]) -> list[str]:
    from hvbackup.moments import local

    rows = [
        (
            h.machine.name,
            local(p.t),
            p.id,
            str(p.consistency),
            count(len(p.disks), "disk"),
            size(sum(d.disk.size for d in p.disks)),
            "+".join(sorted({d.how for d in p.disks})),
            size(int(p.figures.get("new_bytes", 0))),
        )
        for h in machines
        for p in h.points
    ]
    if not rows:
        return ["No points yet; `hvbackup backup SOURCE` makes one"]
    return table(("MACHINE", "TIME", "POINT", "CONSISTENCY", "DISKS", "SIZE", "READ AS", "NEW"), rows, (5, 7))
