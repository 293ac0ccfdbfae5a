"""protect, pause, resume, tag: machines under continuous protection.

A machine under protection has a worker: a thread of the process that runs `protect`.  Others tell it things through `control`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from hvbackup import memory
from hvbackup.bandwidth import pace_of
from hvbackup.capture import Options, system_clock
from hvbackup.config import Places
from hvbackup.errors import HostUnreachable, HvbackupError, NotFound, UsageError, trace
from hvbackup.hypervisors import Hypervisor
from hvbackup.model import SECOND, Consistency, Instant, Machine, MiB
from hvbackup.protect.events import Event, Rhythm
from hvbackup.protect.group import Group
from hvbackup.protect.protection import Protection
from hvbackup.service import backup
from hvbackup.service.control import REPLY_SECONDS, TAG_SECONDS, ask, listening, socket_of
from hvbackup.service.inventory import machine_of
from hvbackup.service.session import Session
from hvbackup.service.standing import noting
from hvbackup.store.shelves import pauses
from hvbackup.store.shelves.pauses import Pause
from hvbackup.store.store import Store

OPEN_FILES = 32  # packs and segments: a fold reads one after the other
CACHE_BYTES = 8 * MiB  # of decoded blocks: a fold reads each of them once
WRITING_SECONDS = 3600.0  # for a reclaim to end: a point may be late, its moments are in the journal

OnEvent = Callable[[Machine, Event], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be protected, and how."""

    sources: Sequence[str]
    name: str = ""
    disks: Sequence[str] = ()
    only: Sequence[str] = ()
    rhythm: Rhythm = field(default_factory=Rhythm)
    group: str = ""  # of all these machines; empty: none
    common_every_ns: int = 60 * SECOND  # between two moments that they have in common


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
        except Exception as e:  # noqa: BLE001 - handed to whoever waits for the thread
            self.error = HvbackupError(f"Protection of machine {self.machine.name} ended: {type(e).__name__}: {e}")
            trace(e)


@contextmanager
def protecting(session: Session, request: Request, report: OnEvent) -> Iterator[list[Worker]]:
    """Every machine of every source is under protection for as long as the context lasts; it ends cleanly when left.

    Raises StoreMissing, KeyRefused, Busy, UsageError, HostUnreachable before anything begins.
    """
    memory.keep_little()
    with ExitStack() as stack:
        store = stack.enter_context(session.open())
        store.writing.wait_seconds, store.cache_bytes = WRITING_SECONDS, CACHE_BYTES
        store.files.open_max = OPEN_FILES
        note = noting(session.places, lambda machine: store.ring.machine_name(machine.id))

        def told(machine: Machine, event: Event) -> None:
            note(machine, event)
            report(machine, event)

        workers = [
            _worker(session.places, store, source, hypervisor, machine, request, told)
            for source in request.sources
            for hypervisor, machine in _found(session, store, source, request)
        ]
        _refuse_doubles(workers)
        if request.group and len(workers) < 2:
            raise UsageError(f"Group {request.group} needs two machines at least: name the source of each")
        for worker in workers:
            stack.enter_context(store.holding(worker.machine.id))
            stack.callback(_end, worker)
            stack.enter_context(listening(session.places, store, worker.machine.id, worker.protection))
            worker.start()
        stack.callback(_tell_to_end, workers)
        if request.group:
            group = Group(request.group, [w.protection for w in workers], request.common_every_ns)
            group.start()
            stack.callback(group.end)
        yield workers


def _found(session: Session, store: Store, source: str, request: Request) -> Iterator[tuple[Hypervisor, Machine]]:
    hypervisor = backup.open_hypervisor(session, store, source, backup.Request([source], request.name, request.disks))
    if not hypervisor.can.changed_extents:
        raise UsageError(f"{source} does not know what changed while it runs, so it can't be protected continuously")
    if request.rhythm.stream and not hypervisor.can.stream:
        raise UsageError(
            f"{source} can't send us each write of a machine; leave --stream out: a moment every second can be had"
        )
    wanted = backup.Request([source], request.name, only=request.only)
    yield from ((hypervisor, machine) for machine in backup.machines_of(hypervisor, source, wanted))


def _worker(
    places: Places,
    store: Store,
    source: str,
    hypervisor: Hypervisor,
    machine: Machine,
    request: Request,
    report: OnEvent,
) -> Worker:
    name = backup.name_of(store, machine, request.name)
    options = Options(source=source, name=name, pace=pace_of(places.run, source, places.store))
    rhythm = replace(request.rhythm, rings=places.rings)
    protection = Protection(
        store, hypervisor, machine, options, rhythm, lambda event: report(machine, event), store.writing
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


# -- tag ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tagged:
    """A moment has a name."""

    machine: Machine
    label: str
    seq: int
    t: int


def tag(session: Session, machine: str, label: str, consistency: Consistency = Consistency.CRASH) -> Tagged:
    """A moment with this name is durable when this returns.  Raises NotFound, UsageError, HostUnreachable."""
    if not label.strip():
        raise UsageError("A tag needs a name")
    with session.open() as store:
        found = machine_of(store, machine)
        path = socket_of(session.places, store.id, found.id)
    answer = ask(path, {"do": "tag", "label": label.strip(), "consistency": consistency}, TAG_SECONDS + REPLY_SECONDS)
    if answer is None:
        raise NotFound(
            f"Machine {found.name} is not under protection here, so this moment of it is not kept; "
            "`hvbackup protect SOURCE` begins, or make a point with `hvbackup backup`"
        )
    if "error" in answer:
        raise HostUnreachable(f"Machine {found.name}: {answer['error']}")
    return Tagged(found, label.strip(), answer["seq"], answer["t"])


# -- pause and resume --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Left:
    """A machine is left alone, or is not any more."""

    machine: Machine
    pause: Pause | None  # None: it is protected again
    worker: bool  # somebody protects it here
    done: bool  # the worker has done what this asks for


def pause(session: Session, machine: str, for_ns: int, why: str) -> Left:
    """Nothing of ours is in the machine's way when this returns, until `resume`, or for so long (0: any time).

    Raises NotFound, HostUnreachable when its worker does not answer; it is paused all the same.
    """
    with session.open() as store:
        found = machine_of(store, machine)
        now = system_clock()
        made = Pause(now, Instant(now + for_ns) if for_ns else None, why)
        pauses.begin(store, found.id, made)
        path = socket_of(session.places, store.id, found.id)
    answer = ask(path, {"do": "pause"}, TAG_SECONDS + REPLY_SECONDS)
    return Left(found, made, answer is not None, answer is None or bool(answer.get("done")))


def resume(session: Session, machine: str) -> Left:
    """The machine is protected again, if a worker runs.  Raises NotFound when it was not paused, HostUnreachable."""
    with session.open() as store:
        found = machine_of(store, machine)
        if pauses.current(store, found.id, system_clock()) is None:
            raise NotFound(f"The protection of machine {found.name} is not paused")
        pauses.end(store, found.id)
        path = socket_of(session.places, store.id, found.id)
    answer = ask(path, {"do": "resume"}, TAG_SECONDS + REPLY_SECONDS)
    return Left(found, None, answer is not None, answer is None or bool(answer.get("done")))
