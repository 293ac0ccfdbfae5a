"""Freezing a guest through libvirt, which holds the agent's channel: planned here, done by a guard of its own (`libvirt_guard`).

libvirt's own calls are used, because commands that are handed to the agent as they are mark the machine as tainted.  Only whether
a freeze reaches the applications takes such commands, so that is looked for when somebody asks for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hvbackup.errors import Busy, HostUnreachable
from hvbackup.hypervisors import qemu_freeze
from hvbackup.hypervisors.guestagent import AgentRefused, FileSystem, GuestAgent, why_not_application
from hvbackup.hypervisors.libvirt_host import Domain, LibvirtRefused
from hvbackup.hypervisors.libvirt_seen import Seen
from hvbackup.hypervisors.qemu_freeze import Freezing, Plan
from hvbackup.model import Consistency

_REPLY_SECONDS = 5


def plan(domain: Domain, seen: Seen, wanted: Consistency | None, freezing: Freezing) -> Plan:
    """Decide, by asking libvirt and the guest; nothing is frozen.  Raises UsageError, HostUnreachable, Busy when more is wanted
    than there is."""
    name = seen.machine.name
    if wanted is Consistency.CRASH:
        return Plan()
    if freezing.agent:
        return qemu_freeze.plan_by_socket(freezing.agent, name, wanted, freezing)
    if not seen.spec.agent_runs:
        return qemu_freeze.without(name, wanted, "no guest agent runs in it")
    guard = [sys.executable, "-m", "hvbackup.hypervisors.libvirt_guard", domain.host.uri, domain.uuid]
    try:
        mounted = [FileSystem(*row) for row in domain.filesystems()]
        doubt = _doubt(domain, wanted, freezing)
    except LibvirtRefused as refused:
        return qemu_freeze.failing(_explained(refused, name), wanted)
    except HostUnreachable as trouble:
        return qemu_freeze.failing(trouble, wanted)
    return qemu_freeze.planned(Path(f"libvirt/{name}"), name, wanted, freezing, mounted, doubt, guard)


def frozen(refused: LibvirtRefused) -> bool:
    """Whether the agent refused because somebody froze the guest."""
    return "frozen" in refused.words


def _explained(refused: LibvirtRefused, name: str) -> HostUnreachable | Busy:
    if frozen(refused):
        return Busy(
            f"The file systems of the guest in machine {name} are frozen already, by another program; "
            "let it end, or thaw them (virsh domfsthaw)"
        )
    return refused


def _doubt(domain: Domain, wanted: Consistency | None, freezing: Freezing) -> str:
    if freezing.excluded:
        return "some of its file systems are excluded, and applications may have files there"
    if domain.system() == "mswindows":
        return ""  # its agent freezes by VSS, with every writer that is registered
    if wanted is not Consistency.APPLICATION:
        return "whether a hook in the guest tells them is looked for only with --consistency application"
    return why_not_application(_Agent(domain))


class _Agent(GuestAgent):
    """The agent behind libvirt, for questions that libvirt itself has no call for."""

    def __init__(self, domain: Domain) -> None:
        self.path = Path(f"libvirt/{domain.uuid}")
        self._domain = domain

    def ask(self, name: str, **arguments: Any) -> Any:
        """The answer to one command.  Raises HostUnreachable."""
        try:
            return self._domain.agent(name, arguments, _REPLY_SECONDS)
        except LibvirtRefused as refused:
            raise AgentRefused(str(refused)) from refused


def thaw(domain: Domain, folder: Path, freezing: Freezing) -> None:
    """What a run left over that is dead, and whose guard is dead too, goes on.  Raises HostUnreachable, Busy."""
    if freezing.agent:
        with GuestAgent(freezing.agent) as agent:
            if agent.frozen():
                agent.ask("guest-fsfreeze-thaw")
    else:
        try:
            domain.filesystems()
        except LibvirtRefused as refused:
            if frozen(refused):
                domain.thaw(_REPLY_SECONDS)
    (folder / qemu_freeze.MARKER).unlink(missing_ok=True)
