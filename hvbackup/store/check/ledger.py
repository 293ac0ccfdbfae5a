"""What was verified when: a cache of this machine under STATE, one row for each pack and segment.

Losing it means that everything counts as never verified.  It is written every SAVE_SECONDS while a check runs, so a check that
was interrupted goes on where it was; what was verified since the last writing is verified again.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from enum import IntEnum

import blake3
import numpy as np

from hvbackup.files import Files
from hvbackup.model import SECOND, Instant
from hvbackup.store.backend import Backend
from hvbackup.store.format import pack as packs

FILE = "verified"
DEBT_NS = 30 * 24 * 3600 * SECOND  # what was not verified for so long is owed
SAVE_SECONDS = 20.0
HEAD = struct.Struct("<4sBxxxq")  # magic, level and beginning of a whole check that has not ended (0: there is none)
MAGIC = b"hvV1"
ROW = np.dtype([("pack", "V32"), ("t", "<i8"), ("level", "u1")])


class Level(IntEnum):
    """How closely a check looks; each level does what those before it do."""

    QUICK = 0
    AUTHENTICATE = 1
    DEEP = 2


class Ledger:
    """When each pack was verified, and how.  Thread safety: one thread."""

    def __init__(self, state: Files) -> None:
        self._state = state
        self._when: dict[bytes, tuple[int, int]] = {}  # key of a pack -> (moment, level)
        self.level, self.begun = Level.QUICK, Instant(0)  # of a whole check that has not ended
        self._load()

    def _load(self) -> None:
        try:
            data = self._state.read(FILE)
        except FileNotFoundError:
            return
        body, digest = data[:-32], data[-32:]
        if len(body) < HEAD.size or (len(body) - HEAD.size) % ROW.itemsize or blake3.blake3(body).digest() != digest:
            return
        magic, level, begun = HEAD.unpack_from(body)
        if magic != MAGIC or level > Level.DEEP:
            return
        self.level, self.begun = Level(level), Instant(begun)
        rows = np.frombuffer(body, ROW, offset=HEAD.size)
        keys = (bytes(k) for k in rows["pack"].tolist())
        self._when = dict(zip(keys, zip(rows["t"].tolist(), rows["level"].tolist(), strict=True), strict=True))

    def save(self) -> None:
        """What was noted survives us when this returns."""
        rows = np.array([(k, t, level) for k, (t, level) in self._when.items()], ROW)
        body = HEAD.pack(MAGIC, self.level, self.begun) + rows.tobytes()
        self._state.replace(FILE, body + blake3.blake3(body).digest())

    def note(self, pack: str, level: Level, t: Instant) -> None:
        """A pack was verified, whatever was found."""
        self._when[_key(pack)] = (t, level)

    def when(self, pack: str, level: Level = Level.AUTHENTICATE) -> Instant:
        """When a pack was last verified at this level or a higher one; 0 for never."""
        t, had = self._when.get(_key(pack), (0, 0))
        return Instant(t if had >= level else 0)

    def keep(self, names: Collection[str]) -> None:
        """Nothing is known of any others."""
        wanted = {_key(n) for n in names}
        self._when = {k: v for k, v in self._when.items() if k in wanted}


def _key(pack: str) -> bytes:
    return blake3.blake3(pack.encode()).digest()


def debt(ledger: Ledger, sizes: Iterable[tuple[str, int]], now: Instant) -> int:
    """How many bytes were not verified, at any level, within DEBT_NS."""
    return sum(size for pack, size in sizes if ledger.when(pack) < now - DEBT_NS)


def sizes(backend: Backend, names: Iterable[str]) -> dict[str, int]:
    """The length of each pack that is there."""
    found = {}
    for name in names:
        try:
            found[name] = backend.size(packs.path_of(name))
        except FileNotFoundError:
            continue
    return found
