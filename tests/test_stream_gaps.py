"""What changed while nobody recorded it may be more than a journal takes: a point holds it, and every gap is told of."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hvbackup import copying
from hvbackup.errors import HostUnreachable, JournalGap, NotFound
from hvbackup.model import Instant, KiB, MachineId, MiB
from hvbackup.protect import cycles, streaming
from hvbackup.protect.events import Begun, Cycle, Event, Trouble
from hvbackup.protect.streaming import StreamLife
from hvbackup.store.journal import recorder
from hvbackup.store.journal.history import History
from hvbackup.store.journal.window import Limits, journal_bytes
from hvbackup.store.store import Store
from tests.hypervisors.daemon import Daemon
from tests.scribe import Scribe
from tests.test_stream_qemu import SIZES, begun, daemon, every_moment, images, on_disk, protection_of, rhythm, store
from tests.test_stream_traps import Running, troubles

__all__ = ["daemon", "store"]
pytestmark = pytest.mark.real

UNARMED = "the stream was not armed yet"
SLOW, FAST = 40, 1500  # writes a second
MORE = "more than the journal takes at once"
TOO_MUCH = "writes too much for its journal"


def kept_out_of(history: History, after: Instant, until: Instant) -> list[str]:
    """Nothing is offered for any time in between, and each is in a gap; why nothing was recorded, in order."""
    told = [gap for gap in history.told.gaps if gap.end > after and gap.start < until]
    rng, offered = random.Random(int(after)), {m.t for m in every_moment(history)}
    times = [after + 1, until - 1, *(rng.randrange(after + 1, until) for _ in range(50))]
    for t in set(times) - offered:
        with pytest.raises(
            (JournalGap, NotFound), match="|".join([*(re.escape(g.why) for g in told), "no moment that early"])
        ):
            history.at(Instant(t))
    assert all(one.end >= other.start for one, other in itertools.pairwise(told)), "no hole between two gaps"
    return [gap.why for gap in told]


def verified(store: Store, machine: MachineId, scribe: Scribe, folder: Path) -> History:
    """Moments are prefixes, one after the other, and the newest is what the disks hold."""
    history = History(store, machine)
    offered = every_moment(history)
    reached = [scribe.verify(images(history, m)) for m in offered[:: max(1, len(offered) // 30)]]
    assert reached == sorted(reached)
    assert images(history, offered[-1]) == on_disk(folder)
    return history


def shown(folder: Path, machine: str) -> str:
    """What the timeline says, to somebody else."""
    places = {"HVBACKUP_STORE": folder / "store", "HVBACKUP_STATE": folder / "state2"}
    environment = {**os.environ, **{name: str(path) for name, path in places.items()}}
    argv = [sys.executable, "-m", "hvbackup", "timeline", machine]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "cycles"])
@pytest.mark.parametrize("limited", ["a set", "the budget"])
def test_more_than_a_journal_takes_at_once_is_held_by_a_point(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: str, streamed: bool
) -> None:
    """One gap until that point, another until the stream was armed; the journal never takes what it has no room for."""
    limits = Limits(0, 4 * MiB) if limited == "the budget" else Limits()
    wanted = dataclasses.replace(rhythm(tmp_path), limits=limits, stream=streamed)
    if limited == "a set":
        monkeypatch.setattr(streaming if streamed else cycles, "SET_MAX_BYTES", 3 * MiB)
    events, again = list[Event](), list[Event]()
    with Scribe(daemon, SIZES, SLOW, noise=True) as scribe:
        with Running(protection_of(store, daemon, wanted, events), events) as made:
            scribe.wait(scribe.acked + 40)
        machine = made.protection.setting.machine.id
        last = History(store, machine).last
        assert last
        scribe.rate = FAST
        scribe.wait(scribe.acked + 1600)
        scribe.rate = SLOW if limited == "a set" else 600  # what changes while a point is made may be over the budget
        with Running(protection_of(store, daemon, wanted, again), again) as made:
            scribe.rate = SLOW
            time.sleep(2.5)
            made.wait(lambda: not limits.budget_bytes or journal_bytes(store, machine) <= limits.budget_bytes)
            [begun] = [e for e in again if isinstance(e, Begun)]
            assert begun.how == "captured"
            scribe.wait(scribe.acked + 40)
            scribe.stop()
            told = made.count(Cycle)
            made.wait(lambda: streamed or made.count(Cycle) >= told + 2)
        assert not troubles(made)
        scribe.assert_never_stalled(1.0)
    history = verified(store, machine, scribe, tmp_path)
    if limits.budget_bytes:
        assert journal_bytes(store, machine) <= limits.budget_bytes
    why = kept_out_of(history, last.t, begun.moment.t)
    assert history.first
    if history.first.seq > last.seq:  # the budget had no room for anything before this life, not even for its gaps
        assert limited == "the budget"
        return
    assert why == ["protection was not running", *([UNARMED] if streamed else [])]
    assert all(each in shown(tmp_path, machine) for each in why)


def test_what_changes_while_the_point_is_made_may_be_too_much_as_well(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room: a point each time, an alarm each time, and a gap between any two of them, until there is."""
    events, again = list[Event](), list[Event]()
    with Scribe(daemon, SIZES, SLOW) as scribe:
        with Running(protection_of(store, daemon, rhythm(tmp_path), events), events) as made:
            scribe.wait(scribe.acked + 40)
        machine = made.protection.setting.machine.id
        last, points = History(store, machine).last, len(list(store.points(machine)))
        assert last
        monkeypatch.setattr(streaming.taking, "limit", lambda *_, **__: 0)

        def report(event: Event) -> None:
            again.append(event)
            if sum(isinstance(e, Trouble) for e in again) == 2:
                monkeypatch.undo()

        protection = protection_of(store, daemon, rhythm(tmp_path))
        protection.setting.report = report
        with Running(protection, again) as made:
            scribe.wait(scribe.acked + 40)
            scribe.stop()
        scribe.assert_never_stalled(1.0)
    assert troubles(made).count(MORE) + troubles(made).count(TOO_MUCH) == 2
    assert len(list(store.points(machine))) == points + 2
    history = verified(store, machine, scribe, tmp_path)
    [begun] = [e for e in again if isinstance(e, Begun)]
    told = kept_out_of(history, last.t, begun.moment.t)
    assert told[0] == "protection was not running"
    assert [MORE in why or TOO_MUCH in why for why in told[1:]] == [True, True]
    for point in sorted(store.points(machine), key=lambda p: p.seq or 0)[-2:]:
        assert point.seq is not None
        made_of = next(m for m in every_moment(history) if m.seq > point.seq)
        assert made_of.t == point.t, "the point is a moment between two gaps"
        scribe.verify(images(history, made_of))


def test_a_burst_that_is_larger_than_the_budget_is_no_gap(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """A point covers it, and its file goes as soon as there is another one."""
    limits = Limits(0, 2 * MiB)
    protection = protection_of(store, daemon, dataclasses.replace(rhythm(tmp_path), limits=limits))
    life, machine = begun(protection), protection.setting.machine.id
    with daemon.guest("vda") as client:
        client.write(0, os.urandom(3 * MiB))
        life.step()
        assert journal_bytes(store, machine) > limits.budget_bytes
        client.write(0, os.urandom(4096))
        life._kept_up = 0.0  # a second later
        life.step()
        assert journal_bytes(store, machine) <= limits.budget_bytes
    life.close()
    history = History(store, machine)
    assert images(history, every_moment(history)[-1]) == on_disk(tmp_path)
    assert not daemon.leftovers()


def test_a_closing_set_that_broke_off_between_two_files_leaves_no_moment(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what its ring holds, which nothing can be laid under."""
    protection = protection_of(store, daemon, rhythm(tmp_path))
    machine = protection.setting.machine.id
    begun(protection).close()
    last, append, calls = History(store, machine).last, StreamLife._append, 0
    assert last

    def breaks_off(life: StreamLife, *more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            scribe.wait(scribe.acked + 50)  # the ring has something
            raise HostUnreachable("as if it had been killed")
        append(life, *more)

    def keep_ring(life: StreamLife) -> None:
        assert life.target
        life.target.close(keep_ring=True)

    with Scribe(daemon, SIZES, FAST) as scribe:
        scribe.wait(1000)
        with monkeypatch.context() as patch:
            patch.setattr(recorder, "SEGMENT_MAX_BYTES", 256 * KiB)
            patch.setattr(copying, "PIECE_BYTES", 64 * KiB)
            patch.setattr(StreamLife, "_append", breaks_off)
            patch.setattr(StreamLife, "_end_target", keep_ring)
            with pytest.raises(HostUnreachable):
                begun(protection)
        assert list((tmp_path / "rings").glob("*.ring"))
        history = History(store, machine)
        assert len(history.told.parts) == 1
        assert history.last == last
        life = begun(protection)
        assert life.how == "resumed"
        scribe.wait(scribe.acked + 50)
        scribe.stop()
        life.close()
    between = [m for m in every_moment(History(store, machine)) if last.seq < m.seq < life.newest.seq]
    assert between, "single writes"
    verified(store, machine, scribe, tmp_path)
    assert not daemon.leftovers()
