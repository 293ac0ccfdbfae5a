"""protect, tag, timeline: machines under continuous protection, and what their journals offer.

A machine under protection has a worker: a thread of the process that runs `protect`.  Others reach it through a unix socket in
the run directory, a line of JSON each way: {"do": "tag", "label": ...} names the next moment, which comes at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvbackup.capture import Options
from hvbackup.config import Places
from hvbackup.errors import HostUnreachable, HvbackupError, NotFound, UsageError
from hvbackup.hypervisors import Hypervisor
from hvbackup.model import Machine, MachineId
from hvbackup.protect.events import Event, Rhythm
from hvbackup.protect.protection import Protection
from hvbackup.service import backup
from hvbackup.service.inventory import inventory
from hvbackup.service.session import Session
from hvbackup.store.store import Store

TAG_SECONDS = 60.0  # for a moment to be made and to be durable
WRITING_SECONDS = 3600.0  # for a reclaim to end: a point may be late, its moments are in the journal
REPLY_SECONDS = 5.0
LINE_BYTES = 65536

OnEvent = Callable[[Machine, Event], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be protected, and how."""

    sources: Sequence[str]
    name: str = ""
    disks: Sequence[str] = ()
    rhythm: Rhythm = field(default_factory=Rhythm)


@dataclass(slots=True)
class Worker:
    """One machine's protection, and the thread it runs on."""

    machine: Machine
    protection: Protection
    error: HvbackupError | None = None
    thread: threading.Thread | None = None

    def start(self) -> None:
        """It runs when this returns."""
        self.thread = threading.Thread(target=self._run, name=f"protect {self.machine.name}")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.protection.run()
        except HvbackupError as e:
            self.error = e


@contextmanager
def protecting(session: Session, request: Request, report: OnEvent) -> Iterator[list[Worker]]:
    """Every machine of every source is under protection for as long as the context lasts; it ends cleanly when left.

    Raises StoreMissing, KeyRefused, Busy, UsageError, HostUnreachable before anything begins.
    """
    with ExitStack() as stack:
        store = stack.enter_context(session.open())
        store.writing.wait_seconds = WRITING_SECONDS
        workers = [
            _worker(store, source, hypervisor, machine, request, report)
            for source in request.sources
            for hypervisor, machine in _found(session, store, source, request)
        ]
        _refuse_doubles(workers)
        for worker in workers:
            stack.enter_context(store.holding(worker.machine.id))
            stack.callback(_end, worker)
            stack.enter_context(_listening(session.places, store, worker))
            worker.start()
        stack.callback(_tell_to_end, workers)
        yield workers


def _found(session: Session, store: Store, source: str, request: Request) -> Iterator[tuple[Hypervisor, Machine]]:
    hypervisor = backup.open_hypervisor(session, store, source, backup.Request([source], request.name, request.disks))
    if not hypervisor.can.changed_extents:
        raise UsageError(f"{source} does not know what changed while it runs, so it can't be protected continuously")
    machines = hypervisor.machines()
    if request.name and len(machines) > 1:
        raise UsageError(f"{source} has {len(machines)} machines; --name is for one")
    yield from ((hypervisor, machine) for machine in machines)


def _worker(
    store: Store,
    source: str,
    hypervisor: Hypervisor,
    machine: Machine,
    request: Request,
    report: OnEvent,
) -> Worker:
    name = backup.name_of(store, machine, request.name)
    options = Options(source=source, name=name)
    protection = Protection(
        store, hypervisor, machine, options, request.rhythm, lambda event: report(machine, event), store.writing
    )
    return Worker(machine, protection)


def _refuse_doubles(workers: Sequence[Worker]) -> None:
    ids = [w.machine.id for w in workers]
    for worker in workers:
        if ids.count(worker.machine.id) > 1:
            raise UsageError(f"Machine {worker.machine.name} ({worker.machine.id}) is named by more than one source")


def _tell_to_end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.protection.end()


def _end(worker: Worker) -> None:
    worker.protection.end()
    if worker.thread:
        worker.thread.join()


# -- the worker's socket -----------------------------------------------------------------------------------------------------


def socket_of(places: Places, store_id: bytes, machine: MachineId) -> Path:
    """Where the worker of a machine listens."""
    name = hashlib.sha256(store_id + machine.encode()).hexdigest()[:16]
    return places.run / f"worker-{name}.sock"


@contextmanager
def _listening(places: Places, store: Store, worker: Worker) -> Iterator[None]:
    """The worker can be told things.  Whoever holds the machine may replace a dead worker's socket."""
    path = socket_of(places, store.id, worker.machine.id)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server = _Server(str(path), worker)
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


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, worker: Worker) -> None:
        self.worker = worker
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
            answer = _answer(server.worker, asked)
        except (ValueError, KeyError, TypeError) as e:
            answer = {"error": f"Not understood: {e}"}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _answer(worker: Worker, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["do"] == "ping":
        return {"pid": os.getpid()}
    if asked["do"] != "tag":
        return {"error": f"Unknown: {asked['do']}"}
    moment = worker.protection.mark(str(asked["label"])).wait(TAG_SECONDS)
    if moment is None:
        return {"error": "No moment could be made yet; the tag goes to the next one"}
    return {"seq": moment.seq, "t": int(moment.t)}


def ask(path: Path, value: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """A worker's answer, or None when nobody listens.  Raises HostUnreachable when it does not answer."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(seconds)
        try:
            line.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        try:
            line.sendall(json.dumps(value).encode() + b"\n")
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


# -- tag ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tagged:
    """A moment has a name."""

    machine: Machine
    label: str
    seq: int
    t: int


def tag(session: Session, machine: str, label: str) -> Tagged:
    """A moment with this name is durable when this returns.  Raises NotFound, UsageError, HostUnreachable."""
    if not label.strip():
        raise UsageError("A tag needs a name")
    with session.open() as store:
        found = inventory(store).machine(machine).machine
        path = socket_of(session.places, store.id, found.id)
    answer = ask(path, {"do": "tag", "label": label.strip()}, TAG_SECONDS + REPLY_SECONDS)
    if answer is None:
        raise NotFound(
            f"Machine {found.name} is not under protection here, so this moment of it is not kept; "
            "`hvbackup protect SOURCE` begins, or make a point with `hvbackup backup`"
        )
    if "error" in answer:
        raise HostUnreachable(f"Machine {found.name}: {answer['error']}")
    return Tagged(found, label.strip(), answer["seq"], answer["t"])
