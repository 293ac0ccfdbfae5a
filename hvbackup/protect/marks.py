"""Marks: names that wait for the next moment, and how much the guest should know of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hvbackup.model import Consistency
from hvbackup.store.history import Moment

LEVELS = list(Consistency)
FROZEN = "frozen"  # the tag of marks that are made at intervals


class Mark:
    """A name for the next moment, and whether it has got one."""

    def __init__(self, label: str, consistency: Consistency = Consistency.CRASH) -> None:
        self.label, self.consistency = label, consistency
        self._done = threading.Event()
        self._moment: Moment | None = None
        self.refused = ""  # why no moment has the name

    def put_on(self, moment: Moment) -> None:
        """The moment is durable and has the name."""
        self._moment = moment
        self._done.set()

    def refuse(self, why: str) -> None:
        """The moment that was made is not as good as was asked for."""
        self.refused = why
        self._done.set()

    def wait(self, seconds: float) -> Moment | None:
        """The moment, or None when there is none in time, or none that is good enough."""
        self._done.wait(seconds)
        return self._moment


class Marks:
    """The marks that wait.  Thread safety: any thread."""

    def __init__(self) -> None:
        self._waiting: list[Mark] = []
        self._lock = threading.Lock()

    def add(self, mark: Mark) -> None:
        """The mark is for the next moment."""
        with self._lock:
            self._waiting.append(mark)

    @contextmanager
    def taken(self) -> Iterator[Sequence[Mark]]:
        """The marks of the moment to come; they wait for the next one when there is none."""
        with self._lock:
            marks, self._waiting = self._waiting, []
        try:
            yield marks
        except BaseException:
            with self._lock:
                self._waiting[:0] = marks
            raise


def wants_freeze(marks: Sequence[Mark]) -> bool:
    """Whether the guest should take part in the moment."""
    return any(m.consistency is not Consistency.CRASH for m in marks)


def fitting(marks: Sequence[Mark], reached: Consistency, why: Sequence[str]) -> list[Mark]:
    """The marks that a moment may have; the others are refused."""
    good = [m for m in marks if LEVELS.index(m.consistency) <= LEVELS.index(reached)]
    for mark in marks:
        if mark not in good:
            mark.refuse(f"the moment is only {reached}-consistent: {'; '.join(why) or 'nobody says why'}")
    return good


def told(marks: Sequence[Mark], reached: Consistency) -> dict[str, object]:
    """What a barrier says of its marks."""
    if not marks:
        return {}
    return {"mark": {"label": "; ".join(m.label for m in marks), "consistency": str(reached)}}
