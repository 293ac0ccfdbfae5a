"""A process that outlives ours and looks after the scratch of one libvirt backup: it must never cost the guest anything.

    python -m hvbackup.hypervisors.libvirt_watchdog URI UUID PREFIX FOLDER RESERVE_BYTES

When a block can't be kept any more, QEMU fails the guest's write or stops the machine.  So the backup is ended before the room
runs out, and as soon as nobody is left to read it.  FOLDER is empty where the scratch is on another host: then only that a
machine stands still tells that there is no room.  A byte on standard input ends the watchdog, the end of input means that its
parent died.  What it did is said on standard output.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence

from hvbackup.errors import HvbackupError, NotFound
from hvbackup.hypervisors import libvirt_xml
from hvbackup.hypervisors.libvirt_host import Domain, Host
from hvbackup.hypervisors.qemu_watchdog import LOOK_SECONDS, RETRY_SECONDS, free_bytes, say

_REMOTE_LOOK_SECONDS = 2.0
_GIVE_UP_SECONDS = 3600.0  # a daemon that is away for longer has its machines restarted, or `release` will see to it


def main(argv: Sequence[str]) -> int:
    """Look until told to stop or until something has to be done; then do it."""
    uri, uuid, prefix, folder, reserve_bytes = argv
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends a whole service wants us to let go of the guest first
    domain = Domain(Host(uri), uuid)
    while True:
        readable = select.select([0], [], [], LOOK_SECONDS if folder else _REMOTE_LOOK_SECONDS)[0]
        if readable and os.read(0, 1):
            return 0
        if readable:
            break
        if folder and free_bytes(folder) <= int(reserve_bytes):
            say(f"scratch directory {os.path.dirname(folder)} ran full")
            break
        if not folder and _stands(domain):
            say("the machine stopped because there was no room left for its scratch")
            break
    let_go(domain, prefix, folder)
    return 0


def _stands(domain: Domain) -> bool:
    try:
        return domain.paused_by_error()
    except HvbackupError:
        return False


def let_go(domain: Domain, prefix: str, folder: str) -> None:
    """The backup has ended and the machine runs when this returns, or it is gone.  A busy daemon is asked again and again.

    When the folder is gone somebody else released the snapshot, or is about to.
    """
    end = time.monotonic() + _GIVE_UP_SECONDS
    while time.monotonic() < end and (not folder or os.path.isdir(folder)):
        try:
            _end(domain, prefix)
        except NotFound:
            return
        except HvbackupError:
            time.sleep(RETRY_SECONDS)
        else:
            return


def _end(domain: Domain, prefix: str) -> None:
    while any(e.startswith(prefix) for e in libvirt_xml.exports(domain.backup_xml())):
        domain.abort_job()
        time.sleep(RETRY_SECONDS)
    if domain.active() and domain.paused_by_error():
        domain.resume()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
