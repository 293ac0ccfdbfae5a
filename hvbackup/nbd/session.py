"""One client that has opened an export: its commands, taken and answered by a few threads that share the connection.

The threads take turns at the socket.  Whoever has the turn reads what has come, answers on the spot what the export
has in memory, leaves the other commands where all threads find them, and passes the turn on.  So a command in flight
costs nothing until a thread takes it, and what nobody read yet waits in the client's own socket: a few threads with
one buffer each are all that a connection can ever use, however slow or greedy it is.

While commands only need a processor, one thread does everything: more would fight for the interpreter, and waking each
other costs more than a small read.  When commands have to wait for something (a remote store, a failing disk), there
are as many threads as the limits allow; `rescue` starts the second one while the first is stuck.

    the client leaves (disconnect, end of file)    commands that were taken are carried out, then the session ends
    it breaks the protocol, stops reading, dies    the session ends at once
    the export raises OSError or HvbackupError     an error for that command, told to `on_error`
    the export raises anything else                a bug: the session ends, the exception reaches threading.excepthook
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hvbackup.nbd import protocol
from hvbackup.nbd.buffers import Pool, Shelf
from hvbackup.nbd.export import Export
from hvbackup.nbd.options import Chosen
from hvbackup.nbd.protocol import CHUNK_DONE, ProtocolError
from hvbackup.nbd.replies import data_reply
from hvbackup.nbd.requests import Executor, OnError, Outbox, Request
from hvbackup.nbd.wire import Buffer, Wire

_INPUT_BYTES = 64 * 1024
_INLINE_BYTES = 64 * 1024  # cached reads up to here are answered by the thread that reads the socket
_OUTPUT_BYTES = 256 * 1024  # of such answers in one system call
_BATCH = 64  # commands looked at before the first of them is carried out
_PENDING_BYTES = 1 << 20  # and payload of writes taken along with them
_QUICK_SECONDS = 0.002  # an export that lets its commands wait less than this on average is quick
_WAITING_SECONDS = 0.0001  # an export that lets them wait longer than this reads a disk: it is told what comes next
_EXPECTED_BYTES = 1 << 20  # of reads up to this length; a longer one keeps the disk busy by itself
_PACE_SHARE = 1 / 16  # of the newest command in that average
_STUCK_SECONDS = 0.025  # all threads are busy and no command was begun for so long: another thread helps


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may use of a server."""

    connections: int = 64
    workers: int = 8  # threads of one connection, started when they are needed
    buffer_bytes: int = 128 << 20  # for requests over 64 KiB, of all connections together
    connection_bytes: int = 32 << 20  # and of one of them
    fragment_bytes: int = 1 << 20  # longer reads are answered in pieces of this size
    handshake_seconds: float = 10.0
    stall_seconds: float = 60.0  # a client that stops in the middle of a message, or takes no replies, is dropped
    close_seconds: float = 10.0  # for commands to end when the server closes


class Session:
    """The transmission phase of one connection.

    Thread safety: `run` is called once, `stop` by any thread.
    """

    def __init__(self, wire: Wire, chosen: Chosen, shelf: Shelf, limits: Limits, on_error: OnError) -> None:
        self._wire, self._on_error = wire, on_error
        self._name, self._structured = chosen.name, chosen.structured
        self._pool = Pool(shelf, limits.connection_bytes)
        self._executor = Executor(chosen, self._pool, limits.fragment_bytes, on_error)
        export = chosen.export
        self._export = export
        self._cached = None if type(export).try_read_cached is Export.try_read_cached else export.try_read_cached
        self._size, self._grain = export.size, export.min_block - 1
        self._workers = limits.workers if export.parallel else 1
        self._pending: deque[Request] = deque()  # taken from the socket by one thread, and from here by any
        self._turn = threading.Lock()  # guards everything about the input, down to _busy
        self._input = memoryview(bytearray(_INPUT_BYTES))
        self._start = self._end = 0  # what of the input is not parsed yet
        self._ended = False  # no more commands come
        self._helpers: list[threading.Thread] = []
        self._busy = 1  # threads that are not at the input; each comes there first
        self._pace = 0.0  # seconds that a command waits for anything but a processor, on average
        self._begun = 0.0  # when the last command was begun
        self._output = threading.Lock()  # to send one whole reply
        self._outboxes: dict[Outbox, None] = {}  # of all threads

    def run(self) -> None:
        """Serve until the client leaves; when this returns, all threads of the session have ended."""
        try:
            self._work()
        finally:
            while self._helpers:
                self._helpers[-1].join()
                self._helpers.pop()

    def stop(self) -> None:
        """Break the connection; commands that are being carried out end without an answer."""
        self._wire.shutdown()

    def rescue(self) -> None:
        """Called now and then by the server: where every thread is stuck in a command, another one helps."""
        if self._busy > len(self._helpers) and time.monotonic() - self._begun > _STUCK_SECONDS:
            self._pace = max(self._pace, 2 * _QUICK_SECONDS)
            if self._turn.acquire(timeout=_QUICK_SECONDS):
                try:
                    self._grow()
                finally:
                    self._turn.release()

    def _work(self) -> None:
        """What each thread of the session does."""
        finished = False
        out = Outbox(self._send, self._pool)
        try:
            for other in list(self._outboxes):
                other.flush()
            self._outboxes[out] = None
            used = time.thread_time()
            while (request := self._next(out)) is not None:
                used = self._serve(request, out, used)
            finished = True
        except ConnectionError:
            return  # the client has gone, or we are closing
        except (OSError, ProtocolError) as error:
            self._on_error(self._name, "talking to a client", error)
        finally:
            out.clear()
            self._outboxes.pop(out, None)
            if not finished:
                self._drop()

    def _serve(self, request: Request, out: Outbox, before: float) -> float:
        """Carry out one command; `before` is what this thread had used of the processor when the last one was done.

        Returns the same of this one.  One question to the kernel for each, and not two: it costs as much as a small read.
        """
        self._begun = begun = time.monotonic()
        try:
            self._executor.carry_out(request, out)
        finally:
            self._forget(request)
        # Busy threads take turns at the interpreter, so each of them may wait for as long as the others compute.
        used = time.thread_time()
        fair = (used - before) * max(1, self._busy)
        self._pace += (max(0.0, time.monotonic() - begun - fair) - self._pace) * _PACE_SHARE
        # A reply waits for the next one only where that is a matter of microseconds, and where, if we were wrong about
        # that, another thread can come and send it.
        if out.full or not self._pending or self._pace > _QUICK_SECONDS or self._workers == 1:
            out.flush()
            used = time.thread_time()
        return used

    def _forget(self, request: Request) -> None:
        if request.payload is not None:
            self._pool.give_back(request.payload)
            request.payload = None

    def _drop(self) -> None:
        """End the session without carrying out what was not begun."""
        self._wire.shutdown()  # first: whoever waits at the socket gives up its turn
        with self._turn:
            self._ended = True
            while (request := self._take()) is not None:
                self._forget(request)

    def _send(self, buffers: Sequence[Buffer]) -> None:
        with self._output:
            self._wire.send(buffers)

    # --- taking commands ---------------------------------------------------------------------------------------------

    def _next(self, out: Outbox) -> Request | None:
        """The next command for this thread, or None when there are no more; without one at hand, `out` is sent."""
        request = self._take()
        if request is None:
            out.flush()
            return self._next_from_input()
        while self._alone:
            # Whoever has the turn either passes it on at once, or has come to the input, so that we are not alone.
            if self._turn.acquire(timeout=_QUICK_SECONDS):
                try:
                    self._grow()
                finally:
                    self._turn.release()
        return request

    def _take(self) -> Request | None:
        try:
            return self._pending.popleft()
        except IndexError:
            return None

    def _next_from_input(self) -> Request | None:
        with self._turn:
            self._busy -= 1
            while (request := self._take()) is None:
                if self._ended or self._retires():
                    return None
                self._take_some()
            self._busy += 1
            self._grow()
            return request

    @property
    def _allowed(self) -> int:
        """How many threads are of use at this pace."""
        return self._workers if self._pace > _QUICK_SECONDS else 1

    @property
    def _alone(self) -> bool:
        """Whether all threads carry out commands, and another one may be started that reads the socket meanwhile."""
        threads = len(self._helpers) + 1
        return self._busy >= threads and threads < self._allowed and not self._ended

    def _grow(self) -> None:
        if self._alone:
            helper = threading.Thread(target=self._work, name=f"nbd {self._name}", daemon=True)
            self._helpers.append(helper)
            self._busy += 1
            helper.start()

    def _retires(self) -> bool:
        """Whether this thread is one too many."""
        thread = threading.current_thread()
        if len(self._helpers) < self._allowed or thread not in self._helpers:
            return False
        self._helpers.remove(thread)
        return True

    def _take_some(self) -> None:
        """Parse what is there, waiting for more when there is nothing; answer what is cached."""
        if not self._parse() and not self._ended:
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
        reads: list[tuple[int, int]] = []
        count = size = payload = 0
        unpack, step = protocol.REQUEST.unpack_from, protocol.REQUEST.size
        while count < _BATCH and self._end - self._start >= step and payload < _PENDING_BYTES:
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
                request = Request(flags, kind, cookie, offset, length)
                payload += self._take_payload(request)
                self._pending.append(request)
                if kind == protocol.READ and 0 < length <= _EXPECTED_BYTES and offset + length <= self._size:
                    reads.append((offset, length))
        if answers:
            self._send(answers)
        if len(reads) > 1 and self._pace > _WAITING_SECONDS:
            self._export.expect(reads)
        return count

    def _at_hand(self, flags: int, offset: int, length: int) -> Buffer | None:
        """The data of a small read if the export has them in memory."""
        if self._cached is None or not 0 < length <= _INLINE_BYTES:
            return None
        if offset + length > self._size or (offset | length) & self._grain or flags & ~protocol.FLAG_DF:
            return None
        return self._cached(offset, length)

    def _take_payload(self, request: Request) -> int:
        """Read the data of a write behind its header; how many bytes they are."""
        if request.kind != protocol.WRITE:
            return 0
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
        return request.length
