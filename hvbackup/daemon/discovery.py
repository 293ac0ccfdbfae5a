"""Which machines each source has, asked in processes of their own: a host that hangs delays nobody but itself."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from hvbackup.configuration import SourceSettings
from hvbackup.daemon.watchers import Watchers
from hvbackup.files import Files
from hvbackup.selection import Found

ANSWER_SECONDS = 120.0


@dataclass(slots=True)
class Asked:
    """A source, and what it answered last."""

    machines: Sequence[Found] = ()
    error: str = ""
    answered: float = -1e9  # monotonic
    asked: float = -1e9
    process: subprocess.Popen[bytes] | None = None
    output: IO[bytes] | None = None


@dataclass(slots=True)
class Discovery:
    """All sources.  Thread safety: `step` on one thread, the rest from any."""

    store_words: Sequence[str]  # how the command line is told which store
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    sources: dict[str, Asked] = field(default_factory=dict)
    kept: Path | None = (
        None  # the file in which answers outlive us: a machine is not gone because nobody has answered yet
    )
    watchers: Watchers = field(init=False)

    def __post_init__(self) -> None:
        self.watchers = Watchers(self.environment)
        if self.kept:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                said = json.loads(self.kept.read_bytes())
                self.sources = {
                    n: Asked([Found(**{**m, "tags": tuple(m["tags"])}) for m in ms]) for n, ms in said.items()
                }

    def _keep(self) -> None:
        if self.kept:
            value = {n: [asdict(m) for m in a.machines] for n, a in self.sources.items()}
            files = Files(self.kept.parent)
            files.make_dir("")
            files.replace(self.kept.name, json.dumps(value).encode())

    @property
    def machines(self) -> list[Found]:
        """Every machine that was there when its source answered last: one that does not answer keeps its machines."""
        return [m for asked in list(self.sources.values()) for m in asked.machines]

    @property
    def complete(self) -> bool:
        """Whether each source has answered, or failed, once."""
        return all(a.answered > 0 or a.error for a in self.sources.values())

    def ask_all(self) -> None:
        """Every source is asked at the next step."""
        for asked in self.sources.values():
            asked.asked = -1e9

    def step(self, settings: Mapping[str, SourceSettings], every_seconds: float) -> bool:
        """Answers are taken in, and who is to be asked is asked; whether anything is new."""
        for gone in set(self.sources) - set(settings):
            self._stop(self.sources.pop(gone))
        new, news = False, self.watchers.step(settings, {n for n, a in self.sources.items() if a.process is None})
        for name, source in settings.items():
            asked = self.sources.setdefault(name, Asked())
            if asked.process is not None:
                new |= self._take(name, asked)
            elif name in news or time.monotonic() - asked.asked >= every_seconds:
                self._ask(asked, source)
        return new

    def close(self) -> None:
        """Nobody is being asked any more."""
        self.watchers.close()
        for asked in self.sources.values():
            self._stop(asked)

    def _ask(self, asked: Asked, source: SourceSettings) -> None:
        words = ["backup", source.uri, "--dry-run", "--json", *self.store_words]
        words += [f"--name={source.name}"] if source.name else []
        asked.asked, asked.output = time.monotonic(), tempfile.TemporaryFile()  # noqa: SIM115
        asked.process = subprocess.Popen(
            [sys.executable, "-m", "hvbackup", *words],
            stdin=subprocess.DEVNULL, stdout=asked.output, stderr=subprocess.DEVNULL, env=dict(self.environment),
        )  # fmt: skip

    def _take(self, name: str, asked: Asked) -> bool:
        assert asked.process is not None
        assert asked.output is not None
        if asked.process.poll() is None:
            if time.monotonic() - asked.asked < ANSWER_SECONDS:
                return False
            self._stop(asked)
            asked.error = f"does not answer within {ANSWER_SECONDS:.0f} s"
            return True
        asked.output.seek(0)
        said = asked.output.read()
        self._stop(asked)
        before = (asked.machines, asked.error)
        self._understand(name, asked, said)
        if before[0] != asked.machines:
            self._keep()
        return before != (asked.machines, asked.error)

    def _understand(self, name: str, asked: Asked, said: bytes) -> None:
        try:
            answer = json.loads(said)
            if "error" in answer:
                asked.error = str(answer["error"]["message"])
                return
            runs = [run["machine"] for run in answer["runs"]]
            asked.machines = [Found(m["id"], m["name"], name, tuple(m["tags"]), m["platform"]) for m in runs]
            asked.error, asked.answered = "", time.monotonic()
        except (ValueError, KeyError, TypeError):
            asked.error = "gave no answer that can be understood"

    def _stop(self, asked: Asked) -> None:
        if asked.process is not None:
            asked.process.kill()
            asked.process.wait()
            asked.process = None
        if asked.output is not None:
            asked.output.close()
            asked.output = None
