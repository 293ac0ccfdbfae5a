"""Ctrl-C, SIGTERM and a closed terminal: each ends a command with exit code 130.

Normally they raise KeyboardInterrupt, so that snapshots end and locks are given back.  While a module is being imported they
end the process at once instead: importing turns exceptions into others (numpy, dataclasses), and what an import interrupts has
either not begun, or is undone by the next run as after any other crash.
"""

from __future__ import annotations

import json
import os
import signal
from types import FrameType

CODE = 130
MESSAGE = "Interrupted; nothing that was committed is lost"


def install(*, as_json: bool) -> None:
    """Signals that whoever started us does not want ignored end us properly from now on."""

    def handle(number: int, frame: FrameType | None) -> None:
        if importing(frame):
            os.write(2, f"hvbackup: error: {MESSAGE}\n".encode())
            if as_json:
                shape = {"error": {"kind": "Interrupted", "message": MESSAGE, "exit_code": CODE}}
                os.write(1, json.dumps(shape).encode() + b"\n")
            os._exit(CODE)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, handle)


def importing(frame: FrameType | None) -> bool:
    """Whether an import is under way somewhere below this frame."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def done() -> None:
    """All is done and answered; only Python has yet to end, and is let."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
