"""A large disk under thousands of scattered writes a second: its protection begins with one point and a few sets."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.capture import Options
from hvbackup.model import SECOND, DiskId, GiB, MiB
from hvbackup.protect import cycles, streaming
from hvbackup.protect.events import Begun, Cycle, Event, Rhythm, Streamed
from hvbackup.protect.protection import Protection
from hvbackup.store.journal.history import History
from hvbackup.store.store import Store, init
from tests.hypervisors.daemon import Daemon, node, only
from tests.protecting import DIES_WITH_US, in_memory
from tests.test_stream_traps import Running, troubles

pytestmark = pytest.mark.real
SIZE, TOUCHED = 32 * GiB, 384 * MiB
RATE = 2000
USUAL = 4 * MiB  # for the test: what changes while the point is made is more


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    image = tmp_path / "vda.raw"
    rng = random.Random(1)
    with image.open("wb") as file:
        file.truncate(SIZE)
        for part in range(12):
            file.seek(part * SIZE // 12 // MiB * MiB)
            file.write(rng.randbytes(TOUCHED // 12))
    made = Daemon(tmp_path, [node("vda", image, "raw")]).start()
    yield made
    made.kill()


@contextlib.contextmanager
def writing(daemon: Daemon) -> Iterator[None]:
    """A guest on a process of its own: random 4 KiB writes over the first GiB."""
    socket = str(daemon.folder / "guest.sock")
    code = f"from pathlib import Path; from labs.bench.stream import offered; offered(Path({socket!r}), {RATE}, 600)"
    process = subprocess.Popen([*DIES_WITH_US, sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    try:
        yield
        assert process.poll() is None, "the guest ended"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)


def data(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, length) of what an image holds that is no hole."""
    with path.open("rb") as file:
        end = 0
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end - start


def digests(history: History, image: Path) -> tuple[str, str]:
    """Of the image, and of the newest moment, where the image has data; elsewhere the moment has to be zero."""
    assert history.last
    view, ours, theirs, at = history.view(history.last, DiskId("vda")), hashlib.blake2b(), hashlib.blake2b(), 0
    buffer = bytearray(4 * MiB)
    with image.open("rb") as file:
        for start, length in [*data(image), (SIZE, 0)]:
            for hole in range(at, start, 64 * MiB):  # here and there
                part = memoryview(buffer)[: min(64 * 1024, start - hole)]
                view.read_into(hole, part)
                assert not any(part)
            for piece in range(start, start + length, len(buffer)):
                part = memoryview(buffer)[: min(len(buffer), start + length - piece)]
                file.seek(piece)
                theirs.update(file.read(len(part)))
                view.read_into(piece, part)
                ours.update(part)
            at = start + length
    return ours.hexdigest(), theirs.hexdigest()


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "every second"])
def test_protection_begins_on_a_large_busy_disk(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr(streaming, "SET_MAX_BYTES", USUAL)
    monkeypatch.setattr(cycles, "SET_MAX_BYTES", USUAL)
    init(tmp_path / "store", None)
    with in_memory(tmp_path / "rings"), Store.open(tmp_path / "store", tmp_path / "state", [], owner=True) as store:
        hypervisor, events = daemon.hypervisor(), list[Event]()
        wanted = Rhythm(SECOND, 3600 * SECOND, rings=(tmp_path / "rings").resolve())
        if streamed:
            wanted = dataclasses.replace(wanted, every_ns=SECOND // 10, stream=True)
        machine = only(hypervisor)
        protection = Protection(store, hypervisor, machine, Options(), wanted, events.append)

        def large() -> int:
            return sum(e.read_bytes > USUAL for e in events if isinstance(e, Cycle))

        with contextlib.ExitStack() as stack:
            load = stack.enter_context(contextlib.ExitStack())
            load.enter_context(writing(daemon))
            made = stack.enter_context(Running(protection, events))
            kind = Streamed if streamed else Cycle
            made.wait(lambda: made.count(kind) >= (5 if streamed else 3))
            made.wait(lambda: streamed or large() >= 2)  # each is as large as what was written meanwhile
            load.close()
            told = made.count(Cycle)
            made.wait(lambda: streamed or made.count(Cycle) >= told + 2)
        assert not troubles(made)
        assert len(list(store.points(machine.id))) == 1
        assert [e.how for e in events if isinstance(e, Begun)] == ["captured"]
        if streamed:
            [closing, *_] = [e for e in events if isinstance(e, Streamed)]
            assert closing.bytes > USUAL, "it was as much as was wanted"
        else:
            read = [e.read_bytes for e in events if isinstance(e, Cycle)]
            assert read[0] > USUAL, "it was as much as was wanted"
        ours, theirs = digests(History(store, machine.id), tmp_path / "vda.raw")
        assert ours == theirs
    assert not daemon.leftovers()
