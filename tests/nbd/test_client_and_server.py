"""Our client on our server: what is read, written and reported is what a bytearray says."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import Busy, HostUnreachable, HvbackupError, ReadFailed, StoreDamage
from hvbackup.nbd import protocol
from hvbackup.nbd.client import NbdClient, RequestFailed, Settings, list_exports
from hvbackup.nbd.export import Export
from hvbackup.nbd.protocol import BASE_ALLOCATION
from hvbackup.nbd.server import NbdServer
from hvbackup.nbd.session import Limits
from tests.nbd.conftest import Serve, wait_for
from tests.nbd.exports import DIRTY, CachedExport, MemoryExport, TrickExport
from tests.nbd.raw import RawClient, request

_SIZE = 300_001  # no multiple of anything
_OFFSETS = st.integers(0, _SIZE)
_OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["read", "write", "zero", "trim", "flush", "status"]), _OFFSETS, _OFFSETS), max_size=12
)
_ODD = Settings(request_bytes=10_007, in_flight=3)


def _read(client: NbdClient, offset: int, length: int) -> bytes:
    data = bytearray(b"\xee") * length
    client.read_into(offset, memoryview(data))
    return bytes(data)


def _read_in_vain(client: NbdClient) -> None:
    with pytest.raises(HostUnreachable):
        _read(client, 0, 4096)


def _when_inside(export: TrickExport, act: Callable[[], object]) -> None:
    """Act on another thread as soon as a command has come to the export."""
    threading.Thread(target=lambda: wait_for(lambda: export.inside == 1) and act()).start()


class Pace:
    """The session's clock, moved by the exports alone: however busy the machine, it is they who are slow or quick."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.now += seconds


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    pace = Pace()
    monkeypatch.setattr("hvbackup.nbd.session.time", pace)
    return pace


def _per_byte(rows: np.ndarray[tuple[int, int], np.dtype[np.int64]], start: int) -> list[int]:
    """The flags of every byte; the rows must follow each other without a hole."""
    assert rows[:, 0].tolist() == (start + np.r_[0, np.cumsum(rows[:-1, 1])]).tolist()
    assert (np.diff(rows[:, 2]) != 0).all()
    return np.repeat(rows[:, 2], rows[:, 1]).tolist()


@pytest.mark.walk
@given(_OPERATIONS, st.booleans(), st.randoms(use_true_random=False))
def test_any_operations_match_a_bytearray(operations: list[tuple[str, int, int]], cached: bool, random: object) -> None:
    export = CachedExport(_SIZE) if cached else MemoryExport(_SIZE)
    model, dirty = bytearray(_SIZE), bytearray(_SIZE)
    with _pair(export) as client:
        for verb, a, b in operations:
            offset, length = min(a, b), abs(a - b)
            end = offset + length
            if verb == "read":
                assert _read(client, offset, length) == model[offset:end]
            elif verb == "write":
                data = random.randbytes(length)  # type: ignore[attr-defined]
                client.write(offset, data, fua=bool(length % 2))
                model[offset:end] = data
                dirty[offset:end] = b"\1" * length
            elif verb == "zero":
                client.write_zeroes(offset, length)
                model[offset:end] = bytes(length)
                dirty[offset:end] = b"\1" * length
            elif verb == "trim":
                client.trim(offset, length)
            elif verb == "flush":
                client.flush()
            elif length:
                _check_status(client, offset, length, export, model, dirty)
        assert _read(client, 0, _SIZE) == model == export.data


def _check_status(
    client: NbdClient, offset: int, length: int, export: MemoryExport, model: bytearray, dirty: bytearray
) -> None:
    rows = client.statuses(offset, length)
    grain = export.grain
    for context, expected in (
        (BASE_ALLOCATION, [0 if any(model[at : at + grain]) else 3 for at in range(0, _SIZE, grain)]),
        (DIRTY, [int(any(dirty[at : at + grain])) for at in range(0, _SIZE, grain)]),
    ):
        assert _per_byte(rows[context], offset) == [expected[at // grain] for at in range(offset, offset + length)]


class _pair:  # noqa: N801 - used like a function
    """A client on a server of its own; hypothesis cannot use fixtures that last for one example."""

    def __init__(self, export: Export, settings: Settings = _ODD) -> None:
        self.server = NbdServer({"disk": export})
        self.settings = settings

    def __enter__(self) -> NbdClient:
        uri = self.server.listen_tcp("127.0.0.1", 0)
        self.client = NbdClient.open(uri, contexts=[BASE_ALLOCATION, DIRTY], settings=self.settings)
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()


def test_what_the_client_learns(serve: Serve) -> None:
    export = MemoryExport(1 << 20)
    export.min_block, export.preferred_block = 512, 8192
    with NbdClient.open(serve(export), contexts=[BASE_ALLOCATION, "qemu:dirty-bitmap:none", DIRTY]) as client:
        assert (client.size, client.read_only, client.can_multi_conn) == (1 << 20, False, True)
        assert (client.min_block, client.preferred_block, client.max_block) == (512, 8192, 32 << 20)
        assert set(client.contexts) == {BASE_ALLOCATION, DIRTY}


def test_unaligned_reads_of_a_disk_with_sectors(serve: Serve) -> None:
    export = MemoryExport(64 * 4096)
    export.data[:] = bytes(range(256)) * (export.size // 256)
    export.min_block = 4096
    settings = Settings(request_bytes=10_000)
    with NbdClient.open(serve(export), settings=settings) as client:
        for offset, length in [(1, 1), (4095, 2), (100, 100_000), (4096, 4097), (0, export.size), (export.size - 1, 1)]:
            assert _read(client, offset, length) == export.data[offset : offset + length]
        with pytest.raises(ReadFailed, match="failed"):
            client.write(1, b"x")


def test_many_small_reads_at_once(serve: Serve) -> None:
    export = CachedExport(1 << 20)
    export.data[:] = np.random.default_rng(1).bytes(1 << 20)
    result = bytearray(1 << 20)
    view = memoryview(result)
    offsets = np.random.default_rng(2).permutation(256) * 4096
    with NbdClient.open(serve(export)) as client:
        client.read_many([(at, view[at : at + 4096]) for at in offsets.tolist()])
    assert result == export.data


def test_large_reads_come_in_pieces_with_holes(serve: Serve) -> None:
    export = MemoryExport(5 << 20)
    export.data[0:3] = b"abc"
    export.data[-3:] = b"xyz"
    with NbdClient.open(serve(export), settings=Settings(request_bytes=32 << 20)) as client:
        assert _read(client, 0, export.size) == export.data


def test_a_failed_read_leaves_the_connection_usable_and_is_reported(serve: Serve) -> None:
    reports: list[tuple[str, str, Exception]] = []

    def fail(offset: int, length: int) -> None:
        if offset == 16384:
            raise StoreDamage("Chunk 42 is damaged")

    export = TrickExport(1 << 20, fail)
    uri = serve(export, on_error=lambda *report: reports.append(report))
    with NbdClient.open(uri, settings=Settings(request_bytes=4096)) as client:
        with pytest.raises(RequestFailed, match=r"reading 4096 bytes at 16384 failed \(Input/output error\)") as caught:
            _read(client, 0, 1 << 20)
        assert (caught.value.offset, caught.value.length, caught.value.errno) == (16384, 4096, errno.EIO)
        assert _read(client, 1 << 19, 100) == bytes(100)
    assert [(name, asked, str(error)) for name, asked, error in reports] == [
        ("disk", "reading 4096 bytes at 16384", "Chunk 42 is damaged")
    ]


def test_an_error_in_the_middle_of_a_long_answer(serve: Serve) -> None:
    def fail(offset: int, length: int) -> None:
        if offset >= 2 << 20:
            raise OSError(errno.EIO, "bad sector")

    with NbdClient.open(serve(TrickExport(4 << 20, fail)), settings=Settings(request_bytes=4 << 20)) as client:
        with pytest.raises(RequestFailed):
            _read(client, 0, 4 << 20)
        assert _read(client, 0, 1 << 20) == bytes(1 << 20)


def test_memory_of_failed_reads_is_given_back(serve: Serve) -> None:
    def fail(offset: int, length: int) -> None:
        raise StoreDamage("Chunk is damaged")

    limits = Limits(buffer_bytes=4 << 20, connection_bytes=2 << 20)
    with NbdClient.open(
        serve(TrickExport(1 << 20, fail), limits=limits), settings=Settings(reply_seconds=60)
    ) as client:
        for _ in range(20):
            with pytest.raises(RequestFailed):
                _read(client, 0, 1 << 20)


def test_requests_of_one_connection_run_in_parallel(serve: Serve) -> None:
    together = threading.Barrier(4, timeout=120)
    export = TrickExport(1 << 20, lambda offset, length: together.wait() and None)
    with NbdClient.open(serve(export), settings=Settings(request_bytes=4096)) as client:
        _read(client, 0, 4 * 4096)
    assert export.most_inside == 4


def test_commands_that_are_stuck_do_not_hold_up_others_of_a_quick_export(serve: Serve) -> None:
    release = threading.Event()
    export = TrickExport(1 << 20, lambda offset, length: release.wait(120) and None if offset < 3 * 4096 else None)
    with RawClient(serve(export)) as client:
        client.open()
        for _ in range(200):  # by now the server takes the export for a quick one
            client.ask(protocol.READ, 65536, 512)
            client.simple()
            client.take(512)
        for cookie in range(3):
            client.ask(protocol.READ, cookie * 4096, 512, cookie=cookie)
        for cookie in range(100, 120):
            client.ask(protocol.READ, 65536, 512, cookie=cookie)
        assert {(client.simple(), client.take(512))[0] for _ in range(20)} == {(0, n) for n in range(100, 120)}
        release.set()
        assert {(client.simple(), client.take(512))[0] for _ in range(3)} == {(0, 0), (0, 1), (0, 2)}


def test_a_reply_is_not_held_back_by_a_command_that_turns_out_to_be_stuck(serve: Serve) -> None:
    release = threading.Event()
    export = TrickExport(1 << 20, lambda offset, length: release.wait(120) and None if offset else None)
    with RawClient(serve(export)) as client:
        client.open().send(request(protocol.READ, 0, 512, cookie=1) + request(protocol.READ, 4096, 512, cookie=2))
        assert client.simple() == (0, 1)
        release.set()


def test_a_serial_export_answers_each_command_at_once(serve: Serve) -> None:
    allowed = threading.Semaphore(0)
    export = TrickExport(1 << 20, lambda offset, length: allowed.acquire(timeout=120) and None)
    export.parallel = False
    with RawClient(serve(export)) as client:
        client.open().send(b"".join(request(protocol.READ, 0, 512, cookie=n) for n in range(5)))
        for n in range(5):
            allowed.release()
            assert client.simple() == (0, n)
            client.take(512)


def test_a_crowd_of_slow_commands_gets_all_the_threads(serve: Serve) -> None:
    slow = threading.Event()
    export = TrickExport(1 << 20, lambda offset, length: time.sleep(0.05) if slow.is_set() else None)
    with RawClient(serve(export)) as client:
        client.open().ask(protocol.READ, 0, 512)
        client.simple()
        client.take(512)
        slow.set()
        client.send(b"".join(request(protocol.READ, 0, 512, cookie=n) for n in range(60)))
        for _ in range(60):
            client.simple()
            client.take(512)
    assert export.most_inside == Limits().workers


def test_threads_come_when_an_export_is_slow_and_go_when_it_is_quick(serve: Serve, pace: Pace) -> None:
    slow = threading.Event()
    export = TrickExport(1 << 20, lambda offset, length: pace.sleep(0.02) if slow.is_set() else None)
    before = set(threading.enumerate())

    def session_threads() -> int:
        return sum(t.name in ("nbd client", "nbd disk") for t in threading.enumerate() if t not in before)

    with NbdClient.open(serve(export), settings=Settings(request_bytes=4096)) as client:
        _read(client, 0, 1 << 20)
        assert session_threads() == 1
        slow.set()
        _read(client, 0, 1 << 20)
        assert export.most_inside == session_threads() == Limits().workers
        slow.clear()
        for _ in range(20):
            _read(client, 0, 1 << 20)
        assert wait_for(lambda: session_threads() <= 2)  # one may still sleep at the input


def test_a_serial_export_sees_one_request_after_the_other_in_order(serve: Serve) -> None:
    seen: list[int] = []

    def look(offset: int, length: int) -> None:
        seen.append(offset)
        time.sleep(0.001)  # long enough for another thread to come in between

    export = TrickExport(1 << 20, look)
    export.parallel = False
    with NbdClient.open(serve(export), settings=Settings(request_bytes=4096)) as client:
        _read(client, 0, 1 << 20)
    assert seen == list(range(0, 1 << 20, 4096))
    assert export.most_inside == 1


def test_an_export_that_waits_for_a_disk_is_told_what_comes_next(serve: Serve, pace: Pace) -> None:
    class Telling(TrickExport):
        def __init__(self, seconds: float) -> None:
            super().__init__(1 << 20, lambda offset, length: pace.sleep(seconds))
            self.told: list[tuple[int, int]] = []

        def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
            self.told += ranges

    slow, quick = Telling(0.001), Telling(0)
    for name, export in (("slow", slow), ("quick", quick)):
        with NbdClient.open(serve(export, name=name), settings=Settings(request_bytes=4096, in_flight=16)) as client:
            assert _read(client, 0, export.size) == export.data
    asked = {(at, 4096) for at in range(0, slow.size, 4096)}
    assert len(slow.told) > len(asked) // 2
    assert set(slow.told) <= asked
    assert len(set(slow.told)) == len(slow.told), "each is told once"
    assert len(quick.told) < len(asked) // 2


def test_replies_of_several_threads_do_not_mix(serve: Serve) -> None:
    export = TrickExport(48 << 20, lambda offset, length: time.sleep(0.002))
    export.data[:] = np.random.default_rng(4).bytes(export.size)
    with NbdClient.open(serve(export), settings=Settings(request_bytes=1 << 19)) as client:
        assert _read(client, 0, export.size) == export.data
    assert export.most_inside > 1


def test_memory_of_writes_is_given_back(serve: Serve) -> None:
    export = MemoryExport(24 << 20)
    content = np.random.default_rng(6).bytes(export.size)
    limits = Limits(buffer_bytes=4 << 20, connection_bytes=2 << 20)
    with NbdClient.open(serve(export, limits=limits)) as client:
        client.write(0, content)
    assert export.data == content


def test_a_slow_read_does_not_hold_up_others(serve: Serve) -> None:
    release = threading.Event()
    export = TrickExport(1 << 20, lambda offset, length: release.wait(120) and None if offset == 0 else None)
    uri = serve(export)
    with NbdClient.open(uri) as slow, NbdClient.open(uri) as fast:
        reader = threading.Thread(target=_read, args=(slow, 0, 4096))
        reader.start()
        assert wait_for(lambda: export.inside == 1)
        assert _read(fast, 8192, 4096) == bytes(4096)
        release.set()
        reader.join(120)


def test_errors_of_writing_reach_the_writer(serve: Serve) -> None:
    class Full(MemoryExport):
        def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
            raise OSError(errno.ENOSPC, "full")

    with NbdClient.open(serve(Full(1 << 20))) as client:
        with pytest.raises(RequestFailed) as caught:
            client.write(0, b"x" * 100_000)
        assert caught.value.errno == errno.ENOSPC
        client.flush()


def test_a_read_only_export_refuses_writes(serve: Serve) -> None:
    export = MemoryExport(1 << 20)
    export.read_only = True
    with NbdClient.open(serve(export)) as client:
        assert client.read_only
        for action in (lambda: client.write(0, b"x"), lambda: client.trim(0, 512), lambda: client.write_zeroes(0, 9)):
            with pytest.raises(RequestFailed) as caught:
                action()
            assert caught.value.errno == errno.EPERM


def test_ranges_outside_of_the_disk_are_refused_before_anything_is_sent(serve: Serve) -> None:
    with NbdClient.open(serve(MemoryExport(4096))) as client:
        for offset, length in [(4096, 1), (-1, 2), (0, 4097), (1 << 70, 1)]:
            with pytest.raises(ReadFailed, match="outside"):
                _read(client, offset, length)
        assert _read(client, 0, 4096) == bytes(4096)


def test_a_hung_export_is_host_unreachable_and_says_what_was_asked(serve: Serve) -> None:
    release = threading.Event()
    uri = serve(TrickExport(1 << 20, lambda offset, length: release.wait(120) and None))
    with NbdClient.open(uri, settings=Settings(reply_seconds=0.3)) as client:
        with pytest.raises(
            HostUnreachable, match=r"Gave up reading 4096 bytes at 8192, no answer within 0[.]3 s"
        ) as caught:
            _read(client, 8192, 4096)
        assert str(uri) in str(caught.value)
        with pytest.raises(HostUnreachable, match="Not connected any more"):
            _read(client, 0, 1)
        release.set()


def test_abort_interrupts_a_read_in_another_thread(serve: Serve) -> None:
    release = threading.Event()
    export = TrickExport(1 << 20, lambda offset, length: release.wait(120) and None)
    with NbdClient.open(serve(export)) as client:
        _when_inside(export, client.abort)
        with pytest.raises(HostUnreachable, match="closed"):
            _read(client, 0, 4096)
        release.set()


def test_ctrl_c_interrupts_a_waiting_read_at_once(serve: Serve) -> None:
    release = threading.Event()
    export = TrickExport(1 << 20, lambda offset, length: release.wait(120) and None)
    with NbdClient.open(serve(export)) as client:
        _when_inside(export, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            _read(client, 0, 4096)
        assert export.inside == 1, "the server has not answered yet"
        with pytest.raises(HostUnreachable, match="interrupted in the middle of a reply"):
            _read(client, 0, 4096)
        release.set()


class Minimal(Export):
    """Nothing but what every export must have."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = b"m" * len(target)


def test_what_an_export_does_by_itself(serve: Serve) -> None:
    with NbdClient.open(serve(Minimal(10_000)), contexts=[BASE_ALLOCATION]) as client:
        assert client.read_only
        assert client.status(BASE_ALLOCATION).tolist() == [[0, 10_000, 0]]
        assert _read(client, 9_990, 10) == b"m" * 10


def test_what_a_writable_export_does_by_itself(serve: Serve) -> None:
    class Unwritable(Minimal):
        read_only = False

    with NbdClient.open(serve(Unwritable(10_000))) as client:
        with pytest.raises(RequestFailed, match="not permitted"):
            client.write(0, b"x")
        client.trim(0, 100)
        client.flush()


def test_an_empty_disk(serve: Serve) -> None:
    with NbdClient.open(serve(MemoryExport(0)), contexts=[BASE_ALLOCATION]) as client:
        assert client.status(BASE_ALLOCATION).shape == (0, 3)
        assert _read(client, 0, 0) == b""
        client.write(0, b"")


def test_an_export_that_knows_no_extents_fails_that_request_only(serve: Serve) -> None:
    class Speechless(Minimal):
        def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
            return []

    with NbdClient.open(serve(Speechless(10_000)), contexts=[BASE_ALLOCATION]) as client:
        with pytest.raises(RequestFailed, match="asking the block status of 10000 bytes at 0 failed"):
            client.status(BASE_ALLOCATION)
        assert _read(client, 0, 1) == b"m"


def test_cached_answers_by_the_megabyte(serve: Serve) -> None:
    class AllCached(MemoryExport):
        def try_read_cached(self, offset: int, length: int) -> memoryview:
            return memoryview(self.data)[offset : offset + length]

    export = AllCached(8 << 20)
    export.data[:] = np.random.default_rng(8).bytes(export.size)
    with NbdClient.open(serve(export), settings=Settings(request_bytes=65536, in_flight=64)) as client:
        assert _read(client, 0, export.size) == export.data


def test_a_closed_server_does_not_listen(short_path: Path) -> None:
    server = NbdServer()
    server.close()
    with pytest.raises(HvbackupError, match="closed"):
        server.listen_unix(short_path / "s")


def test_exports_are_listed_added_and_removed(short_path: Path) -> None:
    with NbdServer({"a": MemoryExport(1)}) as server:
        uri = server.listen_unix(f"{short_path}/s")
        described = MemoryExport(2)
        described.description = "the second one"
        server.add("b", described)
        assert [(e.name, e.description) for e in list_exports(uri)] == [("a", ""), ("b", "the second one")]
        with pytest.raises(HostUnreachable, match="no such export"):
            NbdClient.open(uri)  # two exports: the empty name means none of them
        with NbdClient.open(str(uri).replace("/?", "/b?")) as client:
            assert wait_for(lambda: server.connections == 1)  # those before may still be ending
            server.remove("b")
            with pytest.raises(HostUnreachable):
                _read(client, 0, 1)
        with NbdClient.open(uri) as client:
            assert client.size == 1


def test_a_socket_file_is_private_replaced_when_dead_and_kept_when_alive(short_path: Path) -> None:
    path = f"{short_path}/s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with NbdServer({"a": MemoryExport(1)}) as server:
        server.listen_unix(path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with NbdServer() as other, pytest.raises(Busy, match="Another server"):
            other.listen_unix(path)
    assert not os.path.exists(path)
    with NbdServer() as server, pytest.raises(HvbackupError, match="Cannot listen"):
        server.listen_unix(f"{short_path}/none/s")


def test_a_taken_port_is_busy() -> None:
    with NbdServer() as one, NbdServer() as two:
        port = one.listen_tcp("127.0.0.1", 0).port
        with pytest.raises(Busy, match=str(port)):
            two.listen_tcp("127.0.0.1", port)


def test_nobody_there_is_host_unreachable(short_path: Path) -> None:
    for uri in (f"nbd+unix:///x?socket={short_path}/none", "nbd://127.0.0.1:1/x"):
        with pytest.raises(HostUnreachable, match="Cannot connect") as caught:
            NbdClient.open(uri)
        assert uri in str(caught.value)


def test_closing_the_server_ends_a_session_in_the_middle_of_a_read(serve: Serve, short_path: Path) -> None:
    release = threading.Event()
    export = TrickExport(1 << 20, lambda o, n: release.wait(120) and None)
    server = NbdServer({"disk": export})
    uri = server.listen_unix(f"{short_path}/s")
    with NbdClient.open(uri) as client:
        reader = threading.Thread(target=_read_in_vain, args=(client,))
        reader.start()
        assert wait_for(lambda: export.inside == 1)
        threading.Timer(0.2, release.set).start()
        server.close()
        reader.join(120)
        assert not reader.is_alive()
    server.close()


def test_an_export_that_never_returns_is_left_behind_and_reported(short_path: Path) -> None:
    release, reports = threading.Event(), []
    export = TrickExport(1 << 20, lambda o, n: release.wait(120) and None)
    server = NbdServer({"disk": export}, limits=Limits(close_seconds=0.2), on_error=lambda *r: reports.append(r))
    client = NbdClient.open(server.listen_unix(f"{short_path}/s"), settings=Settings(reply_seconds=60))
    reader = threading.Thread(target=_read_in_vain, args=(client,))
    reader.start()
    assert wait_for(lambda: export.inside == 1)
    server.close()
    release.set()
    reader.join(120)
    client.close()
    assert any("did not return" in str(error) for _, _, error in reports)
