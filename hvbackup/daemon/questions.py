"""Questions that take a while, each put to a process of its own: a command that you could type.

The index is DuckDB's.  Threads of a process that ends are stopped in the middle, and one that is inside DuckDB then aborts the
process.  So none of it runs in the service, which may end at any moment, and lends it no memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvbackup import errors
from hvbackup.errors import Busy, HvbackupError

ASKED_MAX = 4  # at once: each has a process with DuckDB in it, and holds a thread of the API
KINDS = {k: v for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, HvbackupError)}


@dataclass(slots=True)
class Questions:
    """All that are asked.  Thread safety: any thread."""

    environment: Mapping[str, str]
    _asked: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, *words: str) -> dict[str, Any]:
        """What the command answers.  Raises what it failed with; Busy when the service ends, or answers enough others."""
        with self._begun(words) as process:
            try:
                said, complaint = process.communicate()
            finally:
                with self._lock:
                    self._asked.discard(process)
        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError:
            if self._closed:
                raise Busy("The service is ending; ask again when it is back") from None
            last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
            raise HvbackupError(f"hvbackup {words[0]} gave no answer: {last or process.returncode}") from None
        if "error" in answer:
            raise KINDS.get(answer["error"]["kind"], HvbackupError)(answer["error"]["message"])
        return answer

    def _begun(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "hvbackup", words[0], "--json", *words[1:]]
        with self._lock:
            if self._closed:
                raise Busy("The service is ending; ask again when it is back")
            if len(self._asked) >= ASKED_MAX:
                raise Busy(f"The service is answering {ASKED_MAX} other questions; ask again in a moment")
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=dict(self.environment),
            )  # fmt: skip
            self._asked.add(process)
            return process

    def close(self) -> None:
        """Nothing is asked any more, and who waits is told so."""
        with self._lock:
            self._closed = True
            for process in self._asked:
                process.kill()
