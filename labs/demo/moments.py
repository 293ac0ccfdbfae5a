"""Moments recorded every second while the guest writes, until the attack; then some are drawn and proved.

What a moment must hold is known from the outside: the records that the guest had acknowledged a second before it are in it, and
none that it acknowledged long after.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from labs.demo.points import Backup
from labs.demo.stage import PROGRAM, Failed, Hvbackup, Show, size
from labs.guest import Guest

SECONDS = 8.0  # of protection before the attack
DRAWN = 4  # moments that are proved
TAG = "before the attack"
EARLIER_SECONDS = 1.0  # a moment is labelled when it is certainly over, and holds what was acknowledged so long before
LATER_SECONDS = 1.0  # an acknowledgement may be so late on its way out of the guest
PATIENCE_SECONDS = 60.0


@dataclass
class Recording:
    """What `protect` said, and what the guest had acknowledged meanwhile."""

    moments: list[dict[str, Any]] = field(default_factory=list)
    acked: list[tuple[float, int, float]] = field(
        default_factory=list
    )  # a time, the records then, a later time; ascending
    trouble: list[dict[str, Any]] = field(default_factory=list)

    def wait(self, count: int) -> None:
        """So many moments are recorded.  Raises Failed."""
        end = time.monotonic() + PATIENCE_SECONDS
        while len(self.moments) < count:
            if self.trouble or time.monotonic() > end:
                raise Failed(f"protect recorded {len(self.moments)} moments and said {self.trouble or 'nothing'}")
            time.sleep(0.05)

    def proof(self, moment: dict[str, Any], label: str, at: str) -> Backup:
        """What a moment must hold, in the shape of a backup."""
        t = datetime.fromisoformat(moment["time"][:26] + "+00:00").timestamp()
        low = max((n for _, n, by in self.acked if by <= t - EARLIER_SECONDS), default=0)
        high = min((n for after, n, _ in self.acked if after > t + LATER_SECONDS), default=self.acked[-1][1])
        return Backup(label, at, low, high, {}, moment["seconds"])


def record(guest: Guest, hvbackup: Hvbackup, show: Show) -> Recording:
    """The guest was protected continuously for a while, and a moment of it has a name, when this returns."""
    show.command(f"protect qemu:{guest.qmp_path} --every 1s", "until ctrl-C")
    with protecting(guest, hvbackup) as recording:
        time.sleep(SECONDS)
        recording.wait(int(SECONDS / 2))
        hvbackup("tag", guest.name, TAG)
        show.command(f"tag {guest.name} '{TAG}'")
        recording.wait(len(recording.moments) + 2)
        acked = guest.acked()
    read, slowest = sum(m["read_bytes"] for m in recording.moments), max(m["seconds"] for m in recording.moments)
    show.say(f"{len(recording.moments)} moments of a guest that has written {acked:,} records by now;")
    show.say(f"{size(read)} were read for them, and the slowest took {slowest:.2f} s, in which the guest worked on")
    return recording


@contextmanager
def protecting(guest: Guest, hvbackup: Hvbackup) -> Iterator[Recording]:
    """`hvbackup protect` runs beside the guest for as long as the context lasts.  Raises Failed when it ends badly."""
    recording, ended = Recording(), threading.Event()
    words = [str(PROGRAM), "protect", f"qemu:{guest.qmp_path}", "--every", "1s", "--json"]
    process = subprocess.Popen(
        words, env={**os.environ, **hvbackup.environment}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    threads = [
        threading.Thread(target=_listen, args=(process, recording)),
        threading.Thread(target=_watch, args=(guest, recording, ended)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield recording
    finally:
        process.send_signal(signal.SIGTERM)  # SIGINT is ignored by what a shell runs in the background
        code = process.wait(PATIENCE_SECONDS)
        ended.set()
        for thread in threads:
            thread.join()
    if code:
        raise Failed(f"protect ended with {code}")


def _listen(process: subprocess.Popen[str], recording: Recording) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said = json.loads(line)
        if said.get("event") == "moment":
            recording.moments.append(said)
        elif said.get("event") == "trouble":
            recording.trouble.append(said)


def _watch(guest: Guest, recording: Recording, ended: threading.Event) -> None:
    while not ended.wait(0.05):
        recording.acked.append((time.time(), guest.acked(), time.time()))


def drawn(recording: Recording) -> list[Backup]:
    """The tagged moment, and some that chance chose."""
    tagged = next(m for m in recording.moments if TAG in m["marks"])
    others = random.SystemRandom().sample([m for m in recording.moments if m is not tagged], DRAWN - 1)
    chosen = [(m, f"seq:{m['seq']}") for m in sorted(others, key=lambda m: int(m["seq"]))]
    return [recording.proof(m, at, at) for m, at in [*chosen, (tagged, f"tag:{TAG}")]]
