"""A machine's QMP, handed through by libvirt: a process that listens on a socket as QEMU would, and outlives us for our watchdog.

    python -m hvbackup.hypervisors.libvirt_monitor URI UUID SOCKET

libvirt holds the monitors of its machines, and passes on commands that it is given (`qemu-monitor-command`; it marks the machine
as tainted then).  With this in between, everything that speaks to a QEMU speaks to a machine of libvirt.  It serves several
clients at once, and none for ever: when its parent is dead and nobody was connected for a while it ends.  Events and out-of-band
commands don't come through.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvbackup.errors import HvbackupError
from hvbackup.hypervisors.libvirt_host import Domain, Host

COMMAND_SECONDS = 60.0
LINGER_SECONDS = 10.0  # after our parent's death: its watchdog comes within a second, and again
_PIECE_BYTES = 1 << 16
_GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 0}, "package": "libvirt"}, "capabilities": []}
}


class Server(socketserver.ThreadingUnixStreamServer):
    """Thread safety: a thread for each client."""

    daemon_threads = True

    def __init__(self, path: str, domain: Domain) -> None:
        self.domain = domain
        self.clients = 0
        self.lock = threading.Lock()
        before = os.umask(0o177)
        try:
            super().__init__(path, _Client)
        finally:
            os.umask(before)

    def count(self, step: int) -> None:
        """A client came or went."""
        with self.lock:
            self.clients += step


class _Client(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        self.server.count(1)
        try:
            self._say(json.dumps(_GREETING))
            for asked in self._asked():
                self._say(_answer(self.server.domain, asked))
        except (OSError, ValueError, HvbackupError):
            return  # closing the line is all that can be said; who asks next hears the reason from libvirt
        finally:
            self.server.count(-1)

    def _asked(self) -> Iterator[dict[str, object]]:
        """One command after the other; clients may send them without anything in between."""
        seen, decoder = "", json.JSONDecoder()
        while data := self.request.recv(_PIECE_BYTES):
            seen += data.decode()
            while seen := seen.lstrip():
                try:
                    asked, end = decoder.raw_decode(seen)
                except ValueError:
                    break  # there is more to come
                seen = seen[end:]
                yield asked

    def _say(self, text: str) -> None:
        self.request.sendall(text.encode() + b"\n")


def _answer(domain: Domain, asked: dict[str, object]) -> str:
    """QEMU's answer, under the number that the client gave; libvirt has numbers of its own."""
    number = asked.pop("id", None)
    if asked.get("execute") == "qmp_capabilities":
        answer: dict[str, object] = {"return": {}}
    else:
        answer = json.loads(domain.monitor(json.dumps(asked), COMMAND_SECONDS))
        answer.pop("id", None)
    if number is not None:
        answer["id"] = number
    return json.dumps(answer)


def main(argv: Sequence[str]) -> int:
    """Serve until nobody needs it."""
    uri, uuid, path = argv
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends a whole service wants the watchdog to reach QEMU first
    domain = Domain(Host(uri), uuid)
    Path(path).unlink(missing_ok=True)
    with Server(path, domain) as server:
        threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True).start()
        os.write(1, b"ready\n")
        _wait(server)
    Path(path).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # our parent may have been faster
        Path(path).parent.rmdir()
    return 0


def _wait(server: Server) -> None:
    """Until told to stop by a byte, or orphaned and idle."""
    if select.select([0], [], [])[0] and os.read(0, 1):
        return
    idle = time.monotonic()
    while time.monotonic() < idle + LINGER_SECONDS:
        time.sleep(0.2)
        if server.clients:
            idle = time.monotonic()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
