"""A small process that outlives ours, freezes a guest's file systems and lets them go again, whatever becomes of us.

    python -I -S agent_guard.py SOCKET LIMIT_SECONDS MARKER [MOUNTPOINT...]

The socket of a guest agent serves one client at a time, so the one who must be able to thaw is the one who freezes: nobody
can be in its way, not even a parent that was stopped and still holds every socket it had.  It freezes at a byte `f` on
standard input, and thaws at a byte `t`, at the end of input (its parent died) or when the limit has passed.  Each step is
answered by a line of JSON.  A thaw is tried until the agent says that nothing is frozen, or until QEMU is gone.

MARKER is a file that is there while something may be frozen: whoever finds it left over has to thaw.

It is run as a file, needs nothing but the standard library, and so starts in a few milliseconds: it can't import us.
`Line`, the protocol below, is what our own side speaks as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time

REPLY_SECONDS = 5.0  # for what takes an agent a few milliseconds
ORDER_SECONDS = 600.0  # a parent that does not even ask to freeze is none
RETRY_SECONDS = 0.2
ANSWER_MAX_BYTES = 4 << 20  # a guest may say anything, and must not fill our memory

TYPE_CHECKING = False
if TYPE_CHECKING:  # what is imported at all times is paid for by every snapshot
    from collections.abc import Callable, Sequence
    from typing import Any


class Refused(Exception):
    """The agent understood a command and refused it."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"refused {command}: {reason.rstrip('.')}")
        self.reason = reason


class Garbled(Exception):
    """What came back is not what an agent says."""


class Line:
    """One connection to a guest agent.  Raises OSError (a timeout is one), Refused, Garbled."""

    def __init__(self, path: str, reply_seconds: float = REPLY_SECONDS) -> None:
        self._reply_seconds = reply_seconds
        self._seen = b""
        self._number = int.from_bytes(os.urandom(4), "big")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(reply_seconds)
        try:
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def sync(self) -> None:
        """The agent listens, and its next answer is to our next command: answers to older ones were thrown away."""
        end = time.monotonic() + self._reply_seconds
        self._number += 1
        # The first byte makes the agent drop a command that somebody sent by halves; it marks the beginning of the answer too.
        self._send(b"\xff" + _command("guest-sync-delimited", {"id": self._number}), end)
        while True:
            self._until(b"\xff", end)
            with contextlib.suppress(ValueError):
                if json.loads(self._until(b"\n", end)) == {"return": self._number}:
                    return

    def command(self, name: str, arguments: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        """The answer.  After an OSError only `sync` makes the connection of use again."""
        end = time.monotonic() + (seconds or self._reply_seconds)
        self._send(_command(name, arguments or {}), end)
        try:
            answer = json.loads(self._until(b"\n", end))
        except ValueError as error:
            raise Garbled(f"answered {name} with what is not JSON") from error
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            raise Refused(name, str(answer["error"].get("desc", "no reason given"))[:500])
        if not isinstance(answer, dict) or "return" not in answer:
            raise Garbled(f"answered {name} with neither a result nor an error")
        return answer["return"]

    def count(self, name: str, arguments: dict[str, Any] | None = None, seconds: float | None = None) -> int:
        """The answer to a command that returns a number."""
        answer = self.command(name, arguments, seconds)
        if not isinstance(answer, int):
            raise Garbled(f"answered {name} with what is no number")
        return answer

    def close(self) -> None:
        """Let others use the agent; idempotent."""
        self._socket.close()

    def _send(self, data: bytes, end: float) -> None:
        self._socket.settimeout(max(0.01, end - time.monotonic()))
        self._socket.sendall(data)

    def _until(self, mark: bytes, end: float) -> bytes:
        """What comes before the mark."""
        while mark not in self._seen:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("gave no answer in time")
            self._socket.settimeout(left)
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError("closed the connection")
            self._seen += data
            if len(self._seen) > ANSWER_MAX_BYTES:
                raise Garbled(f"sent more than {ANSWER_MAX_BYTES} bytes without an end")
        before, _, self._seen = self._seen.partition(mark)
        return before


def _command(name: str, arguments: dict[str, Any]) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"


# --- the process -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Freeze and thaw once, as told."""
    path, limit_seconds, marker, *mountpoints = argv
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends a whole service wants us to finish first
    try:
        line = Line(path)
        line.sync()
        frozen = line.command("guest-fsfreeze-status") != "thawed"
    except (OSError, Refused, Garbled) as error:
        say(error=str(error))
        return 1
    say(ready=True, frozen=frozen)
    if not frozen and ordered(ORDER_SECONDS):
        mark(marker)
        hold(lambda: Line(path), line, float(limit_seconds), mountpoints)
        unmark(marker)
    return 0


def hold(connect: Callable[[], Line], line: Line, limit_seconds: float, mountpoints: Sequence[str]) -> None:
    """Freeze, wait for the order to thaw or for what stands for it, and thaw."""
    begun = time.monotonic()
    frozen = freeze(line, limit_seconds, mountpoints)
    stood = time.monotonic()
    if frozen is not None:
        say(frozen=frozen, seconds=stood - begun)
    late = frozen is not None and not ordered(limit_seconds)
    count, remark = thaw(connect, line)
    say(thawed=count, seconds=time.monotonic() - stood, late=late, remark=remark)


def freeze(line: Line, limit_seconds: float, mountpoints: Sequence[str]) -> int | None:
    """How many file systems stand still; None when it went wrong, and then nobody knows whether some do."""
    name, arguments = "guest-fsfreeze-freeze", {}
    if mountpoints:
        name, arguments = "guest-fsfreeze-freeze-list", {"mountpoints": list(mountpoints)}
    begun = time.monotonic()
    try:
        frozen = line.count(name, arguments, limit_seconds)
        if time.monotonic() - begun > limit_seconds:  # the answer came while nobody let us run
            raise TimeoutError
        return frozen
    except TimeoutError:
        say(error=f"did not freeze within {limit_seconds:g} s")
    except (OSError, Refused, Garbled) as error:
        say(error=str(error))
    return None


def thaw(connect: Callable[[], Line], line: Line | None) -> tuple[int | None, str]:
    """Nothing is frozen when this returns: how many were let go (None: not known), and what went wrong on the way."""
    while True:
        try:
            line = line or connect()
            return thawed(line)
        except (FileNotFoundError, ConnectionRefusedError):
            return None, "QEMU is gone"
        except (OSError, Refused, Garbled):
            if line is not None:
                line.close()
            line = None
            time.sleep(RETRY_SECONDS)


def thawed(line: Line) -> tuple[int | None, str]:
    """One attempt.  Raises OSError, Refused, Garbled while something may be frozen."""
    line.sync()
    try:
        return line.count("guest-fsfreeze-thaw"), ""
    except Refused as refused:  # a hook in the guest that fails is told of after everything was let go
        if line.command("guest-fsfreeze-status") != "thawed":
            raise
        return None, refused.reason


def ordered(seconds: float) -> bool:
    """Whether the parent gave an order in time; False as well when it is dead."""
    return bool(select.select([0], [], [], seconds)[0] and os.read(0, 1))


def say(**what: Any) -> None:
    """Tell the parent, if it lives."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(what).encode() + b"\n")


def mark(marker: str) -> None:
    """Whoever looks sees that something may be frozen."""
    os.close(os.open(marker, os.O_CREAT | os.O_WRONLY, 0o600))


def unmark(marker: str) -> None:
    """Nothing is frozen by us any more; the folder may be gone, if we are the last to know."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(marker)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
