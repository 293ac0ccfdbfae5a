"""The client against servers that answer nonsense, nothing or too much: always the named error, never a hang."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import HostUnreachable, ReadFailed
from hvbackup.nbd import protocol
from hvbackup.nbd.client import NbdClient, RequestFailed, Settings, list_exports
from hvbackup.nbd.handshake import ExportInfo, Haggler, Refused
from hvbackup.nbd.protocol import CHUNK_DONE, CHUNK_MAGIC, ProtocolError
from hvbackup.nbd.uri import NbdUri
from hvbackup.nbd.wire import Wire

_SETTINGS = Settings(connect_seconds=60, reply_seconds=60)  # servers here say what they say, or hang up
_URI = NbdUri("disk", socket="/scripted")
_CONTEXTS = {1: protocol.BASE_ALLOCATION, 2: "qemu:dirty-bitmap:x"}


@contextlib.contextmanager
def _scripted(*answers: bytes, structured: bool = True) -> Iterator[NbdClient]:
    """A client in transmission whose server has already written its answers and hung up."""
    ours, theirs = socket.socketpair()
    flags = protocol.HAS_FLAGS
    info = ExportInfo(1 << 40, flags, structured=structured, contexts=_CONTEXTS if structured else {})
    sender = threading.Thread(target=_send_and_hang_up, args=(theirs, b"".join(answers)))
    sender.start()
    with NbdClient(_URI, Wire(ours, 60.0), info, _SETTINGS) as client:
        yield client
    sender.join(120)
    theirs.close()


def _send_and_hang_up(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


def chunk(kind: int, payload: bytes = b"", *, flags: int = CHUNK_DONE, cookie: int = 1) -> bytes:
    return protocol.CHUNK.pack(CHUNK_MAGIC, flags, kind, cookie, len(payload)) + payload


def data(offset: int, content: bytes, *, flags: int = CHUNK_DONE, cookie: int = 1) -> bytes:
    return chunk(protocol.CHUNK_DATA, struct.pack(">Q", offset) + content, flags=flags, cookie=cookie)


def hole(offset: int, length: int, *, flags: int = CHUNK_DONE) -> bytes:
    return chunk(protocol.CHUNK_HOLE, struct.pack(">QI", offset, length), flags=flags)


def status(context: int, *pairs: int, flags: int = CHUNK_DONE) -> bytes:
    return chunk(protocol.CHUNK_STATUS, struct.pack(f">I{len(pairs)}I", context, *pairs), flags=flags)


def simple(error: int = 0, cookie: int = 1) -> bytes:
    return protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, error, cookie)


def _read(client: NbdClient, offset: int = 100, length: int = 8) -> bytes:
    target = bytearray(b"\xee" * length)
    client.read_into(offset, memoryview(target))
    return bytes(target)


# --- answers that are allowed, if unusual -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [
        [data(100, b"abcd\0\0gh")],
        [data(106, b"gh", flags=0), hole(104, 2, flags=0), data(100, b"abcd", flags=0), chunk(protocol.CHUNK_NONE)],
        [data(100, b"abcd", flags=0), hole(104, 2, flags=0), data(106, b"gh")],
    ],
)
def test_a_read_in_any_pieces_and_order(answers: list[bytes]) -> None:
    with _scripted(*answers) as client:
        assert _read(client) == b"abcd\0\0gh"


def test_replies_out_of_order() -> None:
    with _scripted(data(4, b"efgh", cookie=2), data(0, b"abcd", cookie=1), structured=True) as client:
        result = bytearray(8)
        view = memoryview(result)
        client.read_many([(0, view[:4]), (4, view[4:])])
        assert result == b"abcdefgh"


def test_simple_replies() -> None:
    with _scripted(simple(cookie=1), b"abcdefgh", simple(errno.EIO, cookie=2), structured=False) as client:
        assert _read(client) == b"abcdefgh"
        with pytest.raises(RequestFailed, match="Input/output error"):
            _read(client)


def test_errors_of_every_kind_leave_the_connection_usable() -> None:
    answers = [
        chunk(protocol.CHUNK_ERROR, struct.pack(">IH", errno.EIO, 3) + b"why", cookie=1),
        chunk(protocol.CHUNK_ERROR_OFFSET, struct.pack(">IHQ", errno.ENOMEM, 0, 104), flags=0, cookie=2),
        data(100, b"abcd", flags=0, cookie=2),
        chunk(protocol.CHUNK_NONE, cookie=2),
        chunk(protocol.CHUNK_ERROR_BIT | 77, struct.pack(">IH", 0, 0), cookie=3),
        simple(errno.EPERM, cookie=4),
        data(100, b"abcdefgh", cookie=5),
    ]
    with _scripted(*answers) as client:
        for reason in ("Input/output error: why", "Cannot allocate memory", "Input/output error", "not permitted"):
            with pytest.raises(ReadFailed, match=reason):
                _read(client)
        assert _read(client) == b"abcdefgh"


@pytest.mark.parametrize("number", [1 << 31, (1 << 32) - 1, 4096])
def test_error_numbers_that_no_system_knows(number: int) -> None:
    with _scripted(simple(number, cookie=1), simple(number, cookie=2), structured=False) as client:
        with pytest.raises(RequestFailed, match="Input/output error") as caught:
            _read(client)
        assert caught.value.errno == errno.EIO
        with pytest.raises(ReadFailed):
            client.write(0, b"x")


def test_after_the_first_error_nothing_more_is_sent_and_the_rest_is_waited_for() -> None:
    answers = [simple(errno.EIO, cookie=n) for n in range(1, 17)] + [data(0, b"x", cookie=17)]
    with _scripted(*answers) as client:
        with pytest.raises(RequestFailed) as caught:
            client.read_many([(at, memoryview(bytearray(1))) for at in range(10_000)])
        assert caught.value.offset == 0
        assert _read(client, 0, 1) == b"x"


def test_block_status_in_parts_is_put_together() -> None:
    answers = [
        status(1, 100, 0, 200, 3, flags=0),
        status(2, 50, 1),
        chunk(protocol.CHUNK_NONE)[:0],
        chunk(protocol.CHUNK_STATUS, struct.pack(">5I", 2, 50, 1, 2000, 0), flags=0, cookie=2),
        chunk(protocol.CHUNK_STATUS, struct.pack(">3I", 1, 950, 3), cookie=2),
    ]
    with _scripted(*answers) as client:
        rows = client.statuses(0, 1000)
    assert rows[protocol.BASE_ALLOCATION].tolist() == [[0, 100, 0], [100, 900, 3]]
    assert rows["qemu:dirty-bitmap:x"].tolist() == [[0, 100, 1], [100, 900, 0]]


def test_contexts_that_advance_at_different_speed_do_not_overlap() -> None:
    answers = [
        status(1, 300, 0, 300, 3, flags=0),
        status(2, 100, 1),
        chunk(protocol.CHUNK_STATUS, struct.pack(">5I", 1, 200, 0, 700, 3), flags=0, cookie=2),
        chunk(protocol.CHUNK_STATUS, struct.pack(">3I", 2, 900, 0), cookie=2),
    ]
    with _scripted(*answers) as client:
        rows = client.statuses(0, 1000)
    assert rows[protocol.BASE_ALLOCATION].tolist() == [[0, 300, 0], [300, 700, 3]]
    assert rows["qemu:dirty-bitmap:x"].tolist() == [[0, 100, 1], [100, 900, 0]]


def test_what_was_said_before_counts_when_an_overlapping_answer_differs() -> None:
    answers = [
        status(1, 600, 3, flags=0),
        status(2, 100, 1),
        chunk(protocol.CHUNK_STATUS, struct.pack(">3I", 1, 900, 0), flags=0, cookie=2),
        chunk(protocol.CHUNK_STATUS, struct.pack(">3I", 2, 900, 0), cookie=2),
    ]
    with _scripted(*answers) as client:
        rows = client.statuses(0, 1000)
    assert rows[protocol.BASE_ALLOCATION].tolist() == [[0, 600, 3], [600, 400, 0]]


# --- answers that are not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([b""], "closed"),
        ([data(100, b"abc")[:-1]], "closed"),
        ([b"x" * 100], "not a reply"),
        ([simple(), b"abcdefgh"], "structured ones were agreed on"),
        ([data(100, b"abcdefgh", cookie=2)], "nothing that was asked"),
        ([simple(cookie=9)], "nothing that was asked"),
        ([data(100, b"abcd")], "4 bytes where 8"),
        ([data(99, b"abcd")], "not asked for"),
        ([data(104, b"abcdefgh")], "not asked for"),
        ([data(1 << 63, b"abcdefgh")], "not asked for"),
        ([data(100, b"")], "without data"),
        ([hole(100, 0)], "not asked for"),
        ([hole(100, 1 << 31)], "not asked for"),
        ([chunk(protocol.CHUNK_HOLE, b"short")], "wrong length"),
        ([data(100, b"abcd", flags=0), data(102, b"efgh")], "overlap"),
        ([data(100, b"abcd", flags=0), data(100, b"efgh")], "overlap"),
        ([chunk(protocol.CHUNK_NONE)], "0 bytes where 8"),
        ([chunk(protocol.CHUNK_NONE, b"x")], "unknown type"),
        ([chunk(6, b"x")], "unknown type"),
        ([status(1, 100, 0)], "not asked for"),
        ([chunk(protocol.CHUNK_ERROR, b"x")], "error chunk"),
        ([chunk(protocol.CHUNK_ERROR, bytes(9000))], "error chunk"),
        ([hole(100, 1, flags=0)] * 100, "too many pieces"),
    ],
)
def test_a_reply_that_breaks_the_protocol(answers: list[bytes], reason: str) -> None:
    with _scripted(*answers) as client:
        with pytest.raises(HostUnreachable, match=reason) as caught:
            _read(client)
        assert not isinstance(caught.value, ReadFailed)
        assert "reading 8 bytes at 100" in str(caught.value)
        with pytest.raises(HostUnreachable, match="Not connected any more"):
            _read(client)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([status(1, 100, 0)], "said nothing about qemu:dirty-bitmap:x"),
        ([chunk(protocol.CHUNK_NONE)], "said nothing"),
        ([status(3, 100, 0)], "not agreed on"),
        ([status(1, 100, 0, flags=0), status(1, 100, 0)], "not agreed on"),
        ([status(1, 0, 0)], "empty extent"),
        ([status(1)], "not asked for"),
        ([status(1, 5)], "not asked for"),
        ([data(0, b"x")], "not asked for"),
    ],
)
def test_a_block_status_that_makes_no_sense(answers: list[bytes], reason: str) -> None:
    with _scripted(*answers) as client, pytest.raises(HostUnreachable, match=reason):
        client.statuses(0, 1000)


def test_a_length_of_gigabytes_allocates_nothing() -> None:
    bombs = [(protocol.CHUNK_DATA, 1), (protocol.CHUNK_STATUS, 1), (protocol.CHUNK_ERROR, 1), (protocol.CHUNK_HOLE, 1)]
    tracemalloc.start()
    for kind, cookie in bombs:
        bomb = protocol.CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, kind, cookie, (1 << 32) - 4)
        for act in (_read, lambda client: client.statuses(0, 1000)):
            with _scripted(bomb + bytes(64)) as client, pytest.raises(HostUnreachable):
                act(client)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


# --- anything at all --------------------------------------------------------------------------------------------------

_NUMBER = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
_PAYLOAD = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda offset, content: struct.pack(">Q", offset) + content, _NUMBER, st.binary(max_size=20)),
    st.builds(lambda a, b, c: struct.pack(">III", a, b, c), _NUMBER, _NUMBER, _NUMBER),
    st.builds(lambda offset, length: struct.pack(">QI", offset, length), _NUMBER, _NUMBER),
)
_KIND = st.one_of(st.integers(0, 7), st.sampled_from([32768, 32769, 32770]), st.integers(0, 65535))
_CHUNKS = st.builds(
    lambda kind, payload, flags, cookie: chunk(kind, payload, flags=flags, cookie=cookie),
    _KIND,
    _PAYLOAD,
    st.integers(0, 3),
    st.integers(0, 5),
)
_REPLIES = st.one_of(_CHUNKS, st.builds(simple, _NUMBER, st.integers(0, 5)), st.binary(max_size=50))


@given(st.lists(_REPLIES, max_size=8), st.booleans())
def test_any_replies_end_in_data_or_the_named_error(replies: list[bytes], structured: bool) -> None:
    with _scripted(*replies, structured=structured) as client:
        for act in (
            lambda: _read(client),
            lambda: client.statuses(0, 300),
            lambda: client.write(0, b"abc"),
            lambda: client.read_many([(at, memoryview(bytearray(8))) for at in range(100, 140, 8)]),
        ):
            with contextlib.suppress(HostUnreachable):
                act()


_GREETING = protocol.GREETING.pack(protocol.NBD_MAGIC, protocol.OPTION_MAGIC, 3)
_OPTION_REPLIES = st.builds(
    protocol.option_reply,
    st.sampled_from([protocol.OPT_STRUCTURED_REPLY, protocol.OPT_SET_META_CONTEXT, protocol.OPT_GO, protocol.OPT_LIST]),
    st.one_of(st.integers(1, 4), st.integers(2**31, 2**31 + 9), st.integers(0, 2**32 - 1)),
    st.one_of(
        st.binary(max_size=30),
        st.builds(lambda size, flags: struct.pack(">HQH", 0, size, flags), _NUMBER, st.integers(0, 65535)),
        st.builds(lambda a, b, c: struct.pack(">HIII", 3, a, b, c), _NUMBER, _NUMBER, _NUMBER),
    ),
)


@given(st.lists(st.one_of(_OPTION_REPLIES, st.binary(max_size=40)), max_size=8), st.booleans())
def test_any_handshake_ends_in_an_export_or_a_reason(replies: list[bytes], listing: bool) -> None:
    ours, theirs = socket.socketpair()
    sender = threading.Thread(target=_send_and_hang_up, args=(theirs, _GREETING + b"".join(replies)))
    sender.start()
    wire = Wire(ours, 60.0)
    with contextlib.suppress(OSError, ProtocolError, Refused):
        haggler = Haggler(wire, 60.0)
        haggler.greet()
        if listing:
            haggler.exports()
        else:
            info = haggler.go("disk", list(_CONTEXTS.values()))
            assert 0 <= info.size < 1 << 63
    wire.close()
    sender.join(120)
    theirs.close()


def _listening(path: Path, answer: Callable[[socket.socket], None]) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        sock, _ = listener.accept()
        answer(sock)
        sock.close()
        listener.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2 and more", "not an NBD server"),
        (protocol.GREETING.pack(protocol.NBD_MAGIC, protocol.OPTION_MAGIC, 0), "too old"),
        (protocol.GREETING.pack(protocol.NBD_MAGIC, 0x00420281861253, 0), "too old"),
        (b"NBDMAGIC", "closed"),
        (_GREETING, "closed"),
        (_GREETING + protocol.option_reply(99, protocol.REP_ACK), "not asked"),
        (_GREETING + protocol.OPTION_REPLY.pack(protocol.OPTION_REPLY_MAGIC, 8, 1, 1 << 31), "bytes long"),
        (
            _GREETING
            + protocol.option_reply(protocol.OPT_STRUCTURED_REPLY, protocol.REP_ERR_UNSUP)
            + protocol.option_reply(protocol.OPT_GO, protocol.REP_ERR_TLS_REQD, b"secrets here"),
            r"wants TLS first; use nbds:// \(secrets here\)",
        ),
    ],
)
def test_a_handshake_that_fails_names_the_uri_and_the_reason(short_path: Path, greeting: bytes, reason: str) -> None:
    thread = _listening(short_path / "s", lambda sock: _send_and_hang_up(sock, greeting))
    with pytest.raises(HostUnreachable, match=reason) as caught:
        NbdClient.open(f"nbd+unix:///x?socket={short_path}/s", settings=_SETTINGS)
    assert str(caught.value).startswith(f"nbd+unix:///x?socket={short_path}/s: ")
    thread.join(120)


@pytest.mark.parametrize("act", [NbdClient.open, list_exports])
def test_a_server_that_says_nothing_or_too_little_is_given_up(
    short_path: Path, act: Callable[..., NbdClient | list[object]]
) -> None:
    release = threading.Event()

    def drip(sock: socket.socket) -> None:
        for byte in _GREETING * 10:
            with contextlib.suppress(OSError):
                sock.send(bytes([byte]))
            if release.wait(0.05):
                return

    thread = _listening(short_path / "s", drip)
    with pytest.raises(HostUnreachable, match=r"no answer within 0[.]3 seconds"):
        act(f"nbd+unix:///x?socket={short_path}/s", settings=Settings(connect_seconds=0.3))
    release.set()
    thread.join(120)
