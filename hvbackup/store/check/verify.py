"""Verify packs: every record's tag, or its content as well, at a bounded rate, and the places that are damaged.

authenticate   an encrypted pack: the tag of each record.  A plain one has no tags: the BLAKE3 of the file is its name, and
               where that does not fit each record is decoded
deep           each record is decrypted, decoded and compared with its ids
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import blake3
import numpy as np
import zstandard
from numpy.typing import NDArray

from hvbackup.errors import ChunkDamaged, HvbackupError, StoreDamage
from hvbackup.store.check.ledger import Level
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format import records
from hvbackup.store.store import Store


@dataclass(slots=True)
class Verified:
    """What was found in one pack or segment."""

    pack: str
    read_bytes: int = 0
    damaged: list[tuple[int, str]] = field(default_factory=list)  # (offset of the record, why)


class Throttle:
    """Lets so many bytes pass in a second, on average.  Thread safety: every method from any thread."""

    def __init__(
        self,
        bytes_per_second: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._free = clock()
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """`count` more bytes may be read when this returns."""
        if not self._rate:
            return
        with self._lock:
            now = self._clock()
            begin = max(self._free, now)
            self._free = begin + count / self._rate
        if begin > now:
            self._sleep(begin - now)


def rows_of(store: Store, pack: str) -> tuple[NDArray[np.void], str]:
    """The rows of a pack, and what is wrong with its header or footer; without a footer its records say what they hold."""
    why = ""
    try:
        packs.cipher_of(store.files, store.ring, pack)
    except StoreDamage as e:
        why = str(e)
    try:
        return packs.read_footer(store.files, pack), why
    except StoreDamage as e:
        there = store.files.exists(packs.path_of(pack))
        return packs.scan(store.files, pack) if there else np.zeros(0, f.ROW), why or str(e)


def verify(
    store: Store, pack: str, level: Level, throttle: Throttle, only: NDArray[np.uint64] | None = None
) -> Verified:
    """What is damaged in a pack; of the records at the offsets in `only`, if that is given."""
    found = Verified(pack)
    rows, _ = rows_of(store, pack)
    if only is not None:
        rows = rows[np.isin(rows["offset"], only)]
    try:
        secret = packs.cipher_of(store.files, store.ring, pack)
    except StoreDamage:
        return found  # named by who looked at headers
    if level == Level.AUTHENTICATE and secret[0] is None and only is None and _name_fits(store, pack, throttle, found):
        return found
    zstd = zstandard.ZstdDecompressor()
    deep = level == Level.DEEP or secret[0] is None
    for offset, data, group in records.each(store.files, pack, rows, throttle.take, grouped=deep):
        found.read_bytes += len(data)
        where = f"the record at {offset}"
        try:
            body = packs.unlock(data, *secret, where)
            if deep:
                records.verify(store.ring, packs.inflate(data, body, zstd, where), group)
        except ChunkDamaged as e:
            found.damaged.append((offset, str(e)))
    return found


def _name_fits(store: Store, pack: str, throttle: Throttle, found: Verified) -> bool:
    """Whether a pack is the file that its name promises, every byte of it."""
    if "/" in pack:
        return False
    path, digest, at = packs.path_of(pack), blake3.blake3(), 0
    try:
        size = store.files.size(path)
        while at < size:
            throttle.take(records.READ_BYTES)
            data = store.files.read_at(path, at, records.READ_BYTES)
            if not data:
                return False
            digest.update(data)
            at += len(data)
    except (HvbackupError, FileNotFoundError):
        return False
    found.read_bytes += at
    return digest.hexdigest() == pack
