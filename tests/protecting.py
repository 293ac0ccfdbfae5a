"""`hvbackup protect` as a process of its own, as users run it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from labs.guest import Guest

SLOW_DISK = "has not answered for"  # of the disk below the store; the tests' own may be busy for a second
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # a test run that is killed leaves nothing behind


@contextlib.contextmanager
def in_memory(path: Path) -> Iterator[None]:
    """What is below this link, until left: as rings of streams are, so that no disk holds up who answers a guest."""
    with tempfile.TemporaryDirectory(prefix="hvr-", dir="/dev/shm") as memory:
        path.symlink_to(memory)
        yield


class Worker:
    """`hvbackup protect` as a process, and what it says."""

    rhythm = ("--every", "500ms", "--fold", "3s")

    def __init__(
        self,
        folder: Path,
        source: str | Sequence[str],
        *more: str,
        name: str = "m1",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        places = {"STORE": "store", "STATE": "state", "CONFIG": "config", "RUN": "run"}
        ours = {f"HVBACKUP_{n}": str(folder / p) for n, p in places.items()}
        self.environment = {**os.environ, **ours, **(environment or {})}
        words = [
            "protect",
            *([source] if isinstance(source, str) else source),
            *self.rhythm,
            "--json",
        ]
        words += [*(["--name", name] if name else []), *more]
        self._path = folder / "worker.log"
        self.log = self._path.open("ab")
        self.process = subprocess.Popen(
            [*DIES_WITH_US, sys.executable, "-m", "hvbackup", *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        self.events: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def of(self, event: str) -> list[dict[str, Any]]:
        """These events, but for what is told of a disk that was slow, and of another life that begins after it."""
        found = [e for e in self.events if e.get("event") == event]
        return [e for n, e in enumerate(found) if SLOW_DISK not in str(e) or (event == "begun" and not n)]

    def told(self, event: str) -> int:
        """How many of these events there were."""
        return len(self.of(event))

    def wait_for(self, event: str, count: int = 1, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while self.told(event) < count:
            assert self.process.poll() is None, f"the worker ended: {self._path.read_text()[-2000:]}"
            assert time.monotonic() < end, f"no {event} in time, only {self.events[-3:]}"
            time.sleep(0.02)

    @contextlib.contextmanager
    def between_cycles(self, guest: Guest) -> Iterator[None]:
        """No cycle is open, and none begins, until left: the process stands still, and QEMU has no job."""
        end = time.monotonic() + 120
        self._stop()
        while any(guest.qmp("query-jobs") or time.sleep(0.1) for _ in range(2)):  # twice: one may be on its way
            assert time.monotonic() < end, "a cycle is always open"
            self.process.send_signal(signal.SIGCONT)
            time.sleep(0.1)
            self._stop()
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def _stop(self) -> None:
        """The process stands still when this returns."""
        self.process.send_signal(signal.SIGSTOP)
        while not Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].startswith("T"):
            assert self.process.poll() is None, f"the worker ended: {self._path.read_text()[-2000:]}"
            time.sleep(0.01)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(120)
        self._thread.join(120)
        self.log.close()
        return code

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "hvbackup", *words]
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def wait_for_common(self, count: int, seconds: float) -> None:
        """So many moments are common to several machines."""
        end = time.monotonic() + seconds
        while len({e["common"]["id"] for e in self.events if e.get("common")}) < count:
            assert self.process.poll() is None, f"the worker ended: {self._path.read_text()[-2000:]}"
            assert time.monotonic() < end, f"not enough common moments, only {self.events[-3:]}"
            time.sleep(0.1)
