"""Marks: names that wait for the next moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hvbackup.store.history import Moment


class Mark:
    """A name for the next moment, and whether it has got one."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._done = threading.Event()
        self._moment: Moment | None = None

    def put_on(self, moment: Moment) -> None:
        """The moment is durable and has the name."""
        self._moment = moment
        self._done.set()

    def wait(self, seconds: float) -> Moment | None:
        """The moment, or None when there is none in time."""
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


def told(marks: Sequence[Mark]) -> dict[str, object]:
    """What a barrier says of its marks."""
    return {"mark": {"label": "; ".join(m.label for m in marks)}} if marks else {}
