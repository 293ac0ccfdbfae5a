"""A client that reads (and writes) one NBD export with many requests in flight on one connection.

    with NbdClient.open("nbd+unix:///vda?socket=/run/vm.nbd", contexts=["base:allocation"]) as disk:
        for start, length, flags in disk.status("base:allocation"):
            ...
        disk.read_into(0, memoryview(buffer))

Data are received straight into the caller's memory.  A request that the server refuses raises ReadFailed and leaves the
connection usable; everything else that goes wrong (no server, a hang, nonsense on the wire) raises HostUnreachable, and
so does every later call on that client.

Thread safety: every method may be called from any thread; one call runs at a time.  To read in parallel, open more
clients where `can_multi_conn` says so.  `abort` is the exception: it interrupts a call that runs in another thread.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import HostUnreachable, ReadFailed
from hvbackup.nbd import protocol
from hvbackup.nbd.commands import Command, Extents, ReplyReader
from hvbackup.nbd.connect import Settings, connect, list_exports, reason
from hvbackup.nbd.handshake import ExportInfo, Refused
from hvbackup.nbd.protocol import ProtocolError
from hvbackup.nbd.uri import NbdUri
from hvbackup.nbd.wire import Buffer, Wire

__all__ = ["NbdClient", "RequestFailed", "Settings", "list_exports"]

_STATUS_STEP_BYTES = (4 << 30) - (64 << 10)  # the largest multiple of any block size that fits 32 bits
_RANGE_STEP_BYTES = 1 << 30  # zeroing and trimming carry no data, so only the 32-bit length splits them


class RequestFailed(ReadFailed):
    """The server answered one request with an error; the connection goes on."""

    def __init__(self, uri: NbdUri, command: Command) -> None:
        reason = os.strerror(command.error) + (f": {command.message}" if command.message else "")
        super().__init__(f"{uri}: {command} failed ({reason})")
        self.offset, self.length, self.errno = command.offset, command.length, command.error


class NbdClient:
    """One connection to one export; see the module's docstring for errors and threads."""

    def __init__(self, uri: NbdUri, wire: Wire, info: ExportInfo, settings: Settings) -> None:
        self.uri = uri
        self.size = info.size
        self.flags = info.flags
        self.min_block = info.min_block or 1
        self.preferred_block = info.preferred_block or 4096
        self.max_block = info.max_block or protocol.PAYLOAD_MAX_BYTES
        self.contexts: Sequence[str] = tuple(info.contexts.values())
        self._wire = wire
        self._settings = settings
        self._replies = ReplyReader(wire, info.contexts, structured=info.structured)
        self._structured = info.structured
        self._lock = threading.Lock()
        self._broken = ""  # why this connection is of no further use
        self._cookie = 0

    @classmethod
    def open(
        cls,
        target: str | NbdUri,
        *,
        contexts: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
        settings: Settings | None = None,
    ) -> NbdClient:
        """Connect and negotiate; `contexts` that the export does not have are missing from `client.contexts`."""
        uri = target if isinstance(target, NbdUri) else NbdUri.parse(target)
        settings = settings or Settings()
        wire, haggler = connect(uri, settings, tls)
        try:
            info = haggler.go(uri.export, contexts)
        except (OSError, ProtocolError, Refused) as error:
            wire.close()
            raise HostUnreachable(
                f"{uri}: Cannot open the export, {reason(error, settings.connect_seconds)}"
            ) from error
        wire.set_timeout(settings.reply_seconds)
        return cls(uri, wire, info, settings)

    @property
    def read_only(self) -> bool:
        """Whether writing is refused."""
        return bool(self.flags & protocol.READ_ONLY)

    @property
    def can_multi_conn(self) -> bool:
        """Whether several connections see one consistent disk."""
        return bool(self.flags & protocol.CAN_MULTI_CONN)

    # --- reading -----------------------------------------------------------------------------------------------------

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset`."""
        self.read_many([(offset, target)])

    def read_many(self, wanted: Iterable[tuple[int, memoryview]]) -> None:
        """Fill each target from its offset, all pipelined; on an error the content of every target is undefined."""
        wanted = list(wanted)
        for offset, target in wanted:
            self._check_range(offset, len(target))
        self._run(self._reads(wanted))

    def _reads(self, wanted: Iterable[tuple[int, memoryview]]) -> Iterator[Command]:
        step = self._step()
        for offset, target in wanted:
            length = len(target)
            if (offset | length) % self.min_block:
                yield from self._unaligned_read(offset, target)
            elif length <= step:
                yield Command(protocol.READ, offset, length, target=target)
            else:
                for at in range(0, length, step):
                    piece = target[at : at + step]
                    yield Command(protocol.READ, offset + at, len(piece), target=piece)

    def _unaligned_read(self, offset: int, target: memoryview) -> Iterator[Command]:
        """Read whole blocks aside and copy the wanted part over, a step at a time."""
        step, end = self._step(), offset + len(target)
        start = offset // self.min_block * self.min_block
        while start < end:
            length = min(step, self._aligned(end - start), self.size - start)
            lower, upper = max(start, offset), min(start + length, end)
            aside = memoryview(bytearray(length))
            yield Command(
                protocol.READ,
                start,
                length,
                target=aside,
                finish=(target[lower - offset : upper - offset], aside[lower - start : upper - start]),
            )
            start += length

    def block_status(self, offset: int, length: int) -> dict[str, Extents]:
        """For each negotiated context the (lengths, flags) from `offset` on, as far as the server cared to answer."""
        self._check_range(offset, length)
        length = min(length, _STATUS_STEP_BYTES)
        command = Command(protocol.BLOCK_STATUS, offset, length)
        self._run([command])
        missing = [name for name in self.contexts if name not in command.answer]
        if missing or not command.answer:
            raise HostUnreachable(f"{self.uri}: The server said nothing about {', '.join(missing) or 'any context'}")
        return command.answer

    def status(self, context: str, offset: int = 0, length: int | None = None) -> NDArray[np.int64]:
        """Rows of start, length, flags that cover the range (by default the disk), equal neighbours merged."""
        return self.statuses(offset, length)[context]

    def statuses(self, offset: int = 0, length: int | None = None) -> Mapping[str, NDArray[np.int64]]:
        """`status` of all negotiated contexts, asked for together."""
        end = self.size if length is None else offset + length
        self._check_range(offset, end - offset)
        found: dict[str, list[NDArray[np.int64]]] = {name: [] for name in self.contexts}
        at = dict.fromkeys(self.contexts, offset)
        while found and (start := min(at.values())) < end:
            wanted = min(self._aligned(end - start), self.size - start)
            for name, extents in self.block_status(start, wanted).items():
                rows = _rows(start, extents, at[name], end)
                if len(rows):
                    found[name].append(rows)
                    at[name] = int(rows[-1, 0] + rows[-1, 1])
        return {name: _merged(rows) for name, rows in found.items()}

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """The bytes are written (and durable, with `fua`)."""
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        step, flags = self._step(), protocol.FLAG_FUA if fua else 0
        self._run(
            Command(protocol.WRITE, offset + at, len(piece), flags=flags, payload=piece)
            for at in range(0, len(view), step)
            for piece in (view[at : at + step],)
        )

    def write_zeroes(self, offset: int, length: int, *, fua: bool = False, may_trim: bool = True) -> None:
        """The range reads as zeroes."""
        flags = (protocol.FLAG_FUA if fua else 0) | (0 if may_trim else protocol.FLAG_NO_HOLE)
        self._check_range(offset, length)
        self._run(_ranges(protocol.WRITE_ZEROES, offset, length, flags))

    def trim(self, offset: int, length: int) -> None:
        """The server knows that the range is not needed; what it reads as is undefined."""
        self._check_range(offset, length)
        self._run(_ranges(protocol.TRIM, offset, length, 0))

    def flush(self) -> None:
        """Everything written before this call is durable."""
        self._run([Command(protocol.FLUSH, 0, 0)])

    # --- life --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Say goodbye and close; never fails."""
        with self._lock:
            if not self._broken:
                self._broken = "the connection was closed by us"
                try:
                    self._wire.send([protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, protocol.DISCONNECT, 0, 0, 0)])
                except OSError:
                    self._wire.shutdown()
            self._wire.close()

    def abort(self) -> None:
        """Break the connection now: a call that runs in another thread fails with HostUnreachable at once."""
        self._wire.shutdown()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- the pipeline ------------------------------------------------------------------------------------------------

    def _run(self, commands: Iterable[Command]) -> None:
        """Send all commands and take their answers, keeping many in flight; raise for the first that failed."""
        with self._lock:
            if self._broken:
                raise HostUnreachable(f"{self.uri}: Not connected any more ({self._broken})")
            waiting: dict[int, Command] = {}
            try:
                failed = self._exchange(iter(commands), waiting)
            except (OSError, ProtocolError) as error:
                self._broken = reason(error, self._settings.reply_seconds)
                self._wire.shutdown()
                asked = next(iter(waiting.values()), "sending a command")
                raise HostUnreachable(f"{self.uri}: Gave up {asked}, {self._broken}") from error
            except BaseException:
                self._broken = "interrupted in the middle of a reply"
                self._wire.shutdown()
                raise
        if failed is not None:
            raise RequestFailed(self.uri, failed)

    def _exchange(self, commands: Iterator[Command], waiting: dict[int, Command]) -> Command | None:
        failed: Command | None = None
        while True:
            batch = self._batch(commands, waiting) if failed is None else []
            self._send(batch, waiting)
            if not waiting:
                return failed
            # Half of the window is refilled at a time, so that small requests share system calls.
            low = len(waiting) // 2 if batch else 0
            while len(waiting) > low:
                done = self._replies.receive(waiting)
                if done is not None and done.error and failed is None:
                    failed = done

    def _batch(self, commands: Iterator[Command], waiting: dict[int, Command]) -> list[Command]:
        """As many more commands as may be in flight beside those that wait already."""
        space = self._settings.in_flight - len(waiting)
        space_bytes = self._settings.in_flight_bytes - sum(c.data_bytes for c in waiting.values())
        batch: list[Command] = []
        while space > 0 and (space_bytes > 0 or not (batch or waiting)):
            command = next(commands, None)
            if command is None:
                break
            batch.append(command)
            space -= 1
            space_bytes -= command.data_bytes
        return batch

    def _send(self, batch: Sequence[Command], waiting: dict[int, Command]) -> None:
        buffers: list[Buffer] = []
        for command in batch:
            self._cookie += 1
            waiting[self._cookie] = command
            buffers.append(command.header(self._cookie))
            if command.payload is not None:
                buffers.append(command.payload)
        if buffers:
            self._wire.send(buffers)

    def _step(self) -> int:
        step = min(self._settings.request_bytes, self.max_block)
        return max(self.min_block, step // self.min_block * self.min_block)

    def _aligned(self, length: int) -> int:
        return -(-length // self.min_block) * self.min_block

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ReadFailed(
                f"{self.uri}: {length} bytes at {offset} are outside of the disk, which has {self.size} bytes"
            )


def _ranges(kind: int, offset: int, length: int, flags: int) -> Iterator[Command]:
    for at in range(0, length, _RANGE_STEP_BYTES):
        yield Command(kind, offset + at, min(_RANGE_STEP_BYTES, length - at), flags=flags)


def _rows(start: int, extents: Extents, lower: int, upper: int) -> NDArray[np.int64]:
    """Extents as rows of start, length, flags, without what lies outside of [lower, upper)."""
    lengths, flags = extents
    ends = start + np.cumsum(lengths)
    starts = np.maximum(ends - lengths, lower)
    rows = np.column_stack([starts, np.minimum(ends, upper) - starts, flags])
    return rows[rows[:, 1] > 0]


def _merged(pieces: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One table from consecutive ones; neighbours with the same flags become one row."""
    if not pieces:
        return np.zeros((0, 3), np.int64)
    rows = np.concatenate(pieces)
    first = np.flatnonzero(np.r_[True, np.diff(rows[:, 2]) != 0])
    ends = np.r_[rows[first[1:], 0], rows[-1, 0] + rows[-1, 1]]
    return np.column_stack([rows[first, 0], ends - rows[first, 0], rows[first, 2]])
