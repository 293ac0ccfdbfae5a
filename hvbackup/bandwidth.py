"""How fast bytes may go: limits of sources and stores, in windows of time, shared by every process of this host.

    50M Mon..Fri 08:00-18:00       50 MiB in each second of this window
    unlimited 22:00-06:00
    200M                           at any other time

Of several rules the first that holds now counts; where none does, nothing is limited.  The service writes the rules of its
configuration into the run directory; captures, workers and restores, whoever started them, read them there, again when they
change, and none has to be restarted.

A limit is a bucket that processes share: one number in a file, the time until which it is used up.  Who wants to move bytes adds
their time to it, under a lock, and waits until it is their turn; so nobody starves, and one that dies has taken a moment's share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import tzinfo
from pathlib import Path
from typing import TYPE_CHECKING

from hvbackup.errors import Busy, UsageError
from hvbackup.files import Files, exclusive
from hvbackup.model import SECOND, Instant
from hvbackup.pipeline import Pace, at_once

if TYPE_CHECKING:  # where nothing is limited, nothing of this is loaded
    from hvbackup.schedule import Window

FOLDER, RULES = "bandwidth", "rules.json"  # in the run directory
SOURCES, STORES = "sources", "stores"
MIN_BYTES = 1 << 20  # a second: slower than this, a machine would stay frozen for hours
BURST_NS = SECOND // 2  # what was not used lately may be used at once
LOOK_NS = 2 * SECOND  # between two looks whether the rules are still the same
LOCK_SECONDS = 1.0  # a lock is held for microseconds: who holds it longer is stopped, and nobody waits for that
FAR_NS = 3600 * SECOND  # a bucket used up for so long is of another life of this host
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_STATE = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Rule:
    """So many bytes a second (0: no limit), in a window or always."""

    bytes_per_second: int
    window: Window | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`50M`, `50M Mon..Fri 08:00-18:00`, `unlimited 22:00-06:00`.  Raises UsageError."""
        from hvbackup.schedule import Window

        rate, _, when = text.strip().partition(" ")
        return cls(_rate(rate, text), Window.parse(when) if when.strip() else None)

    def holds(self, now: Instant, zone: tzinfo) -> bool:
        """Whether it counts now."""
        return self.window is None or self.window.holds(now, zone)


def _rate(word: str, text: str) -> int:
    if word == "unlimited":
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG])i?B?(?:/s)?", word)
    if not found:
        raise UsageError(f"{text!r} begins with no speed; write 50M, 50M Mon..Fri 08:00-18:00 or unlimited 22:00-06:00")
    rate = int(float(found[1]) * _UNITS[found[2]])
    if rate < MIN_BYTES:
        raise UsageError(f"{text!r} is too slow; the slowest limit is 1M a second")
    return rate


def rate_now(rules: Sequence[Rule], now: Instant, zone: tzinfo) -> int:
    """Bytes a second; 0 where nothing is limited.  Pure."""
    return next((r.bytes_per_second for r in rules if r.holds(now, zone)), 0)


def write_rules(run: Path, sources: Mapping[str, Sequence[str]], stores: Mapping[str, Sequence[str]]) -> None:
    """Processes of this host obey these rules soon after this returns: by the address of a source, by the path of a store."""
    files = Files(run / FOLDER, mode=0o600)
    files.make_dir("")
    new = json.dumps(
        {SOURCES: {k: list(v) for k, v in sources.items()}, STORES: {k: list(v) for k, v in stores.items()}}
    )
    if not files.exists(RULES) or files.read(RULES) != new.encode():
        files.replace(RULES, new.encode())


def pace_of(run: Path, source: str, store: Path | None) -> Pace:
    """What reads from a source and moves bytes into or out of a store keeps to their limits."""
    book = Book(run)
    return Pace(
        Bucket(book, SOURCES, source).take if source else at_once,
        Bucket(book, STORES, str(store)).take if store else at_once,
    )


@dataclass(slots=True)
class Book:
    """The rules as they are now.  Thread safety: any thread; at worst they are read twice."""

    run: Path
    clock: Callable[[], int] = time.monotonic_ns  # the same for all processes of a host
    wall: Callable[[], int] = time.time_ns
    sleep: Callable[[float], None] = time.sleep
    zone: tzinfo | None = None  # None: this host's
    _looked: int | None = None
    _stamp: tuple[int, int] = (0, 0)
    _rules: Mapping[tuple[str, str], Sequence[Rule]] = field(default_factory=dict)

    def rate(self, kind: str, key: str) -> int:
        """The limit now; 0: none."""
        now = self.clock()
        if self._looked is None or now - self._looked >= LOOK_NS:
            self._looked = now
            self._look()
        rules = self._rules.get((kind, key))
        return rate_now(rules, Instant(self.wall()), self._zone()) if rules else 0

    def _zone(self) -> tzinfo:
        if self.zone is None:
            from hvbackup.zone import local_zone

            self.zone = local_zone()
        return self.zone

    def _look(self) -> None:
        path = self.run / FOLDER / RULES
        with contextlib.suppress(
            OSError, ValueError, TypeError, AttributeError, UsageError
        ):  # none, or of a later version
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp != self._stamp:
                said = json.loads(path.read_bytes())
                self._rules = {
                    (kind, key): [Rule.parse(text) for text in texts]
                    for kind in (SOURCES, STORES)
                    for key, texts in said[kind].items()
                }
                self._stamp = stamp


@dataclass(slots=True)
class Bucket:
    """One limit, shared with every process that has the same run directory.  Thread safety: any thread."""

    book: Book
    kind: str
    key: str

    @property
    def path(self) -> Path:
        """The file with its number."""
        return self.book.run / FOLDER / hashlib.sha256(f"{self.kind} {self.key}".encode()).hexdigest()[:16]

    def take(self, count: int) -> None:
        """So many bytes may go when this returns."""
        rate = self.book.rate(self.kind, self.key)
        if not rate or count <= 0:
            return
        if (wait := self._reserved(count * SECOND // rate)) > 0:
            self.book.sleep(wait / SECOND)

    def _reserved(self, cost_ns: int) -> int:
        """How long to wait for our turn, which is ours alone when this returns."""
        now = self.book.clock()
        try:
            with exclusive(self.path, "This limit", LOCK_SECONDS) as fd:
                said = os.pread(fd, _STATE.size, 0)
                until = _STATE.unpack(said)[0] if len(said) == _STATE.size else 0
                begin = until if now < until < now + FAR_NS else now
                os.pwrite(fd, _STATE.pack(begin + cost_ns), 0)
        except (Busy, OSError):  # a limit is manners: nothing is left unprotected for its sake
            return 0
        return begin - BURST_NS - now
