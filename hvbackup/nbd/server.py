"""A server of named exports to any NBD client, on unix sockets and TCP.

    with NbdServer({"vda": ViewExport(view)}) as server:
        server.listen_unix("/run/hvbackup/boot.nbd")
        ...

One thread listens on each socket, and each connection has a session (see session.py) with a few threads of its own.
Nothing a client sends ends anything but its own connection.  Handling signals is the caller's business.

Thread safety: every method may be called from any thread.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from hvbackup.errors import Busy, HvbackupError
from hvbackup.nbd.buffers import Shelf
from hvbackup.nbd.export import Export
from hvbackup.nbd.options import Handshake
from hvbackup.nbd.protocol import DEFAULT_PORT, ProtocolError
from hvbackup.nbd.requests import OnError
from hvbackup.nbd.session import Limits, Session
from hvbackup.nbd.uri import NbdUri
from hvbackup.nbd.wire import Wire

_BACKLOG = 128
_WATCH_SECONDS = 0.05  # between two looks at the sessions
_ACCEPT_PAUSE_SECONDS = 0.1  # after accept(2) failed for want of file descriptors or memory


def _ignore(name: str, asked: str, error: Exception) -> None:
    """Errors of exports go to nobody but the client."""


class NbdServer:
    """Serves exports until it is closed; see the module's docstring."""

    def __init__(
        self,
        exports: Mapping[str, Export] | None = None,
        *,
        limits: Limits | None = None,
        on_error: OnError = _ignore,
    ) -> None:
        self._exports = dict(exports or {})
        self._limits = limits or Limits()
        self._on_error = on_error
        self._shelf = Shelf(self._limits.buffer_bytes)
        self._lock = threading.Lock()  # guards what follows
        self._closed = False
        self._listeners: list[tuple[socket.socket, threading.Thread, NbdUri]] = []
        self._clients: dict[Wire, _Client] = {}
        self._somebody = threading.Event()  # there are clients, or the end has come
        self._watcher = threading.Thread(target=self._watch, name="nbd watch", daemon=True)

    # --- what is served ----------------------------------------------------------------------------------------------

    def add(self, name: str, export: Export) -> None:
        """Offer one more export, or another under a name; clients that have the old one open keep it."""
        self._exports = {**self._exports, name: export}

    def remove(self, name: str) -> None:
        """Stop offering an export and disconnect its clients."""
        gone = self._exports.get(name)
        self._exports = {other: export for other, export in self._exports.items() if other != name}
        for client in self._snapshot():
            if gone is not None and client.export is gone:
                client.wire.shutdown()

    @property
    def connections(self) -> int:
        """Clients that are connected now."""
        return len(self._clients)

    # --- listening ---------------------------------------------------------------------------------------------------

    def listen_unix(self, path: str | os.PathLike[str], *, mode: int = 0o600) -> NbdUri:
        """Accept clients on a unix socket, those whom `mode` allows; a dead socket file is replaced."""
        path = Path(path).absolute()
        sock = socket.socket(socket.AF_UNIX)
        try:
            _remove_dead(path)
            sock.bind(str(path))
            path.chmod(mode)  # before listen(2), so nobody can have connected yet
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise HvbackupError(f"{path}: Cannot listen there, {error.strerror or error}") from error
        except HvbackupError:
            sock.close()
            raise
        return self._listen(sock, NbdUri(socket=str(path)))

    def listen_tcp(self, host: str = "localhost", port: int = DEFAULT_PORT) -> NbdUri:
        """Accept clients on TCP, unencrypted; port 0 takes a free one.  The URI says which."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.create_server((address[0], port), family=family, backlog=_BACKLOG)
        except OSError as error:
            kind = Busy if error.errno == errno.EADDRINUSE else HvbackupError
            raise kind(f"{host}:{port}: Cannot listen there, {error.strerror or error}") from error
        return self._listen(sock, NbdUri(host=host, port=sock.getsockname()[1]))

    def _listen(self, sock: socket.socket, uri: NbdUri) -> NbdUri:
        thread = threading.Thread(target=self._accept, args=(sock,), name=f"nbd listen {uri}", daemon=True)
        with self._lock:
            if self._closed:
                sock.close()
                raise HvbackupError(f"{uri}: The server is closed")
            self._listeners.append((sock, thread, uri))
            if self._watcher.ident is None:
                self._watcher.start()
        thread.start()
        return uri

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                sock, _ = listener.accept()
            except OSError:
                # Closed by us, a client that left the queue, or out of file descriptors for the moment.
                if not self._closed:
                    time.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        try:
            wire = Wire(sock, self._limits.stall_seconds)
        except OSError:  # reset before we looked at it
            sock.close()
            return
        client = _Client(self, wire)
        with self._lock:
            welcome = not self._closed and len(self._clients) < self._limits.connections
            if welcome:
                self._clients[wire] = client
                self._somebody.set()
                client.thread.start()
        if not welcome:
            wire.close()
            self._on_error("", "accepting a client", Busy(f"All {self._limits.connections} connections are in use"))

    # --- clients -----------------------------------------------------------------------------------------------------

    def _serve(self, client: _Client) -> None:
        """The whole life of one connection."""
        try:
            chosen = Handshake(client.wire, self._exports, self._limits.handshake_seconds).run()
            if chosen is None:
                return
            client.export = chosen.export
            if all(export is not chosen.export for export in self._exports.values()):
                return  # withdrawn while the client was choosing it: `remove` could not see this connection yet
            client.wire.set_timeout(self._limits.stall_seconds)
            client.session = Session(client.wire, chosen, self._shelf, self._limits, self._on_error)
            client.session.run()
        except (OSError, ProtocolError):
            return  # a port scanner, or a client that did not like what is offered
        finally:
            with self._lock:
                del self._clients[client.wire]
                if not self._clients and not self._closed:
                    self._somebody.clear()
            client.wire.close()

    def _watch(self) -> None:
        """Help sessions whose threads are stuck, while there are any clients."""
        while not self._closed:
            self._somebody.wait()
            for client in self._snapshot():
                if client.session is not None:
                    client.session.rescue()
            time.sleep(_WATCH_SECONDS)

    def _snapshot(self) -> list[_Client]:
        with self._lock:
            return list(self._clients.values())

    # --- end ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop listening, disconnect everybody and end all threads.

        An export that does not return from a read keeps its thread; after `close_seconds` it is left behind (threads
        are daemons) and reported.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._somebody.set()
        self._shelf.budget.close()
        for sock, thread, uri in self._listeners:
            if uri.socket:  # first, while we still listen: what is there afterwards is somebody else's
                Path(uri.socket).unlink(missing_ok=True)
            _wake(sock)
            thread.join(self._limits.close_seconds)
            sock.close()
        self._disconnect_all()
        if self._watcher.ident is not None:
            self._watcher.join()

    def _disconnect_all(self) -> None:
        end = time.monotonic() + self._limits.close_seconds
        clients = self._snapshot()
        for client in clients:
            client.wire.shutdown()
        for client in clients:
            client.thread.join(max(0.0, end - time.monotonic()))
            if client.thread.is_alive():
                self._on_error("", "closing the server", TimeoutError("an export did not return from a request"))

    def __enter__(self) -> NbdServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Client:
    """One connection and its first thread."""

    __slots__ = ("export", "session", "thread", "wire")

    def __init__(self, server: NbdServer, wire: Wire) -> None:
        self.wire = wire
        self.export: Export | None = None
        self.session: Session | None = None
        self.thread = threading.Thread(target=server._serve, args=(self,), name="nbd client", daemon=True)


def _wake(listener: socket.socket) -> None:
    """Make accept(2) in another thread return."""
    try:
        listener.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # not listening any more, which is as good


def _remove_dead(path: Path) -> None:
    """Remove a socket file that nobody listens on; Busy when somebody does."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise Busy(f"{path}: Another server listens there")
