"""Scratch of a machine on another host: written by ourselves there too, through the storage of its libvirt.

libvirt would have QEMU format it, and 7.2 fails an assertion, which is the end of the guest, when anybody lists its nodes
meanwhile.  So an empty image becomes the content of a volume.  libvirt removes only what it made itself: the names of ours are in
the folder of the lease before there is any, and whoever ends the backup removes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hvbackup.errors import Busy, HostUnreachable
from hvbackup.files import Files
from hvbackup.hypervisors.libvirt_host import Host, LibvirtRefused
from hvbackup.hypervisors.libvirt_room import BEGIN_WAIT_SECONDS, Room

RECORD = "away.json"


def put(room: Room, host: Host, folder: Path, images: Mapping[str, bytes]) -> bool:
    """Path -> content: they are there when this returns; False, and none is, where the host's storage can't be used like this.

    Raises HostUnreachable, Busy.
    """
    record = {"files": sorted(images), "runtime": str(room.runtime)}
    Files(folder).replace(RECORD, json.dumps(record).encode())
    with _alone(room.runtime, host):
        try:
            for path, content in images.items():
                host.remove_file(path)  # of a try that was refused
                host.put_file(path, content, room.uid, room.gid)
        except LibvirtRefused:
            with contextlib.suppress(LibvirtRefused):
                _remove(host, folder)
            (folder / RECORD).unlink(missing_ok=True)  # libvirt makes files of these names now, and removes them
            return False
    return True


def remove(host: Host, folder: Path) -> None:
    """Nothing that a lease has on its machine's host is left; idempotent.  Raises HostUnreachable."""
    if not (recorded := _recorded(folder)):
        return
    runtime = recorded.get("runtime")
    try:
        with _alone(Path(runtime), host) if runtime else contextlib.nullcontext():
            _remove(host, folder)
    except Busy as busy:
        raise HostUnreachable(str(busy)) from busy


def _alone(runtime: Path, host: Host) -> AbstractContextManager[None]:
    """Two of us would each take the other's pool for one that stays.  Raises Busy."""
    lock = f"libvirt-storage-{hashlib.sha256(host.uri.encode()).hexdigest()[:16]}.lock"
    return Files(runtime).owner(lock, f"The storage of {host.uri}", wait_seconds=BEGIN_WAIT_SECONDS)


def _remove(host: Host, folder: Path) -> None:
    for path in _recorded(folder).get("files", []):
        host.remove_file(path)
    (folder / RECORD).unlink(missing_ok=True)


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(Files(folder).read(RECORD))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {"files": found}  # as it was before there was a lock
