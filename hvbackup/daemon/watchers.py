"""What happens on hosts that tell of it: a `hvbackup watch` for each such source, so that nothing waits for the next look.

An event is a reason to ask the source, never a fact: a watcher that ends, or loses its host, is a reason as well.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from hvbackup.configuration import SourceSettings
from hvbackup.hypervisors.source import tells_events
from hvbackup.model import Instant

AGAIN_SECONDS = 10.0  # before a watcher that ended is started again
QUIET_SECONDS = 1.0  # between two looks for events: one command of an administrator makes several
KINDS = (
    "defined",
    "removed",
    "started",
    "stopped",
    "crashed",
    "reverted",
    "migrated",
    "tagged",
)  # of which people hear
KEPT = 10_000  # machines whose newest event is remembered
log = logging.getLogger("hvbackup")


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest event of a machine."""

    kind: str
    t: int


@dataclass(slots=True)
class _Watch:
    process: subprocess.Popen[bytes] | None = None
    started: float = -1e9
    rest: bytes = b""
    uri: str = ""
    news: bool = False
    told: float = -1e9  # when its source was asked because of an event last


@dataclass(slots=True)
class Watchers:
    """All watchers.  Thread safety: `step` and `close` on one thread, `heard` from any."""

    environment: Mapping[str, str]
    clock: Callable[[], Instant] = lambda: Instant(time.time_ns())
    heard: dict[str, Heard] = field(default_factory=dict)
    _all: dict[str, _Watch] = field(default_factory=dict)

    def step(self, settings: Mapping[str, SourceSettings], free: Collection[str]) -> set[str]:
        """The sources to be asked at once; of those that are `free` to be asked, the others wait."""
        for name in [n for n, w in self._all.items() if n not in settings or settings[n].uri != w.uri]:
            self._end(self._all.pop(name))
        for name, source in settings.items():
            if tells_events(source.uri):
                self._look(self._all.setdefault(name, _Watch(uri=source.uri)))
        now, ready = time.monotonic(), set()
        for name, watch in self._all.items():
            if watch.news and name in free and now - watch.told >= QUIET_SECONDS:
                watch.news, watch.told = False, now
                ready.add(name)
        return ready

    def close(self) -> None:
        """Nobody watches any more."""
        for watch in self._all.values():
            self._end(watch)

    def _look(self, watch: _Watch) -> None:
        if watch.process is None:
            if time.monotonic() - watch.started >= AGAIN_SECONDS:
                self._start(watch)
            return
        assert watch.process.stdout is not None
        while data := watch.process.stdout.read(65536):
            *lines, watch.rest = (watch.rest + data).split(b"\n")
            for line in lines:
                self._take(watch, line)
        if watch.process.poll() is not None:
            self._end(watch)
            watch.news = True

    def _start(self, watch: _Watch) -> None:
        words = [sys.executable, "-m", "hvbackup", "watch", watch.uri, "--json"]
        watch.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env=dict(self.environment),
        )  # fmt: skip
        assert watch.process.stdout is not None
        os.set_blocking(watch.process.stdout.fileno(), False)
        watch.started, watch.rest = time.monotonic(), b""

    def _take(self, watch: _Watch, line: bytes) -> None:
        try:
            said = json.loads(line)
            kind, machine, name = (str(said[key]) for key in ("event", "id", "name"))
        except (ValueError, KeyError, TypeError):
            watch.news = True
            return
        if kind in KINDS or not machine:
            watch.news = True
        if not machine:
            log.info("%s tells what happens", watch.uri)
        if kind in KINDS and machine:
            log.info("Machine %s: %s", name, kind, extra={"machine": machine})
            self.heard.pop(machine, None)
            self.heard[machine] = Heard(kind, int(self.clock()))
            while len(self.heard) > KEPT:
                self.heard.pop(next(iter(self.heard)))

    def _end(self, watch: _Watch) -> None:
        if watch.process is not None:
            watch.process.kill()
            watch.process.wait()
            assert watch.process.stdout is not None
            watch.process.stdout.close()
            watch.process = None
