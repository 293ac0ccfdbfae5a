"""Processes that outlive us: started on their own, recognised later, and stopped without ever hitting another.

A process id alone is no identity, because ids are used again.  With the time the process began, and the life of the
machine it runs on, it is one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvbackup.errors import HvbackupError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STARTED_FIELD = 19  # of /proc/PID/stat, counted after the name: ticks since the machine came up
_UCRED = struct.Struct("3i")
_POLL_SECONDS = 0.02
_STARTING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Process:
    """One process of this life of this machine, and never a later one with its id."""

    pid: int
    started: int  # ticks since the machine came up
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process with this id now; None when there is none, or only its exit status is left."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[_STARTED_FIELD]), _BOOT_ID.read_text().strip())

    def is_running(self) -> bool:
        """Whether it still is that process."""
        self._reap()
        return Process.of(self.pid) == self

    def wait(self, timeout_seconds: float) -> bool:
        """Whether it ended in time."""
        end = time.monotonic() + timeout_seconds
        while self.is_running():
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def stop(self, timeout_seconds: float) -> None:
        """It has ended when this returns: asked first, then killed.  Raises HvbackupError when it does not die."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.is_running():
                self.signal(number)
            if self.wait(timeout_seconds):
                return
        raise HvbackupError(
            f"Process {self.pid} does not end although it was killed; see what it waits for in /proc/{self.pid}/stack"
        )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _reap(self) -> None:
        """Take its exit status when it was our child; nobody else can."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)


def give_way() -> None:
    """This thread, and those it begins from now on, never push another one from a processor by waking up.

    They get their share all the same: who waits for the processor waits for a time slice, not for ever.
    """
    with contextlib.suppress(OSError):  # a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def idle() -> None:
    """This thread has what nobody else wants of the processors, until it gives way again.

    That may be nothing for a long time: somebody else has to be able to call it back.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@functools.cache
def may_idle() -> bool:
    """Whether a thread of ours that is idle may be called back: without privileges RLIMIT_NICE has to allow it."""
    back: list[bool] = []

    def attempt() -> None:
        with contextlib.suppress(OSError):
            idle()
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            back.append(True)

    thread = threading.Thread(target=attempt, name="hvbackup-idle")
    thread.start()
    thread.join()
    return bool(back)


def start_detached(
    argv: Sequence[str], log: Path, errors: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Process:
    """A process of its own session, which writes to `log` (and its errors elsewhere) and lives on when we end.

    Raises HvbackupError.
    """
    to_log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    streams: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), to_log, 0o600),
        (os.POSIX_SPAWN_OPEN, 2, str(errors), to_log, 0o600) if errors else (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    try:
        pid = os.posix_spawnp(argv[0], list(argv), environment, file_actions=streams, setsid=True)
    except OSError as error:
        raise HvbackupError(f"{argv[0]} cannot be started: {error.strerror}") from error
    return Process.of(pid) or Process(pid, 0, "")


def listener(path: Path) -> Process | None:
    """The process that listens on a Unix socket; None when nobody does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError:
            return None
        pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Process.of(pid) if pid > 0 else None


def started_with(word: str) -> list[Process]:
    """The processes that have exactly this word on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid() and word in _command_line(entry):
            found.append(Process.of(int(entry.name)))
    return [process for process in found if process is not None]


def started_with_folder(*folders: Path) -> list[Process]:
    """The processes that have something directly in one of these folders on their command line."""
    others = [e for e in Path("/proc").iterdir() if e.name.isdecimal() and int(e.name) != os.getpid()]
    inside = {str(folder) for folder in folders}
    found = [e for e in others if any(word.rpartition("/")[0] in inside for word in _command_line(e))]
    return [process for e in found if (process := Process.of(int(e.name)))]


def _command_line(entry: Path) -> list[str]:
    """The words; a process that is just being started has none for a moment, which is waited for."""
    end = time.monotonic() + _STARTING_SECONDS
    while True:
        try:
            (entry / "exe").readlink()
            words = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
        except OSError:  # it has ended, is not ours to see, or belongs to the kernel
            return []
        if words != [""] or time.monotonic() > end:
            return words
        time.sleep(_POLL_SECONDS)
