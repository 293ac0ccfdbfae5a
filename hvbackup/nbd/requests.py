"""One command of a client, carried out on an export."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hvbackup.errors import HvbackupError
from hvbackup.nbd import protocol
from hvbackup.nbd.buffers import Lease, Pool
from hvbackup.nbd.options import Chosen
from hvbackup.nbd.protocol import CHUNK_DONE
from hvbackup.nbd.replies import (
    data_reply,
    done_reply,
    error_reply,
    merged_extents,
    refusal,
    status_chunk,
    wire_error,
)
from hvbackup.nbd.wire import Buffer

OnError = Callable[[str, str, Exception], None]  # the export's name, what was asked, what went wrong

_TOGETHER = 8  # replies that may wait for each other
_TOGETHER_BYTES = 64 * 1024


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


class Outbox:
    """Replies of one thread that are about to be sent, and the memory they are in.

    Replies share a system call where the next command is at hand: waking the client costs more than a small read.

    Thread safety: `flush` from any thread, which is how another one rescues replies from a thread that is stuck.
    """

    __slots__ = ("_buffers", "_bytes", "_count", "_leases", "_lock", "_pool", "_send")

    def __init__(self, send: Callable[[Sequence[Buffer]], None], pool: Pool) -> None:
        self._send, self._pool = send, pool
        self._lock = threading.Lock()
        self._buffers: list[Buffer] = []
        self._leases: list[Lease] = []
        self._count = self._bytes = 0

    def add(self, buffers: Sequence[Buffer], lease: Lease | None = None) -> None:
        """One more reply, or a piece of one."""
        with self._lock:
            self._buffers += buffers
            self._count += 1
            if lease is not None:
                self._leases.append(lease)
                self._bytes += len(lease.view)

    @property
    def full(self) -> bool:
        """Whether nothing more should wait."""
        return self._count >= _TOGETHER or self._bytes >= _TOGETHER_BYTES

    def flush(self) -> None:
        """Everything is on its way, and the memory is free again."""
        with self._lock:  # until all is sent: the last piece of a reply must not overtake the others
            try:
                if self._buffers:
                    self._send(self._buffers)
            finally:
                self._clear()

    def clear(self) -> None:
        """Forget what was not sent."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        for lease in self._leases:
            self._pool.give_back(lease)
        self._buffers, self._leases, self._count, self._bytes = [], [], 0, 0


class Executor:
    """Carries out commands on one export for one client.

    Thread safety: `carry_out` from any thread, each with an outbox of its own.
    """

    def __init__(self, chosen: Chosen, pool: Pool, fragment_bytes: int, on_error: OnError) -> None:
        self._name, self._export = chosen.name, chosen.export
        self._structured, self._contexts = chosen.structured, chosen.contexts
        self._pool, self._fragment_bytes, self._on_error = pool, fragment_bytes, on_error
        self._size = chosen.export.size
        self._actions: Mapping[int, Callable[[Request, Outbox], None]] = {
            protocol.READ: self._read,
            protocol.WRITE: self._write,
            protocol.FLUSH: self._flush,
            protocol.TRIM: self._trim,
            protocol.WRITE_ZEROES: self._write_zeroes,
            protocol.BLOCK_STATUS: self._block_status,
        }

    def carry_out(self, request: Request, out: Outbox) -> None:
        """The command's answer is in `out` when this returns; long ones are on their way already."""
        error = refusal(
            request.kind,
            request.flags,
            request.offset,
            request.length,
            size=self._size,
            min_block=self._export.min_block,
            read_only=self._export.read_only,
        )
        if error:
            self._fail(request, error, out)
        else:
            self._actions[request.kind](request, out)

    def _read(self, request: Request, out: Outbox) -> None:
        whole = not self._structured or request.flags & protocol.FLAG_DF
        step = request.length if whole else self._fragment_bytes
        if not request.length:
            out.add([done_reply(request.cookie, structured=self._structured)])
        for at in range(0, request.length, step or 1):
            if out.full:  # of all the memory that this connection may use, perhaps
                out.flush()
            if not self._read_piece(request, at, min(step, request.length - at), out):
                break

    def _read_piece(self, request: Request, at: int, length: int, out: Outbox) -> bool:
        """Answer with a part of what was asked; False when it failed, which answers all of it."""
        offset = request.offset + at
        lease = self._pool.take(length)
        try:
            error = self._failure(request, self._export.read_into, offset, lease.view)
        except BaseException:
            self._pool.give_back(lease)
            raise
        if error:
            self._pool.give_back(lease)
            self._fail(request, error, out)
            return False
        done = CHUNK_DONE if at + length == request.length else 0
        out.add(data_reply(request.cookie, offset, lease.view, done, structured=self._structured), lease)
        return True

    def _block_status(self, request: Request, out: Outbox) -> None:
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
            self._fail(request, error, out)
            return
        last = len(found) - 1
        chunks = [
            status_chunk(request.cookie, number, extents, CHUNK_DONE if index == last else 0)
            for index, (number, extents) in enumerate(found)
        ]
        out.add(chunks)

    def _extents(self, context: str, offset: int, length: int) -> Iterable[tuple[int, int]]:
        if context == protocol.BASE_ALLOCATION:
            return self._export.extents(offset, length)
        return self._export.context_extents(context, offset, length)

    def _write(self, request: Request, out: Outbox) -> None:
        if request.payload is not None:
            data = request.payload.view[: request.length]
            self._acknowledge(request, partial(self._export.write, request.offset, data, fua=_fua(request)), out)

    def _flush(self, request: Request, out: Outbox) -> None:
        self._acknowledge(request, self._export.flush, out)

    def _trim(self, request: Request, out: Outbox) -> None:
        trim = partial(self._export.trim, request.offset, request.length, fua=_fua(request))
        self._acknowledge(request, trim, out)

    def _write_zeroes(self, request: Request, out: Outbox) -> None:
        may_trim = not request.flags & protocol.FLAG_NO_HOLE
        write = partial(self._export.write_zeroes, fua=_fua(request), may_trim=may_trim)
        self._acknowledge(request, partial(write, request.offset, request.length), out)

    def _acknowledge(self, request: Request, action: Callable[[], None], out: Outbox) -> None:
        error = self._failure(request, action)
        if error:
            self._fail(request, error, out)
        else:
            out.add([done_reply(request.cookie, structured=False)])

    def _failure(self, request: Request, action: Callable[..., None], *arguments: object) -> int:
        """Let the export act; 0, or the number of its error, which has been reported."""
        try:
            action(*arguments)
        except (HvbackupError, OSError) as error:
            self._on_error(self._name, str(request), error)
            return wire_error(error)
        return 0

    def _fail(self, request: Request, error: int, out: Outbox) -> None:
        # Replies to commands without data may be simple ones even where structured ones were agreed on.
        structured = self._structured and request.kind in (protocol.READ, protocol.BLOCK_STATUS)
        out.add([error_reply(request.cookie, error, structured=structured)])


def _fua(request: Request) -> bool:
    return bool(request.flags & protocol.FLAG_FUA)
