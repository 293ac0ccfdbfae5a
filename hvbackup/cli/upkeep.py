"""parity, regroup: what keeps a store well and small while nobody looks."""

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
    from hvbackup.store.reclaim.cold import Regrouped


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
    verb.add_argument("--rate", default="", metavar="SIZE", help="read no more than this in a second")
    verb.set_defaults(run=regroup)
    verb = add_verb(
        verbs,
        "parity",
        "keep a tenth more, out of which damaged packs can be mended",
        "Every pack gets a parity file beside it, out of which `check --repair` mends flipped bits and lost ranges, up to a\n"
        "tenth of the pack.  Packs that later backups add get theirs as well.  Needs the package zfec.",
    )
    verb.add_argument("--off", action="store_true", help="remove all parity, and make no more")
    verb.set_defaults(run=parity)


def parity(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup parity`."""
    from hvbackup.service import parity as service

    if args.off:
        removed = service.uncover(session_of(args))
        out.answer({"removed": removed}, [f"Removed the parity of {count(removed, 'pack')}; later ones get none"])
        return 0
    with Progress(out) as progress:
        done = service.cover(session_of(args), lambda n, total: progress("parity", n, total))
    line = f"{count(done.made, 'pack')} of {size(done.pack_bytes)} got {size(done.parity_bytes)} of parity; later ones get theirs"
    out.answer(asdict(done), [line])
    out.warn_all([f"Pack {name} is damaged already and got none; run `hvbackup check --deep`" for name in done.damaged])
    return 0


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
            parse_size(args.rate),
        )
    out.answer(asdict(done), _regrouped_lines(done))
    out.warn_all([f"{line}; `hvbackup check --deep` says what needs it" for line in done.damaged])
    return 0


def _regrouped_lines(done: Regrouped) -> Iterator[str]:
    if done.no_room:
        yield f"{count(done.no_room, 'pack')} wait for room: old packs go with the next reclaim, then go on"
    if done.packs:
        yield (
            f"{count(done.packs, 'pack')} of {size(done.old_bytes)} became {count(done.made_packs, 'pack')} of "
            f"{size(done.new_bytes)}; the old ones go with the next reclaim"
        )
    elif not done.no_room:
        yield "Nothing old enough has small frames; nothing was changed"
