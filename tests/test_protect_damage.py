"""Protection goes on although something of the journal is damaged: a point is made of the machine itself."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hvbackup.capture import Options
from hvbackup.errors import JournalGap, StoreDamage
from hvbackup.model import SECOND, DiskId, Instant, KiB
from hvbackup.protect.events import Begun, ContinuityLost, Event, Folded, Rhythm, Trouble
from hvbackup.protect.protection import Protection
from hvbackup.store.format import layout as f
from hvbackup.store.journal import journal
from hvbackup.store.journal.history import History
from hvbackup.store.journal.journal import LOG, SEGMENT, LogReader
from hvbackup.store.journal.window import Limits
from tests.store.test_sealing import unsealed
from tests.test_protect import World, world

__all__ = ["world"]


def recorded(world: World, suffix: str, patch: pytest.MonkeyPatch) -> list[Path]:
    """Three files of a journal, one of each moment."""
    if suffix == LOG:
        unsealed(patch)
    life = world.protection.begin("a test")
    for _ in range(3):
        world.guest_writes()
        life.cycle()
        life.recorder.rotate()
    life.close(seal=suffix == SEGMENT)
    folder = world.store.ring.machine_name(world.machine.id)
    names = journal.list_files(world.store.files, folder)
    assert {n.suffix for n in names} == {suffix}
    return [world.store.files.path(f"journals/{folder}/{n}") for n in names]


def forget_tables(world: World) -> None:
    folder = f"journal/{world.store.ring.machine_name(world.machine.id)}"
    for name in world.store.state.names(folder):
        world.store.state.remove(f"{folder}/{name}")


def damage(world: World, path: Path) -> None:
    """Something that a guest has written."""
    at = f.HEADER_BYTES + 500
    if path.suffix == LOG:
        name = journal.parse_name(path.name)
        assert name
        index = LogReader(world.store.files, world.store.ring, path.parent.name, name).index()
        assert index
        at = int(index.frames["at"][1]) + 500
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("suffix", "known"), [(LOG, False), (SEGMENT, True), (SEGMENT, False)])
@pytest.mark.parametrize("budget", [0, 60 * KiB])
def test_a_point_is_made_of_the_machine_where_none_can_be_made_of_the_journal(
    world: World, suffix: str, known: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`known`: tables under STATE tell what the damaged file has."""
    with monkeypatch.context() as patch:
        paths = recorded(world, suffix, patch)
    if known:
        History(world.store, world.machine.id)
    else:
        forget_tables(world)
    damage(world, paths[1])
    events: list[Event] = []
    rhythm = replace(Rhythm(SECOND // 20, limits=Limits(0, budget)), fold_every_ns=SECOND)
    protection = Protection(world.store, world.hv, world.machine, Options(), rhythm, events.append)
    thread = threading.Thread(target=protection.run)
    thread.start()
    end = time.monotonic() + 60
    while not whole_again(events) and time.monotonic() < end:
        with world.hv._lock:
            world.hv.machine("m1").disks["vda"].write(0, world.rng.randbytes(4096))
        time.sleep(0.02)
    protection.end()
    thread.join(60)
    assert whole_again(events), events
    history = History(world.store, world.machine.id)
    if suffix == LOG or known:
        troubles = [e.error for e in events if isinstance(e, Trouble)]
        assert isinstance(troubles[0], StoreDamage)
        assert budget or isinstance(troubles[1], ContinuityLost)
        assert budget or next(e.how for e in events if isinstance(e, Begun)) == "resumed"
    elif not budget:
        assert next(e.how for e in events if isinstance(e, Begun)) == "captured"
        assert str(paths[1].name) in history.told.gaps[0].why
        with pytest.raises(JournalGap, match=paths[1].name):
            history.at(Instant((history.told.gaps[0].start + history.told.gaps[0].end) // 2))
    assert history.last
    for disk, wanted in world.content().items():
        view = history.view(history.last, DiskId(disk))
        out = bytearray(view.size)
        view.read_into(0, memoryview(out))
        assert out[4096:] == wanted[4096:]


def whole_again(events: list[Event]) -> bool:
    """Whether a point was made of the journal of a life that began with one of the machine."""
    begun = next((i for i, e in enumerate(events) if isinstance(e, Begun) and e.how == "captured"), None)
    return begun is not None and any(isinstance(e, Folded) for e in events[begun:])
