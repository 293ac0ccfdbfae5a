"""Someone who looks after the scratch while a snapshot is read: a full scratch must cost the snapshot, not the guest.

When copying an old block fails, QEMU fails the guest's write (or stops the machine), because the write came first and has
nowhere to go.  So before the room runs out the jobs are cancelled: the guest goes on, and the snapshot says it is broken.
"""

from __future__ import annotations

import threading
from pathlib import Path

from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors import qemu_fleece
from hvbackup.hypervisors.qmp import Qmp

_LOOK_SECONDS = 0.1  # a guest that overwrites 2 GB/s uses 200 MB of the reserve meanwhile


class Watch:
    """A thread between `start` and `stop`.  Thread safety: `reason` may be read at any time."""

    def __init__(self, socket_path: Path, prefix: str, folder: Path, reserve_bytes: int) -> None:
        self.reason = ""  # why the snapshot was given up
        self._socket_path = socket_path
        self._prefix = prefix
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name=f"watch {folder.name}", daemon=True)

    def start(self) -> None:
        """Look after the scratch from now on."""
        self._thread.start()

    def stop(self) -> None:
        """The thread has ended."""
        self._over.set()
        self._thread.join()

    def _look_after(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            try:
                full = qemu_fleece.free_bytes(self._folder) <= self._reserve_bytes
            except FileNotFoundError:
                return  # released by somebody else
            if full and self._let_go():
                return

    def _let_go(self) -> bool:
        self.reason = f"scratch directory {self._folder.parent} ran full"
        try:
            with Qmp(self._socket_path) as qmp:
                qemu_fleece.cancel(qmp, self._prefix)
        except HostUnreachable:
            return False  # try again: the guest waits for us
        return True
