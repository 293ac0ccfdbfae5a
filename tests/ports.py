"""Ports for servers that can not be asked which one the kernel gave them."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, COUNT = 10_000, 20_000  # below those that the kernel gives to whoever asks for any
_TRIED = itertools.count(os.getpid() * 101)  # far from where another process of the tests looks


def free_port() -> int:
    """A port of this host that nobody listens at, and that the kernel gives nobody until our server takes it."""
    for tried in itertools.islice(_TRIED, COUNT):
        port = FIRST + tried % COUNT
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("Every port is taken")
