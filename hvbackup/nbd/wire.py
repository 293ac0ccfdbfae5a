"""Bytes over one connected socket, in blocking calls that give up after a time without progress.

Thread safety: one thread may send while another receives, except over TLS, where everything must happen in one thread.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Sequence

Buffer = bytes | bytearray | memoryview

_TIMEVAL = struct.Struct("@ll")
_KEEPALIVE_SECONDS = 60  # of silence until we ask, and as long again until we give up
_GATHER_MAX = 512  # buffers in one sendmsg(2); the kernel's limit is 1,024
_SOCKET_BUFFER_BYTES = 1024 * 1024  # unix sockets start with 208 KiB: a reader would wake five times for each 1 MiB


class Closed(ConnectionError):
    """The other side closed the connection."""


class Wire:
    """One connected stream socket.

    The waiting is left to the kernel (SO_RCVTIMEO, SO_SNDTIMEO): a Python timeout would cost a poll(2) for each call.
    """

    def __init__(self, sock: socket.socket, timeout_seconds: float) -> None:
        self.sock = sock
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notices a host that vanished without a word
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS // 6)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        self.set_timeout(timeout_seconds)

    def set_timeout(self, seconds: float) -> None:
        """Give up after this long without progress, in either direction; 0 waits for ever."""
        self.sock.settimeout(None)
        limit = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1_000_000))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def receive_into(self, target: memoryview) -> None:
        """Fill `target`."""
        receive = self.sock.recv_into
        done, length = 0, len(target)
        while done < length:
            try:
                count = receive(target[done:] if done else target, 0, socket.MSG_WAITALL)
            except BlockingIOError as error:
                raise TimeoutError("no answer in time") from error
            if count == 0:
                raise Closed("the connection was closed")
            done += count

    def receive(self, length: int) -> bytearray:
        """The next `length` bytes."""
        data = bytearray(length)
        if length:
            self.receive_into(memoryview(data))
        return data

    def receive_some(self, target: memoryview) -> int:
        """At least one byte into `target`; how many, or 0 at the end."""
        try:
            return self.sock.recv_into(target)
        except BlockingIOError as error:
            raise TimeoutError("nothing came in time") from error

    def send(self, buffers: Sequence[Buffer]) -> None:
        """All buffers, in order."""
        for first in range(0, len(buffers), _GATHER_MAX):
            self._send(buffers[first : first + _GATHER_MAX])

    def _send(self, buffers: Sequence[Buffer]) -> None:
        missing = sum(map(len, buffers))
        while missing:
            try:
                sent = self.sock.sendmsg(buffers)
            except BlockingIOError as error:
                raise TimeoutError("nothing was accepted in time") from error
            missing -= sent
            if missing:
                buffers = _rest(buffers, sent)

    def shutdown(self) -> None:
        """Wake everybody who waits on this connection; they see it closed."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it was closed already, which is as good

    def close(self) -> None:
        """Give the socket back."""
        self.sock.close()


class TlsWire(Wire):
    """The same over TLS, where neither MSG_WAITALL nor sendmsg(2) exist and the timeout has to be Python's."""

    def __init__(self, wire: Wire, context: ssl.SSLContext, server_name: str, timeout_seconds: float) -> None:
        wire.sock.settimeout(timeout_seconds)
        self.sock = context.wrap_socket(wire.sock, server_hostname=server_name or None)

    def set_timeout(self, seconds: float) -> None:
        self.sock.settimeout(seconds or None)

    def receive_into(self, target: memoryview) -> None:
        done, length = 0, len(target)
        while done < length:
            count = self.sock.recv_into(target[done:])
            if count == 0:
                raise Closed("the connection was closed")
            done += count

    def send(self, buffers: Sequence[Buffer]) -> None:
        self.sock.sendall(b"".join(buffers) if len(buffers) > 1 else buffers[0])


class Deadline:
    """Spreads one time limit over several receives, against a peer that sends a byte now and then."""

    def __init__(self, wire: Wire, seconds: float) -> None:
        self._wire = wire
        self._end = time.monotonic() + seconds

    def receive(self, length: int) -> bytearray:
        """The next `length` bytes, or TimeoutError when the limit for all of them together has passed."""
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        while done < length:
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError("the handshake took too long")
            self._wire.set_timeout(max(left, 0.001))
            count = self._wire.receive_some(view[done:])
            if count == 0:
                raise Closed("the connection was closed")
            done += count
        return data

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """The next message of this layout."""
        return layout.unpack(self.receive(layout.size))


def _rest(buffers: Sequence[Buffer], sent: int) -> list[Buffer]:
    """What remains of `buffers` after their first `sent` bytes."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
