"""Every error hvbackup raises: one class for each thing the reader can do about it.

    HvbackupError                 1   failed
    ├── UsageError                2   what was asked makes no sense; nothing was touched
    │   ├── NotFound                  a machine, disk, point or moment that does not exist
    │   ├── JournalGap                a moment that was not recorded; names the nearest ones that were
    │   └── StoreMissing              no store there, or a store of another kind or version
    ├── HostUnreachable           4   a hypervisor, disk server or host does not answer
    │   ├── ReadFailed                it answered, and could not read or write these bytes
    │   ├── DiskReplaced              a disk has another content, and what tracks its changes does not know
    │   └── StreamBroken              a machine's writes do not reach us any more
    │       └── StreamBypassed        and some were missed before that was noticed
    │           └── StreamUncertain   or may have been; what tracks changes knows which
    ├── Busy                      5   somebody else holds the store, the machine or the disk
    ├── SpaceExhausted            1   no room left; what was committed is untouched
    ├── HookFailed                1   a program of the administrator's said no, or did not end
    ├── FileSystemUnreadable      1   a file system inside a disk is broken, encrypted or unknown; the disk itself is as it was
    ├── KeyRefused                2   no key, a wrong key, or a damaged key file
    └── StoreDamage              20   stored bytes are missing or wrong
        ├── ChunkDamaged              one chunk; `check` names what needs it
        └── PointDamaged              one point file

The class carries the exit code, the message says what, which one, and what to do now.
"""

from __future__ import annotations

import contextlib
import traceback


class HvbackupError(Exception):
    """Base of all errors meant for a person; `str()` is the whole message."""

    exit_code = 1


class UsageError(HvbackupError):
    """What was asked for makes no sense; nothing was touched."""

    exit_code = 2


class NotFound(UsageError):
    """The named machine, disk, point or moment does not exist."""


class JournalGap(NotFound):
    """The moment lies where nothing was recorded; the nearest recoverable moments are in the message."""


class StoreMissing(UsageError):
    """There is no store at this place, or it is not one this version can open."""


class KeyRefused(UsageError):
    """No key was given, or the key does not open this store; nothing was written."""


class HostUnreachable(HvbackupError):
    """A hypervisor, disk server or host refused, broke off or did not answer in time."""

    exit_code = 4


class StreamBroken(HostUnreachable):
    """The writes of a machine do not reach us any more; what was recorded until then is good."""


class StreamBypassed(StreamBroken):
    """Writes of a machine went past us before that was noticed: moments since the last good look may lack some."""


class StreamUncertain(StreamBypassed):
    """Moments since the last good look may lack a write; QEMU's bitmaps have it."""


class DiskReplaced(HostUnreachable):
    """A disk is another file under the name it had: what its bitmap calls unchanged proves nothing."""


class ReadFailed(HostUnreachable):
    """The other side answered, and could not read (or write) these bytes of a disk."""


class Busy(HvbackupError):
    """Somebody else holds what we need; try again when they are done."""

    exit_code = 5


class SpaceExhausted(HvbackupError):
    """The store, the scratch or the target has no room left; committed points are untouched."""


class HookFailed(HvbackupError):
    """A hook ended with an error or not in time; before a freeze this means that there is no point."""


class FileSystemUnreadable(HvbackupError):
    """A file system inside a disk is broken, encrypted or unknown; the disk is as it was, and can be restored or booted."""


class PartlyFailed(HvbackupError):
    """Some of what was asked was done, some was not; the message says which."""

    exit_code = 3


class Interrupted(HvbackupError):
    """Stopped by a person (ctrl-C) or by the system; nothing committed was lost."""

    exit_code = 130


class StoreDamage(HvbackupError):
    """Bytes in the store are missing or are not what was written."""

    exit_code = 20


class ChunkDamaged(StoreDamage):
    """A chunk cannot be read back; `hvbackup check` names every point that needs it."""


class PointDamaged(StoreDamage):
    """A point file cannot be read, or its signature does not match."""


def trace(error: BaseException) -> None:
    """Where an error comes from that nobody expected, on standard error, if anybody can be told."""
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(error)
