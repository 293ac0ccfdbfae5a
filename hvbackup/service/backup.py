"""backup: every machine of every source, one after the other, each ending in a point of its own or in a named error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hvbackup.bandwidth import pace_of
from hvbackup.capture import Options, Progress, capture
from hvbackup.errors import HostUnreachable, HvbackupError, NotFound, PartlyFailed, UsageError
from hvbackup.hypervisors import Hypervisor
from hvbackup.hypervisors.source import SourceOptions, open_source
from hvbackup.model import Consistency, Figures, Machine, Outcome, RecoveryPoint, Status
from hvbackup.service.chosen import ChosenDisks
from hvbackup.service.control import POINT_SECONDS, REPLY_SECONDS, ask, socket_of
from hvbackup.service.hooks import TIMEOUT_SECONDS, HookedHypervisor, Hooks, after, find
from hvbackup.service.session import Session
from hvbackup.store.store import Store

AUTO = "auto"  # the best consistency the platform offers
NAMELESS = ("image", "nbd")  # platforms that call a machine by its file
OnProgress = Callable[[Machine, Progress], None]


def _silent(_machine: Machine, _progress: Progress) -> None:
    """Nobody looks."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be captured, and how."""

    sources: Sequence[str]
    name: str = ""
    disks: Sequence[str] = ()  # only these; empty: all
    only: Sequence[str] = ()  # machines of the source, by name or id; empty: all
    machine_file: Path | None = None
    changed: Path | None = None
    consistency: str = AUTO
    full: bool = False
    tags: Sequence[str] = ()
    agent: Path | None = None  # where the guest agent listens
    exclude_mountpoints: Sequence[str] = ()
    freeze_limit_seconds: float | None = None
    hooks: Sequence[Path] = ()
    hooks_optional: bool = False
    hook_timeout_seconds: float = TIMEOUT_SECONDS
    progress: OnProgress = _silent


@dataclass(frozen=True, slots=True)
class Run:
    """How it went for one machine, or for a source that could not even be asked for its machines."""

    source: str
    machine: Machine | None = None
    outcome: Outcome | None = None
    error: HvbackupError | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """What a capture would begin with."""

    source: str
    machine: Machine
    newest: RecoveryPoint | None  # what it would build upon
    known: Sequence[str] = field(default_factory=list)  # disks whose changes since then may be known


def backup(session: Session, request: Request) -> list[Run]:
    """One run for each machine.  Raises StoreMissing, KeyRefused, Busy, UsageError before anything is captured."""
    _check(request)
    with session.open() as store:
        return [run for source in request.sources for run in _source(session, store, source, request)]


def dry_run(session: Session, request: Request) -> list[Planned]:
    """What `backup` would do; nothing is made on any host or in the store."""
    _check(request)
    with session.open() as store:
        found = []
        for source in request.sources:
            hypervisor = open_hypervisor(session, store, source, request)
            found += [_planned(store, source, machine, request) for machine in machines_of(hypervisor, source, request)]
        return found


def verdict(runs: Sequence[Run]) -> HvbackupError | None:
    """The error that stands for all of them, or None when every machine has its point."""
    errors = [run.error for run in runs if run.error]
    if not errors or len(runs) == 1:
        return errors[0] if errors else None
    if len(errors) < len(runs):
        failed = ", ".join(_called(run) for run in runs if run.error)
        return PartlyFailed(f"{len(errors)} of {len(runs)} captures failed: {failed}")
    whole = type(errors[0])(f"All {len(runs)} captures failed; the first: {errors[0]}")
    return whole if len({e.exit_code for e in errors}) == 1 else HvbackupError(str(whole))


def _called(run: Run) -> str:
    return run.machine.name if run.machine else run.source


def _check(request: Request) -> None:
    single = request.name or request.changed or request.machine_file or request.disks or request.agent
    if len(request.sources) > 1 and single:
        raise UsageError("--name, --disk, --changed, --machine and --agent belong to one source; run once for each")
    if request.freeze_limit_seconds is not None and not 0 < request.freeze_limit_seconds <= 3600:
        raise UsageError("--freeze-limit is a number of seconds, more than 0 and at most 3600")
    if request.exclude_mountpoints and request.consistency == Consistency.CRASH:
        raise UsageError("--exclude-mountpoint leaves file systems out of a freeze, and crash consistency freezes none")
    if not all(tag.strip() for tag in request.tags):
        raise UsageError("A tag needs a name")
    find(request.hooks)
    if request.consistency != AUTO and request.consistency not in list(Consistency):
        raise UsageError(f"There is no consistency {request.consistency}; there are auto, {', '.join(Consistency)}")


def _source(session: Session, store: Store, source: str, request: Request) -> Iterator[Run]:
    """One run for each machine of a source."""
    try:
        hypervisor = open_hypervisor(session, store, source, request)
        machines = machines_of(hypervisor, source, request)
    except HvbackupError as e:
        yield Run(source, error=e)
        return
    hooks = Hooks(find(request.hooks), request.hooks_optional, request.hook_timeout_seconds, source)
    hooked = HookedHypervisor(hypervisor, hooks) if request.hooks else hypervisor
    for machine in machines:
        pace = pace_of(session.places.run, source, session.places.store)
        options = replace(_options(request, source, machine, name_of(store, machine, request.name)), pace=pace)
        worker = socket_of(session.places, store.id, machine.id)
        if ask(worker, {"do": "ping"}, REPLY_SECONDS):
            yield by_worker(store, worker, machine, options, request)
        else:
            yield _run(store, hooked, machine, options, hooks)


def machines_of(hypervisor: Hypervisor, source: str, request: Request) -> list[Machine]:
    """The machines of a source that were asked for.  Raises NotFound, UsageError, HostUnreachable."""
    machines = hypervisor.machines()
    for wanted in request.only:
        if not any(wanted in (m.id, m.name) for m in machines):
            known = ", ".join(sorted(m.name for m in machines)) or "none"
            raise NotFound(f"{source} has no machine {wanted}; it has: {known}")
    chosen = [m for m in machines if not request.only or m.id in request.only or m.name in request.only]
    if request.name and len(chosen) > 1:
        raise UsageError(f"{source} has {len(chosen)} machines; --name is for one")
    return chosen


def by_worker(store: Store, worker: Path, machine: Machine, options: Options, request: Request) -> Run:
    """A machine under continuous protection: its worker marks a moment and folds it; the bitmaps are not rotated once more."""
    given = {"--full": request.full, "--disk": request.disks, "--changed": request.changed, "--hook": request.hooks}
    given |= {"--agent": request.agent, "--exclude-mountpoint": request.exclude_mountpoints}
    refused = [name for name, value in given.items() if value]
    try:
        if refused:
            raise UsageError(
                f"Machine {machine.name} is under continuous protection, which records all disks and what changed: "
                f"leave out {', '.join(refused)}, or `hvbackup protect pause {machine.name}` first"
            )
        asked = {"do": "point", "label": "; ".join(options.tags), "consistency": options.consistency}
        answer = ask(worker, asked, POINT_SECONDS + REPLY_SECONDS) or {}
        if "point" not in answer:
            kind = UsageError if answer.get("exit_code") == UsageError.exit_code else HostUnreachable
            raise kind(f"Machine {machine.name}: {answer.get('error', 'its worker has ended')}")
    except HvbackupError as e:
        return Run(options.source, machine, error=e)
    point = next(p for p in store.points(machine.id) if p.id == answer["point"])
    notes = list(answer["notes"])
    return Run(
        options.source, machine, Outcome(Status(answer["status"]), [], notes, Figures(**answer["figures"]), point)
    )


def _run(store: Store, hypervisor: Hypervisor, machine: Machine, options: Options, hooks: Hooks) -> Run:
    """One machine, and the hooks told of it."""
    try:
        with store.holding(machine.id), store.writing:
            outcome = capture(store, hypervisor, machine, options)
    except HvbackupError as e:
        after(hooks, machine, "", e)  # what hooks say of a failure is not what failed
        return Run(options.source, machine, error=e)
    for trouble in after(hooks, machine, outcome.point.id if outcome.point else "", None):
        outcome.degrade(trouble)
    return Run(options.source, machine, outcome)


def name_of(store: Store, machine: Machine, wanted: str) -> str:
    """What people call the machine; where the platform knows no names, a name once given stays."""
    if wanted or machine.platform not in NAMELESS:
        return wanted
    newest = store.newest(machine.id)
    return newest.machine.name if newest else ""


def _options(request: Request, source: str, machine: Machine, name: str) -> Options:
    return Options(
        source=source,
        consistency=None if request.consistency == AUTO else Consistency(request.consistency),
        name=name,
        full=request.full,
        tags=tuple(dict.fromkeys(request.tags)),
        progress=lambda progress: request.progress(machine, progress),
    )


def open_hypervisor(session: Session, store: Store, source: str, request: Request) -> Hypervisor:
    """The adapter of a source, limited to the disks that were asked for.  Raises UsageError."""
    options = SourceOptions(
        store_id=store.id.hex()[:8],
        scratch=session.places.scratch,
        runtime=session.places.run,
        name=request.name,
        changed=request.changed,
        machine_file=request.machine_file,
        agent=request.agent,
        exclude_mountpoints=request.exclude_mountpoints,
        freeze_limit_seconds=request.freeze_limit_seconds,
    )
    hypervisor = open_source(source, options)
    return ChosenDisks(hypervisor, request.disks) if request.disks else hypervisor


def _planned(store: Store, source: str, machine: Machine, request: Request) -> Planned:
    newest = store.newest(machine.id)
    known = [] if newest is None or request.full else [d.disk.id for d in newest.disks if d.token]
    machine = replace(machine, name=name_of(store, machine, request.name) or machine.name)
    return Planned(source, machine, newest, [d.id for d in machine.disks if d.id in known])
