"""Some disks of a machine: a hypervisor that shows the chosen ones and nothing else.

A point made through it has the chosen disks only.  Trackers of the others go when it is committed, so the next capture with
all disks reads those whole once: lost tracking costs reading time, never correctness.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from hvbackup.errors import NotFound
from hvbackup.hypervisors import Frozen, FrozenDisk, Hypervisor, Stream, Streaming
from hvbackup.model import (
    Consistency,
    Disk,
    DiskId,
    LeaseId,
    Machine,
    Token,
)


class ChosenDisks:
    """The same hypervisor, with machines that have fewer disks."""

    def __init__(self, whole: Hypervisor, disks: Sequence[str]) -> None:
        self.platform, self.can = whole.platform, replace(whole.can, cycles=False)
        self._whole, self._disks = whole, list(dict.fromkeys(disks))

    def machines(self) -> Sequence[Machine]:
        return [replace(machine, disks=self._chosen(machine)) for machine in self._whole.machines()]

    def _chosen(self, machine: Machine) -> tuple[Disk, ...]:
        """The disks of a machine that were asked for, in its order.  Raises NotFound."""
        known = [d.id for d in machine.disks]
        for name in self._disks:
            if name not in known:
                raise NotFound(no_disk(machine.name, name, known))
        return tuple(d for d in machine.disks if d.id in self._disks)

    @contextmanager
    def snapshot(
        self,
        machine: Machine,
        lease: LeaseId,
        since: Mapping[DiskId, Token],
        consistency: Consistency | None,
        *,
        fine: bool = False,
    ) -> Iterator[Frozen]:
        with self._whole.snapshot(machine, lease, since, consistency, fine=fine) as frozen:
            chosen = replace(frozen.machine, disks=self._chosen(frozen.machine))
            left_out = [d.disk.id for d in frozen.disks if d.disk.id not in self._disks]
            notes = [*frozen.notes, *(f"Disk {disk} was left out, as asked" for disk in left_out)]
            disks = [d for d in frozen.disks if d.disk.id in self._disks]
            yield cast(Frozen, _Fewer(frozen, chosen, notes, disks))

    def stream(self, machine: Machine, lease: LeaseId) -> Stream:
        """Of the chosen disks alone: `machine` has no others."""
        return cast(Streaming, self._whole).stream(machine, lease)

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        self._whole.release(machine, lease, keep)


class _Fewer:
    """The moment of a snapshot with the chosen disks; everything else is as the whole machine says."""

    def __init__(self, whole: Frozen, machine: Machine, notes: Sequence[str], disks: Sequence[FrozenDisk]) -> None:
        self._whole, self.machine, self.notes, self.disks = whole, machine, notes, disks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def no_disk(machine: str, name: str, known: Sequence[str]) -> str:
    """The message for a disk that a machine does not have, with the nearest name."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ";"
    return f"Machine {machine} has no disk {name}{hint} It has: {', '.join(known) or 'none'}"
