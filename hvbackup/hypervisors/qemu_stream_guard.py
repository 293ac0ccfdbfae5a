"""A small process that outlives ours and looks after the target of a stream: a guest's writes wait for its answers.

When the target gives no sign of life, or nobody is left to take out what it keeps, it is killed: that cuts its connections, and
the guest's writes go on at once, for its mirrors stop at an error and go on without us.  Should it not die, QEMU is told to cut
them itself (`yank`, out of band: a main loop that waits for the target hears nothing else).

What is left then are mirrors that have stopped.  To cancel one by force is no way out: QEMU frees what a write that is under way
still uses *(seen with 7.2: about one in thirty, under load, ended in a crash)*; and to end one in good order needs a target that
answers.  So they get one more, which keeps nothing: they are resumed, drain into it, and end.  A mirror whose connection was
yanked does not connect any more; then the machine is stopped for the moment in which it is cancelled.  A file says so meanwhile,
MARKER: a try that broke off leaves it to the next one, and a guard that was killed to `release`, to let the machine go on.

    python -I -S qemu_stream_guard.py watch SOCKET PREFIX PROGRAM PID RING [FD] [--marker=MARKER]
    python -I -S qemu_stream_guard.py relieve SOCKET PREFIX PROGRAM [--marker=MARKER]

FD is a second monitor, out of band.  `relieve` ends the mirrors that a dead run left.

A byte on standard input ends it, the end of input means that its parent died or can't end the mirrors.  What was wrong is said
on standard output.  It is run as a file and needs nothing but the standard library, as qemu_watchdog.py, which it borrows from.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from hvbackup.hypervisors.qemu_watchdog import RETRY_SECONDS, Gone, command, say, speak
else:
    _FOLDER = os.path.dirname(os.path.abspath(__file__))
    sys.path.append(_FOLDER)
    from qemu_watchdog import RETRY_SECONDS, Gone, command, say, speak

    sys.path.remove(_FOLDER)  # it has a `qemu` of its own, which is not the library's

LOOK_SECONDS = 0.1
HUNG_SECONDS = 1.0  # a target says that it lives ten times a second
ALIVE_AT, STATE_AT = 80, 88  # where it says so in its ring, and whether it records: see target/ring.py
START_SECONDS = 5.0  # for a target to record: before, whatever is sent to it fails
DEATH_SECONDS = 1.0  # for a killed process to be gone
RESUME_SECONDS = 0.25  # between two tries
DRAIN_SECONDS = 15.0  # for mirrors to end in good order
_RING = struct.Struct("<QQQ")  # magic, rows_max, data_max
_MAGIC, _ROWS, _BYTES = 0x31676E5262766800, 16, 4096
_MARKER = "--marker="
_HEADER_BYTES, _ROW_BYTES = 4096, 32


def main(argv: Sequence[str]) -> int:
    """Look until told to stop or until something has to be done; then do it."""
    what, socket_path, prefix, program, *rest = (word for word in argv if not word.startswith(_MARKER))
    marker = "".join(word.removeprefix(_MARKER) for word in argv if word.startswith(_MARKER))  # older ones name none
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends a whole service wants us to let go of the guest first
    if what == "watch" and not watch(prefix, *rest):
        return 0
    relieve(socket_path, prefix, program, marker)
    return 0


def watch(prefix: str, pid: str, ring: str, monitor: str = "") -> bool:
    """Whether there are mirrors to be ended; no write of the guest waits for the target then."""
    alive, line, silent = os.open(ring, os.O_RDONLY), int(monitor or -1), b""
    while True:
        readable = select.select([0], [], [], LOOK_SECONDS)[0]
        if readable and os.read(0, 1):
            return False
        line = swallow(line)
        sign = os.pread(alive, 8, ALIVE_AT)
        late = time.monotonic_ns() - int.from_bytes(sign, "little") > HUNG_SECONDS * 1e9
        hung = late and sign == silent  # at two looks: where the whole host stood still we may run again before it does
        silent = sign if late else b""
        if hung:
            say(f"its target gave no sign of life for {HUNG_SECONDS:g} s")
        if hung or readable:
            break
    if not killed(int(pid)) and line >= 0:
        yank(line, prefix)
    return True


def swallow(line: int) -> int:
    """Nobody wants the events of the second monitor, and QEMU keeps those that are not taken."""
    while line >= 0 and select.select([line], [], [], 0)[0]:
        if not os.read(line, 65536):
            return -1
    return line


def killed(pid: int) -> bool:
    """Whether a process is gone: one that waits for a disk in the kernel does not die."""
    end = time.monotonic() + DEATH_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True  # its connections are cut; our parent buries it
        except OSError:
            return True
        time.sleep(0.01)
    return False


def yank(line: int, prefix: str) -> None:
    """QEMU cuts the connections of all mirrors."""
    import json

    for number in range(64):
        instance = {"type": "block-node", "node-name": f"{prefix}t{number}"}
        with contextlib.suppress(OSError):
            os.write(line, json.dumps({"exec-oob": "yank", "arguments": {"instances": [instance]}}).encode() + b"\n")
        swallow(line)


# --- the mirrors end ------------------------------------------------------------------------------------------------------


def relieve(socket_path: str, prefix: str, program: str, marker: str) -> None:
    """No mirror is left and the machine goes on when this returns, or QEMU is gone.  A busy monitor is tried again and again."""
    stopped: list[str] = []  # what we did to the machine, in this try or an earlier one
    while True:
        try:
            return speak(socket_path, lambda lines: relieved(lines, prefix, program, marker, stopped))
        except Gone:
            return None
        except (OSError, ValueError, KeyError):
            time.sleep(RETRY_SECONDS)


def relieved(lines: io.BufferedRWPair, prefix: str, program: str, marker: str, stopped: list[str]) -> None:
    """The mirrors drain into a target that keeps nothing, and end; or are cancelled by force while nothing is written."""
    try:
        with contextlib.ExitStack() as stack:
            place = target_socket(lines, prefix)
            waits = stopped or os.path.exists(marker)
            if place and mirrors(lines, prefix) and not waits:  # a machine that we stopped waits no longer
                stack.enter_context(target(program, place, exports(lines, prefix)))
                resumed: dict[str, float] = {}
                until(lambda: ended_in_order(lines, prefix, resumed), DRAIN_SECONDS)
            if mirrors(lines, prefix):
                by_force(lines, prefix, marker, stopped)
    finally:
        go_on(lines, marker, stopped)
    for job in command(lines, "query-jobs")["return"]:
        if job["id"].startswith(prefix):
            command(lines, "job-dismiss", {"id": job["id"]})


def ended_in_order(lines: io.BufferedRWPair, prefix: str, resumed: dict[str, float]) -> bool:
    """Whether no mirror is left.  Those that stopped are resumed, and others told to end.

    Where QEMU has no connection yet a resumed one stops again, with an error that every monitor is told of: not too often.
    """
    left = mirrors(lines, prefix)
    for job in left:
        name, now = job["id"], time.monotonic()
        if job["status"] not in ("paused", "standby"):
            command(lines, "block-job-cancel", {"device": name})
        elif now - resumed.get(name, 0.0) >= RESUME_SECONDS:
            resumed[name] = now
            command(lines, "block-job-resume", {"device": name})
    return not left


def by_force(lines: io.BufferedRWPair, prefix: str, marker: str, stopped: list[str]) -> None:
    """The mirrors are cancelled; a machine does not run meanwhile, so that no write is under way.  `go_on` is to follow."""
    if command(lines, "query-status").get("return", {}).get("running", False):
        with contextlib.suppress(OSError):  # without its folder, or room in it, only we know
            os.close(os.open(marker, os.O_WRONLY | os.O_CREAT, 0o600))
        stopped.append(prefix)
        command(lines, "stop")
    for job in mirrors(lines, prefix):
        command(lines, "job-cancel", {"id": job["id"]})
    until(lambda: not mirrors(lines, prefix), DRAIN_SECONDS)


def go_on(lines: io.BufferedRWPair, marker: str, stopped: list[str]) -> None:
    """A machine that we stopped, in this try or one before it, runs again.  Raises OSError when it does not."""
    if not stopped and not os.path.exists(marker):
        return
    if command(lines, "query-status")["return"]["status"] == "paused" and "error" in command(lines, "cont"):
        raise OSError("it does not go on")
    stopped.clear()
    with contextlib.suppress(FileNotFoundError):  # `release` was faster
        os.unlink(marker)


def mirrors(lines: io.BufferedRWPair, prefix: str) -> list[dict[str, Any]]:
    """The mirrors of a run that are not over."""
    jobs = command(lines, "query-jobs")["return"]
    over = ("concluded", "aborting", "pending", "null")
    return [j for j in jobs if j["type"] == "mirror" and j["id"].startswith(prefix) and j["status"] not in over]


def nodes(lines: io.BufferedRWPair, prefix: str) -> list[tuple[str, int]]:
    """(address, size) of the nodes behind which the target is."""
    found = command(lines, "query-named-block-nodes")["return"]
    return [(n["file"], n["image"]["virtual-size"]) for n in found if n["node-name"].startswith(f"{prefix}t")]


def exports(lines: io.BufferedRWPair, prefix: str) -> list[tuple[str, int]]:
    """(name, size) of what the target has to offer; an address is nbd+unix:///NAME?socket=PATH."""
    from urllib.parse import unquote

    return [(unquote(a.partition("?")[0].split("/", 3)[3]), size) for a, size in nodes(lines, prefix) if "/" in a]


def target_socket(lines: io.BufferedRWPair, prefix: str) -> str:
    """Where the target listened, and the next one will."""
    from urllib.parse import unquote

    return next((unquote(address.partition("socket=")[2]) for address, _ in nodes(lines, prefix)), "")


@contextlib.contextmanager
def target(program: str, place: str, disks: Sequence[tuple[str, int]]) -> Iterator[None]:
    """A target that answers everything and keeps nothing: its ring is full in no time."""
    import socket

    ring = os.memfd_create("ring")
    os.ftruncate(ring, _HEADER_BYTES + _ROWS * _ROW_BYTES + _BYTES)
    os.pwrite(ring, _RING.pack(_MAGIC, _ROWS, _BYTES), 0)
    owner = os.stat(os.path.dirname(place))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(place)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        if os.geteuid() == 0:
            os.chown(place, owner.st_uid, owner.st_gid)
        listener.listen(64)
        words = [word for name, size in disks for word in (str(size), name)]
        fds = (ring, listener.fileno())
        process = subprocess.Popen([program, *map(str, fds), *words], stdin=subprocess.PIPE, pass_fds=fds)
    try:
        until(lambda: os.pread(ring, 8, STATE_AT) != bytes(8), START_SECONDS)
        os.close(ring)
        yield
    finally:
        process.kill()
        process.wait()


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it came to be in time."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
