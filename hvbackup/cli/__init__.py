"""The command line: a thin skin over `hvbackup.service`.  No decision lives here.

interrupt    ctrl-C and its like
command      runs one command and turns every end of it into an exit code
parser       options that every verb has, and unknown words with their nearest neighbour
output       text for people, JSON for programs, warnings, exit codes
progress     a bar on a terminal, a line now and then elsewhere
stores       init, key, check, status, sql, benchmark
machines     backup, points
continuous   protect, tag, timeline
recovery     map, restore, boot, drill, discard
copies       copy
insight      stats, size
doctor       doctor
retention    prune, forget, hold, holds, release, approve, settings, reclaim
audit        audit
serving      serve, config, jobs, watch
people       user, token
local        the service's socket
through      what the service does for a command
job, worker  processes of the service
upkeep       parity, regroup
papers       completion, man

Modules here import nothing heavy: `--help` answers at once, and a verb pays only for what it needs.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130
GARBAGE_OBJECTS = 20_000  # made before the collector looks for cycles among them: at 700 it takes 2 % of a backup


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.  Ctrl-C ends it properly even while it is still being loaded."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's linear algebra, which we never use, spins up threads
    gc.set_threshold(GARBAGE_OBJECTS, 20, 20)
    try:
        from hvbackup.cli import interrupt

        if argv is None:  # we are the program, and nobody else's signals are concerned
            interrupt.install(as_json="--json" in words)
        from hvbackup.cli import command

        code = command.run(words)
        if argv is None:
            if "duckdb" not in sys.modules:  # which complains on standard error of what nobody has collected
                gc.freeze()  # else the interpreter looks for cycles among all there is: a tenth of a short command
            interrupt.done()
        return code
    except KeyboardInterrupt:
        message = "Interrupted; nothing that was committed is lost"
        print(f"hvbackup: error: {message}", file=sys.stderr)
        if "--json" in words:
            import json

            print(json.dumps({"error": {"kind": "Interrupted", "message": message, "exit_code": INTERRUPTED}}))
        return INTERRUPTED
