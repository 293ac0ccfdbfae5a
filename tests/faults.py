"""Kernels and hypervisors that fail, or kill us, at a step of one's choice."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hvbackup.hypervisors.fake import FakeHypervisor, Killed
from tests.world import CarelessKernel

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

Fault = Callable[[str, int], None]  # (call, how many calls came before): raises, or lets it happen


class FaultyKernel(CarelessKernel):
    """Asks `fault` before every call."""

    def __init__(self) -> None:
        self.fault: Fault = lambda call, number: None
        self.calls = 0

    def arm(self, fault: Fault) -> None:
        """From now on `fault` is asked, and counts from 0."""
        self.fault, self.calls = fault, 0

    def disarm(self) -> None:
        """Nothing fails any more."""
        self.fault = lambda call, number: None

    def _ask(self, call: str) -> None:
        number, self.calls = self.calls, self.calls + 1
        self.fault(call, number)

    def create(self, path: str, mode: int) -> int:
        self._ask("create")
        return super().create(path, mode)

    def write(self, fd: int, data: Buffer) -> None:
        self._ask("write")
        super().write(fd, data)

    def write_at(self, fd: int, data: Buffer, offset: int) -> None:
        self._ask("write")
        super().write_at(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self._ask("fsync")

    def rename(self, old: str, new: str) -> None:
        self._ask("rename")
        super().rename(old, new)

    def unlink(self, path: str) -> None:
        self._ask("unlink")
        super().unlink(path)

    def mkdir(self, path: str, mode: int) -> None:
        self._ask("mkdir")
        super().mkdir(path, mode)

    def sync_dir(self, path: str) -> None:
        self._ask("sync_dir")


def full_from(nth: int) -> Fault:
    """The disk is full from the nth call on: nothing new can be written, files can still be removed."""

    def fault(call: str, number: int) -> None:
        if number >= nth and call in ("create", "write", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fault


def once(nth: int, error: BaseException, calls: tuple[str, ...] = ()) -> Fault:
    """The nth call fails (if it is one of `calls`), and no other."""

    def fault(call: str, number: int) -> None:
        if number == nth and (not calls or call in calls):
            raise error

    return fault


class DyingHypervisor(FakeHypervisor):
    """Kills us at the nth call: no call has any effect from then on, neither on the host nor on the disk."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.die_at, self.seen = -1, 0

    @property
    def dead(self) -> bool:
        return 0 <= self.die_at < self.seen

    def revive(self) -> None:
        self.die_at = -1

    def reached(self, call: str) -> None:
        self.seen += 1
        if self.dead:
            raise Killed
        super().reached(call)

    def _thaw(self, *args: Any) -> None:
        if not self.dead:
            super()._thaw(*args)
