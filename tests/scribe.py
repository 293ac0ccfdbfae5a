"""A guest that can be checked: numbered writes to the disks of a storage daemon, one after the other, over the same blocks.

The images of all disks at one moment are right when some n exists such that every block holds the last write to it among the
first n: an exact prefix, across all disks.  A write that found no answer is made again with the same number.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import HostUnreachable
from hvbackup.nbd.client import NbdClient
from tests.hypervisors.daemon import Daemon

BLOCK = 4096


# What a guest may wait for beyond what is promised, on a machine that has other things to do: a guest that nobody frees waits
# for as long as the test lasts.
MARGIN_SECONDS = 10.0


class Metronome:
    """How late this process may wake up here and now: what a machine's own slowness adds to every step of a wait."""

    BEAT_SECONDS = 0.01
    STEPS = 10  # between a guest's write and its answer, when somebody has to be killed first

    def __init__(self) -> None:
        self.late = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            time.sleep(self.BEAT_SECONDS)
            self.late = max(self.late, time.monotonic() - began - self.BEAT_SECONDS)

    def bound(self, seconds: float) -> float:
        """What takes so long on a machine that has nothing else to do, by a wide margin."""
        return seconds + MARGIN_SECONDS + self.STEPS * self.late

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(120)


class Scribe:
    """Writes on a thread of its own until told to stop."""

    def __init__(
        self, daemon: Daemon, sizes: Mapping[str, int], rate: float, seed: int = 1, *, noise: bool = False
    ) -> None:
        self._daemon, self._sizes, self.rate = daemon, dict(sizes), rate
        self._rng = random.Random(seed)
        self._factors = np.ones(BLOCK // 8, np.uint64)
        if noise:  # which nothing compresses
            self._factors[1:] = np.random.default_rng(seed).integers(1 << 63, 1 << 64, BLOCK // 8 - 1, np.uint64)
        self.log: list[tuple[str, int]] = [("", 0)]  # number n is entry n
        self.acked = 0
        self.latencies: list[float] = []
        self.answered = [0.0]  # when number n was
        self._metronome = Metronome()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Scribe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(120)
        self._metronome.stop()

    def assert_never_stalled(self, seconds: float, since: int = 0) -> None:
        """No write waited longer than an idle machine may take, and this one adds."""
        longest, bound = max(self.latencies[since:], default=0.0), self._metronome.bound(seconds)
        assert longest < bound, f"a write waited for {longest:.2f} s, and may for {bound:.2f}"

    def wait(self, acked: int, seconds: float = 120) -> None:
        """So many writes have been answered, however slow the machine."""
        end = time.monotonic() + seconds
        while self.acked < acked:
            assert time.monotonic() < end, f"only {self.acked} of {acked} writes were answered"
            time.sleep(0.002)

    def _run(self) -> None:
        clients: dict[str, NbdClient] = {}
        due = time.monotonic()
        while not self._stop.is_set():
            number = self.acked + 1
            if len(self.log) == number:
                disk = self._rng.choice(sorted(self._sizes))
                self.log.append((disk, self._rng.randrange(self._sizes[disk] // BLOCK)))
            disk, block = self.log[number]
            began = time.monotonic()
            try:
                client = clients.get(disk) or self._daemon.guest(disk)
                clients[disk] = client
                client.write(block * BLOCK, (np.uint64(number) * self._factors).tobytes())
            except HostUnreachable:
                clients.pop(disk, None)
                self._stop.wait(0.05)
                continue
            self.answered.append(time.monotonic())
            self.acked = number
            self.latencies.append(self.answered[-1] - began)
            due = max(due + 1 / self.rate, began)
            self._stop.wait(max(0.0, due - time.monotonic()))
        for client in clients.values():
            client.close()

    def verify(
        self, images: Mapping[str, bytes | bytearray], over: Mapping[str, bytes | bytearray] | None = None
    ) -> int:
        """The n of which the images are a prefix, on disks that held `over` (else zeroes); an assertion when there is none."""
        cells = {disk: _cells(image) for disk, image in images.items()}
        n = max(int(c[self._ours(c), 0].max(initial=0)) for c in cells.values())
        assert n < len(self.log), "a number nobody wrote"
        for disk, c in cells.items():
            last = {block: number for number, (where, block) in enumerate(self.log[: n + 1]) if where == disk}
            expected = _cells(over[disk]).copy() if over else np.zeros_like(c)
            expected[list(last)] = np.array(list(last.values()), np.uint64)[:, None] * self._factors
            wrong = np.flatnonzero((c != expected).any(axis=1))
            assert not len(wrong), f"{disk}: {len(wrong)} blocks are not of the first {n} writes, such as {wrong[:3]}"
        return n

    def _ours(self, cells: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which blocks may be of this scribe: with noise, none of another's are."""
        ours: NDArray[np.bool_] = cells[:, 1] == cells[:, 0] * self._factors[1]
        return ours


def _cells(image: bytes | bytearray) -> NDArray[np.uint64]:
    return np.frombuffer(image, np.uint64).reshape(-1, BLOCK // 8)
