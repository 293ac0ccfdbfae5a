"""A stub to begin with."""

from __future__ import annotations

from pathlib import Path

from hvbackup.hypervisors import qemu_freeze
from hvbackup.hypervisors.libvirt_host import Domain
from hvbackup.hypervisors.libvirt_seen import Seen
from hvbackup.hypervisors.qemu_freeze import Freezing
from hvbackup.model import Consistency


def plan(domain: Domain, seen: Seen, wanted: Consistency | None, freezing: Freezing) -> qemu_freeze.Plan:
    if wanted is Consistency.CRASH:
        return qemu_freeze.Plan()
    return qemu_freeze._without(seen.machine.name, wanted, "no guest agent runs in it")


def thaw(domain: Domain, folder: Path, freezing: Freezing) -> None:
    pass
