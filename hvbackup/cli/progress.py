"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing with --json or --quiet."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from hvbackup.cli import interrupt
from hvbackup.cli.output import PROGRAM, Out, duration, size

BAR_SECONDS = 0.1  # between two drawings of the bar
LINE_SECONDS = 10.0  # between two lines: a job that ends sooner writes none, so cron mails nothing
FILE_SECONDS = 0.5
MIN_SECONDS = 1.0  # before anything is said of rates


class Progress:
    """How far one thing after the other is.  Thread safety: one thread.

    Where HVBACKUP_PROGRESS names a file, it holds the newest figures: that is how the service follows its jobs.
    """

    def __init__(self, out: Out, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._on = not out.json and not out.quiet
        self._bar = self._on and self._stream.isatty()
        self._clock = clock
        self._what = ""
        self._began = self._shown = clock()
        self._drawn = False
        self._file = os.environ.get("HVBACKUP_PROGRESS", "")
        self._written = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `what`.  Raises KeyboardInterrupt when we were asked to end, and that was lost."""
        interrupt.check()
        now = self._clock()
        if what != self._what:
            self._what, self._began = what, now
        if self._file and (now - self._written >= FILE_SECONDS or done >= total):
            self._written = now
            self._write_down(what, done, total, now - self._began)
        if not self._on or now - self._shown < (BAR_SECONDS if self._bar else LINE_SECONDS):
            return
        self._shown = now
        text = _text(what, done, total, now - self._began)
        if self._bar:
            width = shutil.get_terminal_size().columns
            self._stream.write(f"\r\x1b[K{_bar(text, done, total, width)}")
            self._drawn = True
        else:
            self._stream.write(f"{PROGRAM}: {text}\n")
        self._stream.flush()

    def _write_down(self, what: str, done: int, total: int, seconds: float) -> None:
        shown = {"what": what, "done_bytes": done, "total_bytes": total, "seconds": round(seconds, 1)}
        with (
            contextlib.suppress(OSError),
            open(self._file, "w", encoding="utf-8") as file,
        ):  # a reader passes over half of it
            file.write(json.dumps(shown) + "\n")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """The bar is gone when this returns, so that what comes next has a line of its own."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False


def _text(what: str, done: int, total: int, seconds: float) -> str:
    share = f"{100 * done // total:3d} %" if total else "  - "
    text = f"{what}: {share}, {size(done)} of {size(total)}"
    if seconds < MIN_SECONDS or not done:
        return text
    rate = done / seconds
    left = f", {duration((total - done) / rate)} left" if total > done else ""
    return f"{text}, {size(rate)}/s{left}"


def _bar(text: str, done: int, total: int, width: int) -> str:
    """The text behind a bar of whatever room there is."""
    room = min(30, width - len(text) - 4)
    if room < 5 or not total:
        return text[: width - 1]
    full = room * min(done, total) // total
    return f"[{'#' * full}{'.' * (room - full)}] {text}"
