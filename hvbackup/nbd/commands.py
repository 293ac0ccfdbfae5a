"""One command in flight, and the reader that gives each reply to the command it belongs to."""

from __future__ import annotations

import errno
import struct

import numpy as np
from numpy.typing import NDArray

from hvbackup.nbd import protocol
from hvbackup.nbd.protocol import ProtocolError
from hvbackup.nbd.wire import Buffer, Wire

Extents = tuple[NDArray[np.int64], NDArray[np.int64]]  # lengths and flags, from the offset asked for on

_CHUNK_REST = struct.Struct(">HHQI")  # CHUNK without its magic number
_SIMPLE_REST = struct.Struct(">IQ")  # SIMPLE_REPLY without its magic number
_FRAGMENT_BYTES = 512  # no server tells holes from data at a finer grain; bounds what a hostile one makes us remember
_FRAGMENTS_MIN = 64
_ERRNO_MAX = 4096  # what Linux itself keeps room for; a server may send any 32 bits


class Command:
    """What was asked, and what has come of it so far."""

    __slots__ = (
        "_fragments", "answer", "error", "finish", "flags", "kind", "length", "message", "offset", "payload", "target",
    )  # fmt: skip

    def __init__(
        self,
        kind: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        payload: Buffer | None = None,
        target: memoryview | None = None,
        finish: tuple[memoryview, memoryview] | None = None,
    ) -> None:
        self.kind, self.offset, self.length, self.flags = kind, offset, length, flags
        self.payload = payload  # goes with the request
        self.target = target  # takes the data of a read
        self.finish = finish  # when done, copy the second into the first
        self.answer: dict[str, Extents] = {}  # block status by context
        self.error = 0
        self.message = ""
        self._fragments: list[tuple[int, int]] = []

    def __str__(self) -> str:
        return f"{protocol.COMMAND_NAMES[self.kind]} {self.length} bytes at {self.offset}"

    def header(self, cookie: int) -> bytes:
        """The request on the wire."""
        return protocol.REQUEST.pack(protocol.REQUEST_MAGIC, self.flags, self.kind, cookie, self.offset, self.length)

    @property
    def data_bytes(self) -> int:
        """What this command and its answer put on the wire beside headers."""
        return self.length if self.target is not None or self.payload is not None else 0

    def fail(self, error: int, message: str) -> None:
        """Remember the first error."""
        if not self.error:
            self.error, self.message = error if 0 < error < _ERRNO_MAX else errno.EIO, message

    def fragment(self, offset: int, length: int) -> memoryview:
        """Where a piece of the answer to this read goes."""
        start = offset - self.offset
        if self.target is None or length == 0 or start < 0 or start + length > self.length:
            raise ProtocolError(f"the reply carries {length} bytes at {offset} that were not asked for")
        if len(self._fragments) > self.length // _FRAGMENT_BYTES + _FRAGMENTS_MIN:
            raise ProtocolError("the reply comes in too many pieces")
        self._fragments.append((start, length))
        return self.target[start : start + length]

    def complete(self) -> None:
        """The last chunk has come; a read that succeeded is covered exactly once."""
        if self.target is None or self.error:
            return
        at = 0
        for start, length in sorted(self._fragments) if len(self._fragments) > 1 else self._fragments:
            if start != at:
                raise ProtocolError("the pieces of a reply overlap or leave a gap")
            at += length
        if at != self.length:
            raise ProtocolError(f"the reply has {at} bytes where {self.length} were asked for")
        if self.finish is not None:
            self.finish[0][:] = self.finish[1]


class ReplyReader:
    """Takes replies, simple or structured, in whatever order and pieces the server sends them."""

    def __init__(self, wire: Wire, contexts: dict[int, str], *, structured: bool) -> None:
        self._wire = wire
        self._contexts = contexts
        self._structured = structured
        self._head = memoryview(bytearray(protocol.CHUNK.size))
        self._offset = memoryview(bytearray(protocol.OFFSET.size))

    def receive(self, waiting: dict[int, Command]) -> Command | None:
        """Take one reply or chunk; the command it finished, by then no longer in `waiting`."""
        head = self._head
        simple = protocol.SIMPLE_REPLY.size
        # A simple reply is the shorter one: what it has in common with a chunk tells which it is.
        self._wire.receive_into(head[:simple])
        magic = int.from_bytes(head[:4])
        if magic == protocol.CHUNK_MAGIC and self._structured:
            self._wire.receive_into(head[simple:])
            return self._chunk(waiting, *_CHUNK_REST.unpack_from(head, 4))
        if magic == protocol.SIMPLE_REPLY_MAGIC:
            return self._simple(waiting, *_SIMPLE_REST.unpack_from(head, 4))
        raise ProtocolError("what came is not a reply")

    def _simple(self, waiting: dict[int, Command], error: int, cookie: int) -> Command:
        command = waiting.get(cookie)
        if command is None:
            raise ProtocolError("a reply to nothing that was asked")
        if error:
            command.fail(error, "")
        elif command.target is not None:
            if self._structured:
                raise ProtocolError("a simple reply to a read where structured ones were agreed on")
            self._wire.receive_into(command.fragment(command.offset, command.length))
        return _finished(waiting, cookie, command)

    def _chunk(self, waiting: dict[int, Command], flags: int, kind: int, cookie: int, length: int) -> Command | None:
        command = waiting.get(cookie)
        if command is None:
            raise ProtocolError("a reply to nothing that was asked")
        if kind == protocol.CHUNK_DATA:
            self._data(command, length)
        elif kind == protocol.CHUNK_HOLE:
            self._hole(command, length)
        elif kind == protocol.CHUNK_STATUS:
            self._status(command, length)
        elif kind & protocol.CHUNK_ERROR_BIT:
            self._error(command, length)
        elif kind != protocol.CHUNK_NONE or length:
            raise ProtocolError(f"a chunk of unknown type {kind}")
        return _finished(waiting, cookie, command) if flags & protocol.CHUNK_DONE else None

    def _data(self, command: Command, length: int) -> None:
        if length <= protocol.OFFSET.size:
            raise ProtocolError("a data chunk without data")
        self._wire.receive_into(self._offset)
        (offset,) = protocol.OFFSET.unpack(self._offset)
        self._wire.receive_into(command.fragment(offset, length - protocol.OFFSET.size))

    def _hole(self, command: Command, length: int) -> None:
        if length != protocol.HOLE.size:
            raise ProtocolError("a hole chunk of the wrong length")
        target = command.fragment(*protocol.HOLE.unpack(self._wire.receive(length)))
        np.frombuffer(target, np.uint8).fill(0)

    def _status(self, command: Command, length: int) -> None:
        fits = 12 <= length <= protocol.STATUS_MAX_BYTES and length % 8 == 4
        if command.kind != protocol.BLOCK_STATUS or not fits:
            raise ProtocolError(f"a block status of {length} bytes that was not asked for")
        data = self._wire.receive(length)
        name = self._contexts.get(int.from_bytes(data[:4]))
        if name is None or name in command.answer:
            raise ProtocolError("a block status for a context that was not agreed on")
        pairs = np.frombuffer(data, ">u4", offset=4).astype(np.int64).reshape(-1, 2)
        if not pairs[:, 0].all():
            raise ProtocolError("a block status with an empty extent")
        command.answer[name] = (pairs[:, 0], pairs[:, 1])

    def _error(self, command: Command, length: int) -> None:
        if not protocol.ERROR.size <= length <= protocol.ERROR_MAX_BYTES:
            raise ProtocolError(f"an error chunk of {length} bytes")
        data = self._wire.receive(length)
        error, message_length = protocol.ERROR.unpack_from(data)
        message = data[protocol.ERROR.size : protocol.ERROR.size + min(message_length, 400)]
        command.fail(error, message.decode(errors="replace"))


def _finished(waiting: dict[int, Command], cookie: int, command: Command) -> Command:
    command.complete()
    del waiting[cookie]
    return command
