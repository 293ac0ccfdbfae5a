"""copy: points of one store into another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hvbackup.cli.invocation import now, other_session, session_of
from hvbackup.cli.output import Out, count, duration, size, table
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.cli.progress import Progress

if TYPE_CHECKING:
    from hvbackup.replicate import Copied
    from hvbackup.service.copies import CopiedPoints

COPY = """\
Copy recovery points into another store: the newest of each machine, or those you choose.  Only what the other store lacks is
read and written, and a copy that was interrupted goes on where it was.  Every block is verified on the way.
"""
DETAILS = """\
The other store must have blocks of the same size.  Stores that were made with `hvbackup init STORE --family-of OTHER` share the
key of chunk ids, so that copies between them need not read what is there already.  Journals are not copied.
"""


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    verb = add_verb(verbs, "copy", "copy recovery points into another store", COPY, DETAILS)
    verb.add_argument("machine", nargs="*", metavar="MACHINE", help="only of these machines (default: of all)")
    verb.add_argument("--to", required=True, metavar="STORE", help="the other store")
    which = verb.add_mutually_exclusive_group()
    which.add_argument(
        "--at", default="latest", metavar="MOMENT", help="the newest point at or before (default: latest)"
    )
    which.add_argument("--points", default="", metavar="ID,ID", help="these points; four digits of an id are enough")
    which.add_argument("--all", action="store_true", help="every point")
    verb.add_argument("--to-key-file", metavar="FILE", help="a key that opens the other store")
    verb.add_argument("--to-passphrase-file", metavar="FILE", help="a file with the passphrase that opens it")
    verb.set_defaults(run=copy)


def copy(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup copy [MACHINE…] --to STORE`."""
    from hvbackup.capture import system_clock
    from hvbackup.service import copies

    to = other_session(args, args.to, args.to_key_file, args.to_passphrase_file)
    ids = [text for text in args.points.split(",") if text]
    which = copies.Which(args.machine, args.at, ids, args.all, now())
    with Progress(out) as progress:
        done = copies.copy(
            session_of(args),
            to,
            which,
            system_clock,
            lambda p, at, total: progress(f"{p.machine.name} {p.id}", at, total),
        )
    verdict = copies.verdict(done)
    out.answer(copies.shape(done), _lines(done))
    out.warn_all(done.notes)
    for failed in [r.error for r in done.results if r.error and r.error is not verdict]:
        out.error(failed)
    return out.fail(verdict) if verdict else 0


def _lines(done: CopiedPoints) -> Iterator[str]:
    head = ("MACHINE", "POINT", "TIME", "", "READ", "NEW", "STORED")
    yield from table(head, [_row(r) for r in done.results], (4, 5, 6))
    copied = [r for r in done.results if r.point and not r.was_there]
    seconds = sum(r.figures.seconds for r in copied)
    stored = sum(r.figures.stored_bytes for r in copied)
    there = sum(r.was_there for r in done.results)
    yield f"{count(len(copied), 'point')} copied in {duration(seconds)}, {size(stored)} stored; {there} were there already"


def _row(r: Copied) -> tuple[str, ...]:
    from hvbackup.moments import local

    state = "FAILED" if r.error else "there already" if r.was_there else "copied"
    costs = (size(r.figures.read_bytes), size(r.figures.new_bytes), size(r.figures.stored_bytes))
    return (
        r.source.machine.name,
        r.source.id,
        local(r.source.t),
        state,
        *(costs if state == "copied" else ("", "", "")),
    )
