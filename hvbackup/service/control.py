"""A worker of continuous protection can be told things, through a unix socket in the run directory: a line of JSON each way.

do          with                    the answer comes
ping                                at once: who it is
tag         label, consistency      when the next moment, which is made at once, has the name and is durable
point       label, consistency      when a point has been made of the next moment; consistency null: the best there is
pause                               when nothing of ours is in the machine's way: a pause has begun
resume                              when a moment has been recorded: a pause has ended

Every request says of which `protocol` it is; one that a worker does not know yet is refused by name, and fields that it does not
know are nothing to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvbackup import __version__
from hvbackup.config import Places
from hvbackup.errors import HostUnreachable, HvbackupError, UsageError
from hvbackup.model import Consistency, MachineId

if TYPE_CHECKING:  # asking a worker needs nothing of what protects a machine
    from hvbackup.protect.protection import Protection
    from hvbackup.store.store import Store

PROTOCOL = 1  # a request says the first version that knows it: workers and who asks them may be of different releases
TAG_SECONDS = 60.0  # for a moment to be made and to be durable
POINT_SECONDS = 6 * 3600.0  # for a fold that has to wait for a reclaim, of a day's changes
REPLY_SECONDS = 5.0
LOOK_SECONDS = 0.05
LINE_BYTES = 65536
SOCKET_PATH_MAX_BYTES = 107  # sun_path, less its closing zero


def socket_of(places: Places, store_id: bytes, machine: MachineId) -> Path:
    """Where the worker of a machine listens."""
    name = hashlib.sha256(store_id + machine.encode()).hexdigest()[:16]
    return places.run / f"worker-{name}.sock"


@contextmanager
def listening(places: Places, store: Store, machine: MachineId, protection: Protection) -> Iterator[None]:
    """The worker can be told things.  Whoever holds the machine may replace a dead worker's socket.  Raises UsageError."""
    path = socket_of(places, store.id, machine)
    if _too_long(path):
        raise UsageError(f"The run directory {places.run} has too long a name for a socket; set HVBACKUP_RUN")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server = _Server(str(path), protection)
    finally:
        os.umask(before)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="hvbackup-control", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        path.unlink(missing_ok=True)


def _too_long(path: Path) -> bool:
    return len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, protection: Protection) -> None:
        self.protection = protection
        super().__init__(path, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's trouble."""


class _Handler(socketserver.StreamRequestHandler):
    timeout = REPLY_SECONDS

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        try:
            asked = json.loads(self.rfile.readline(LINE_BYTES))
            answer = _answer(server.protection, asked)
        except (ValueError, KeyError, TypeError) as e:
            answer = {"error": f"Not understood: {e}"}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _answer(protection: Protection, asked: dict[str, Any]) -> dict[str, Any]:
    if int(asked.get("protocol", 1)) > PROTOCOL:
        return {
            "error": f"This worker is of hvbackup {__version__} and does not know that yet; it is replaced by the service"
        }
    match asked["do"]:
        case "ping":
            return {"pid": os.getpid(), "version": __version__, "protocol": PROTOCOL}
        case "tag":
            return _tag(protection, str(asked["label"]), Consistency(asked.get("consistency", "crash")))
        case "point":
            return _point(protection, str(asked["label"]), asked["consistency"])
        case "pause":
            protection.look()
            return {"done": _until(lambda: not protection.living)}
        case "resume":
            protection.look()
            return {"done": _until(lambda: protection.begun)}
    return {"error": f"Unknown: {asked['do']}"}


def _tag(protection: Protection, label: str, consistency: Consistency) -> dict[str, Any]:
    mark = protection.mark(label, consistency)
    moment = mark.wait(TAG_SECONDS)
    if mark.refused:
        return {"error": f"No moment is tagged, for {mark.refused}"}
    if moment is None:
        return {"error": "No moment could be made yet; the tag goes to the next one"}
    return {"seq": moment.seq, "t": int(moment.t)}


def _point(protection: Protection, label: str, consistency: str | None) -> dict[str, Any]:
    """A mark, and a fold of its moment: the host's bitmaps are not rotated once more."""
    if protection.paused:
        return {"error": "Its protection is paused, so no moment can be recorded; `hvbackup protect resume` first"}
    mark = protection.mark(label, None if consistency is None else Consistency(consistency), point=True)
    try:
        outcome = mark.outcome(POINT_SECONDS)
    except TimeoutError:
        return {"error": "No point was made in time; it comes as soon as a moment can be recorded"}
    except HvbackupError as e:
        return {"error": str(e), "exit_code": e.exit_code}
    point = outcome.point
    assert point is not None  # every other way out of a fold raises
    figures = asdict(outcome.figures)
    return {
        "point": point.id,
        "status": int(outcome.status),
        "notes": [*mark.notes, *outcome.notes],
        "figures": figures,
    }


def _until(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + TAG_SECONDS
    while not done() and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
    return done()


def ask(path: Path, value: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """A worker's answer, or None when nobody listens.  Raises HostUnreachable when it does not answer."""
    if _too_long(path):
        return None  # nobody can listen there
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(seconds)
        try:
            line.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        try:
            line.sendall(json.dumps({"protocol": PROTOCOL, **value}).encode() + b"\n")
            with line.makefile("rb") as lines:
                found: dict[str, Any] = json.loads(lines.readline(LINE_BYTES))
                return found
        except (OSError, ValueError) as e:
            raise HostUnreachable(f"The worker at {path} does not answer: {e}") from e


def worker_pid(places: Places, store_id: bytes, machine: MachineId) -> int:
    """The process that protects a machine on this host, 0 when there is none."""
    with contextlib.suppress(HostUnreachable):
        answer = ask(socket_of(places, store_id, machine), {"do": "ping"}, REPLY_SECONDS)
        return int(answer.get("pid", 0)) if answer else 0
    return 0
