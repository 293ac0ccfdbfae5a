"""regroup: what keeps a store small while nobody looks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from hvbackup.cli.invocation import now, session_of
from hvbackup.cli.output import Out, count, parse_size, size
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.cli.progress import Progress
from hvbackup.cli.retention import span_ns

if TYPE_CHECKING:
    from hvbackup.store.cold import Regrouped


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    verb = add_verb(
        verbs,
        "regroup",
        "join and compress harder what was stored long ago",
        "Blocks that were stored long ago are joined into larger frames and compressed harder: about a tenth less room, at\n"
        "the price of dearer random reads of them.  The room comes back with the next reclaim; until then it takes more.",
    )
    verb.add_argument("--older-than", default="7d", metavar="TIME", help="only what was stored before (7d)")
    verb.add_argument("--group", default="256K", choices=("256K", "512K", "1M"), help="how much is joined (256K)")
    verb.set_defaults(run=regroup)


def regroup(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup regroup`."""
    from hvbackup.service import upkeep

    with Progress(out) as progress:
        done = upkeep.regroup(
            session_of(args),
            now(),
            span_ns(args.older_than),
            parse_size(args.group),
            lambda n, total: progress("regroup", n, total),
        )
    out.answer(asdict(done), _regrouped_lines(done))
    out.warn_all([f"{line}; `hvbackup check --deep` says what needs it" for line in done.damaged])
    return 0


def _regrouped_lines(done: Regrouped) -> Iterator[str]:
    if not done.packs:
        yield "Nothing old enough has small frames; nothing was changed"
        return
    yield (
        f"{count(done.packs, 'pack')} of {size(done.old_bytes)} became {count(done.made_packs, 'pack')} of "
        f"{size(done.new_bytes)}; the old ones go with the next reclaim"
    )
