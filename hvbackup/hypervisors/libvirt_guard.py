"""A small process that outlives ours, freezes a guest through libvirt and lets it go again, whatever becomes of us.

    python -m hvbackup.hypervisors.libvirt_guard URI UUID LIMIT_SECONDS MARKER [MOUNTPOINT...]

It obeys and answers as `agent_guard` does, which has the rest: only the way to the agent is another one, because libvirt holds
the agent's socket.  It has a connection to libvirt of its own.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

from hvbackup.errors import HvbackupError, NotFound
from hvbackup.hypervisors import agent_guard
from hvbackup.hypervisors.agent_guard import (
    ORDER_SECONDS,
    REPLY_SECONDS,
    Line,
    Refused,
    hold,
    mark,
    ordered,
    say,
    unmark,
)
from hvbackup.hypervisors.libvirt_freeze import frozen
from hvbackup.hypervisors.libvirt_host import Domain, Host, LibvirtRefused


class LibvirtLine(Line):
    """libvirt's calls behind the names of the agent's commands.  Raises OSError, Refused."""

    def __init__(self, uri: str, uuid: str) -> None:
        self._domain = Domain(Host(uri), uuid)

    def sync(self) -> None:
        """libvirt matches answers to questions by itself."""

    def command(self, name: str, arguments: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        """The answer to the few commands that a guard needs."""
        given, seconds = arguments or {}, seconds or REPLY_SECONDS
        try:
            if name == "guest-fsfreeze-status":
                return self._status()
            if name == "guest-fsfreeze-thaw":
                return self._domain.thaw(seconds)
            return self._domain.freeze(given.get("mountpoints", ()), seconds)
        except NotFound as error:
            raise ConnectionRefusedError(str(error)) from error
        except LibvirtRefused as refused:
            raise Refused(name, refused.words) from refused
        except HvbackupError as error:
            raise TimeoutError(str(error)) from error

    def _status(self) -> str:
        """A guest that stands still answers nothing else, and says why."""
        try:
            self._domain.filesystems()
        except LibvirtRefused as refused:
            if frozen(refused):
                return "frozen"
            if not self._domain.active():
                raise NotFound("The machine is off") from refused
            raise
        return "thawed"

    def close(self) -> None:
        self._domain.host.close()


def main(argv: Sequence[str]) -> int:
    """Freeze and thaw once, as told."""
    uri, uuid, limit_seconds, marker, *mountpoints = argv
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends a whole service wants us to finish first
    try:
        line = LibvirtLine(uri, uuid)
        stands = line.command("guest-fsfreeze-status") != "thawed"
    except (OSError, Refused, agent_guard.Garbled) as error:
        say(error=str(error))
        return 1
    say(ready=True, frozen=stands)
    if not stands and ordered(ORDER_SECONDS):
        mark(marker)
        hold(lambda: LibvirtLine(uri, uuid), line, float(limit_seconds), mountpoints)
        unmark(marker)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
