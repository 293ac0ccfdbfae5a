"""Run a program and account for everything it started: wall time, CPU, memory.

The measuring process makes itself the reaper of all its descendants (PR_SET_CHILD_SUBREAPER), so that a helper that forks
away from its parent is still waited for, and counted, here.  Helpers that outlive the program are given a moment to end and
are then terminated; what they used counts too.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
LINGER_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What one run cost, with everything it started.  `rss_bytes` is the largest single process."""

    wall_seconds: float
    user_seconds: float
    system_seconds: float
    rss_bytes: int
    code: int
    output: str


def measured(command: Sequence[str | Path], *, log: Path, env: Mapping[str, str], cwd: Path | None = None) -> Usage:
    """The cost of `command`; what it prints goes to `log`, whose end is in the result."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with open(log, "wb") as output:
        start = time.perf_counter()
        child = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    usages = [usage, *_reap_orphans()]
    return Usage(
        wall_seconds=wall,
        user_seconds=sum(one.ru_utime for one in usages),
        system_seconds=sum(one.ru_stime for one in usages),
        rss_bytes=max(one.ru_maxrss for one in usages) * 1024,
        code=child.returncode,
        output=log.read_bytes()[-4000:].decode(errors="replace"),
    )


def _reap_orphans() -> Iterator[resource.struct_rusage]:
    """The usage of every process that was left to us; those that do not end by themselves are terminated."""
    deadline = time.monotonic() + LINGER_SECONDS
    while True:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            yield usage
        elif time.monotonic() < deadline:
            time.sleep(0.01)
        else:
            for left in _children(os.getpid()):
                os.kill(left, signal.SIGTERM)
            deadline = time.monotonic() + LINGER_SECONDS


def _children(parent: int) -> list[int]:
    """The process ids whose parent is `parent`."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
    return [int(pid) for pid in listed.split()]


def files(folder: Path) -> Iterator[Path]:
    """All regular files under `folder`, or the one file that it is."""
    if folder.is_file():
        yield folder
    yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def file_bytes(folder: Path) -> int:
    """The lengths of all files under `folder`."""
    return sum(path.stat().st_size for path in files(folder))
