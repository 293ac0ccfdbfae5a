"""How a life begins: it goes on from the newest barrier where that can be proved, else it begins with a capture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from hvbackup.capture import capture
from hvbackup.errors import HostUnreachable, HvbackupError, NotFound, StoreDamage
from hvbackup.hypervisors import Cycling, Streaming
from hvbackup.model import DiskId, Machine, RecoveryPoint, Token
from hvbackup.protect import rings
from hvbackup.protect.cycles import CycleLife, cycles_of
from hvbackup.protect.events import Begun, ContinuityLost
from hvbackup.protect.journaling import Journaling
from hvbackup.protect.points import FOLD_AT, Points
from hvbackup.protect.samples import Samples
from hvbackup.protect.setting import Setting
from hvbackup.protect.streaming import StreamLife
from hvbackup.store.journal.history import History, Moment
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.journal.told import Told

AnyLife = CycleLife | StreamLife


def begin(setting: Setting, why: str) -> AnyLife:
    """A life has begun: a moment of it is durable.  `why` says why there may be a gap before it."""
    began = time.monotonic()
    setting.machine = present(setting)
    if not (setting.untold or rings.is_left(setting)):  # else that comes first
        _refuse_off(setting)  # before the journal is taken from whoever protects it where it runs
    recorder = Recorder(setting.store, setting.machine.id, setting.machine.disks, setting.sealing, setting.steps)
    history = History(setting.store, setting.machine.id)  # of files that are settled: what it counts stays
    recorder.doubts = history.live_doubts()
    try:
        if rings.salvage(setting, recorder, history):
            history = History(setting.store, setting.machine.id)
        if _told_doubt(setting, recorder, history):
            history = History(setting.store, setting.machine.id)
        _refuse_off(setting)
        if setting.is_full():
            with contextlib.suppress(HvbackupError):
                recorder.finish()  # what waits to be sealed becomes smaller
        if history.last and setting.is_full() and not setting.damaged:
            Points(setting, history.last.t).cover(history.last)
        life = resumed(setting, recorder, history, why) or captured(setting, recorder, why)
    except BaseException:
        with contextlib.suppress(HvbackupError):
            recorder.close(seal=False)
        raise
    setting.report(Begun(life.newest, life.point, life.told_gap, life.how, time.monotonic() - began))
    return life


def _refuse_off(setting: Setting) -> None:
    if setting.hypervisor.can.cycles:
        cast(Cycling, setting.hypervisor).refuse_off(setting.machine)


def _told_doubt(setting: Setting, recorder: Recorder, history: History) -> bool:
    """What the last life found, and could not write down, is in the journal.  Whether there was anything."""
    untold, last = setting.untold, history.recorded
    if not untold:
        return False
    if not last or recorder.epoch > untold.epoch + 1:
        setting.untold = None  # somebody else has recorded moments since, of which we have nothing to say
        return False
    setting.tell_doubt(recorder, last.t, untold.tokens, untold.doubt)
    return True


def present(setting: Setting) -> Machine:
    """The machine as it is now: its disks may have become others."""
    wanted = setting.machine
    found = next((m for m in setting.hypervisor.machines() if m.id == wanted.id), None)
    if found is None:
        raise HostUnreachable(f"Machine {wanted.name} ({wanted.id}) is not there any more")
    return found


def resumed(setting: Setting, recorder: Recorder, history: History, why: str) -> AnyLife | None:
    """A life that goes on from the newest barrier, or None when its tokens prove nothing any more."""
    told, last = history.told, history.last
    if last is None or told.distrusted or setting.damaged:
        return None
    if history.recorded != last:
        return None  # what the tokens call unchanged has changed since the newest moment that is offered
    tokens = {d: Token(**v) for d, v in told.tokens.items()}
    try:
        point = history.based(last)
    except (NotFound, StoreDamage):
        return None  # no point could be made of what followed
    if recorder.last > history.runs[-1].summary.last_seq + 1:
        return None  # numbers are left out, and so would be facts: nothing could be read across them
    if set(tokens) != set(told.disks) or {d: v.size for d, v in told.disks.items()} != setting.sizes():
        return None
    setting.leases.settle(setting.hypervisor, setting.machine)
    life = _life(setting, recorder, point, tokens, "resumed", last)
    life.gap, recorder.newest = {"from": int(last.t), "why": why}, last
    try:
        _catch_up(life)
    except ContinuityLost:
        recorder.rotate()  # what was appended belongs to no moment
        return None
    return life


def _catch_up(life: AnyLife) -> None:
    """The gap at the head of the life is closed, or nothing is left of it on the host."""
    try:
        life.catch_up()
    except ContinuityLost:
        life.let_go()
        raise
    except BaseException:
        with contextlib.suppress(HvbackupError):
            life.close(seal=False)  # nobody writes into the journal any more
        raise


def captured(setting: Setting, recorder: Recorder, why: str) -> AnyLife:
    """A life that begins with a point, which compares what it must."""
    told, last = (history := History(setting.store, setting.machine.id)).told, history.recorded
    with setting.writing:
        # A file that can't be read may have said that the tracker lied.
        unknown = any(name.first > told.tokens_seq for name, _ in history.lost)
        full = setting.options.full or told.distrusted or unknown
        options = replace(setting.options, seq=recorder.last, full=full, fine=True)
        outcome = capture(setting.store, setting.hypervisor, setting.machine, options)
    point = outcome.point
    assert point is not None  # every other way out of `capture` raises
    setting.damaged = False
    doubt = _doubt(told, history.first, last) if outcome.distrusted else {}
    recorder.set_disks([d.disk for d in point.disks])
    tokens = {d.disk.id: d.token for d in point.disks if d.token}
    life = _life(setting, recorder, point, tokens, "captured", Moment(0, point.t))
    since = doubt.get("start", last.t if last else None)
    gap = {"from": int(since), "to": int(point.t), "why": why} if since is not None else None
    # Nothing before this point may be laid under what follows: what happened in between is in the point alone.
    more = {"base": point.seq, **({"doubt": doubt} if doubt else {}), **({"gap": gap} if gap else {})}
    life.newest, life.told_gap = Moment(recorder.barrier(point.t, tokens, **more), point.t), gap
    if setting.is_full(FOLD_AT):
        recorder.finish()
        life.points.trim()  # the new point covers all of it: room for what changes until the life records
    if setting.rhythm.stream:
        life.gap = {"from": int(point.t), "why": "the stream was not armed yet"}
        _catch_up(life)
    return life


def _doubt(told: Told, first: Moment | None, last: Moment | None) -> dict[str, Any]:
    """What the journal says of moments since the last good sample, after a capture has found that the tracker lied.

    Where no sample is known any more, no moment is good.
    """
    if first is None or last is None:
        return {}
    good = told.good or Moment(0, first.t)
    if last.seq <= good.seq:
        return {}
    why = "the tracker called blocks unchanged that had changed"
    return {"after": good.seq, "until": last.seq, "start": int(good.t), "end": int(last.t), "why": why}


def _life(
    setting: Setting,
    recorder: Recorder,
    point: RecoveryPoint,
    tokens: Mapping[DiskId, Token],
    how: str,
    newest: Moment,
) -> AnyLife:
    lease = setting.leases.take(setting.machine.id, setting.options.source)
    if setting.rhythm.stream:
        stream = cast(Streaming, setting.hypervisor).stream(setting.machine, lease.id)
        return StreamLife(setting, recorder, stream, lease, Points(setting, point.t), point, tokens, how, newest)
    cycles = cycles_of(setting.hypervisor, setting.machine, lease.id)
    samples = Samples(setting.rhythm.sample_blocks, setting.options.rng)
    points, journaling = Points(setting, point.t), Journaling(recorder)
    return CycleLife(setting, recorder, cycles, lease, points, point, tokens, how, newest, samples, journaling)
