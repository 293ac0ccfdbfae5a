"""hvbackup as a process, in a world of its own: store, state, configuration and run directory below one folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT_SECONDS = 120
# Where a small file system can be mounted that nobody else sees: root may do so as it is, others as root of a room of their own.
PRIVATE_MOUNTS = ["unshare", "--mount", *(() if os.geteuid() == 0 else ("--user", "--map-root-user"))]


@dataclass(frozen=True, slots=True)
class Ran:
    """How one command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one line of JSON it answered."""
        [line] = self.out.splitlines()
        return json.loads(line)

    @property
    def error(self) -> str:
        """The one line of its error; there must be no other, and no traceback."""
        lines = [line for line in self.err.splitlines() if not line.startswith("hvbackup: warning: ")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("hvbackup: error: "), self.err
        return lines[0].removeprefix("hvbackup: error: ")


class World:
    """One machine with hvbackup on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.configuration = folder / "conf"
        self.state = folder / "state"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HOME": str(folder),
            "TZ": "UTC",
            "LC_ALL": "C.UTF-8",
            "HVBACKUP_STORE": str(self.store),
            "HVBACKUP_STATE": str(self.state),
            "HVBACKUP_CONFIG": str(self.configuration),
            "HVBACKUP_RUN": str(folder / "run"),
            **{k: v for k, v in os.environ.items() if k.startswith("COVERAGE")},
        }

    def command(self, *words: str | Path) -> list[str]:
        """The words of a command."""
        return [sys.executable, "-m", "hvbackup", *map(str, words)]

    def start(self, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
        """A command that goes on while the test does something."""
        return subprocess.Popen(
            self.command(*words),
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str | Path, **environment: str) -> Ran:
        """A command that has ended."""
        process = self.start(*words, **environment)
        try:
            out, err = process.communicate(timeout=WAIT_SECONDS)
        finally:
            process.kill()
        return Ran(process.returncode, out, err)

    def done(self, *words: str | Path, **environment: str) -> Ran:
        """A command that has done what it should, without any complaint."""
        ran = self.run(*words, **environment)
        assert (ran.code, ran.err) == (0, ""), ran
        return ran

    def refused(self, code: int, *words: str | Path, **environment: str) -> str:
        """The message of a command that ends with this code, in text and as JSON alike."""
        ran = self.run(*words, "--json", **environment)
        assert ran.code == code, ran
        shape = json.loads(ran.out.splitlines()[-1])["error"]
        assert shape["exit_code"] == code, ran
        assert " ".join(shape["message"].split()) == ran.error.strip()
        return str(shape["message"])

    @property
    def key_file(self) -> Path:
        """The key that `init` made."""
        [found] = (self.configuration / "keys").glob("*.key")
        return found


def dead(pid: int) -> bool:
    """Whether a process has ended; nobody may have asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def make_disk(path: Path, size: int, *, seed: int = 1) -> bytes:
    """A raw disk of random bytes, with a hole in the middle."""
    third = size // 3
    rng = random.Random(seed)
    content = rng.randbytes(third) + bytes(third) + rng.randbytes(size - 2 * third)
    path.write_bytes(content)
    return content
