"""Rings that dead workers left: what they hold, and the journal does not, follows what the journal has."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path

import numpy as np

from hvbackup.config import private
from hvbackup.errors import UsageError
from hvbackup.model import Instant
from hvbackup.protect.setting import Setting
from hvbackup.store.format import layout as f
from hvbackup.store.journal.history import History
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.told import Told
from hvbackup.target import ring as rings
from hvbackup.target.ring import Ring

_FRAME_BYTES = 4 * 1024 * 1024
_END_SECONDS = 5.0


def ring_path(setting: Setting) -> Path:
    """Where the ring of a machine's stream is.  Raises UsageError when that folder is not ours."""
    folder = setting.rhythm.rings
    if folder is None:
        raise UsageError("A stream needs a folder for its ring")
    name = hashlib.sha256(setting.store.id + setting.machine.id.encode()).hexdigest()[:24]
    return private(folder) / f"{name}.ring"


def is_left(setting: Setting) -> bool:
    """Whether a life of ours that was killed may have left something that its journal lacks, and nobody has gone on with that."""
    if setting.rhythm.rings is None or not (path := ring_path(setting)).exists() or not (ring := rings.find(path)):
        return False
    with contextlib.closing(ring):
        return _is_newest(History(setting.store, setting.machine.id).told, ring)


def _is_newest(told: Told, ring: Ring) -> bool:
    """Whether nobody has gone on since, with another stream, or with cycles, which name tokens of their own."""
    return told.stream is not None and told.stream.ring == ring.id and told.tokens_seq <= told.stream.seq


def salvage(setting: Setting, recorder: Recorder, history: History) -> bool:
    """What the guest was told in a life that was killed is in the journal when this returns.  Whether there was anything.

    A ring is of use only when the journal tells how far it was taken: then the gap at the head of that life was closed.
    """
    if setting.rhythm.rings is None or not (path := ring_path(setting)).exists():
        return False
    ring = rings.find(path)
    found = False
    if ring is not None:
        _end_target(ring)
        found = _append(recorder, history, ring)
        ring.close()
    path.unlink(missing_ok=True)
    return found


def _append(recorder: Recorder, history: History, ring: Ring) -> bool:
    told, (row, at) = history.told, ring.tails
    if told.stream is None or not _is_newest(told, ring):
        return False
    if any(doubt.holds(told.stream.seq) for doubt in told.doubts):
        return False  # something went past the stream: what is left would be laid over moments that lack it
    taken = told.stream.rows + _writes_after(history, told.stream.seq)
    if not row <= taken < ring.heads.rows:
        return False
    at += sum(len(b.data) for b in ring.batches(row, at, _FRAME_BYTES, until=taken))
    before = recorder.disks
    recorder.set_disks(list(told.disks.values()))
    recorder.begin_stream(ring.id, taken)
    t = Instant(0)
    for batch in ring.batches(taken, at, _FRAME_BYTES):
        recorder.stream(batch.rows.view(f.FACT), batch.data, each=True)
        t = Instant(int(batch.rows["t"][-1]))
    recorder.sync(t)
    recorder.end_stream()
    recorder.set_disks(before)
    return True


def _writes_after(history: History, seq: int) -> int:
    """How many single writes the journal has after a remark of the stream's."""
    count = 0
    for run in history.runs:
        if run.summary.last_seq > seq:
            kinds = run.facts["kind"][max(0, seq + 1 - run.name.first) :]
            count += int(np.count_nonzero(kinds != f.FACT_META))
    return count


def _end_target(ring: Ring) -> None:
    """Nobody puts anything into the ring any more: a target outlives its worker by a moment, unless it hangs."""
    program = Path(f"/proc/{ring.pid}/cmdline")
    end = time.monotonic() + _END_SECONDS
    while time.monotonic() < end:
        try:
            if b"hvbackup-target" not in program.read_bytes():
                return
        except OSError:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(ring.pid, signal.SIGKILL)
        time.sleep(0.01)
