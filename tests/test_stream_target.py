"""The stream's target and its ring: whatever a client sends, what is in the ring is a prefix of what was answered."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvbackup.model import KiB, MiB
from hvbackup.nbd import protocol
from hvbackup.nbd.client import NbdClient
from hvbackup.nbd.uri import NbdUri
from hvbackup.processes import give_way, idle, may_idle
from hvbackup.protect.streaming import StreamLife
from hvbackup.store.format import layout as f
from hvbackup.store.journal.recorder import Recorder
from hvbackup.target import ring as rings
from hvbackup.target.process import PROGRAM, Export, Target
from tests.nbd.raw import RawClient, request

pytestmark = pytest.mark.real
SIZE = 4 * MiB
SOURCE = PROGRAM.with_name("target.c")


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    made = Target([Export("vda", SIZE), Export("vdb", 1 * MiB)], tmp_path / "ring", tmp_path / "t", 1 * MiB)
    yield made
    made.close()


def uri(target: Target, name: str = "vda") -> NbdUri:
    return NbdUri(name, socket=str(target.path))


def taken(target: Target) -> tuple[np.ndarray, bytes]:
    """Everything in the ring that was not freed."""
    batches = list(target.ring.batches(*target.ring.tails, 1 * MiB))
    rows = np.concatenate([b.rows for b in batches]) if batches else np.zeros(0, rings.ROW)
    return rows, b"".join(b.data for b in batches)


def test_a_row_is_a_fact_of_the_journal() -> None:
    assert rings.ROW == f.FACT
    assert (rings.DATA, rings.ZERO) == (f.FACT_DATA, f.FACT_ZERO)


COUNTERPART = """
import sys
from pathlib import Path
from hvbackup.store.journal.recorder import Recorder
from hvbackup.target import ring as rings
ring, head, seen = rings.find(Path(sys.argv[1])), 0, (0, 0)
while head < 255 * 300_000:
    head += 255
    ring._words[rings._HEADS] = head
    now = ring.tails
    assert now >= seen, (seen, now)
    seen = now
"""


def test_no_number_is_torn_between_the_two_that_look_at_it(tmp_path: Path) -> None:
    """A head only grows, and so does a tail, whoever reads it at whatever moment."""
    ring = rings.make(tmp_path / "ring", MiB)
    other = subprocess.Popen([sys.executable, "-c", COUNTERPART, tmp_path / "ring"], stderr=subprocess.PIPE, text=True)
    seen = 0
    while other.poll() is None:
        now = ring.heads.rows
        assert seen <= now <= ring._words[rings._HEADS], "what has not come yet is not taken"
        ring.free(now, now)
        seen = now
    assert other.returncode == 0, other.stderr and other.stderr.read()
    assert seen > 255 * 200_000
    ring.close()


@pytest.mark.parametrize("looked_at", [5, rings.LOOKED_AT_ROWS])
def test_what_was_answered_is_in_the_ring_in_its_order_round_and_round(
    target: Target, monkeypatch: pytest.MonkeyPatch, looked_at: int
) -> None:
    monkeypatch.setattr(rings, "LOOKED_AT_ROWS", looked_at)
    rng, written, row, at = random.Random(1), [], 0, 0
    with NbdClient.open(uri(target)) as one, NbdClient.open(uri(target, "vdb")) as two:
        for _ in range(400):
            disk = rng.randrange(2)
            length = rng.choice([512, 4096, 20 * KiB])
            offset = rng.randrange(1 * MiB - length)
            data = rng.randbytes(length)
            (one, two)[disk].write(offset, data)
            written.append((disk, offset, data))
            if rng.random() < 0.1:
                for batch in target.ring.batches(row, at, 64 * KiB):
                    for r in batch.rows:
                        disk, offset, data = written.pop(0)
                        assert (r["disk"], r["offset"], r["length"], r["kind"]) == (disk, offset, len(data), 1)
                        assert batch.data[r["pos"] : r["pos"] + r["length"]] == data
                    row, at = batch.row_end, batch.data_end
                target.ring.free(row, at)
        assert target.ring.written(0)[0] + target.ring.written(1)[0] == 400
    assert at > 2 * target.ring.data_max, "it went round"
    assert not target.ring.heads.lost


def test_times_never_stand_still(target: Target) -> None:
    with RawClient(uri(target)) as client:
        client.open(b"vda")
        client.send(b"".join(request(protocol.WRITE, 0, 512, cookie=n) + bytes(512) for n in range(500)))
        for _ in range(500):
            assert client.simple()[0] == 0
    rows, _ = taken(target)
    assert (np.diff(rows["t"]) > 0).all()


def test_it_lets_qemu_go_on_while_many_writes_come_and_comes_at_once_where_few_do(tmp_path: Path) -> None:
    policy = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # as a worker that gives way
    try:
        target = Target([Export("vda", SIZE)], tmp_path / "ring", tmp_path / "t", 32 * MiB)
    finally:
        os.sched_setscheduler(0, policy, os.sched_param(0))
    many = b"".join(request(protocol.WRITE, 0, 512, cookie=n) + bytes(512) for n in range(100))
    seen, end = [], time.monotonic() + 120
    with RawClient(uri(target)) as client:
        client.open(b"vda")
        while os.SCHED_BATCH not in seen:
            assert time.monotonic() < end
            client.send(many)  # no more at a time: whoever does not take its answers is no client
            client.take(100 * protocol.SIMPLE_REPLY.size)
            seen.append(os.sched_getscheduler(target.pid))
            heads = target.ring.heads
            target.ring.free(heads.rows, heads.data)
        assert seen[0] == os.SCHED_OTHER, "before it knew how many come"
        while os.sched_getscheduler(target.pid) != os.SCHED_OTHER:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not target.ring.heads.broken
    target.close()


@pytest.mark.parametrize("why", ["the ring fills", "nothing is taken out"])
def test_it_calls_a_worker_that_waits_for_a_processor(target: Target, why: str) -> None:
    assert may_idle(), "these tests may change what class a thread is of"
    waits, ended, classes = threading.Event(), threading.Event(), []

    def late() -> None:
        idle()
        target.ring.idler = threading.get_native_id()
        waits.set()
        ended.wait(60)
        classes.append(os.sched_getscheduler(0))

    worker = threading.Thread(target=late)
    worker.start()
    assert waits.wait(60)
    with NbdClient.open(uri(target)) as client:
        if why == "the ring fills":
            size = 0
            while not target.ring.calls:
                client.write(0, bytes(32 * 1024))
                size += 32 * 1024
            assert size <= target.ring.data_max // 4 + 32 * 1024
        else:
            client.write(0, bytes(512))
            end = time.monotonic() + 20
            while not target.ring.calls and time.monotonic() < end:
                time.sleep(0.01)
    ended.set()
    worker.join()
    assert classes == [os.SCHED_BATCH]


def test_a_worker_stands_back_in_a_burst_and_not_for_a_while_after_it_was_called(target: Target) -> None:
    life, burst = StreamLife.__new__(StreamLife), SimpleNamespace(in_burst=False)
    life.recorder, life._called_until = cast(Recorder, burst), 0.0
    classes: list[int] = []

    def step(call: bool = False) -> None:
        with life._last_in_line(target):
            classes.append(os.sched_getscheduler(0))
            assert target.ring.idler == (threading.get_native_id() if classes[-1] == os.SCHED_IDLE else 0)
            if call:
                target.ring._words[rings._CALLS] += 1
        assert os.sched_getscheduler(0) != os.SCHED_IDLE
        assert not target.ring.idler

    def steps() -> None:
        give_way()
        step()
        burst.in_burst = True
        step()
        step(call=True)
        step()
        life._called_until = 0.0
        step()
        with pytest.raises(KeyError), life._last_in_line(target):
            raise KeyError
        assert os.sched_getscheduler(0) == os.SCHED_BATCH

    os.kill(target.pid, signal.SIGSTOP)  # it would call us, too, when we wait for a processor
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    os.kill(target.pid, signal.SIGCONT)
    b, i = os.SCHED_BATCH, os.SCHED_IDLE
    assert classes == [b, i, i, b, i]


def test_it_does_not_call_a_worker_that_keeps_up(target: Target) -> None:
    ended, kept_up, end = threading.Event(), 0, time.monotonic() + 240
    thread = threading.Thread(target=ended.wait, args=(270,))
    thread.start()
    assert thread.native_id
    target.ring.idler = thread.native_id
    with NbdClient.open(uri(target)) as client:
        while kept_up < 10:
            began, calls = time.monotonic(), target.ring.calls
            assert began < end
            client.write(0, bytes(512))
            time.sleep(0.05)
            heads = target.ring.heads
            target.ring.free(heads.rows, heads.data)
            if time.monotonic() - began < 0.1:
                kept_up += 1
                assert kept_up < 1 or target.ring.calls == calls
            else:
                kept_up = -1  # on a busy machine we are late ourselves, and may be called, then or right after
    ended.set()
    thread.join()


def test_a_full_ring_answers_and_keeps_nothing_more(target: Target) -> None:
    with NbdClient.open(uri(target)) as client:
        for n in range(300):
            client.write(0, n.to_bytes(2, "little") * 4096)
        heads = target.ring.heads
        assert "full" in heads.broken
        assert heads.lost == 300 - heads.rows > 0
        target.ring.free(heads.rows, heads.data)
        client.write(0, bytes(512))
        assert target.ring.heads.rows == heads.rows, "a stream that broke stays broken"


def test_a_cut_connection_breaks_the_stream_for_all_disks(target: Target) -> None:
    one, two = NbdClient.open(uri(target)), NbdClient.open(uri(target, "vdb"))
    one.write(0, b"1" * 512)
    one.close()
    two.write(0, b"2" * 512)  # depends on what nobody kept, perhaps
    rows, _ = taken(target)
    assert len(rows) == 1
    assert "cut" in target.ring.heads.broken
    two.close()


def test_a_refused_write_breaks_the_stream(target: Target) -> None:
    with RawClient(uri(target)) as client:
        client.open(b"vda")
        client.ask(protocol.WRITE, SIZE - 100, 512, data=bytes(512))
        assert client.simple()[0] == errno.ENOSPC
    assert "understand" in target.ring.heads.broken


def test_an_export_has_one_client_and_only_once(target: Target) -> None:
    NbdClient.open(uri(target)).close()
    with RawClient(uri(target)) as client:
        client.greet()
        answer = client.option(protocol.OPT_GO, b"\0\0\0\3vda\0\0")[-1][0]
        assert answer & protocol.REP_ERR


def test_it_ends_with_its_worker_and_the_ring_stays(tmp_path: Path) -> None:
    target = Target([Export("vda", SIZE)], tmp_path / "ring", tmp_path / "t", 1 * MiB)
    with NbdClient.open(uri(target)) as client:
        client.write(4096, b"kept" * 128)
        target.close(keep_ring=True)
    found = rings.find(tmp_path / "ring")
    assert found is not None
    [batch] = found.batches(*found.tails, MiB)
    assert batch.data == b"kept" * 128
    found.close()


def test_one_that_hangs_is_killed_and_says_so_in_its_ring(target: Target) -> None:
    os.kill(target.pid, signal.SIGSTOP)
    before = target.ring.heads.alive_ns
    time.sleep(0.3)
    assert target.ring.heads.alive_ns == before
    target.kill()
    assert target._process.wait(120) == -signal.SIGKILL


@pytest.mark.parametrize("content", [b"", bytes(100), bytes(8192), b"\xff" * 8192])
def test_what_is_no_ring_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ring").write_bytes(content)
    assert rings.find(tmp_path / "ring") is None


# --- nonsense, under the sanitizers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with its undefined behaviour and its stray pointers made visible."""
    program = tmp_path_factory.mktemp("sanitized") / PROGRAM.name
    options = [
        "-std=gnu11",
        "-g",
        "-O1",
        "-Wall",
        "-Werror",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    subprocess.run(["gcc", *options, "-o", str(program), str(SOURCE)], check=True, timeout=120)
    return program


class Hostile:
    """A sanitized target that has to be there after whatever was done to it."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.ring = rings.make(folder / "ring", 1 * MiB)
        self.path = folder / "t"
        import socket

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen(256)
            fds = (self.ring.fd, listener.fileno())
            names = [word for n in range(8) for word in (str(SIZE), f"disk{n}")]
            self.process = subprocess.Popen(
                [str(program), *map(str, fds), *names], stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds
            )

    def client(self) -> RawClient:
        return RawClient(NbdUri("disk0", socket=str(self.path)))

    def end(self) -> None:
        _, said = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, said.decode()
        assert self.ring.heads.rows <= self.ring.rows_max
        self.ring.close()


@pytest.fixture
def hostile(sanitized: Path, tmp_path: Path) -> Iterator[Hostile]:
    made = Hostile(sanitized, tmp_path)
    yield made
    made.end()


_NUMBERS = st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1))
_OPTIONS = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda n, rest: n.to_bytes(4, "big") + b"disk0" + rest, _NUMBERS, st.binary(max_size=30)),
    st.builds(lambda n, rest: b"\0\0\0\5disk0" + n.to_bytes(4, "big") + rest, _NUMBERS, st.binary(max_size=30)),
)
_U64 = st.one_of(st.integers(0, 70000), st.integers(0, 2**64 - 1))
_COMMANDS = st.builds(
    lambda kind, flags, offset, length: request(kind, offset, length, flags=flags),
    st.one_of(st.integers(0, 8), st.integers(0, 65535)),
    st.one_of(st.integers(0, 15), st.integers(0, 65535)),
    _U64,
    st.one_of(st.integers(0, 70000), st.integers(0, 2**32 - 1)),
)


def test_nonsense_harms_nothing(hostile: Hostile) -> None:
    """Handshakes, options and commands of all kinds; one program takes them all, and ends in good order."""

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.binary(max_size=200), max_size=4))
    def garbage(pieces: list[bytes]) -> None:
        with hostile.client() as client:
            client.send_all(b"".join(pieces))
            client.drain()

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(_NUMBERS, _OPTIONS), max_size=12))
    def options(pieces: list[tuple[int, bytes]]) -> None:
        with hostile.client() as client:
            client.greet()
            client.send_all(b"".join(protocol.option(number, data) for number, data in pieces))
            client.drain()

    garbage()
    options()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(_COMMANDS, st.binary(max_size=40)), max_size=20))
def test_any_commands_with_any_arguments(
    sanitized: Path, tmp_path_factory: pytest.TempPathFactory, commands: list[bytes]
) -> None:
    hostile = Hostile(sanitized, tmp_path_factory.mktemp("hostile"))
    with hostile.client() as client:
        client.open(b"disk0")
        client.send_all(b"".join(commands))
        client.drain()
    hostile.end()


def test_payloads_that_trickle_and_clients_without_end(hostile: Hostile) -> None:
    data = os.urandom(100_000)
    with hostile.client() as slow, hostile.client() as other:
        slow.open(b"disk1")
        other.open(b"disk2")
        whole = request(protocol.WRITE, 4096, len(data)) + data
        for at in range(0, len(whole), 9_001):
            slow.send(whole[at : at + 9_001])
            other.ask(protocol.WRITE, 0, 512, data=bytes(512))
            assert other.simple()[0] == 0
        assert slow.simple()[0] == 0
        many = []
        for _ in range(100):
            client = hostile.client()
            many.append(client)
        assert hostile.ring.heads.state == rings.RECORDING
        for client in many:
            client.sock.close()
    batches = list(hostile.ring.batches(0, 0, 10 * MiB))
    rows = np.concatenate([b.rows for b in batches])
    [big] = np.flatnonzero(rows["length"] == len(data))
    assert batches[0].data[rows["pos"][big] :][: len(data)] == data
