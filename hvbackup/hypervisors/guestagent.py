"""The guest agent of a machine (qemu-guest-agent), by the socket QEMU opened for it: what it knows, and freezing through it.

    with GuestAgent(path) as agent:
        agent.commands                 what its version and its administrator allow
        agent.filesystems()            what is mounted
        why_not_application(agent)     whether a freeze reaches the applications; "" when it provably does

    with Freezer(path, marker, limit_seconds=10) as freezer:
        freezer.freeze()
        ...                            the moment
        stood = freezer.thaw()

The agent is a program in the guest: what it says is believed about that guest and nothing else, every answer is waited for no
longer than a few seconds, and none may be large.  Everything that goes wrong is HostUnreachable and names the socket.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hvbackup.errors import Busy, HostUnreachable
from hvbackup.hypervisors.agent_guard import REPLY_SECONDS, Garbled, Line, Refused

FREEZE, FREEZE_LIST = "guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list"
DEFAULT_HOOK = "/etc/qemu/fsfreeze-hook"  # where qemu-ga looks when its option -F names no file
NEVER_FREEZE = ("vfat", "msdos", "exfat", "iso9660", "udf", "squashfs", "erofs", "cramfs", "romfs", "fuseblk")
FILE_MAX_BYTES = 64 << 10

_PROGRAM = Path(__file__).with_name("agent_guard.py")
_START_SECONDS = 2 * REPLY_SECONDS + 5.0  # of a guard: a new interpreter, two answers of the agent
_THAW_SECONDS = 15.0  # that we wait; the guard goes on waiting


@dataclass(frozen=True, slots=True)
class FileSystem:
    """One mounted file system of a guest."""

    mountpoint: str
    type: str
    device: str

    @property
    def freezable(self) -> bool:
        """Whether the guest's kernel has a way to freeze it."""
        return self.type.lower() not in NEVER_FREEZE


class GuestAgent:
    """One conversation with an agent.  Thread safety: one thread at a time."""

    def __init__(self, path: Path, reply_seconds: float = REPLY_SECONDS) -> None:
        self.path = path
        with self._named():
            self._line = Line(os.fspath(path), reply_seconds)
        try:
            with self._named():
                self._line.sync()
            self.commands = self._commands()
        except BaseException:
            self._line.close()
            raise

    def ask(self, name: str, **arguments: Any) -> Any:
        """The answer to one command.  Raises HostUnreachable."""
        with self._named():
            return self._line.command(name, arguments)

    def system(self) -> str:
        """Which system the guest runs: mswindows, debian, ...; "" when the agent won't say."""
        try:
            found = self.ask("guest-get-osinfo")
        except AgentRefused:
            return ""
        return str(found.get("id", "")) if isinstance(found, Mapping) else ""

    def filesystems(self) -> Sequence[FileSystem]:
        """What is mounted from block devices."""
        found = self.ask("guest-get-fsinfo")
        rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
        return [FileSystem(*(str(row.get(key, "")) for key in ("mountpoint", "type", "name"))) for row in rows]

    def frozen(self) -> bool:
        """Whether somebody froze the guest and did not let it go."""
        return bool(self.ask("guest-fsfreeze-status") != "thawed")

    def read_file(self, path: str) -> bytes:
        """The first bytes of a file in the guest.  Raises AgentRefused when it is not there or must not be read."""
        handle = self.ask("guest-file-open", path=path, mode="r")
        try:
            found = self.ask("guest-file-read", handle=handle, count=FILE_MAX_BYTES)
            return base64.b64decode(found["buf-b64"])
        except (KeyError, TypeError, binascii.Error) as error:
            raise HostUnreachable(f"{self._name} answered guest-file-read with what is no file") from error
        finally:
            with contextlib.suppress(HostUnreachable):
                self.ask("guest-file-close", handle=handle)

    def close(self) -> None:
        """Let others use the agent; idempotent."""
        self._line.close()

    def __enter__(self) -> GuestAgent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _name(self) -> str:
        return f"The guest agent at {self.path}"

    def _commands(self) -> frozenset[str]:
        found = self.ask("guest-info")
        listed = found.get("supported_commands") if isinstance(found, Mapping) else None
        rows = [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
        return frozenset(str(row.get("name")) for row in rows if row.get("enabled"))

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        try:
            yield
        except Refused as error:
            raise AgentRefused(f"{self._name} {error}") from error
        except (OSError, Garbled) as error:
            raise HostUnreachable(f"{self._name} {_told(error)}") from error


class AgentRefused(HostUnreachable):
    """The agent understood a command and refused it: not there, switched off by its administrator, or failed."""


def _told(error: Exception) -> str:
    """What went wrong with a connection, and what to do."""
    if isinstance(error, FileNotFoundError):
        return "can't be reached: there is no such socket; is the machine running?"
    if isinstance(error, ConnectionRefusedError):
        return "can't be reached: nobody listens there any more; is the machine running?"
    if isinstance(error, PermissionError):
        return "can't be reached: we may not open it; run as root or as the user QEMU runs as"
    if isinstance(error, TimeoutError | BlockingIOError):
        return (
            "gave no answer in time: it is not running or hangs in the guest, or another program "
            "holds its socket, which serves one at a time"
        )
    return f"{str(error) or type(error).__name__}; is the machine still running?"


# --- does a freeze reach the applications? ---------------------------------------------------------------------------


def why_not_application(agent: GuestAgent) -> str:
    """Why nobody can say that a freeze tells the applications too; empty when that is proved.

    On Windows the agent freezes by a VSS snapshot with all writers, and switches the command off when it can't.  Elsewhere it
    runs a hook before freezing, and refuses to freeze when that fails: so a hook of the guest's own, named by the agent's own
    command line or configuration, is the proof.  The stock hook runs a directory of scripts and forgets their results.
    """
    if agent.system() == "mswindows":
        return ""
    try:
        hook = _hook_of(agent)
    except AgentRefused as refused:
        return f"the agent does not let us see how it was started ({refused})"
    if not hook:
        return "the agent runs no hook when it freezes (start it with --fsfreeze-hook=FILE)"
    try:
        script = agent.read_file(hook)
    except AgentRefused as refused:
        return f"the agent does not show us its hook ({refused})"
    if b"fsfreeze-hook.d" in script:
        return (
            f"its hook {hook} runs a directory of scripts and forgets whether they failed; "
            "let the agent run a script of your own that ends with an error when an application can't be told"
        )
    return ""


def _hook_of(agent: GuestAgent) -> str:
    """The hook the agent runs around a freeze; empty when it has none.  An agent reads its own /proc/self."""
    words = agent.read_file("/proc/self/cmdline").decode(errors="replace").split("\0")
    if hook := hook_in_words(words):
        return hook
    try:
        return hook_in_configuration(agent.read_file("/etc/qemu/qemu-ga.conf").decode(errors="replace"))
    except AgentRefused:
        return ""


def hook_in_words(words: Sequence[str]) -> str:
    """The hook a command line of qemu-ga names."""
    for word in words:
        if word in ("-F", "--fsfreeze-hook"):
            return DEFAULT_HOOK
        for option in ("-F", "--fsfreeze-hook="):
            if word.startswith(option):
                return word.removeprefix(option)
    return ""


def hook_in_configuration(text: str) -> str:
    """The hook a qemu-ga.conf names."""
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and key.strip() == "fsfreeze-hook":
            return value.strip()
    return ""


def frozen_already(path: Path) -> Busy:
    """Somebody else froze the guest; it is theirs to thaw."""
    return Busy(
        f"The file systems of the guest behind {path} are frozen already, by another program; "
        "let it end, or thaw them with guest-fsfreeze-thaw (virsh domfsthaw)"
    )


# --- freezing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stood:
    """A guest stood still, and does not any more."""

    filesystems: int
    freezing_seconds: float  # until the last of them stood: hooks and flushing included
    frozen_seconds: float  # from then until the agent said that they were let go
    doubt: str = ""  # why they may not have stood still all the time
    remark: str = ""  # what went wrong after that


class Freezer:
    """One freeze by a process that outlives us.  If we die or forget it, the guest is thawed all the same.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        path: Path,
        marker: Path,
        limit_seconds: float,
        mountpoints: Sequence[str] = (),
        guard: Sequence[str] = (),  # another program than ours for an agent behind a socket
    ) -> None:
        self.path = path
        self._limit_seconds = limit_seconds
        self._said = b""
        self._frozen: Mapping[str, Any] = {}
        guard = guard or [sys.executable, "-I", "-S", str(_PROGRAM), str(path.absolute())]
        # A session of its own: ctrl-C and the end of a terminal are meant for us, not for the guest's protection.
        self._process = subprocess.Popen(
            [*guard, str(limit_seconds), str(marker), *mountpoints],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )

    @property
    def pid(self) -> int:
        """The guard."""
        return self._process.pid

    def ready(self) -> None:
        """The agent answers, and nothing is frozen.  Raises HostUnreachable, Busy."""
        if self._next(_START_SECONDS, "listen")["frozen"]:
            raise frozen_already(self.path)

    def freeze(self) -> int:
        """How many file systems stand still now.  Raises HostUnreachable; then they are let go again."""
        self._order(b"f")
        self._frozen = self._next(self._limit_seconds + _THAW_SECONDS, "freeze")
        return int(self._frozen["frozen"])

    def thaw(self) -> Stood:
        """The guest goes on when this returns.  Raises HostUnreachable when it does not; the guard goes on trying."""
        self._order(b"t")
        done = self._next(_THAW_SECONDS, "thaw")
        stood = Stood(int(self._frozen["frozen"]), round(self._frozen["seconds"], 4), round(done["seconds"], 4))
        return Stood(
            stood.filesystems, stood.freezing_seconds, stood.frozen_seconds, self._doubt(stood, done), done["remark"]
        )

    def _doubt(self, stood: Stood, done: Mapping[str, Any]) -> str:
        if done["late"]:
            return f"the guest was let go after {self._limit_seconds:g} s, before the snapshot was there"
        if done["thawed"] is None:
            return f"nobody knows whether the guest stood still to the end ({done['remark']})"
        if done["thawed"] < stood.filesystems:
            return f"{stood.filesystems} file systems were frozen and only {done['thawed']} still were at the end"
        return ""

    def close(self) -> None:
        """The guard ends, if not at once then as soon as the guest is thawed; idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)

    def __enter__(self) -> Freezer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _order(self, order: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone; what it said last tells why
            self._process.stdin.write(order)
            self._process.stdin.flush()

    def _next(self, seconds: float, what: str) -> Mapping[str, Any]:
        """What the guard says next.  Raises HostUnreachable when that is an error, or nothing."""
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._said:
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise HostUnreachable(f"The guest agent at {self.path} did not {what} within {seconds:g} s")
            data = os.read(self._process.stdout.fileno(), 4096)
            if not data:
                raise HostUnreachable(f"The process that was to {what} the guest behind {self.path} ended by itself")
            self._said += data
        said, _, self._said = self._said.partition(b"\n")
        answer: Mapping[str, Any] = json.loads(said)
        if "error" in answer:
            raise HostUnreachable(f"The guest agent at {self.path} {answer['error']}")
        return answer
