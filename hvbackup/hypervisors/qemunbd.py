"""A `qemu-nbd -r` of our own for images that are not raw: on a private socket, and gone when we are.

    killed after                   left behind                          cleaned by
    1 folder of the lease made     an empty folder                      release
    2 server started               nothing: the kernel ends it with us  (PR_SET_PDEATHSIG)
    3 process id written           the folder                           release
    4 we are connected             nothing: it ends with its last connection

The folder is private (0700) and has the lease's name, so `release` finds it from another process.  A process is killed
only if its start time is the one written down: a number used again is somebody else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvbackup.errors import HostUnreachable, UsageError
from hvbackup.hypervisors.qemuimg import is_locked, missing_program, refused
from hvbackup.hypervisors.rawfile import in_use
from hvbackup.nbd.uri import NbdUri

if TYPE_CHECKING:  # a raw disk needs no NBD
    from hvbackup.nbd.client import NbdClient

CONNECTIONS_MAX = 16

_START_SECONDS = 20.0
_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.01
_SOCKET_PATH_MAX_BYTES = 107
_START_TIME_COLUMN = 19  # in /proc/PID/stat, after the name


def default_runtime() -> Path:
    """Where lease folders go: gone after a reboot, as the processes are."""
    if os.geteuid() == 0:
        return Path("/run/hvbackup")
    given = os.environ.get("XDG_RUNTIME_DIR")
    return Path(given) / "hvbackup" if given else Path(tempfile.gettempdir()) / f"hvbackup-{os.geteuid()}"


@dataclass(frozen=True, slots=True)
class Server:
    """One running qemu-nbd; `client` is the connection that keeps it alive."""

    process: subprocess.Popen[bytes]
    uri: NbdUri
    client: NbdClient
    files: tuple[Path, ...]

    def stop(self) -> None:
        """The server is gone, and so are its files; never fails."""
        self.client.close()
        end(self.process)
        for file in self.files:
            file.unlink(missing_ok=True)


def private_folder(runtime: Path, name: str) -> Path:
    """The folder of a lease, ours alone."""
    folder = runtime / name
    try:
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder}: this folder can't be made: {error.strerror}; name another runtime folder"
        ) from error
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise UsageError(f"{folder} belongs to somebody else or is open to others; remove it and try again")
    return folder


def serve(path: Path, format_: str, folder: Path, index: int, bitmap: str = "") -> Server:
    """Serve the image read-only to us alone, with a persistent bitmap.  Raises Busy, ReadFailed, HostUnreachable."""
    socket, words = folder / f"d{index}.sock", folder / f"d{index}.err"
    if len(os.fsencode(socket)) > _SOCKET_PATH_MAX_BYTES:
        raise UsageError(f"{folder}: this path is too long for a socket; name a shorter runtime folder")
    socket.unlink(missing_ok=True)
    process = _start(_command(path, format_, socket, bitmap), words)
    files = (socket, words, folder / f"d{index}.pid")
    try:
        files[2].write_text(f"{process.pid} {_start_time(process.pid)}\n")
        uri = NbdUri(socket=str(socket))
        contexts = ["base:allocation", *([f"qemu:dirty-bitmap:{bitmap}"] if bitmap else [])]
        return Server(process, uri, _connect(path, process, uri, contexts, words), files)
    except BaseException:
        end(process)
        for file in files:
            file.unlink(missing_ok=True)
        raise


def release(runtime: Path, prefix: str) -> None:
    """Whatever runs in folders whose names begin with `prefix` is ended, and the folders are gone; idempotent."""
    for folder in sorted(runtime.glob(f"{prefix}*")):
        for file in folder.glob("*.pid"):
            _end_written(file)
        shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """The process is gone.  It only reads, so it may be killed; and qemu-nbd loses a SIGTERM that comes too early."""
    process.kill()
    process.wait(_STOP_SECONDS)


def _command(path: Path, format_: str, socket: Path, bitmap: str) -> list[str]:
    # Not persistent: qemu-nbd ends with its last connection, and `Server.client` is held as long as it is wanted.
    # The shell: we may have died before the kernel was told to end it with us.
    command = ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]
    command += ["qemu-nbd", "-r", "-f", format_, "-k", str(socket)]
    command += ["-e", str(CONNECTIONS_MAX), *(["-B", bitmap] if bitmap else [])]
    return [*command, "--", str(path)]


def _start(command: list[str], words: Path) -> subprocess.Popen[bytes]:
    if shutil.which("qemu-nbd") is None:
        raise missing_program("qemu-nbd")
    if shutil.which("setpriv") is None:
        raise UsageError("setpriv is needed to start qemu-nbd and is not installed: apt install util-linux")
    with open(words, "wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "LC_ALL": "C"}
        )


def _connect(path: Path, process: subprocess.Popen[bytes], uri: NbdUri, contexts: list[str], words: Path) -> NbdClient:
    """The connection that keeps the server alive, as soon as it listens."""
    from hvbackup.nbd.client import NbdClient

    deadline = time.monotonic() + _START_SECONDS
    while True:
        if Path(uri.socket).exists():
            with contextlib.suppress(HostUnreachable):
                return NbdClient.open(uri, contexts=contexts)
        if process.poll() is not None:
            said = words.read_text(errors="replace")
            raise in_use(path) if is_locked(said) else refused(path, "qemu-nbd", said)
        if time.monotonic() > deadline:
            raise HostUnreachable(f"{path}: qemu-nbd did not begin to serve it within {_START_SECONDS:g} seconds")
        time.sleep(_POLL_SECONDS)


def _start_time(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" when there is none, or only an exit code to be fetched."""
    try:
        columns = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if columns[0] in ("Z", "X") else columns[_START_TIME_COLUMN]


def _end_written(file: Path) -> None:
    try:
        pid, began = file.read_text().split()
    except (OSError, ValueError):
        return
    deadline = time.monotonic() + _STOP_SECONDS
    while _start_time(int(pid)) == began and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
