"""Listening: on the local socket, where everybody who gets in may do everything, and with TLS on the network."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from hvbackup.api import app as application
from hvbackup.api import pages, scrape, tls
from hvbackup.api.gate import Desk
from hvbackup.auth import Accounts
from hvbackup.config import private
from hvbackup.daemon.keeper import Keeper
from hvbackup.errors import HvbackupError, UsageError

SOCKET = "api.sock"  # in the run directory
START_SECONDS = 30.0
STOP_SECONDS = 3
log = logging.getLogger("hvbackup.api")


@contextmanager
def answering(keeper: Keeper) -> Iterator[Desk]:
    """The API answers for as long as the context lasts.  Raises UsageError, HvbackupError."""
    keeper.refresh()
    desk = Desk(keeper, Accounts(keeper.places.configuration, keeper.clock))
    desk.load_audit()
    made = application.create(desk)
    pages.warm()
    for store in keeper.stores:
        scrape.figures.of(keeper, store)  # what takes a while is known when somebody looks
    servers = [_serve(Local(made), local(keeper.places.run / SOCKET), None)]
    if keeper.settings.service.listen:
        listener = network(keeper.settings.service.listen)
        desk.port = listener.getsockname()[1]
        servers.append(_serve(made, listener, _files(keeper)))
        log.info("API and console: https://%s:%d", *_name(listener))
    try:
        yield desk
    finally:
        keeper.questions.close()  # else who waits for an answer would hold up our end
        for server, thread in servers:
            server.should_exit = True
            thread.join(STOP_SECONDS + 2)
        (keeper.places.run / SOCKET).unlink(missing_ok=True)


class Local:
    """Marks what came over the local socket."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        scope["hvbackup.local"] = True
        await self._app(scope, receive, send)


def _files(keeper: Keeper) -> tuple[Path, Path]:
    s = keeper.settings.service
    return (Path(s.certificate), Path(s.key)) if s.certificate else tls.certificate(keeper.places.configuration)


def _name(listener: socket.socket) -> tuple[str, int]:
    """Where a browser finds us."""
    host, port = listener.getsockname()[:2]
    anywhere = host in ("0.0.0.0", "::")
    return socket.getfqdn() if anywhere else f"[{host}]" if ":" in host else host, port


def local(path: Path) -> socket.socket:
    """A socket that only who we are, and root, can reach.  We hold the service's lock: a file that is there is a dead one's."""
    private(path.parent)
    path.unlink(missing_ok=True)
    made, before = socket.socket(socket.AF_UNIX), os.umask(0o177)
    try:
        made.bind(str(path))
    finally:
        os.umask(before)
    return made


def network(listen: str) -> socket.socket:
    """A listening socket.  Raises UsageError."""
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        made = socket.socket(found[0][0])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(found[0][4])
    except (OSError, ValueError, OverflowError) as e:
        raise UsageError(f"[service] listen: {listen} can't be listened on: {e}") from e
    return made


def _serve(
    app: ASGIApp, listener: socket.socket, secure: tuple[Path, Path] | None
) -> tuple[uvicorn.Server, threading.Thread]:
    """It answers when this returns."""
    cert, key = secure or (None, None)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off", proxy_headers=False,
        timeout_graceful_shutdown=STOP_SECONDS, ssl_certfile=cert, ssl_keyfile=key,
    )  # fmt: skip
    if secure:
        try:
            config.load()
        except (OSError, ValueError) as e:
            raise UsageError(f"The certificate {cert} can't be used: {e}") from e
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="hvbackup-api", daemon=True)
    thread.start()
    end = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > end:
            raise HvbackupError("The API could not be started; see the log")
        time.sleep(0.02)
    return server, thread
