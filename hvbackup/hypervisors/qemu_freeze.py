"""Letting the guest take part in the moment: its file systems stand still while the snapshot's transaction runs, and no longer.

killed after                     left behind                        cleaned by
1 the guard runs                 nothing in the guest               the guard ends by itself
2 the marker, the freeze         frozen file systems                the guard thaws at once; both dead: `thaw`, by `release`
3 the transaction                frozen file systems, the snapshot  the same; `release`
4 the thaw                       the snapshot                       `release`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvbackup.errors import Busy, HostUnreachable, UsageError
from hvbackup.hypervisors import Standstill
from hvbackup.hypervisors.guestagent import (
    FREEZE,
    FREEZE_LIST,
    FileSystem,
    Freezer,
    GuestAgent,
    Stood,
    frozen_already,
    why_not_application,
)
from hvbackup.hypervisors.qmp import CommandRefused, Qmp
from hvbackup.model import Consistency

PORT = "org.qemu.guest_agent.0"
MARKER = "frozen"  # in the folder of a lease
LIMIT_SECONDS = 10.0  # Windows holds writes no longer either

_CHARDEV = re.compile(r"(disconnected:)?unix:(.*?),server(=on)?\b")


@dataclass(frozen=True, slots=True)
class Freezing:
    """How to freeze a guest."""

    agent: Path | None = None  # the agent's socket; None: ask QEMU
    excluded: Sequence[str] = ()  # mountpoints that go on
    limit_seconds: float = LIMIT_SECONDS  # a guest is let go then, whatever we are doing


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do about the guest at the moment."""

    consistency: Consistency = Consistency.CRASH
    agent: Path = Path()  # its socket, or what stands for it in messages
    mountpoints: Sequence[str] = ()  # only these; none: all there are
    expected: int = 0  # how many of them should stand still
    required: bool = False  # no moment without it
    limit_seconds: float = LIMIT_SECONDS
    notes: Sequence[str] = ()
    remark: str = ""
    guard: Sequence[str] = ()  # what freezes, where that is not the guard of a socket

    @property
    def freezes(self) -> bool:
        """Whether the guest is frozen."""
        return self.consistency is not Consistency.CRASH


@dataclass(frozen=True, slots=True)
class Moment:
    """The transaction is done; this is how much the guest knew of it."""

    notes: Sequence[str]
    consistency: Consistency
    standstill: Standstill


# --- before the moment -----------------------------------------------------------------------------------------------


def plan(qmp: Qmp, cwd: str, name: str, wanted: Consistency | None, freezing: Freezing) -> Plan:
    """Decide, by asking QEMU and the guest; nothing is frozen.  Raises UsageError, HostUnreachable, Busy when more is wanted
    than there is."""
    if wanted is Consistency.CRASH:
        return Plan()
    try:
        path = freezing.agent or find_agent(qmp, cwd)
    except Busy as busy:
        if wanted is not None:
            raise
        return Plan(remark=_only_crash(str(busy)))  # how the host is set up, and nothing that failed
    if path is None:
        return without(name, wanted, "no guest agent runs in it")
    return plan_by_socket(path, name, wanted, freezing)


def plan_by_socket(path: Path, name: str, wanted: Consistency | None, freezing: Freezing) -> Plan:
    """The same, where the agent's socket is known."""
    try:
        with GuestAgent(path) as agent:
            return _with(agent, name, wanted, freezing)
    except (HostUnreachable, Busy) as trouble:
        return failing(trouble, wanted)


def failing(trouble: HostUnreachable | Busy, wanted: Consistency | None) -> Plan:
    """What to do with an agent that does not do its work.  Raises `trouble` when it must."""
    if wanted is not None:
        raise trouble
    return Plan(notes=[_only_crash(str(trouble))])


def find_agent(qmp: Qmp, cwd: str) -> Path | None:
    """The socket of the machine's guest agent; None when there is no port for one, or nobody in the guest opened it.

    Raises Busy when another program is connected to it.
    """
    wired = {chardev["label"]: chardev for chardev in qmp.command("query-chardev")}
    for label in _agent_chardevs(qmp):
        chardev = wired.get(label, {})
        match = _CHARDEV.match(chardev.get("filename", ""))
        if not match or not chardev.get("frontend-open"):
            continue
        if not match[1]:
            raise Busy(
                f"Another program is connected to the guest agent at {match[2]}, which serves one at a time "
                "(libvirt keeps it for itself); give us a channel of our own with --agent"
            )
        return Path(cwd or "/") / match[2]
    return None


def _agent_chardevs(qmp: Qmp) -> Sequence[str]:
    """The character devices behind ports on which a guest agent looks for us."""
    found = []
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in _or_nothing(qmp, "qom-list", path=folder) or []:
            if child["type"] == "child<virtserialport>":
                path = f"{folder}/{child['name']}"
                if _or_nothing(qmp, "qom-get", path=path, property="name") == PORT:
                    found.append(str(_or_nothing(qmp, "qom-get", path=path, property="chardev")))
    return found


def _or_nothing(qmp: Qmp, command: str, **arguments: Any) -> Any:
    """The answer, or None where this QEMU has no such thing: a storage daemon, for one."""
    try:
        return qmp.command(command, **arguments)
    except CommandRefused:
        return None


def without(name: str, wanted: Consistency | None, reason: str) -> Plan:
    """What to do about a guest that can't be frozen.  Raises UsageError when it must be."""
    if wanted is not None:
        raise UsageError(
            f"Machine {name} can only be captured crash-consistent: {reason}; start qemu-guest-agent in it "
            f"(its port is a virtserialport with name={PORT}), say where its socket is with --agent PATH, "
            "or ask for crash consistency"
        )
    return Plan(remark=f"Machine {name} is captured crash-consistent: {reason}")


def _with(agent: GuestAgent, name: str, wanted: Consistency | None, freezing: Freezing) -> Plan:
    if agent.frozen():
        raise frozen_already(agent.path)
    command = FREEZE_LIST if freezing.excluded else FREEZE
    if command not in agent.commands:
        raise HostUnreachable(
            f"The guest agent at {agent.path} does not offer {command}: it is switched off in the guest "
            "(qemu-ga's block-rpcs), or on Windows its VSS provider is not installed"
        )
    mounted = agent.filesystems() if freezing.excluded or "guest-get-fsinfo" in agent.commands else []
    return planned(agent.path, name, wanted, freezing, mounted, _application_doubt(agent, freezing))


def planned(
    path: Path,
    name: str,
    wanted: Consistency | None,
    freezing: Freezing,
    mounted: Sequence[FileSystem],
    doubt: str,
    guard: Sequence[str] = (),
) -> Plan:
    """How to freeze a guest with these file systems; `doubt` is why its applications may not notice.  Raises UsageError."""
    chosen = _chosen(name, mounted, freezing.excluded)
    if doubt and wanted is Consistency.APPLICATION:
        raise UsageError(f"Machine {name} can only be captured filesystem-consistent, or crash-consistent: {doubt}")
    return Plan(
        Consistency.FILESYSTEM if doubt else Consistency.APPLICATION,
        path,
        [fs.mountpoint for fs in chosen] if freezing.excluded else [],
        len({fs.device for fs in chosen if fs.freezable}),
        wanted is not None,
        freezing.limit_seconds,
        [f"Mountpoint {mountpoint} was not frozen, as asked" for mountpoint in freezing.excluded],
        f"Not known to be application-consistent: {doubt}" if doubt else "",
        guard,
    )


def _application_doubt(agent: GuestAgent, freezing: Freezing) -> str:
    if freezing.excluded:
        return "some of its file systems are excluded, and applications may have files there"
    return why_not_application(agent)


def _chosen(name: str, mounted: Sequence[FileSystem], excluded: Sequence[str]) -> Sequence[FileSystem]:
    """The file systems to freeze.  Raises UsageError when the exclusion makes no sense."""
    known = {fs.mountpoint for fs in mounted}
    for mountpoint in excluded:
        if mountpoint not in known:
            raise UsageError(
                f"Nothing is mounted on {mountpoint} in machine {name}; mountpoints are {', '.join(sorted(known)) or 'none'}"
            )
    chosen = [fs for fs in mounted if fs.mountpoint not in excluded]
    if excluded and not chosen:
        raise UsageError(
            f"No file system of machine {name} is left to freeze; exclude fewer, or ask for crash consistency"
        )
    return chosen


# --- the moment ------------------------------------------------------------------------------------------------------


def moment(chosen: Plan, folder: Path, transaction: Callable[[], Sequence[str]]) -> Moment:
    """The transaction, with the guest standing still around it when that was chosen.

    Raises what the transaction raises, and HostUnreachable, Busy when the guest had to stand still and did not.
    """
    if not chosen.freezes:
        return Moment([*transaction(), *chosen.notes], Consistency.CRASH, Standstill(remark=chosen.remark))
    with Freezer(chosen.agent, folder / MARKER, chosen.limit_seconds, chosen.mountpoints, chosen.guard) as freezer:
        try:
            _frozen(freezer)
        except (HostUnreachable, Busy) as trouble:
            if chosen.required:
                raise
            freezer.close()
            return _crash_moment(transaction(), str(trouble))
        notes = transaction()
        try:
            stood = freezer.thaw()
        except HostUnreachable as trouble:
            if chosen.required:
                raise
            return _crash_moment(notes, f"{trouble}; its guard goes on trying")
    return _judged(chosen, notes, stood)


def _frozen(freezer: Freezer) -> None:
    """The guest stands still when this returns."""
    freezer.ready()
    if freezer.freeze() == 0:
        raise HostUnreachable(f"The guest agent at {freezer.path} found no file system that it could freeze")


def _judged(chosen: Plan, notes: Sequence[str], stood: Stood) -> Moment:
    """What the point may call itself."""
    standstill = Standstill(stood.filesystems, stood.freezing_seconds, stood.frozen_seconds, chosen.remark)
    if stood.doubt and chosen.required:
        raise HostUnreachable(f"The guest behind {chosen.agent} did not stand still: {stood.doubt}; try again")
    if stood.doubt:
        return _crash_moment(notes, stood.doubt, standstill)
    notes = [*notes, *chosen.notes]
    if stood.filesystems < chosen.expected:
        notes.append(f"Only {stood.filesystems} of the guest's {chosen.expected} file systems could be frozen")
    if stood.remark:
        notes.append(f"In the guest something went wrong after the thaw: {stood.remark}")
    return Moment(notes, chosen.consistency, standstill)


def _crash_moment(notes: Sequence[str], reason: str, standstill: Standstill | None = None) -> Moment:
    return Moment([*notes, _only_crash(reason)], Consistency.CRASH, standstill or Standstill(remark=reason))


def _only_crash(reason: str) -> str:
    return f"The point is only crash-consistent: {reason}"


# --- after a crash ---------------------------------------------------------------------------------------------------


def left_over(folder: Path) -> bool:
    """Whether a run that is dead, and whose guard is dead too, may have left the guest frozen."""
    return (folder / MARKER).exists()


def thaw(qmp: Qmp, cwd: str, folder: Path, freezing: Freezing) -> None:
    """What was left over goes on when this returns.  Raises HostUnreachable, Busy."""
    path = freezing.agent or find_agent(qmp, cwd)
    if path is not None:  # without an agent in the guest any more nothing can be frozen by it: it was restarted
        with GuestAgent(path) as agent:
            if agent.frozen():
                agent.ask("guest-fsfreeze-thaw")
    (folder / MARKER).unlink(missing_ok=True)  # a guard that lives after all was faster
