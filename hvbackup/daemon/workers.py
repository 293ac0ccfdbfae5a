"""The workers: a `hvbackup protect` for each machine under continuous protection, started here and living on without us.

A worker holds its machine in the store, so there are never two; it notes how it stands in the run directory, and a service that
starts takes over the workers it finds there.  One of another version is asked to end, and begins again from its newest barrier.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvbackup import __version__
from hvbackup.config import Places
from hvbackup.errors import HvbackupError
from hvbackup.processes import Process, start_detached, started_with
from hvbackup.service import standing
from hvbackup.service.standing import Note

BACKOFF_SECONDS = (0, 5, 15, 60, 300)  # before a worker that ended is started again
CALM_SECONDS = 600.0  # a worker that lived so long begins without a pause
REPLACE_SECONDS = 5.0  # between two workers of another version that are replaced
LOG_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """A machine that is to have a worker, and its command."""

    key: str  # the machine's keyed name in the store
    words: Sequence[str]


@dataclass(slots=True)
class _Kept:
    """A worker we look after."""

    process: Process | None = None
    words: Sequence[str] = ()
    started: float = 0.0
    failures: int = 0


@dataclass(slots=True)
class Workers:
    """Every worker of this host.  Thread safety: `step` on one thread."""

    places: Places
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    _kept: dict[str, _Kept] = field(default_factory=dict)
    _replaced: float = -1e9  # when a worker of another version was asked to end last

    @property
    def folder(self) -> Path:
        """Where their logs are."""
        return self.places.state / "workers"

    def step(self, wanted: Mapping[str, Wanted]) -> None:
        """Who should have a worker has one that was told the same, and nobody else has one of ours, or soon."""
        for key in [k for k in self._kept if k not in wanted]:
            self._end(self._kept.pop(key))
        for key, want in wanted.items():
            kept = self._kept.get(key) or self._adopt(key, want)
            self._kept[key] = kept
            if kept.process and kept.process.is_running():
                if kept.words != want.words or (self._is_of_another_version(key) and self._may_replace()):
                    self._end(kept)
                    kept.words = want.words
            elif time.monotonic() - kept.started >= self._pause(kept):
                self._start(key, want, kept)

    def end_all(self) -> None:
        """Every worker of ours was asked to end when this returns."""
        for kept in self._kept.values():
            self._end(kept)

    def note(self, key: str) -> Note | None:
        """How a worker stands, whoever started it."""
        return standing.read(self.places, key)

    def log(self, key: str) -> str:
        """The end of what a worker said."""
        try:
            return (self.folder / f"{key}.log").read_bytes()[-4096:].decode(errors="replace")
        except OSError:
            return ""

    def _adopt(self, key: str, want: Wanted) -> _Kept:
        """A worker that an earlier service started; told by its log's name, which is on its command line."""
        found = started_with(self._word(key))
        return _Kept(found[0], want.words if found else (), time.monotonic()) if found else _Kept()

    def _word(self, key: str) -> str:
        return str(self.folder / key)

    def _is_of_another_version(self, key: str) -> bool:
        note = self.note(key)
        return note is not None and note.version != __version__

    def _may_replace(self) -> bool:
        """After an upgrade workers begin anew one after the other, not all machines at once."""
        if time.monotonic() - self._replaced < REPLACE_SECONDS:
            return False
        self._replaced = time.monotonic()
        return True

    def _pause(self, kept: _Kept) -> float:
        return float(BACKOFF_SECONDS[min(kept.failures, len(BACKOFF_SECONDS) - 1)])

    def _start(self, key: str, want: Wanted, kept: _Kept) -> None:
        lived = time.monotonic() - kept.started
        kept.failures = 0 if lived > CALM_SECONDS else kept.failures + 1
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = self.folder / f"{key}.log"
        if log.exists() and log.stat().st_size > LOG_MAX_BYTES:
            log.unlink()
        argv = [sys.executable, "-m", "hvbackup.cli.worker", self._word(key), *want.words]
        kept.started, kept.words = time.monotonic(), want.words
        try:
            kept.process = start_detached(argv, log, environment=self.environment)
        except HvbackupError as e:
            log.write_text(f"{e}\n")

    def _end(self, kept: _Kept) -> None:
        if kept.process and kept.process.is_running():
            kept.process.signal(signal.SIGTERM)
