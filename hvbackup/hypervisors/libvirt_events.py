"""What happens on a libvirt host, as it happens: machines that appear, run, stop, go back or get other disks.

    with watching(host, lambda event: ...):
        ...

An event is a reason to look, never a fact to rely on: a daemon that is restarted, or a connection that breaks, loses some.
`lost` is told of that once, and whoever watches begins anew and looks at everything.

Thread safety: events come on a thread of libvirt's, one at a time; what is called must return soon.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hvbackup.hypervisors.libvirt_host import Happening, Host
from hvbackup.hypervisors.libvirt_xml import NAMESPACE
from hvbackup.model import MachineId


class Kind(enum.StrEnum):
    """What happened to a machine."""

    DEFINED = "defined"  # it is new, or its definition changed
    REMOVED = "removed"
    STARTED = "started"
    STOPPED = "stopped"
    PAUSED = "paused"
    RESUMED = "resumed"
    CRASHED = "crashed"
    REVERTED = "reverted"  # it went back to a snapshot
    MIGRATED = "migrated"  # it came from another host, or went to one
    DISKS = "disks"  # one was attached or detached, or its image became another one
    TAGGED = "tagged"  # its metadata says something else to us
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    kind: Kind
    machine: MachineId
    name: str

    @property
    def breaks_tracking(self) -> bool:
        """Whether changes since a checkpoint may not be provable any more."""
        return self.kind in (Kind.CRASHED, Kind.REVERTED, Kind.MIGRATED, Kind.DISKS, Kind.REMOVED)


_LIFECYCLE = {
    ("defined", ""): Kind.DEFINED,
    ("undefined", ""): Kind.REMOVED,
    ("started", ""): Kind.STARTED,
    ("started", "migrated"): Kind.MIGRATED,
    ("started", "snapshot"): Kind.REVERTED,
    ("suspended", ""): Kind.PAUSED,
    ("suspended", "snapshot"): Kind.REVERTED,
    ("resumed", ""): Kind.RESUMED,
    ("resumed", "migrated"): Kind.MIGRATED,
    ("resumed", "snapshot"): Kind.REVERTED,
    ("stopped", ""): Kind.STOPPED,
    ("stopped", "crashed"): Kind.CRASHED,
    ("stopped", "failed"): Kind.CRASHED,
    ("stopped", "migrated"): Kind.MIGRATED,
    ("stopped", "snapshot"): Kind.REVERTED,
    ("crashed", ""): Kind.CRASHED,
    ("disks", ""): Kind.DISKS,
    ("metadata", NAMESPACE): Kind.TAGGED,
}


@contextmanager
def watching(host: Host, report: Callable[[Event], None], lost: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Events are reported while the context lasts.  Raises HostUnreachable."""

    def happened(what: Happening) -> None:
        kind = _LIFECYCLE.get((what.event, what.detail)) or _LIFECYCLE.get((what.event, "")) or Kind.OTHER
        report(Event(kind, MachineId(what.uuid), what.name))

    stop = host.watch(happened, lost)
    try:
        yield
    finally:
        stop()
