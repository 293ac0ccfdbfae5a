"""Stopping a machine for a moment, so that several have one moment in common; it always goes on.

    killed after            left behind                  cleaned by
    1 watchdog told         nothing                      the watchdog lets the machine go on
    2 marker, `stop`        a machine that stands still  the same; both dead: `go_on`, by `release`
    3 `cont`                the marker                   the same

A machine that somebody else has stopped stands still already, and stays so.  The guard of a stream leaves the same marker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvbackup.errors import HostUnreachable, HvbackupError
from hvbackup.hypervisors.qemu_watch import Watch
from hvbackup.hypervisors.qemu_wire import Wire
from hvbackup.hypervisors.qmp import CommandRefused, Qmp

MARKER = "stopped"  # in the folder of a lease


ELSEWHERE = {
    "postmigrate": "handed its machine to another QEMU by live migration",
    "finish-migrate": "is handing its machine to another QEMU by live migration",
    "inmigrate": "is waiting for a machine by live migration",
}


def refuse_elsewhere(
    path: Path,
    status: Mapping[str, Any] | None,
    migration: Callable[[], Mapping[str, Any] | None],
    kind: type[HostUnreachable] = HostUnreachable,
) -> None:
    """The machine runs in this QEMU; its disks would not be what they are.  Raises HostUnreachable, of this kind."""
    found = str(status["status"]) if status else ""
    if found == "prelaunch" and (gone := migration() or {}).get("status") == "completed" and "total-time" in gone:
        found = "postmigrate"  # and it was reset since; the QEMU to which a machine came tells no times
    if where := ELSEWHERE.get(found):
        raise kind(f"QEMU at {path} {where}; name the socket of the one in which the machine runs")


def can_stop(wire: Wire) -> str:
    """Why the machine can't be stopped; empty when it can."""
    try:
        wire.one("query-status")
    except CommandRefused:
        return "a storage daemon can't hold its guests still"
    return ""


@contextmanager
def stopped(wire: Wire, watch: Watch, folder: Path) -> Iterator[None]:
    """No instruction of the guest runs and nothing is in flight to its disks while the context lasts."""
    if not wire.one("query-status")["running"]:
        yield
        return
    watch.tell(b"s")
    marker(folder).touch(0o600)
    try:
        wire.one("stop")
        yield
    finally:
        wire.one("cont")
        marker(folder).unlink(missing_ok=True)
        with contextlib.suppress(HvbackupError):
            watch.tell(b"c")


def marker(folder: Path) -> Path:
    """It is there while the machine may stand still for the lease of this folder."""
    return folder / MARKER


def left_over(folder: Path) -> bool:
    """Whether a run that is dead, and whose watchdog is dead too, may have left the machine stopped."""
    return marker(folder).exists()


def go_on(qmp: Qmp, folder: Path) -> None:
    """What was left over runs again when this returns.  Raises HostUnreachable."""
    if qmp.command("query-status")["status"] == "paused":
        qmp.command("cont")
    marker(folder).unlink(missing_ok=True)
