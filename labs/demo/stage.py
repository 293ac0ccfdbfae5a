"""What the demonstration is told with: the `hvbackup` command, and lines on the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.executable).with_name("hvbackup")
MIB = 1 << 20


class Failed(Exception):
    """A step did not do what it must, or a proof did not hold."""


@dataclass
class Hvbackup:
    """The command, with a store, a key and caches of its own."""

    folder: Path

    def __call__(self, *words: str) -> dict[str, Any]:
        """What the command answered.  Raises Failed."""
        done = subprocess.run(
            [str(PROGRAM), *words, "--json"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise Failed(f"hvbackup {' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    @property
    def environment(self) -> dict[str, str]:
        places = {"STORE": "store", "STATE": "state", "CONFIG": "config", "RUN": "run"}
        return {f"HVBACKUP_{name}": str(self.folder / place) for name, place in places.items()}


@dataclass
class Show:
    """Lines on the terminal: what happens, what it cost, what is proved."""

    begun: float = field(default_factory=time.monotonic)
    proofs: int = 0

    def title(self, text: str) -> None:
        print(f"\n{text}\n{'-' * len(text)}", flush=True)

    def say(self, text: str = "") -> None:
        print(text and f"  {text}", flush=True)

    def cost(self, *cells: str) -> None:
        first, *rest = cells
        self.say(f"{first:<26}" + "".join(f"{cell:>13}" for cell in rest))

    def command(self, words: str, remark: str = "") -> None:
        self.say(f"$ hvbackup {words}" + (f"     # {remark}" if remark else ""))

    def step(self, text: str, begun: float) -> None:
        self.say(f"{text:<80}{time.monotonic() - begun:>9.1f} s")

    def proved(self, text: str) -> None:
        self.proofs += 1
        self.say(f"[proved] {text}")


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / MIB:,.1f} MiB"
