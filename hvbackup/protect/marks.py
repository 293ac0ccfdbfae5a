"""Marks: names that wait for the next moment, and how much the guest should know of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from hvbackup.errors import HostUnreachable
from hvbackup.model import Consistency, Outcome
from hvbackup.store.journal.history import Moment

LEVELS = list(Consistency)
FROZEN = "frozen"  # the tag of marks that are made at intervals


class Mark:
    """A name for the next moment, and whether it has got one."""

    def __init__(self, label: str, consistency: Consistency | None = Consistency.CRASH, *, point: bool = False) -> None:
        """`consistency`: the least that is wanted; None: the best there is.  `point`: a point is to be made of the moment."""
        self.label, self.freeze = label, consistency is not Consistency.CRASH
        self.consistency, self.point = consistency or Consistency.CRASH, point
        self.notes: Sequence[str] = ()  # of the moment
        self._outcome: Future[Outcome] = Future()
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
        self._outcome.set_exception(HostUnreachable(f"No point was made, for {why}"))
        self._done.set()

    def wait(self, seconds: float) -> Moment | None:
        """The moment, or None when there is none in time, or none that is good enough."""
        self._done.wait(seconds)
        return self._moment

    def fold(self, work: Callable[[], Outcome]) -> None:
        """The point is made, by `work`, or has failed, when this returns."""
        try:
            self._outcome.set_result(work())
        except BaseException as e:  # noqa: BLE001 - handed to whoever wants the point
            self._outcome.set_exception(e)

    def outcome(self, seconds: float) -> Outcome:
        """How the making of the point went.  Raises what it raised, TimeoutError when it is not made in time."""
        return self._outcome.result(seconds)


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
    return any(m.freeze for m in marks)


def fitting(marks: Sequence[Mark], reached: Consistency, why: Sequence[str]) -> list[Mark]:
    """The marks that a moment may have; the others are refused."""
    good = [m for m in marks if LEVELS.index(m.consistency) <= LEVELS.index(reached)]
    for mark in marks:
        mark.notes = [note for note in why if note]
        if mark not in good:
            mark.refuse(f"the moment is only {reached}-consistent: {'; '.join(why) or 'nobody says why'}")
    return good


def refusals(marks: Sequence[Mark]) -> list[str]:
    """Why marks have no moment, for people."""
    return [f"No moment is tagged {m.label}, for {m.refused}" for m in marks if m.refused]


def told(marks: Sequence[Mark], reached: Consistency) -> dict[str, object]:
    """What a barrier says of its marks."""
    label = "; ".join(m.label for m in marks if m.label)
    if not label and reached is Consistency.CRASH:
        return {}
    return {"mark": {"label": label, "consistency": str(reached)}}
