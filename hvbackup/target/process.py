"""The target as a process: started before QEMU is told of it, ended when QEMU has let go, or with us."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvbackup.errors import HvbackupError, UsageError
from hvbackup.target import ring as rings
from hvbackup.target.ring import DEFAULT_BYTES, Ring

PROGRAM = Path(__file__).with_name("hvbackup-target")
_END_SECONDS = 2.0
_START_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Export:
    """One disk of the machine, as the target offers it."""

    name: str
    size: int


class Target:
    """A running target.  Thread safety: one thread; `kill` from any."""

    def __init__(self, exports: Sequence[Export], ring: Path, socket_path: Path, size: int = DEFAULT_BYTES) -> None:
        """It listens when this returns.  Raises UsageError, SpaceExhausted, HvbackupError."""
        if not PROGRAM.exists():
            raise UsageError(
                f"The stream's target {PROGRAM} was not built, for want of a C compiler; "
                "install gcc and libc6-dev and install hvbackup again"
            )
        self.exports, self.path, self.ring_path = tuple(exports), socket_path, ring
        self.ring: Ring = rings.make(ring, size)
        try:
            self._process = self._start()
            self._wait_until_recording()
        except BaseException:
            self.close()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        with socket.socket(socket.AF_UNIX) as listener:
            self.path.unlink(missing_ok=True)
            listener.bind(str(self.path))
            listener.listen(len(self.exports) + 8)
            words = [word for e in self.exports for word in (str(e.size), e.name)]
            fds = (self.ring.fd, listener.fileno())
            # A session of its own: ctrl-C and the end of a terminal are meant for us, not for what the guest waits for.
            return subprocess.Popen(
                [str(PROGRAM), *map(str, fds), *words],
                stdin=subprocess.PIPE,
                pass_fds=fds,
                start_new_session=True,
                cwd="/",
            )

    def _wait_until_recording(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while self.ring.heads.state != rings.RECORDING:
            if self._process.poll() is not None or time.monotonic() > end:
                raise HvbackupError(f"The stream's target {PROGRAM} did not start")
            time.sleep(0.002)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def dead(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """It is gone, and with it every connection of QEMU; even a target that hangs.  The ring stays."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)

    def close(self, *, keep_ring: bool = False) -> None:
        """Nothing is left of it but, if wanted, its ring."""
        if hasattr(self, "_process"):
            if self._process.stdin:
                self._process.stdin.close()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
                self._process.wait()
        self.path.unlink(missing_ok=True)
        self.ring.close()
        if not keep_ring:
            self.ring_path.unlink(missing_ok=True)
