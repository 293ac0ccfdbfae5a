"""The command line: a thin skin over `hvbackup.service`.  No decision lives here.

parser       options that every verb has, and unknown words with their nearest neighbour
output       text for people, JSON for programs, warnings, exit codes
progress     a bar on a terminal, a line now and then elsewhere
stores       init, key, check, status, sql, benchmark
machines     backup, points
recovery     map, restore, boot, discard
papers       completion, man

Modules here import nothing heavy: `--help` answers at once, and a verb pays only for what it needs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from hvbackup.cli import machines, papers, recovery, stores
from hvbackup.cli.output import Out
from hvbackup.cli.parser import Parser, new_parser, split_off_moment
from hvbackup.errors import HvbackupError, Interrupted

GROUPS = (stores, machines, recovery, papers)


def build() -> Parser:
    """The parser of every verb."""
    parser, verbs = new_parser()
    for group in GROUPS:
        group.add(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    out = Out(json="--json" in words)  # until the words are understood
    _terminate_like_ctrl_c()
    try:
        args = build().parse_args(split_off_moment(words))
        out = Out.of(args)
        code: int = args.run(args, out)
        return out.finish(code)
    except HvbackupError as e:
        return out.fail(e)
    except KeyboardInterrupt:
        return out.fail(Interrupted("Interrupted; nothing that was committed is lost"))
    except BrokenPipeError:
        return _nobody_reads()
    except OSError as e:
        return out.fail(HvbackupError(f"{e.filename or 'The system'}: {e.strerror or e}"))


def _terminate_like_ctrl_c() -> None:
    """SIGTERM and a closed terminal end a command as ctrl-C does, unless whoever started us wanted them ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _nobody_reads() -> int:
    """What was asked is done; only its answer found no reader, as in `hvbackup points | head -1`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
