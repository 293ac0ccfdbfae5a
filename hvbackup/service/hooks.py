"""Programs of the administrator's that run on this host around the moment of a capture.

    pre-freeze      before the guest is frozen; an exit code other than 0 means that there will be no point
    post-thaw       after the snapshot is there or has failed: whenever pre-freeze was begun, whatever it said
    done, failed    after the capture, with HVBACKUP_POINT or HVBACKUP_ERROR

    killed after                    post-thaw is run by
    1 the guard is waiting          the guard, which outlives us
    2 pre-freeze begun              the guard
    3 post-thaw run                 nobody; if the lease is still there, the next run
    host or guard dead as well      the next run: the lease of the dead one says that it began

So post-thaw may be run more than once, and must not mind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from hvbackup.errors import HookFailed, HvbackupError, UsageError
from hvbackup.hypervisors import Frozen, Hypervisor
from hvbackup.model import Consistency, DiskId, LeaseId, Machine, Token

TIMEOUT_SECONDS = 60.0  # of one program
PRE_FREEZE, POST_THAW, DONE, FAILED = "pre-freeze", "post-thaw", "done", "failed"

_GUARD = Path(__file__).with_name("hook_guard.py")
_TOLD_BYTES = 1000  # of what a program said, for the message


@dataclass(frozen=True, slots=True)
class Hooks:
    """What to run, in this order before the moment and in the opposite one after it."""

    programs: Sequence[Path] = ()
    optional: bool = False  # a pre-freeze that fails is a note
    timeout_seconds: float = TIMEOUT_SECONDS
    source: str = ""  # for the programs to know

    def run(self, phase: str, machine: Machine, **more: str) -> list[str]:
        """Run the programs, and return what went wrong; `more` becomes HVBACKUP_... in their environment.

        Each one is run, except that the first one that says no before the freeze is the last.
        """
        programs = self.programs if phase == PRE_FREEZE else list(reversed(self.programs))
        environment = {**os.environ, **self.environment(phase, machine, **more)}
        troubles = []
        for program in programs:
            if trouble := _run(program, phase, environment, self.timeout_seconds):
                troubles.append(f"Hook {program} {trouble} at {phase}")
                if phase == PRE_FREEZE and not self.optional:
                    break
        return troubles

    def environment(self, phase: str, machine: Machine, **more: str) -> Mapping[str, str]:
        """What the programs are told."""
        told = {"PHASE": phase, "MACHINE": machine.id, "MACHINE_NAME": machine.name, "SOURCE": self.source}
        return {f"HVBACKUP_{key.upper()}": value for key, value in {**told, **more}.items()}


def find(paths: Sequence[Path]) -> list[Path]:
    """The programs to run: the files named, and those in directories named, by name.  Raises UsageError."""
    found = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if _is_program(p)) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"Hook directory {path} has no executable programs in it")
        for program in inside:
            _check(program)
            found.append(program.absolute())
    return found


def _is_program(path: Path) -> bool:
    """Whether somebody meant this file to be run; what an editor or a package left behind was not meant."""
    left = path.name.startswith(".") or path.name.endswith(
        ("~", ".bak", ".sample", ".dpkg-old", ".dpkg-new", ".rpmsave")
    )
    return not left and path.is_file() and os.access(path, os.X_OK)


def _check(program: Path) -> None:
    try:
        found = program.stat()
    except OSError as error:
        raise UsageError(f"Hook {program} can't be run: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode) or not os.access(program, os.X_OK):
        raise UsageError(f"Hook {program} is not an executable program; chmod +x it")
    if found.st_mode & stat.S_IWOTH or found.st_uid not in (0, os.geteuid()):
        raise UsageError(
            f"Hook {program} can be changed by others, who could run anything as us; chown and chmod go-w it"
        )


def _run(program: Path, phase: str, environment: Mapping[str, str], timeout_seconds: float) -> str:
    """What went wrong; empty when nothing did."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                [program, phase],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return f"can't be run ({error.strerror})"
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return f"did not end within {timeout_seconds:g} s and was killed"
        finally:
            _end(process)
        return f"ended with exit code {code}{_told(said)}" if code else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a program that did not end by itself runs on."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _told(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - _TOLD_BYTES))
    text = said.read().decode(errors="replace").strip()
    return f" ({text})" if text else ""


# --- around the moment -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class HookedHypervisor:
    """The same hypervisor, with hooks around each of its snapshots."""

    whole: Hypervisor
    hooks: Hooks
    platform: str = ""
    can: Any = None
    _ours: set[LeaseId] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.platform, self.can = self.whole.platform, self.whole.can

    def machines(self) -> Sequence[Machine]:
        return self.whole.machines()

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
        self._ours.add(lease)
        with contextlib.ExitStack() as stack:
            notes: list[str] = []
            with self._around(machine, lease, notes):
                frozen = stack.enter_context(self.whole.snapshot(machine, lease, since, consistency, fine=fine))
            yield cast(Frozen, _Noted(frozen, notes)) if notes else frozen

    def release(self, machine: Machine, lease: LeaseId | None, keep: Collection[Token]) -> None:
        self.whole.release(machine, lease, keep)
        if lease is not None and lease not in self._ours:
            # The run that took this lease died, and perhaps its guard with it.
            troubles = self.hooks.run(POST_THAW, machine, lease=lease, late="1")
            if troubles:
                raise HookFailed("; ".join(troubles))
            self._ours.add(lease)

    @contextmanager
    def _around(self, machine: Machine, lease: LeaseId, notes: list[str]) -> Iterator[None]:
        """Both phases, of which the second is run whatever happens.  Raises HookFailed when the first one fails."""
        guard = _guard(self.hooks, self.hooks.environment(POST_THAW, machine, lease=lease, late="1"))
        try:
            troubles = self.hooks.run(PRE_FREEZE, machine, lease=lease)
            if troubles and not self.hooks.optional:
                raise HookFailed(f"{'; '.join(troubles)}; machine {machine.name} was not captured")
            notes += troubles
            yield
        finally:
            notes += self.hooks.run(POST_THAW, machine, lease=lease)
            _dismiss(guard)


class _Noted:
    """A frozen machine with more to note."""

    def __init__(self, whole: Frozen, notes: Sequence[str]) -> None:
        self._whole = whole
        self.notes = [*whole.notes, *notes]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def _guard(hooks: Hooks, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    programs = [str(program) for program in reversed(hooks.programs)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_GUARD), str(hooks.timeout_seconds), *programs],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    """The guard has ended and will run nothing."""
    assert guard.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.write(b"q")
        guard.stdin.close()
    guard.wait(10)


def after(hooks: Hooks, machine: Machine, point: str, error: HvbackupError | None) -> list[str]:
    """Tell the programs how it ended; returns what went wrong."""
    if error is not None:
        return hooks.run(FAILED, machine, error=str(error))
    return hooks.run(DONE, machine, point=point)
