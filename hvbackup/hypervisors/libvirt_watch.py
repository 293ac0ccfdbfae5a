"""Our side of the watchdog of a libvirt backup: started before the guest's writes depend on the scratch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hvbackup.hypervisors.libvirt_host import Domain
from hvbackup.hypervisors.libvirt_room import Room
from hvbackup.hypervisors.qemu_watch import Watch

_PROGRAM = Path(__file__).with_name("libvirt_watchdog.py")


class LibvirtWatch(Watch):
    """One watchdog process, which speaks to libvirt."""

    def __init__(self, room: Room, domain: Domain, prefix: str, folder: Path) -> None:
        arguments = [
            os.pathsep.join(sys.path),
            domain.host.uri,
            domain.uuid,
            prefix,
            str(folder),
            str(room.limits.scratch_reserve_bytes) if room.where.local else "",
        ]
        self.start([sys.executable, "-I", "-S", str(_PROGRAM), *arguments])
