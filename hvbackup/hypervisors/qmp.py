"""QEMU's monitor protocol for code that is not asynchronous: one connection, every call with a timeout.

    with Qmp("/run/vm/qmp.sock") as qmp:
        qmp.command("query-jobs")

What goes wrong is HostUnreachable and names the socket; a command that QEMU understood and refused is CommandRefused
and has QEMU's own words.  After a timeout nobody knows what QEMU did, so the connection is of no further use.

Thread safety: any thread may call; the asyncio loop of a connection lives in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Coroutine, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from hvbackup.errors import HostUnreachable
from hvbackup.pipeline import result

T = TypeVar("T")

_UCRED = struct.Struct("3i")  # pid, uid, gid
_REPLY_MAX_BYTES = 64 << 20  # the block graph of a machine with many disks and bitmaps is one line

_RETRY_SECONDS = 0.02

_ADVICE = {
    errno.ENOENT: "there is no such socket; is the machine running, with -qmp unix:PATH,server=on,wait=off?",
    errno.ECONNREFUSED: "nobody listens there any more; start the machine",
    errno.EACCES: "we may not open it; run as root or as the user QEMU runs as",
    errno.EAGAIN: "others are waiting for it already; QEMU serves one at a time, so give us a -qmp socket of our own",
}


class CommandRefused(HostUnreachable):
    """QEMU understood a command and refused it."""

    def __init__(self, path: Path, command: str, reason: str, error_class: str = "GenericError") -> None:
        super().__init__(f"QEMU at {path} refused {command}: {reason.rstrip('.')}")
        self.reason = reason
        self.error_class = error_class

    @property
    def unknown(self) -> bool:
        """Whether this QEMU has no such command."""
        return self.error_class == "CommandNotFound"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who listens at the other end, as the kernel says; pid 0 is a process in a namespace we can't see."""

    pid: int
    uid: int
    gid: int


class Events:
    """The events asked for, from the moment of asking."""

    def __init__(self, qmp: Qmp, listener: EventListener) -> None:
        self._qmp = qmp
        self._listener = listener

    def next(self, timeout_seconds: float) -> Mapping[str, Any]:
        """The next event as QEMU sent it.  Raises HostUnreachable when none comes in time; the connection goes on."""
        names = " or ".join(sorted(self._listener.names))
        event: Message = self._qmp.run(self._listener.get(), names, timeout_seconds, fatal=False)
        return dict(event)


class Qmp:
    """One open connection to a monitor."""

    def __init__(self, path: str | Path, *, timeout_seconds: float = 20.0) -> None:
        self.path = Path(path)
        self._timeout = timeout_seconds
        self._broken = ""
        sock = connected(self.path, timeout_seconds)
        self.peer = Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
        sock.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(
            lambda _loop, _context: None
        )  # what a broken peer left: our errors say it, once
        self._thread = threading.Thread(target=self._serve, name=f"qmp {self.path}", daemon=True)
        self._thread.start()
        try:
            self._client = self.run(_greeted(sock), "its greeting", timeout_seconds)
        except BaseException:
            self._stop()
            sock.close()
            raise

    def command(self, name: str, /, timeout_seconds: float | None = None, **arguments: Any) -> Any:
        """The answer to one command; underscores in names of arguments stand for dashes."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return self.run(self._client.execute(name, given), name, timeout_seconds or self._timeout)
        except ExecuteError as error:
            raise CommandRefused(self.path, name, str(error), error.error_class) from error

    @contextmanager
    def events(self, *names: str) -> Generator[Events]:
        """Collect the events with these names while the context is open."""
        listener = EventListener(names)
        self._loop.call_soon_threadsafe(self._client.register_listener, listener)
        try:
            yield Events(self, listener)
        finally:
            self._loop.call_soon_threadsafe(self._client.remove_listener, listener)

    def run(self, work: Coroutine[Any, Any, T], what: str, timeout_seconds: float, *, fatal: bool = True) -> T:
        """Wait for `work` on the connection's own loop; a timeout ends the connection unless it is not `fatal`."""
        if self._broken:
            work.close()
            raise HostUnreachable(f"QEMU at {self.path}: {self._broken}")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return result(future, timeout_seconds)
        except ExecuteError:
            raise
        except TimeoutError as error:
            future.cancel()
            reason = (
                f"No answer within {timeout_seconds:g} s (waiting for {what}); either the machine hangs, "
                "or another program holds this socket, which serves one at a time"
            )
            self._broken = reason if fatal else ""
            raise HostUnreachable(f"QEMU at {self.path}: {reason}") from error
        except (OSError, EOFError, QMPError, AssertionError) as error:
            # The library asserts that a connection it has just made still stands; one that broke at that moment does not.
            self._broken = f"The connection broke off (waiting for {what}); is the machine still running?"
            raise HostUnreachable(f"QEMU at {self.path}: {self._broken}") from error

    def close(self) -> None:
        """Let go of the socket; never fails, idempotent."""
        if self._loop.is_closed():
            return
        self._broken = self._broken or "The connection is closed"
        with contextlib.suppress(OSError, EOFError, QMPError):
            result(asyncio.run_coroutine_threadsafe(self._client.disconnect(), self._loop), 2.0)
        self._stop()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)


async def _greeted(sock: socket.socket) -> QMPClient:
    client = QMPClient("hvbackup", readbuflen=_REPLY_MAX_BYTES)
    client.logger = logging.Logger("hvbackup.qmp", logging.CRITICAL + 1)  # our errors say it, once
    await client.connect(sock)
    return client


def connected(path: Path, timeout_seconds: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout_seconds)
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            sock.connect(os.fspath(path))
            return sock
        except OSError as error:
            # The queue is short: a client that is just leaving fills it for a moment.
            if error.errno == errno.EAGAIN and time.monotonic() < end:
                time.sleep(_RETRY_SECONDS)
                continue
            sock.close()
            advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
            raise HostUnreachable(f"QEMU at {path}: Cannot connect, {advice}") from error
