"""One connection to the service, over its local socket: apart, because HTTP costs a tenth of a short command."""

from __future__ import annotations

import http.client
import socket

Failed = http.client.HTTPException


class Line(http.client.HTTPConnection):
    """An HTTP connection over a unix socket."""

    def __init__(self, path: str, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        """Over the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
