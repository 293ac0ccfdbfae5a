"""Our side of the watchdog: started before the guest's writes depend on the scratch, ended when they don't any more."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hvbackup.errors import ReadFailed
from hvbackup.target.process import PROGRAM as TARGET

_PROGRAM = Path(__file__).with_name("qemu_watchdog.py")
_GUARD = Path(__file__).with_name("qemu_stream_guard.py")
_END_SECONDS = 5.0


class Watch:
    """One watchdog process.  If we die or forget it, it lets go of the guest and ends by itself.

    Thread safety: one thread at a time.
    """

    def __init__(self, socket_path: Path, prefix: str, folder: Path, reserve_bytes: int) -> None:
        arguments = [str(socket_path.absolute()), prefix, str(folder), str(reserve_bytes)]
        self.start([sys.executable, "-I", "-S", str(_PROGRAM), *arguments])

    def start(self, command: Sequence[str], fds: Sequence[int] = ()) -> None:
        """The watchdog runs when this returns."""
        self._said = b""
        # A session of its own: ctrl-C and the end of a terminal are meant for us, not for the guest's protection.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, pass_fds=fds, cwd="/"
        )

    @property
    def reason(self) -> str:
        """Why the watchdog gave the snapshot up; empty while it did not."""
        said = self._process.stdout
        if said is not None and not said.closed and select.select([said], [], [], 0)[0]:
            self._said += os.read(said.fileno(), 4096)
        return self._said.decode(errors="replace")

    @property
    def dead(self) -> bool:
        """Whether it has ended: by itself, when it gave up what it looked after, or killed."""
        return self._process.poll() is not None

    def tell(self, order: bytes) -> None:
        """`s`: the machine is about to be stopped by us, `c`: it goes on.  Raises ReadFailed when nobody would see to that."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise ReadFailed(f"The watchdog of this snapshot is gone: {self.reason or 'it was killed'}") from error

    def abandon(self) -> None:
        """Nobody needs the snapshot any more and we can't end it: the watchdog tries until QEMU answers or is gone."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def stop(self) -> None:
        """The watchdog has ended; idempotent."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"q")
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # it waits for a monitor that hangs; what it wanted is done by `release`
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class StreamGuard(Watch):
    """The one that looks after the target of a stream."""

    def __init__(
        self, socket_path: Path, prefix: str, marker: Path, target: int, ring: Path, fds: Sequence[int]
    ) -> None:
        """`marker`: of a machine that is stopped, see `qemu_stop`."""
        arguments = [*_relieved(socket_path, prefix), str(target), str(ring), *map(str, fds), _marked(marker)]
        self.start([sys.executable, "-I", "-S", str(_GUARD), "watch", *arguments], fds)

    def relieve(self, seconds: float) -> None:
        """The target is killed and the mirrors are ended, if that can be done in time; the guard goes on trying."""
        self.abandon()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


def relieve(socket_path: Path, prefix: str, marker: Path, seconds: float) -> None:
    """The mirrors that a dead run left, whose guard is dead too, are ended, if that can be done in time.

    If not, the machine may stand still; then the marker is there.
    """
    words = ["relieve", *_relieved(socket_path, prefix), _marked(marker)]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-I", "-S", str(_GUARD), *words], stdin=subprocess.DEVNULL, timeout=seconds, check=False
        )


def _relieved(socket_path: Path, prefix: str) -> list[str]:
    """What the guard needs to know to end mirrors.  Its words stay as they are: workers run on while files are upgraded."""
    return [str(socket_path.absolute()), prefix, str(TARGET)]


def _marked(marker: Path) -> str:
    return f"--marker={marker.absolute()}"
