"""reclaim: the space of what was forgotten."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hvbackup.errors import UsageError
from hvbackup.model import SECOND, Instant
from hvbackup.service.retention import ordering
from hvbackup.service.session import Session
from hvbackup.store.keep import forget as forgetting
from hvbackup.store.reclaim import reclaim as reclaiming
from hvbackup.store.reclaim import reserve
from hvbackup.store.reclaim.reclaim import Options, Reclaimed
from hvbackup.store.shelves import immutable, pins

NICENESS = 10
COUNTS_AGE_NS = 7 * 24 * 3600 * SECOND  # counts choose for so long; what captures that died left waits no longer
FOREVER = Instant(2**63 - 1)


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for."""

    garbage_share: float = reclaiming.GARBAGE_SHARE
    grace_ns: int = reclaiming.GRACE_NS
    wait: bool = False
    bytes_per_second: int = 0  # 0: as fast as it goes
    empty_trash: bool = False
    exact: bool = False  # mark first, whatever is known
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is needed and what is not, in bytes of plain chunks."""

    packs: int
    live: int
    total: int
    dead_packs: int
    chosen: int  # packs that would be condemned
    seconds: float


@dataclass(frozen=True, slots=True)
class Freed:
    """What a run did."""

    emptied: list[str] = field(default_factory=list)  # points whose time in the trash had passed
    done: Reclaimed = field(default_factory=Reclaimed)


def reclaim(session: Session, wish: Wish, now: Instant) -> Freed:
    """One run.  Raises Busy, StoreDamage, SpaceExhausted, UsageError."""
    os.nice(NICENESS)  # in the background: captures and restores go first
    with ordering(session, now) as (store, rules):
        if wish.empty_trash and rules.two_person:
            raise UsageError("This store asks for two operators, so nobody empties its trash early by themselves")
        moment = FOREVER if wish.empty_trash else now
        emptied = reserve.using(store.files, lambda: forgetting.empty(store, moment))
        pins.remove_expired(store, now)
    with session.open() as store:
        immutable.arm(store)
        options = Options(
            wish.garbage_share,
            wish.grace_ns,
            0 if wish.exact else COUNTS_AGE_NS,
            wish.wait,
            pause=Throttle(wish.bytes_per_second),
            say=wish.say,
        )
        done = reserve.using(store.files, lambda: reclaiming.reclaim(store, options))
        reserve.keep(store.files)
        return Freed(emptied, done)


def dry_run(session: Session, wish: Wish) -> Sizes:
    """What `reclaim` would do; nothing is changed."""
    began = time.monotonic()
    with session.open() as store:
        shares = reclaiming.shares(store, Options(pause=Throttle(wish.bytes_per_second), say=wish.say))
        chosen = reclaiming.choose(store, shares, wish.garbage_share)
        return Sizes(
            len(shares),
            sum(s.live for s in shares.values()),
            sum(s.total for s in shares.values()),
            sum(1 for s in shares.values() if not s.live),
            len(chosen),
            round(time.monotonic() - began, 3),
        )


class Throttle:
    """Takes its time, so that no more than so many bytes are read in a second, on average."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate, self._began, self._read = bytes_per_second, time.monotonic(), 0

    def __call__(self, count: int) -> None:
        self._read += count
        if self._rate and (ahead := self._read / self._rate - (time.monotonic() - self._began)) > 0:
            time.sleep(ahead)


def shape(freed: Freed) -> dict[str, object]:
    """A run as JSON."""
    from hvbackup.moments import rfc3339

    d = freed.done
    return {
        "emptied": [path.rsplit("-", 1)[1] for path in freed.emptied],
        "condemned_packs": d.condemned,
        "copied_bytes": d.copied_bytes,
        "removed_packs": d.removed_packs,
        "removed_bytes": d.removed_bytes,
        "waiting_for_writers": d.waiting_for,
        "until": rfc3339(d.until) if d.until is not None else None,
        "kept": d.kept,
        "seconds": d.seconds,
    }
