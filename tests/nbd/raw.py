"""A client that sends what it is told to, for tests of the server; it knows nothing that it could get right by itself."""

from __future__ import annotations

import contextlib
import socket
import struct
from types import TracebackType

from hvbackup.nbd import protocol
from hvbackup.nbd.uri import NbdUri


class RawClient:
    """A connected socket and the few layouts a test needs; every wait ends after a minute."""

    def __init__(self, uri: NbdUri) -> None:
        self.sock = socket.socket(socket.AF_UNIX if uri.socket else socket.AF_INET)
        self.sock.settimeout(60)
        self.sock.connect(uri.socket or (uri.host, uri.port))

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send_all(self, data: bytes) -> None:
        """Send and say that nothing more comes, to a server that may have hung up by then."""
        with contextlib.suppress(OSError):
            self.sock.sendall(data)
            self.sock.shutdown(socket.SHUT_WR)

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.sock.recv(length - len(data))
            assert piece, "the server closed the connection"
            data += piece
        return data

    def drain(self) -> bytes:
        """Everything until the server closes."""
        data = b""
        while True:
            try:
                piece = self.sock.recv(1 << 20)
            except ConnectionError:
                return data
            if not piece:
                return data
            data += piece

    def greet(self, flags: int = protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES) -> RawClient:
        self.take(protocol.GREETING.size)
        self.send(protocol.CLIENT_FLAGS.pack(flags))
        return self

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All answers to an option; the last is an ACK or an error."""
        self.send(protocol.option(number, data))
        answers: list[tuple[int, bytes]] = []
        while not answers or (answers[-1][0] != protocol.REP_ACK and not answers[-1][0] & protocol.REP_ERR):
            magic, to, kind, length = protocol.OPTION_REPLY.unpack(self.take(protocol.OPTION_REPLY.size))
            assert (magic, to) == (protocol.OPTION_REPLY_MAGIC, number)
            answers.append((kind, self.take(length)))
        return answers

    def open(self, name: bytes = b"disk", *, structured: bool = False) -> RawClient:
        """Greet, and go into transmission."""
        self.greet()
        if structured:
            assert self.option(protocol.OPT_STRUCTURED_REPLY) == [(protocol.REP_ACK, b"")]
        assert self.option(protocol.OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0")[-1][0] == protocol.REP_ACK
        return self

    def ask(self, kind: int, offset: int, length: int, *, cookie: int = 7, flags: int = 0, data: bytes = b"") -> None:
        self.send(request(kind, offset, length, cookie=cookie, flags=flags) + data)

    def simple(self) -> tuple[int, int]:
        """The error and cookie of a simple reply."""
        magic, error, cookie = protocol.SIMPLE_REPLY.unpack(self.take(protocol.SIMPLE_REPLY.size))
        assert magic == protocol.SIMPLE_REPLY_MAGIC
        return error, cookie

    def chunk(self) -> tuple[int, int, int, bytes]:
        """Flags, type, cookie and payload of a chunk."""
        magic, flags, kind, cookie, length = protocol.CHUNK.unpack(self.take(protocol.CHUNK.size))
        assert magic == protocol.CHUNK_MAGIC
        return flags, kind, cookie, self.take(length)


def request(kind: int, offset: int, length: int, *, cookie: int = 7, flags: int = 0) -> bytes:
    """A command's header."""
    return protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, kind, cookie, offset, length)
