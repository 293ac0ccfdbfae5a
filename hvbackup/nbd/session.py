"""One client that has opened an export: its commands, taken and answered by a few threads that share the connection.

The threads take turns at the socket.  Whoever has the turn reads what has come, answers on the spot what the export
has in memory, takes one of the other commands, passes the turn on and carries that command out.  So there is no queue
between threads, a command in flight costs nothing until a thread takes it, and what nobody took yet waits in the
client's own socket: a few threads with one buffer each are all that a connection can ever use, however slow or greedy
it is.

    the client leaves (disconnect, end of file)    commands that were taken are carried out, then the session ends
    it breaks the protocol, stops reading, dies    the session ends at once
    the export raises OSError or HvbackupError     an error for that command, told to `on_error`
    the export raises anything else                a bug: the session ends, the exception reaches threading.excepthook
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from hvbackup.errors import HvbackupError
from hvbackup.nbd import protocol
from hvbackup.nbd.buffers import Lease, Pool, Shelf
from hvbackup.nbd.export import Export
from hvbackup.nbd.options import Chosen
from hvbackup.nbd.protocol import CHUNK_DONE, ProtocolError
from hvbackup.nbd.replies import (
    data_reply,
    done_reply,
    error_reply,
    merged_extents,
    refusal,
    status_chunk,
    wire_error,
)
from hvbackup.nbd.wire import Buffer, Wire

OnError = Callable[[str, str, Exception], None]  # the export's name, what was asked, what went wrong

_INPUT_BYTES = 64 * 1024
_INLINE_BYTES = 64 * 1024  # cached reads up to here are answered by the thread that reads the socket
_OUTPUT_BYTES = 256 * 1024  # of such answers in one system call
_BATCH = 64  # commands looked at before the first of them is carried out
_PENDING_BYTES = 1 << 20  # and payload of writes taken along with them


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may use of a server."""

    connections: int = 64
    workers: int = 4  # threads of one connection, started when they are needed
    buffer_bytes: int = 128 << 20  # for requests over 64 KiB, of all connections together
    connection_bytes: int = 32 << 20  # and of one of them
    fragment_bytes: int = 1 << 20  # longer reads are answered in pieces of this size
    handshake_seconds: float = 10.0
    stall_seconds: float = 60.0  # a client that stops in the middle of a message, or takes no replies, is dropped
    close_seconds: float = 10.0  # for commands to end when the server closes


@dataclass(slots=True)
class Request:
    """One command of the client."""

    flags: int
    kind: int
    cookie: int
    offset: int
    length: int
    payload: Lease | None = None

    def __str__(self) -> str:
        return f"{protocol.COMMAND_NAMES.get(self.kind, f'command {self.kind}')} {self.length} bytes at {self.offset}"


class Session:
    """The transmission phase of one connection.

    Thread safety: `run` is called once, `stop` by any thread.
    """

    def __init__(self, wire: Wire, chosen: Chosen, shelf: Shelf, limits: Limits, on_error: OnError) -> None:
        self._wire, self._limits, self._on_error = wire, limits, on_error
        self._pool = Pool(shelf, limits.connection_bytes)
        self._name, self._export = chosen.name, chosen.export
        overrides = type(chosen.export).try_read_cached is not Export.try_read_cached
        self._cached = chosen.export.try_read_cached if overrides else None
        self._structured, self._contexts = chosen.structured, chosen.contexts
        self._size, self._grain = chosen.export.size, chosen.export.min_block - 1
        self._turn = threading.Lock()  # guards everything about the input, down to _busy
        self._input = memoryview(bytearray(_INPUT_BYTES))
        self._start = self._end = 0  # what of the input is not parsed yet
        self._pending: deque[Request] = deque()
        self._pending_bytes = 0
        self._ended = False  # no more commands come
        self._helpers: list[threading.Thread] = []
        self._busy = 1  # threads that are not at the input; each comes there first
        self._output = threading.Lock()  # to send one whole reply
        self._carry_out: dict[int, Callable[[Request], None]] = {
            protocol.READ: self._read,
            protocol.WRITE: self._write,
            protocol.FLUSH: self._flush,
            protocol.TRIM: self._trim,
            protocol.WRITE_ZEROES: self._write_zeroes,
            protocol.BLOCK_STATUS: self._block_status,
        }

    def run(self) -> None:
        """Serve until the client leaves; when this returns, all threads of the session have ended."""
        try:
            self._work()
        finally:
            while self._helpers:
                self._helpers.pop().join()

    def stop(self) -> None:
        """Break the connection; commands that are being carried out end without an answer."""
        self._wire.shutdown()

    def _work(self) -> None:
        """What each thread of the session does."""
        finished = False
        try:
            while (request := self._next()) is not None:
                self._serve(request)
            finished = True
        except ConnectionError:
            return  # the client has gone, or we are closing
        except (OSError, ProtocolError) as error:
            self._on_error(self._name, "talking to a client", error)
        finally:
            if not finished:
                self._drop()

    def _drop(self) -> None:
        """End the session without carrying out what was not begun."""
        self._wire.shutdown()  # first: whoever waits at the socket gives up its turn
        with self._turn:
            self._ended = True
            while self._pending:
                self._forget(self._pending.popleft())

    # --- taking commands ---------------------------------------------------------------------------------------------

    def _next(self) -> Request | None:
        """The next command for this thread, or None when there are no more."""
        with self._turn:
            self._busy -= 1
            while not self._pending:
                if self._ended:
                    return None
                self._take_some()
            request = self._pending.popleft()
            if request.payload is not None:
                self._pending_bytes -= request.length
            self._busy += 1
            if self._busy > len(self._helpers) and not self._ended:
                self._add_helper()
            return request

    def _add_helper(self) -> None:
        """Every thread is busy: without another one nobody would read the socket."""
        workers = self._limits.workers if self._export.parallel else 1
        if len(self._helpers) + 1 < workers:
            helper = threading.Thread(target=self._work, name=f"nbd {self._name}", daemon=True)
            self._helpers.append(helper)
            self._busy += 1
            helper.start()

    def _take_some(self) -> None:
        """Parse what is there, waiting for more when there is nothing; answer what is cached."""
        if not self._parse():
            if self._ended:
                return
            left = self._end - self._start
            self._input[:left] = self._input[self._start : self._end]
            self._start, self._end = 0, left
            self._receive()

    def _receive(self) -> None:
        try:
            count = self._wire.receive_some(self._input[self._end :])
        except TimeoutError:
            if self._end:
                raise  # in the middle of a command
            return  # nothing to do for so long is no reason to part
        if count == 0:
            self._ended = True
        self._end += count

    def _parse(self) -> int:
        """Take the commands that are in the input, a batch at most; how many."""
        answers: list[Buffer] = []
        count = size = 0
        unpack, step = protocol.REQUEST.unpack_from, protocol.REQUEST.size
        while count < _BATCH and self._end - self._start >= step and self._pending_bytes < _PENDING_BYTES:
            magic, flags, kind, cookie, offset, length = unpack(self._input, self._start)
            if magic != protocol.REQUEST_MAGIC:
                raise ProtocolError("what came is not a command")
            self._start += step
            count += 1
            if kind == protocol.READ and (data := self._at_hand(flags, offset, length)) is not None:
                answers += data_reply(cookie, offset, data, CHUNK_DONE, structured=self._structured)
                size += length
                if size >= _OUTPUT_BYTES:
                    self._send(answers)
                    answers, size = [], 0
            elif kind == protocol.DISCONNECT:
                self._ended = True
                break
            else:
                self._pending.append(self._request(flags, kind, cookie, offset, length))
        if answers:
            self._send(answers)
        return count

    def _at_hand(self, flags: int, offset: int, length: int) -> Buffer | None:
        """The data of a small read if the export has them in memory."""
        if self._cached is None or not 0 < length <= _INLINE_BYTES:
            return None
        if offset + length > self._size or (offset | length) & self._grain or flags & ~protocol.FLAG_DF:
            return None
        return self._cached(offset, length)

    def _request(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> Request:
        request = Request(flags, kind, cookie, offset, length)
        if kind == protocol.WRITE:
            self._take_payload(request)
        return request

    def _take_payload(self, request: Request) -> None:
        if request.length > protocol.PAYLOAD_MAX_BYTES:
            raise ProtocolError(f"a write of {request.length} bytes")
        request.payload = lease = self._pool.take(max(1, request.length))
        target = lease.view[: request.length]
        try:
            at_hand = min(request.length, self._end - self._start)
            target[:at_hand] = self._input[self._start : self._start + at_hand]
            self._start += at_hand
            self._wire.receive_into(target[at_hand:])
        except BaseException:
            self._pool.give_back(lease)
            raise
        self._pending_bytes += request.length

    # --- carrying them out -------------------------------------------------------------------------------------------

    def _serve(self, request: Request) -> None:
        try:
            error = refusal(
                request.kind,
                request.flags,
                request.offset,
                request.length,
                size=self._size,
                min_block=self._grain + 1,
                read_only=self._export.read_only,
            )
            if error:
                self._answer_error(request, error)
            else:
                self._carry_out[request.kind](request)
        finally:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        if request.payload is not None:
            self._pool.give_back(request.payload)
            request.payload = None

    def _read(self, request: Request) -> None:
        whole = not self._structured or request.flags & protocol.FLAG_DF
        step = request.length if whole else self._limits.fragment_bytes
        if not request.length:
            self._send([done_reply(request.cookie, structured=self._structured)])
        for at in range(0, request.length, step or 1):
            if not self._read_piece(request, at, min(step, request.length - at)):
                break

    def _read_piece(self, request: Request, at: int, length: int) -> bool:
        """Answer with a part of what was asked; False when it failed, which answers all of it."""
        lease = self._pool.take(length)
        try:
            error = self._failure(request, self._export.read_into, request.offset + at, lease.view)
            if error:
                self._answer_error(request, error)
            else:
                done = CHUNK_DONE if at + length == request.length else 0
                structured = self._structured
                self._send(data_reply(request.cookie, request.offset + at, lease.view, done, structured=structured))
        finally:
            self._pool.give_back(lease)
        return not error

    def _block_status(self, request: Request) -> None:
        one = bool(request.flags & protocol.FLAG_REQ_ONE)
        found: list[tuple[int, bytes]] = []

        def look_up() -> None:
            for number, context in self._contexts.items():
                extents = self._extents(context, request.offset, request.length)
                found.append((number, merged_extents(extents, request.length, one=one)))
                if not found[-1][1]:
                    raise HvbackupError(f"{self._name}: No extents in {context} at {request.offset}")

        error = self._failure(request, look_up) if self._contexts else errno.EINVAL
        if error:
            self._answer_error(request, error)
            return
        last = len(found) - 1
        self._send(
            [
                status_chunk(request.cookie, number, extents, CHUNK_DONE if index == last else 0)
                for index, (number, extents) in enumerate(found)
            ]
        )

    def _extents(self, context: str, offset: int, length: int) -> Iterable[tuple[int, int]]:
        if context == protocol.BASE_ALLOCATION:
            return self._export.extents(offset, length)
        return self._export.context_extents(context, offset, length)

    def _write(self, request: Request) -> None:
        if request.payload is not None:
            data = request.payload.view[: request.length]
            self._acknowledge(request, partial(self._export.write, request.offset, data, fua=_fua(request)))

    def _flush(self, request: Request) -> None:
        self._acknowledge(request, self._export.flush)

    def _trim(self, request: Request) -> None:
        self._acknowledge(request, partial(self._export.trim, request.offset, request.length, fua=_fua(request)))

    def _write_zeroes(self, request: Request) -> None:
        may_trim = not request.flags & protocol.FLAG_NO_HOLE
        write = partial(self._export.write_zeroes, fua=_fua(request), may_trim=may_trim)
        self._acknowledge(request, partial(write, request.offset, request.length))

    def _acknowledge(self, request: Request, action: Callable[[], None]) -> None:
        error = self._failure(request, action)
        if error:
            self._answer_error(request, error)
        else:
            self._send([done_reply(request.cookie, structured=False)])

    def _failure(self, request: Request, action: Callable[..., None], *arguments: object) -> int:
        """Let the export act; 0, or the number of its error, which has been reported."""
        try:
            action(*arguments)
        except (HvbackupError, OSError) as error:
            self._on_error(self._name, str(request), error)
            return wire_error(error)
        return 0

    # --- answering ---------------------------------------------------------------------------------------------------

    def _answer_error(self, request: Request, error: int) -> None:
        # Replies to commands without data may be simple ones even where structured ones were agreed on.
        structured = self._structured and request.kind in (protocol.READ, protocol.BLOCK_STATUS)
        self._send([error_reply(request.cookie, error, structured=structured)])

    def _send(self, buffers: Sequence[Buffer]) -> None:
        with self._output:
            self._wire.send(buffers)


def _fua(request: Request) -> bool:
    return bool(request.flags & protocol.FLAG_FUA)
