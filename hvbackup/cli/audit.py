"""audit: who did what to the store, and whether its records are whole."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvbackup.cli.invocation import session_of
from hvbackup.cli.output import Out, count, table
from hvbackup.cli.parser import Verbs, add_shared, add_verb
from hvbackup.errors import StoreDamage

if TYPE_CHECKING:
    from hvbackup.service.audit import Entry


def add(verbs: Verbs) -> None:
    """The verb of this module."""
    verb = add_verb(verbs, "audit", "who did what to the store, and whether its records are whole")
    actions = verb.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=type(verb))

    def action(name: str, help_: str, run: Any) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=help_, description=f"{help_.capitalize()}.")
        add_shared(made)
        made.set_defaults(run=run)
        return made

    listing = action("list", "what was ordered, by whom, and what came of it", list_)
    listing.add_argument("--all", action="store_true", help="captures and folds as well")
    verifying = action("verify", "look whether any record, or the whole store, was put back or cut off", verify)
    verifying.add_argument("--head", metavar="FILE", help="compare with heads that were kept elsewhere")
    keeping = action("keep", "write down the newest records, to compare with later", keep)
    keeping.add_argument(
        "--to", metavar="FILE", help="default: in the configuration directory, where every run renews it"
    )


def list_(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup audit list`."""
    from hvbackup.service import audit as service

    found = service.entries(session_of(args), everything=args.all)
    out.answer({"records": [service.shape(e) for e in found]}, _lines(found))
    return 0


def _lines(found: list[Entry]) -> list[str]:
    from hvbackup.moments import local

    rows = [(local(e.t), e.kind, str(e.value.get("by", "")), _what(e.value)) for e in found]
    return table(("TIME", "WHAT", "BY", "OF"), rows) if rows else ["Nobody has ordered anything yet"]


def _what(value: dict[str, Any]) -> str:
    for key in ("forgotten", "restored", "removed", "added"):
        if value.get(key):
            return ", ".join(path.rsplit("-", 1)[-1] for path in value[key])
    return str(value.get("point", value.get("request", "")))


def verify(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup audit verify`."""
    from hvbackup.service import audit as service

    found = service.verify(session_of(args), Path(args.head) if args.head else None)
    known = f"and {count(found.heads, 'record')} that were kept elsewhere are there" if found.heads else ""
    lines = list(found.problems) or [f"Every record is there and whole {known}".rstrip()]
    out.answer({"ok": not found.problems, "problems": list(found.problems), "heads": found.heads}, lines)
    if found.problems:
        return out.fail(StoreDamage(f"{count(len(found.problems), 'problem')} with the records of the store"))
    return 0


def keep(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup audit keep`."""
    from hvbackup.service import audit as service

    path = service.keep(session_of(args), Path(args.to) if args.to else None)
    out.answer(
        {"file": str(path)}, [f"The newest records are in {path}; keep a copy where nobody who can write the store can"]
    )
    return 0
