"""Short pieces of work that a signal lets finish: what they put in order is in order, or the process was killed.

    @let_finish
    def abandon(self): ...

A signal that asks us to end waits until the outermost of them has returned (`cli.interrupt`); a second one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_CODES: set[CodeType] = set()  # known when the modules are loaded, and never changed afterwards


def let_finish(function: Callable[P, T]) -> Callable[P, T]:
    """The function, known as one that a signal lets finish."""
    _CODES.add(function.__code__)
    return function


def finishing(frame: FrameType | None) -> bool:
    """Whether such a piece of work is under way somewhere below this frame."""
    while frame is not None:
        if frame.f_code in _CODES:
            return True
        frame = frame.f_back
    return False
