"""How we reach the NBD server of a backup job: a unix socket here, one forwarded by ssh, or TCP with TLS.

libvirt allots no ports, so on a host reached by TLS we take the first one in a small range that is free.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors.libvirt_room import Room
from hvbackup.hypervisors.libvirt_seen import shell_of
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.hypervisors.qemu_names import LeaseNames
from hvbackup.nbd.uri import NbdUri

PORTS = 64  # as many machines of one host may be read at the same time
_SSH_SECONDS = 20.0


class Line(Protocol):
    """The way to one job's exports."""

    @property
    def server(self) -> Mapping[str, str]:
        """What libvirt is told of the server."""

    def another_port(self, words: str) -> bool:
        """Whether libvirt's refusal was about the port, and there is another one to try."""

    def connect(self) -> None:
        """The exports can be reached when this returns.  Raises HostUnreachable."""

    def export(self, name: str) -> NbdUri:
        """The address of one export."""

    def close(self) -> None:
        """Nothing of the way is left; idempotent."""


def open_line(room: Room, folder: Path, names: LeaseNames) -> Line:
    """The way to a job that is about to begin."""
    if room.where.local:
        return UnixLine(room.socket(folder, names))
    if room.where.by_ssh:
        return SshLine(room.where, room.socket(folder, names), room.short(f"{names.prefix}ssh.sock"))
    return TlsLine(room.where)


class UnixLine:
    """A socket of this host."""

    def __init__(self, path: str) -> None:
        self.server = {"transport": "unix", "socket": path}

    def another_port(self, words: str) -> bool:
        return False

    def connect(self) -> None:
        """It is there."""

    def export(self, name: str) -> NbdUri:
        return NbdUri(name, socket=self.server["socket"])

    def close(self) -> None:
        """Nothing of ours."""


class SshLine(UnixLine):
    """A socket of another host, forwarded for as long as a `cat` of ours runs there: it ends when we do."""

    def __init__(self, where: LibvirtUri, remote: str, local: Path) -> None:
        super().__init__(remote)
        self._where, self._local = where, local
        self._process: subprocess.Popen[bytes] | None = None

    def connect(self) -> None:
        self._local.unlink(missing_ok=True)
        shell = shell_of(self._where)
        forward = ["-o", "ExitOnForwardFailure=yes", "-L", f"{self._local}:{self.server['socket']}"]
        command = [shell[0], *forward, *shell[1:], "cat"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        end = time.monotonic() + _SSH_SECONDS
        while not self._local.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise HostUnreachable(f"ssh to {self._where.host} forwards no socket: {self._words()}")
            time.sleep(0.02)

    def _words(self) -> str:
        assert self._process is not None
        self._process.kill()
        said = self._process.communicate()[1].decode(errors="replace").strip()
        return said[-300:] or f"no answer within {_SSH_SECONDS:g} s"

    def export(self, name: str) -> NbdUri:
        return NbdUri(name, socket=str(self._local))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._local.unlink(missing_ok=True)


class TlsLine:
    """TCP with certificates on both sides."""

    def __init__(self, where: LibvirtUri) -> None:
        self._where = where
        # Several of us may begin at the same time, so each begins somewhere else in the range.
        self._ports = [where.nbd_port + n for n in range(PORTS)]
        start = random.randrange(PORTS)
        self._ports = self._ports[start:] + self._ports[:start]

    @property
    def server(self) -> Mapping[str, str]:
        everywhere = "::" if ":" in self._where.host else "0.0.0.0"
        return {"transport": "tcp", "tls": "yes", "name": everywhere, "port": str(self._ports[0])}

    def another_port(self, words: str) -> bool:
        if "in use" not in words or len(self._ports) == 1:
            return False
        self._ports.pop(0)
        return True

    def connect(self) -> None:
        """Each connection is made anew."""

    def export(self, name: str) -> NbdUri:
        return NbdUri(name, self._where.host, self._ports[0], tls=True, certificates=self._where.certificates)

    def close(self) -> None:
        """Nothing of ours."""
