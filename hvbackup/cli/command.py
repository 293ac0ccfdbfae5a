"""One command: its words become a verb, and every end of it an exit code."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Mapping, Sequence

from hvbackup.cli import interrupt
from hvbackup.cli.interrupt import MESSAGE
from hvbackup.cli.output import Out
from hvbackup.cli.parser import Parser, new_parser, split_off_moment, verb_in
from hvbackup.errors import HvbackupError, Interrupted

VERBS: Mapping[
    str, Sequence[str]
] = {  # of each module, in the order of `--help`; only the one that is needed is loaded
    "stores": ("init", "status", "key", "check", "sql", "benchmark"),
    "machines": ("backup", "points"),
    "continuous": ("protect", "tag", "timeline"),
    "recovery": ("restore", "boot", "drill", "discard", "map"),
    "guestfiles": ("files",),
    "copies": ("copy",),
    "retention": ("prune", "forget", "hold", "holds", "release", "approve", "settings", "reclaim"),
    "audit": ("audit",),
    "insight": ("stats", "size"),
    "upkeep": ("regroup", "parity"),
    "doctor": ("doctor",),
    "serving": ("serve", "config", "jobs", "watch"),
    "people": ("user", "token"),
    "papers": ("completion", "man"),
}


def build(verb: str = "") -> Parser:
    """The parser of a verb and its neighbours, or of every verb where there is none of that name."""
    parser, verbs = new_parser()
    modules = [module for module, names in VERBS.items() if verb in names] or list(VERBS)
    for module in modules:
        importlib.import_module(f"hvbackup.cli.{module}").add(verbs)
    parser.set_defaults(build=build)  # for the verbs that write of all verbs
    return parser


@interrupt.answering
def run(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    words = list(argv)
    out = Out(json="--json" in words)  # until the words are understood
    _print_anything()
    try:
        args = build(verb_in(words)).parse_args(split_off_moment(words))
        out = Out.of(args)
        code: int = args.run(args, out)
        return out.finish(code)
    except KeyboardInterrupt:
        return out.fail(Interrupted(MESSAGE))
    except Exception as e:
        if interrupt.asked():  # a library made another error of it
            return out.fail(Interrupted(MESSAGE))
        if isinstance(e, HvbackupError):
            return out.fail(e)
        if isinstance(e, OSError):
            return out.fail(HvbackupError(f"{e.filename or 'The system'}: {e.strerror or e}"))
        raise


def _print_anything() -> None:
    """Names that the terminal's encoding does not have are shown escaped, and are no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
