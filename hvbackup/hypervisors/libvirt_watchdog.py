"""A process that outlives ours and looks after the scratch of one libvirt backup: it must never cost the guest anything.

    python -I -S libvirt_watchdog.py PATH URI UUID PREFIX FOLDER RESERVE_BYTES

When a block can't be kept any more, QEMU fails the guest's write or stops the machine.  So the backup is ended before the room
runs out, and as soon as nobody is left to read it.  RESERVE_BYTES is empty where the scratch is on another host: then only that a
machine stands still tells that there is no room.  A byte on standard input ends the watchdog, the end of input means that its
parent died.  What it did is said on standard output.

It is run as a file, with nothing but the standard library, so that it starts in a few milliseconds: almost always it is told to
end and nothing more.  When it has to do something it takes PATH for its own and imports us, and libvirt.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

LOOK_SECONDS = 0.1  # a guest that overwrites 2 GB/s uses 200 MB of the reserve meanwhile
REMOTE_LOOK_SECONDS = 2.0
GIVE_UP_SECONDS = 3600.0  # a daemon that is away for longer has its machines restarted, or `release` will see to it

TYPE_CHECKING = False
if TYPE_CHECKING:  # what is imported at all times is paid for by every snapshot
    from collections.abc import Sequence

    from hvbackup.hypervisors.libvirt_host import Domain
    from hvbackup.hypervisors.qemu_watchdog import RETRY_SECONDS, free_bytes, say
else:
    _FOLDER = os.path.dirname(os.path.abspath(__file__))
    sys.path.append(_FOLDER)
    from qemu_watchdog import RETRY_SECONDS, free_bytes, say

    sys.path.remove(_FOLDER)  # it has a `qemu` of its own, which is not the library's


def main(argv: Sequence[str]) -> int:
    """Look until told to stop or until something has to be done; then do it."""
    path, uri, uuid, prefix, folder, reserve_bytes = argv
    is_here = bool(reserve_bytes)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends a whole service wants us to let go of the guest first
    while True:
        readable = select.select([0], [], [], LOOK_SECONDS if is_here else REMOTE_LOOK_SECONDS)[0]
        if readable and os.read(0, 1):
            return 0
        if readable:
            break
        if is_here and free_bytes(folder) <= int(reserve_bytes):
            say(f"scratch directory {os.path.dirname(folder)} ran full")
            break
        if not is_here and stands(domain(path, uri, uuid)):
            say("the machine stopped because there was no room left for its scratch")
            break
    let_go(domain(path, uri, uuid), prefix, folder)
    return 0


def domain(path: str, uri: str, uuid: str) -> Domain:
    """The machine, by the modules that speak to libvirt."""
    sys.path[:] = path.split(os.pathsep)
    from hvbackup.hypervisors.libvirt_host import Domain, Host

    return Domain(Host(uri), uuid)


def stands(machine: Domain) -> bool:
    """Whether the machine stands still for want of room; a daemon that does not answer says nothing."""
    from hvbackup.errors import HvbackupError

    try:
        return machine.paused_by_error()
    except HvbackupError:
        return False


def let_go(machine: Domain, prefix: str, folder: str) -> None:
    """The backup has ended, its scratch takes no room, and the machine runs or is gone when this returns.

    A busy daemon is asked again and again.

    When the folder is gone somebody else released the snapshot, or is about to.
    """
    import contextlib
    from pathlib import Path

    from hvbackup.errors import HvbackupError, NotFound
    from hvbackup.hypervisors import libvirt_away

    end = time.monotonic() + GIVE_UP_SECONDS
    while time.monotonic() < end and os.path.isdir(folder):
        try:
            with contextlib.suppress(NotFound):
                end_backup(machine, prefix)
            libvirt_away.remove(machine.host, Path(folder))
        except HvbackupError:
            time.sleep(RETRY_SECONDS)
        else:
            return remove_scratch(folder)
    return None


def remove_scratch(folder: str) -> None:
    """The scratch in the folder is gone: libvirt removes what it made itself, and only that."""
    try:
        for name in os.listdir(folder):
            if name.endswith(".scratch"):
                os.unlink(os.path.join(folder, name))
    except FileNotFoundError:
        return  # released by somebody else


def end_backup(machine: Domain, prefix: str) -> None:
    """One attempt.  Raises NotFound, HostUnreachable."""
    from hvbackup.hypervisors import libvirt_xml

    while any(e.startswith(prefix) for e in libvirt_xml.exports(machine.backup_xml())):
        machine.abort_job()
        time.sleep(RETRY_SECONDS)
    if machine.active() and machine.paused_by_error():
        machine.resume()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
