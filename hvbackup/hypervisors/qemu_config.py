"""What is needed to start a QEMU machine again: its command line, from the process at the other end of the socket."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvbackup.errors import UsageError
from hvbackup.hypervisors.qemu_graph import Drive
from hvbackup.hypervisors.qmp import Peer
from hvbackup.model import MachineConfig

KIND = "qemu-argv"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """How a QEMU was started; empty with a `note` when nobody knows."""

    argv: Sequence[str] = ()
    cwd: str = ""  # relative paths in argv begin here
    exe: str = ""
    note: str = ""

    def option(self, *names: str) -> Sequence[str]:
        """The values given for an option, in order: `option("nbd-server")` finds --nbd-server X and --nbd-server=X."""
        found = []
        for at, word in enumerate(self.argv):
            name, equals, value = word.lstrip("-").partition("=")
            if word.startswith("-") and name in names:
                found.append(value if equals else "".join(self.argv[at + 1 : at + 2]))
        return found


@dataclass(frozen=True, slots=True)
class Facts:
    """What the monitor says of the machine; the portable part of its configuration."""

    memory_bytes: int = 0
    cpus: int = 0
    machine_type: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)  # device -> why it is not captured


def of_peer(peer: Peer) -> CommandLine:
    """The command line of the process that listens on the socket."""
    if peer.pid == 0:
        return CommandLine(
            note="QEMU runs in a process namespace we can't see; give its command line with --machine FILE"
        )
    proc = Path("/proc") / str(peer.pid)
    try:
        argv = [word.decode(errors="surrogateescape") for word in (proc / "cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError as error:
        reason = error.strerror or str(error)
        return CommandLine(note=f"The command line of process {peer.pid} can't be read ({reason}); use --machine FILE")
    name = Path(argv[0]).name if argv else "another program"
    if "qemu" not in name and "kvm" not in name:
        return CommandLine(note=f"The socket was opened by {name}, not by QEMU; use --machine FILE")
    return CommandLine(argv, _link(proc / "cwd"), _link(proc / "exe"))


def of_file(path: Path) -> CommandLine:
    """The command line an administrator gave: JSON (a list, or an object with argv and cwd) or the words of a shell."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Machine file {path} can't be read: {error}") from error
    try:
        return _parsed(text, path)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"Machine file {path} is neither a command line nor JSON with argv: {error}") from error


def config(line: CommandLine, drives: Iterable[Drive], facts: Facts) -> MachineConfig:
    """The configuration as it is kept in a recovery point; empty when nobody knows the command line."""
    if not line.argv:
        return MachineConfig()
    portable: dict[str, Any] = {
        "memory_bytes": facts.memory_bytes,
        "cpus": facts.cpus,
        "machine_type": facts.machine_type,
        "disks": [_portable(drive) for drive in drives],
        "skipped": dict(facts.skipped),
    }
    native = json.dumps({"argv": list(line.argv), "cwd": line.cwd, "exe": line.exe})
    return MachineConfig(KIND, native, portable)


def _portable(drive: Drive) -> Mapping[str, Any]:
    disk = drive.disk
    return {
        "id": disk.id,
        "node": drive.node,
        "driver": drive.driver,
        "file": disk.path,
        "size": disk.size,
        "sector": disk.sector,
        "read_only": drive.read_only,
    }


def _parsed(text: str, path: Path) -> CommandLine:
    if not text.lstrip().startswith(("{", "[")):
        argv = shlex.split(text.replace("\\\n", " "), comments=True)
        return CommandLine(argv, str(path.parent.resolve()))
    raw = json.loads(text)
    given: Mapping[str, Any] = {"argv": raw} if isinstance(raw, list) else raw
    argv = [str(word) for word in given["argv"]]
    return CommandLine(argv, str(given.get("cwd", path.parent.resolve())), str(given.get("exe", "")))


def _link(path: Path) -> str:
    """Where a link in /proc points; empty where only the process's own user may know."""
    try:
        return str(path.readlink())
    except OSError:
        return ""
