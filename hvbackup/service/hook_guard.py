"""A small process that outlives ours and runs the post-thaw hooks when we can't any more.

    python -I -S hook_guard.py TIMEOUT_SECONDS PROGRAM...

A byte on standard input ends it, the end of input means that its parent died.  It is run as a file and needs nothing but the
standard library; the environment of the hooks is its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

THAW_SECONDS = 2.0  # the guard of the guest's agent thaws at the same sign; hooks are to come after it

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Wait until nobody needs us, or everybody does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends a whole service wants us to finish first
    if os.read(0, 1):
        return 0
    time.sleep(THAW_SECONDS)
    for program in argv[1:]:
        run(program, float(argv[0]))
    return 0


def run(program: str, timeout_seconds: float) -> None:
    """One hook, which gets the signals back that we ignore; nobody is left to hear how it went."""
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            [program, "post-thaw"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=default_signals,
        )
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def default_signals() -> None:
    """An ignored signal stays ignored in programs we start."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
