"""A small process that outlives ours and looks after the scratch of one snapshot: it must never cost the guest anything.

When copying an old block fails, QEMU fails the guest's write, or stops the machine, for the write came first and has
nowhere to go *(seen with 7.2: on a full scratch the guest got ENOSPC)*.  So before the room runs out, and as soon as
nobody is left to read the snapshot, its jobs are cancelled: the guest goes on, and the snapshot is known to be broken.

    python -I -S qemu_watchdog.py SOCKET PREFIX FOLDER RESERVE_BYTES

A byte `q` on standard input ends it, the end of input means that its parent died.  `s`: the parent is about to stop the machine
for a moment; `c`: it goes on.  A machine that its parent left stopped goes on; a parent that takes too long over it is woken, for
it may have been stopped itself.  What was done is said on standard output.
It is run as a file, needs nothing but the standard library, and so starts in a few milliseconds: it can't import us.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

LOOK_SECONDS = 0.1  # a guest that overwrites 2 GB/s uses 200 MB of the reserve meanwhile
REPLY_SECONDS = 20.0
RETRY_SECONDS = 0.5
STOPPED_SECONDS = 2.0  # a common moment of several machines takes a fraction of it

TYPE_CHECKING = False
if TYPE_CHECKING:  # what is imported at all times is paid for by every snapshot
    import io
    from collections.abc import Callable, Sequence
    from typing import Any


class Gone(Exception):
    """QEMU is not there any more, so there is nothing left to protect."""


def main(argv: Sequence[str]) -> int:
    """Look until told to stop or until something has to be done; then do it."""
    socket_path, prefix, folder, reserve_bytes = argv
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends a whole service wants us to let go of the guest first
    stopped: float | None = None
    while True:
        readable = select.select([0], [], [], LOOK_SECONDS)[0]
        order = os.read(0, 1) if readable else b"-"
        if order == b"q":
            return 0
        if not order:
            break
        if order != b"-":
            stopped = time.monotonic() if order == b"s" else None
        if stopped is not None and time.monotonic() - stopped > STOPPED_SECONDS:
            os.kill(os.getppid(), signal.SIGCONT)
        if free_bytes(folder) <= int(reserve_bytes):
            say(f"scratch directory {os.path.dirname(folder)} ran full")
            break
    let_go(socket_path, prefix, stopped is not None)
    return 0


def free_bytes(folder: str) -> int:
    """Room left; plenty when the folder is gone, for then the snapshot was released by somebody else."""
    try:
        found = os.statvfs(folder)
    except FileNotFoundError:
        return sys.maxsize
    return found.f_bavail * found.f_frsize


def say(text: str) -> None:
    """Tell the parent, if it lives."""
    try:
        os.write(1, text.encode())
    except BrokenPipeError:
        return


def let_go(socket_path: str, prefix: str, stopped: bool) -> None:
    """The jobs are cancelled when this returns, or QEMU is gone.  A busy monitor is tried again and again."""
    while True:
        try:
            return cancel(socket_path, prefix, stopped)
        except Gone:
            return None
        except (OSError, ValueError):
            time.sleep(RETRY_SECONDS)


def cancel(socket_path: str, prefix: str, stopped: bool) -> None:
    """Cancel every job that begins with `prefix`, and let a machine go on that stopped for want of room, or for us."""

    def cancelled(lines: io.BufferedRWPair) -> None:
        for job in command(lines, "query-jobs").get("return", []):
            if job["id"].startswith(prefix) and job["status"] not in ("concluded", "aborting", "pending"):
                command(lines, "job-cancel", {"id": job["id"]})
        status = command(lines, "query-status").get("return", {}).get("status")
        if status in ("io-error", "paused" if stopped else ""):
            command(lines, "cont")

    speak(socket_path, cancelled)


def speak(socket_path: str, work: Callable[[io.BufferedRWPair], None]) -> None:
    """`work` is done with a monitor that takes commands.  Raises Gone, OSError."""
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(REPLY_SECONDS)
        try:
            sock.connect(socket_path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise Gone from error
        with sock.makefile("rwb") as lines:
            receive(lines)  # the greeting
            command(lines, "qmp_capabilities")
            work(lines)


def command(lines: io.BufferedRWPair, name: str, arguments: dict[str, str] | None = None) -> dict[str, Any]:
    """The whole answer to one command; a refusal is an answer too."""
    import json

    lines.write(json.dumps({"execute": name, "arguments": arguments or {}}).encode() + b"\n")
    lines.flush()
    while True:
        answer = receive(lines)
        if "event" not in answer:
            return answer


def receive(lines: io.BufferedRWPair) -> dict[str, Any]:
    """The next message.  Raises OSError when the line is cut."""
    import json

    line = lines.readline()
    if not line:
        raise ConnectionResetError
    message: dict[str, Any] = json.loads(line)
    return message


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
