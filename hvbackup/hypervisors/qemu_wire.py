"""QEMU's monitor protocol without waiting in between: many commands are sent at once, and answered in order.

For cycles, which come every second and must cost the guest and us little: one write, one stretch of waiting, no event loop.
Everything else speaks through `qmp.Qmp`.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors.qmp import CommandRefused, Peer, connected

_UCRED = struct.Struct("3i")

Command = tuple[str, dict[str, Any]]


class Wire:
    """One connection to a monitor.  Thread safety: one thread."""

    def __init__(self, path: Path, timeout_seconds: float, *, out_of_band: bool = False) -> None:
        self.path = path
        self._socket = connected(path, timeout_seconds)
        self._socket.settimeout(timeout_seconds)
        self._lines = self._socket.makefile("rb")
        self.peer = Peer(*_UCRED.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
        try:
            self._receive("its greeting")
            self.all([("qmp_capabilities", {"enable": ["oob"]} if out_of_band else {})])
        except BaseException:
            self.close()
            raise

    def all(self, commands: Sequence[Command], seen: Callable[[int], None] = lambda _: None) -> list[Any]:
        """The answers, in order; `seen` is told of each as it comes.  Raises the first refusal once all have answered."""
        lines = [json.dumps({"execute": name, "arguments": arguments}) for name, arguments in commands]
        try:
            self._socket.sendall("\n".join(lines).encode() + b"\n")
        except OSError as error:
            raise self._broken(commands[0][0]) from error
        answers, refused = [], None
        for i, (name, _) in enumerate(commands):
            answer = self._receive(name)
            seen(i)
            if "error" in answer and refused is None:
                said = answer["error"]
                refused = CommandRefused(self.path, name, said["desc"], said["class"])
            answers.append(answer.get("return"))
        if refused:
            raise refused
        return answers

    def one(self, name: str, **arguments: Any) -> Any:
        """The answer to one command; underscores in names of arguments stand for dashes."""
        return self.all([(name, dashed(**arguments))])[0]

    def _receive(self, what: str) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.readline()
                message: dict[str, Any] = json.loads(line) if line else {}
            except TimeoutError as error:
                raise HostUnreachable(
                    f"QEMU at {self.path}: No answer in time (waiting for {what}); either the machine hangs, "
                    "or another program holds this socket, which serves one at a time"
                ) from error
            except (OSError, ValueError) as error:
                raise self._broken(what) from error
            if not message:
                raise self._broken(what)
            if "event" not in message:
                return message

    def _broken(self, what: str) -> HostUnreachable:
        return HostUnreachable(
            f"QEMU at {self.path}: The connection broke off (waiting for {what}); is the machine still running?"
        )

    def fileno(self) -> int:
        """Of the socket."""
        return self._socket.fileno()

    def close(self) -> None:
        """Let go of the socket; idempotent."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def dashed(**arguments: Any) -> dict[str, Any]:
    """Arguments as QEMU spells them."""
    return {key.replace("_", "-"): value for key, value in arguments.items()}


def until(done: Callable[[], bool], what: str, path: Path, timeout_seconds: float) -> None:
    """Wait for something that takes QEMU a moment.  Raises HostUnreachable."""
    end, pause = time.monotonic() + timeout_seconds, 0.0005
    while not done():
        if time.monotonic() > end:
            raise HostUnreachable(f"QEMU at {path} did not let go of {what} within {timeout_seconds:g} s; try again")
        time.sleep(pause)
        pause = min(0.02, pause * 2)
