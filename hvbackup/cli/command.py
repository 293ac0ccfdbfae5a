"""One command: its words become a verb, and every end of it an exit code."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from hvbackup.cli import (
    audit,
    continuous,
    copies,
    doctor,
    insight,
    interrupt,
    machines,
    papers,
    people,
    recovery,
    retention,
    serving,
    stores,
    upkeep,
)
from hvbackup.cli.interrupt import MESSAGE
from hvbackup.cli.output import Out
from hvbackup.cli.parser import Parser, new_parser, split_off_moment
from hvbackup.errors import HvbackupError, Interrupted

GROUPS = (
    stores,
    machines,
    continuous,
    recovery,
    copies,
    retention,
    audit,
    insight,
    upkeep,
    doctor,
    serving,
    people,
    papers,
)


def build() -> Parser:
    """The parser of every verb."""
    parser, verbs = new_parser()
    for group in GROUPS:
        group.add(verbs)
    parser.set_defaults(build=build)  # for the verbs that write of all verbs
    return parser


@interrupt.answering
def run(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    words = list(argv)
    out = Out(json="--json" in words)  # until the words are understood
    _print_anything()
    try:
        args = build().parse_args(split_off_moment(words))
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
