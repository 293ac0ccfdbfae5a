"""The command line: a thin skin over `hvbackup.service`.  No decision lives here.

command      runs one command and turns every end of it into an exit code
parser       options that every verb has, and unknown words with their nearest neighbour
output       text for people, JSON for programs, warnings, exit codes
progress     a bar on a terminal, a line now and then elsewhere
stores       init, key, check, status, sql, benchmark
machines     backup, points
continuous   protect, tag, timeline
recovery     map, restore, boot, discard
papers       completion, man

Modules here import nothing heavy: `--help` answers at once, and a verb pays only for what it needs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.  Ctrl-C ends it properly even while we are still loading."""
    try:
        from hvbackup.cli import command

        code = command.run(sys.argv[1:] if argv is None else argv)
        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and answered; only Python has yet to end
        return code
    except KeyboardInterrupt:
        print("hvbackup: error: Interrupted; nothing that was committed is lost", file=sys.stderr)
        return INTERRUPTED
