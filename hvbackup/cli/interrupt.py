"""Ctrl-C, SIGTERM and a closed terminal: each ends a command with exit code 130.

Normally they raise KeyboardInterrupt at once, so that snapshots end and locks are given back.  But not everywhere:

    while a module is imported       it is put off, for importing turns exceptions into others (numpy, dataclasses); before a
                                     command runs, when nothing has begun and nobody would answer, the process ends
    inside Python's own locks,       it is put off by a moment, again and again: between taking a lock and saying so, an
    contexts and finalizers          exception leaves the lock taken for ever, and what a finalizer raises nobody hears
    in what must be put in order     the same, until that is done (`endings`): files get their names, hosts are let go
    in other code that is not ours   it is put off for a second at most: only what blocks there takes longer

What is lost all the same (a finalizer's, or one that a library turned into an error of its own) is not forgotten: `asked`
stays true, and `check`, which every piece of progress calls, raises it again.

A second signal, a second or more after the first, ends the process at once; the next run cleans up as after any crash.  One
that comes sooner is the same wish: make and sudo pass on what the terminal has sent to us already.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import ParamSpec, TypeVar

from hvbackup.endings import finishing

CODE = 130
MESSAGE = "Interrupted; nothing that was committed is lost"
AT_ONCE = "Interrupted again; the next run cleans up what this one left"

AGAIN_SECONDS = 0.005  # until one that was put off is tried again
PATIENCE_SECONDS = 1.0  # for code that is not ours to come back, and between two signals that mean two things

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# Where a lock may have been taken that nobody knows of yet, or where exceptions end unheard.
_FRAGILE = (
    "/threading.py",
    "/queue.py",
    "/contextlib.py",
    "/weakref.py",
    "/_weakrefset.py",
    "/futures/thread.py",
    "/futures/_base.py",
)


P = ParamSpec("P")
T = TypeVar("T")


class _Asked:
    """What this process was asked by signals."""

    first: float | None = None  # when
    as_json = False
    answering: CodeType | None = None  # the function that answers KeyboardInterrupt


def answering(function: Callable[P, T]) -> Callable[P, T]:
    """The function, known as the one that turns KeyboardInterrupt into an answer."""
    _Asked.answering = function.__code__
    return function


def install(*, as_json: bool) -> None:
    """Signals that whoever started us does not want ignored end us properly from now on."""
    _Asked.first, _Asked.as_json = None, as_json
    sys.unraisablehook = _unheard
    signal.signal(signal.SIGALRM, lambda _number, frame: _interrupt(frame))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _handle)


def asked() -> bool:
    """Whether a signal has asked us to end."""
    return _Asked.first is not None


def check() -> None:
    """Raises KeyboardInterrupt when a signal has asked us to end: for loops that would go on if that was lost once."""
    if asked():
        raise KeyboardInterrupt


def _handle(_number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Asked.first is None:
        _Asked.first = now
        _interrupt(frame)
    elif now - _Asked.first > PATIENCE_SECONDS:
        _end(AT_ONCE)


def _interrupt(frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt here, or a moment later where that is better."""
    if importing(frame) and not _answered(frame) and not finishing(frame):
        _end(MESSAGE)
    waited = time.monotonic() - (_Asked.first or 0.0)
    if importing(frame) or fragile(frame) or finishing(frame) or (waited < PATIENCE_SECONDS and not ours(frame)):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        return
    raise KeyboardInterrupt


def _end(message: str) -> None:
    """End at once, as a kill does, but with a word."""
    os.write(2, f"hvbackup: error: {message}\n".encode())
    if _Asked.as_json:
        shape = {"error": {"kind": "Interrupted", "message": message, "exit_code": CODE}}
        os.write(1, json.dumps(shape).encode() + b"\n")
    os._exit(CODE)


def importing(frame: FrameType | None) -> bool:
    """Whether an import is under way somewhere below this frame."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def _answered(frame: FrameType | None) -> bool:
    """Whether a command is running below this frame, which would say how it ended."""
    while frame is not None:
        if frame.f_code is _Asked.answering:
            return True
        frame = frame.f_back
    return False


def ours(frame: FrameType | None) -> bool:
    """Whether the innermost code is ours: everything in it is written to be interrupted."""
    return frame is None or frame.f_code.co_filename.startswith(_OURS)


def fragile(frame: FrameType | None) -> bool:
    """Whether an exception here would leave a lock taken, or end unheard."""
    if frame is not None and frame.f_code.co_filename.endswith(_FRAGILE):
        return True
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def done() -> None:
    """All is done and answered; only Python has yet to end, and is let."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _unheard(unraisable: sys.UnraisableHookArgs) -> None:
    """A KeyboardInterrupt that was raised where nobody hears is raised again a moment later."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    else:
        sys.__unraisablehook__(unraisable)
