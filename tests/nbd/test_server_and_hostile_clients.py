"""The server against clients that send nonsense, stop, vanish or ask for too much: only their own connection suffers."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.nbd import protocol
from hvbackup.nbd.client import NbdClient
from hvbackup.nbd.server import NbdServer
from hvbackup.nbd.session import Limits
from hvbackup.nbd.uri import NbdUri
from tests.nbd.conftest import Serve, wait_for
from tests.nbd.exports import DIRTY, CachedExport, MemoryExport, TrickExport
from tests.nbd.raw import RawClient, request

_MiB = 1 << 20


@contextlib.contextmanager
def _served(export: MemoryExport, **limits: float) -> Iterator[tuple[NbdServer, NbdUri]]:
    """A server that must still serve, with all its memory and no client left, after what was done to it."""
    with NbdServer({"disk": export}, limits=Limits(**limits)) as server:  # type: ignore[arg-type]
        uri = server.listen_tcp("127.0.0.1", 0)
        yield server, uri
        assert wait_for(lambda: server.connections == 0)
        with NbdClient.open(uri) as client:
            client.read_into(0, memoryview(bytearray(4096)))
        assert wait_for(lambda: server.connections == 0)
        assert server._shelf.budget.left == server._shelf.budget.limit


# --- nonsense ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_garbage_instead_of_a_handshake(pieces: list[bytes]) -> None:
    with _served(MemoryExport(4096)) as (_, uri), RawClient(uri) as client:
        client.send_all(b"".join(pieces))
        client.drain()


_NUMBERS = st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1))
_OPTION_DATA = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda n, rest: struct.pack(">I", n) + b"disk" + rest, st.integers(0, 9), st.binary(max_size=30)),
    st.builds(lambda n, rest: b"\0\0\0\4disk" + struct.pack(">I", n) + rest, _NUMBERS, st.binary(max_size=30)),
)


@pytest.mark.walk
@given(st.lists(st.tuples(_NUMBERS, _OPTION_DATA), max_size=12))
def test_any_options_with_any_data(options: list[tuple[int, bytes]]) -> None:
    with _served(MemoryExport(4096)) as (_, uri), RawClient(uri) as client:
        client.greet()
        client.send_all(b"".join(protocol.option(number, data) for number, data in options))
        client.drain()


_U64 = st.one_of(st.integers(0, 70000), st.integers(0, 2**64 - 1))
_COMMANDS = st.builds(
    lambda kind, flags, offset, length: request(kind, offset, length, flags=flags),
    st.one_of(st.integers(0, 8), st.integers(0, 65535)),
    st.one_of(st.integers(0, 15), st.integers(0, 65535)),
    _U64,
    st.one_of(st.integers(0, 70000), st.integers(0, 2**32 - 1)),
)


@pytest.mark.walk
@given(st.lists(st.one_of(_COMMANDS, st.binary(max_size=40)), max_size=20), st.booleans(), st.booleans())
def test_any_commands_with_any_arguments(commands: list[bytes], structured: bool, cached: bool) -> None:
    export = CachedExport(65536 * 2) if cached else MemoryExport(65536 * 2)
    with _served(export) as (_, uri), RawClient(uri) as client:
        client.open(structured=structured)
        client.send_all(b"".join(commands))
        client.drain()


def test_oversize_messages_end_the_connection(serve: Serve) -> None:
    uri = serve(MemoryExport(64 * _MiB))
    with RawClient(uri) as client:
        client.greet().send(protocol.OPTION.pack(protocol.OPTION_MAGIC, protocol.OPT_GO, 1 << 31))
        assert client.drain() == b""
    with RawClient(uri) as client:
        client.open().ask(protocol.WRITE, 0, protocol.PAYLOAD_MAX_BYTES + 1)
        assert client.drain() == b""


def test_an_oversize_read_is_refused_and_the_connection_goes_on(serve: Serve) -> None:
    with RawClient(serve(MemoryExport(64 * _MiB))) as client:
        client.open().ask(protocol.READ, 0, protocol.PAYLOAD_MAX_BYTES + 1)
        assert client.simple() == (errno.EINVAL, 7)
        client.ask(protocol.READ, 0, 16)
        assert client.simple() == (0, 7)
        assert client.take(16) == bytes(16)


@pytest.mark.parametrize("offset", [65536 * 2 - 512, 65536 * 3, 2**64 - 512])
def test_a_read_beyond_the_end_of_cached_data_is_refused(serve: Serve, offset: int) -> None:
    with RawClient(serve(CachedExport(65536 * 2))) as client:
        client.open().ask(protocol.READ, offset, 1024)
        assert client.simple() == (errno.EINVAL, 7)


def test_endless_options_are_cut_off(serve: Serve) -> None:
    with RawClient(serve(MemoryExport(4096))) as client:
        client.greet()
        with pytest.raises((AssertionError, ConnectionError)):
            for _ in range(2000):
                client.option(protocol.OPT_LIST)


# --- silence ----------------------------------------------------------------------------------------------------------


def test_a_client_that_says_nothing_or_too_little_is_dropped_in_time() -> None:
    """Within a second: the twelfth byte, six seconds later, would end it anyway, as nonsense."""
    with _served(MemoryExport(4096), handshake_seconds=1.0) as (server, uri), RawClient(uri) as silent:
        with RawClient(uri) as dripping:
            for _ in range(11):
                with contextlib.suppress(ConnectionError):
                    dripping.send(b"\0")
                if wait_for(lambda: server.connections == 0, 0.5):
                    break
            assert server.connections == 0
        assert silent.drain()[:8] == b"NBDMAGIC"


def test_an_idle_client_stays() -> None:
    with _served(MemoryExport(4096), stall_seconds=0.1) as (_, uri), NbdClient.open(uri) as client:
        assert not wait_for(lambda: False, 0.4)
        client.read_into(0, memoryview(bytearray(4096)))


@pytest.mark.parametrize("sent", [request(protocol.READ, 0, 4096)[:20], request(protocol.WRITE, 0, 4096) + b"half"])
def test_a_client_that_stops_in_the_middle_of_a_command_is_dropped(sent: bytes) -> None:
    with _served(MemoryExport(4096), stall_seconds=0.2) as (_, uri), RawClient(uri) as client:
        client.open().send(sent)
        assert client.drain() == b""


@pytest.mark.walk
def test_a_client_that_takes_no_replies_is_dropped_and_slows_nobody_else() -> None:
    export = MemoryExport(64 * _MiB)
    with _served(export, stall_seconds=10.0) as (server, uri):
        slow = [RawClient(uri).open() for _ in range(3)]
        for client in slow:
            client.send(b"".join(request(protocol.READ, 0, 8 * _MiB, cookie=n) for n in range(20)))
        with NbdClient.open(uri) as other:
            for _ in range(50):
                other.read_into(0, memoryview(bytearray(65536)))
            assert server.connections == 4
        assert wait_for(lambda: server.connections == 0)
        for client in slow:
            client.sock.close()


@pytest.mark.walk
def test_a_client_that_is_slow_but_not_dead_is_served() -> None:
    export = MemoryExport(24 * _MiB)
    export.data[:] = np.random.default_rng(7).bytes(export.size)
    # In all it is slower than what a dead one is given; each of its pauses is a twentieth of that.
    with _served(export, stall_seconds=3.0) as (_, uri), RawClient(uri) as client:
        client.open().ask(protocol.READ, 0, export.size)
        assert client.simple() == (0, 7)
        for at in range(0, export.size, _MiB):
            assert client.take(_MiB) == export.data[at : at + _MiB]
            time.sleep(0.15)


# --- too much ---------------------------------------------------------------------------------------------------------


def test_thousands_of_reads_in_flight_are_all_answered(serve: Serve) -> None:
    export = CachedExport(_MiB)
    export.data[:] = b"".join(struct.pack(">Q", n) for n in range(_MiB // 8))
    count = 10_000
    with RawClient(serve(export)) as client:
        client.open()
        asked = b"".join(request(protocol.READ, n * 104 % _MiB // 8 * 8, 8, cookie=n) for n in range(count))
        sender = threading.Thread(target=client.send, args=(asked,))
        sender.start()
        seen = {}
        for _ in range(count):
            error, cookie = client.simple()
            assert error == 0
            seen[cookie] = client.take(8)
        sender.join(120)
    assert seen == {n: export.data[n * 104 % _MiB // 8 * 8 :][:8] for n in range(count)}


@pytest.mark.walk
def test_memory_stays_bounded_whatever_is_asked_and_not_taken() -> None:
    with _served(MemoryExport(64 * _MiB), stall_seconds=2.0, buffer_bytes=16 * _MiB) as (_, uri):
        clients = [RawClient(uri).open(structured=bool(n % 2)) for n in range(6)]
        tracemalloc.start()
        for client in clients:
            client.send(b"".join(request(protocol.READ, 0, 32 * _MiB, cookie=n) for n in range(2000)))
        assert not wait_for(lambda: tracemalloc.get_traced_memory()[1] > 40 * _MiB, 1.0)
        tracemalloc.stop()
        for client in clients:
            client.sock.close()


def test_more_connections_than_allowed_are_refused_until_one_leaves() -> None:
    with _served(MemoryExport(4096), connections=3) as (server, uri):
        clients = [RawClient(uri).open() for _ in range(3)]
        with RawClient(uri) as refused:
            assert refused.drain() == b""
        clients.pop().sock.close()
        assert wait_for(lambda: server.connections == 2)
        with RawClient(uri) as welcome:
            welcome.open()
        for client in clients:
            client.sock.close()


# --- sudden ends ------------------------------------------------------------------------------------------------------


def test_a_client_that_vanishes_in_the_middle_of_requests() -> None:
    release = threading.Event()
    export = TrickExport(64 * _MiB, lambda offset, length: release.wait(120) and None if offset else None)
    with _served(export) as (_, uri):
        with RawClient(uri) as client:
            client.open().send(b"".join(request(protocol.READ, 4096, 8 * _MiB) for _ in range(10)))
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
            assert wait_for(lambda: export.inside > 0)
        release.set()


def test_a_client_that_vanishes_in_the_middle_of_writes() -> None:
    release = threading.Event()
    begun = threading.Event()

    class Waiting(MemoryExport):
        parallel = False

        def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
            begun.set()
            release.wait(120)

    with _served(Waiting(4 * _MiB)) as (_, uri):
        with RawClient(uri) as client:
            small = request(protocol.WRITE, 0, 512) + bytes(512)  # is carried out while the large one waits
            client.open().send(small + request(protocol.WRITE, 0, 400_000) + bytes(400_000))
            assert begun.wait(120)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        release.set()


def test_a_disconnect_waits_for_the_answers() -> None:
    release = threading.Event()
    export = TrickExport(4 * _MiB, lambda offset, length: release.wait(120) and None if offset else None)
    with _served(export) as (_, uri), RawClient(uri) as client:
        client.open()
        client.send(b"".join(request(protocol.READ, 4096, 512, cookie=n) for n in range(20)))
        client.ask(protocol.DISCONNECT, 0, 0)
        release.set()
        assert len(client.drain()) == 20 * (16 + 512)


def test_a_bug_in_an_export_ends_one_connection_and_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: seen.append(arguments.exc_type))

    def stumble(offset: int, length: int) -> None:
        if offset:
            raise ZeroDivisionError

    with _served(TrickExport(_MiB, stumble)) as (_, uri):
        with RawClient(uri) as client:
            client.open().ask(protocol.READ, 4096, 512)
            assert client.drain() == b""
        assert wait_for(lambda: seen == [ZeroDivisionError])


# --- the letter of the protocol ---------------------------------------------------------------------------------------


def test_the_old_way_to_open_an_export(serve: Serve) -> None:
    uri = serve(MemoryExport(4096))
    with RawClient(uri) as client:
        client.greet(protocol.FIXED_NEWSTYLE).send(protocol.option(protocol.OPT_EXPORT_NAME, b"disk"))
        size, flags = protocol.OLD_EXPORT.unpack(client.take(protocol.OLD_EXPORT.size))
        assert (size, flags & protocol.SEND_DF) == (4096, 0)
        assert client.take(124) == bytes(124)
        client.ask(protocol.WRITE, 5, 3, data=b"abc", flags=protocol.FLAG_FUA)
        assert client.simple() == (0, 7)
        client.ask(protocol.READ, 4, 5)
        assert client.simple() == (0, 7)
        assert client.take(5) == b"\0abc\0"
    with RawClient(uri) as client:
        client.greet().send(protocol.option(protocol.OPT_EXPORT_NAME, b"other"))
        assert client.drain() == b""


def test_refused_options(serve: Serve) -> None:
    with RawClient(serve(MemoryExport(4096))) as client:
        client.greet()
        context = b"\0\0\0\4disk\0\0\0\1" + protocol.counted(DIRTY)
        for option, data, expected in [
            (protocol.OPT_STARTTLS, b"", protocol.REP_ERR_POLICY),
            (protocol.OPT_LIST, b"x", protocol.REP_ERR_INVALID),
            (11, b"", protocol.REP_ERR_UNSUP),
            (protocol.OPT_GO, b"\0\0\0\5other\0\0", protocol.REP_ERR_UNKNOWN),
            (protocol.OPT_GO, b"\0\0\0\4disk", protocol.REP_ERR_INVALID),
            (protocol.OPT_GO, b"\0\0\0\4disk\0\0x", protocol.REP_ERR_INVALID),
            (protocol.OPT_GO, b"\0\0\0\1\xff\0\0", protocol.REP_ERR_INVALID),
            (protocol.OPT_SET_META_CONTEXT, context, protocol.REP_ERR_INVALID),
            (protocol.OPT_STRUCTURED_REPLY, b"x", protocol.REP_ERR_INVALID),
        ]:
            assert client.option(option, data)[-1][0] == expected
        assert client.option(protocol.OPT_ABORT) == [(protocol.REP_ACK, b"")]
        assert client.drain() == b""


def test_contexts_are_listed_by_namespace(serve: Serve) -> None:
    with RawClient(serve(MemoryExport(4096))) as client:
        client.greet()

        def listed(*queries: str) -> set[bytes]:
            data = b"\0\0\0\4disk" + protocol.NUMBER.pack(len(queries)) + b"".join(map(protocol.counted, queries))
            return {name[4:] for _, name in client.option(protocol.OPT_LIST_META_CONTEXT, data)[:-1]}

        base, dirty = protocol.BASE_ALLOCATION.encode(), DIRTY.encode()
        assert listed() == {base, dirty}
        assert listed("base:") == {base}
        assert listed("qemu:") == listed("qemu:dirty-bitmap:") == listed(DIRTY) == {dirty}
        assert listed("x:", "base") == set()


def test_contexts_count_only_for_the_export_they_were_negotiated_for(short_path: Path) -> None:
    server = NbdServer({"disk": MemoryExport(4096), "other": MemoryExport(4096)})
    with server, RawClient(server.listen_unix(f"{short_path}/s")) as client:
        client.greet().option(protocol.OPT_STRUCTURED_REPLY)
        data = b"\0\0\0\4disk\0\0\0\1" + protocol.counted(protocol.BASE_ALLOCATION)
        assert len(client.option(protocol.OPT_SET_META_CONTEXT, data)) == 2
        client.option(protocol.OPT_GO, b"\0\0\0\5other\0\0")
        client.ask(protocol.BLOCK_STATUS, 0, 4096)
        flags, kind, _, payload = client.chunk()
        assert (flags, kind, payload) == (1, protocol.CHUNK_ERROR, struct.pack(">IH", errno.EINVAL, 0))


def test_structured_reads(serve: Serve) -> None:
    export = MemoryExport(4 * _MiB)
    export.data[:1] = b"x"
    with RawClient(serve(export)) as client:
        client.open(structured=True).ask(protocol.READ, 0, 3 * _MiB)
        pieces = [client.chunk() for _ in range(3)]
        assert [(flags, kind, len(data)) for flags, kind, _, data in pieces] == [
            (0, protocol.CHUNK_DATA, 8 + _MiB),
            (0, protocol.CHUNK_HOLE, 12),
            (1, protocol.CHUNK_HOLE, 12),
        ]
        client.ask(protocol.READ, 0, 3 * _MiB, flags=protocol.FLAG_DF)
        flags, kind, _, data = client.chunk()
        assert (flags, kind, len(data)) == (1, protocol.CHUNK_DATA, 8 + 3 * _MiB)
        client.ask(protocol.READ, 100, 0)
        assert client.chunk()[:2] == (1, protocol.CHUNK_NONE)


def test_one_extent_when_one_was_asked_for(serve: Serve) -> None:
    export = MemoryExport(_MiB)
    export.data[8192:8193] = b"x"
    with RawClient(serve(export)) as client:
        client.greet().option(protocol.OPT_STRUCTURED_REPLY)
        data = b"\0\0\0\4disk\0\0\0\1" + protocol.counted(protocol.BASE_ALLOCATION)
        client.option(protocol.OPT_SET_META_CONTEXT, data)
        client.option(protocol.OPT_GO, b"\0\0\0\4disk\0\0")
        client.ask(protocol.BLOCK_STATUS, 0, _MiB, flags=protocol.FLAG_REQ_ONE)
        assert client.chunk()[3] == struct.pack(">III", 1, 8192, 3)
        client.ask(protocol.BLOCK_STATUS, 0, _MiB)
        assert client.chunk()[3] == struct.pack(">7I", 1, 8192, 3, 4096, 0, _MiB - 12288, 3)
