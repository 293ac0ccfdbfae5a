"""Jobs: commands of hvbackup that the service runs as processes of their own, and what became of them.

A job is a folder: `job.json` says what it is and how it stands, `out` and `err` are what its process writes, `progress` how
far it is, `exit` its exit code.  The processes outlive the service: one that starts finds the jobs of the one before, whether
they run or have ended.

    killed after            left behind                          mended by
    1 job.json written      a queued job                         the next start runs it
    2 marked as running     a running job without a process      the next start looks for a process with the job's folder
    3 process started       a process that nobody waits for      the same; its exit code is in its folder
"""

from __future__ import annotations

import enum
import json
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hvbackup.errors import HvbackupError, NotFound, UsageError
from hvbackup.files import Files
from hvbackup.model import SECOND, Instant
from hvbackup.processes import Process, start_detached, started_with

OUT = "out"  # in a job's folder: what its process says, which makes the file
LOG_BYTES = 64 * 1024  # of a job's log that is shown
KILL_AFTER_NS = 60 * SECOND  # from the polite end of a cancelled job to the forced one
KEPT_MAX = 5000  # ended jobs
INTERRUPTED = 130


class State(enum.StrEnum):
    """How a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    DEGRADED = "degraded"  # done, with warnings
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_open(self) -> bool:
        """Whether something is yet to come."""
        return self in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Task:
    """What a job does, for whom, and what it takes up."""

    kind: str  # the verb
    words: Sequence[str]  # of the command, without `hvbackup`
    store: str = ""  # a name of the configuration
    source: str = ""
    machine: str = ""  # its id
    name: str = ""  # what people call it
    policy: str = ""
    who: str = "schedule"
    lasting: bool = False  # it runs until it is ended: an export, a boot

    @property
    def subject(self) -> str:
        """What it is about: a machine, the machines of a policy, or a store."""
        return self.machine or self.policy or self.store


@dataclass(frozen=True, slots=True)
class Job:
    """One job."""

    id: str
    task: Task
    state: State
    made: int
    began: int = 0
    ended: int = 0
    process: Process | None = None
    exit_code: int | None = None
    error: str = ""
    cancelled: int = 0  # when somebody asked for its end


@dataclass(frozen=True, slots=True)
class Limits:
    """How many jobs may run at once."""

    total: int = 4
    of_store: Mapping[str, int] = field(default_factory=dict)
    of_source: Mapping[str, int] = field(default_factory=dict)

    def admit(self, task: Task, running: Sequence[Task]) -> bool:
        """Whether one more may begin.  Pure.  What lasts takes no place: it would keep it for days."""
        busy = [t for t in running if not t.lasting]
        if task.lasting:
            return True
        if task.machine and any(t.machine == task.machine and t.kind == task.kind for t in busy):
            return False
        of_store = sum(t.store == task.store for t in busy) if task.store else 0
        of_source = sum(t.source == task.source for t in busy) if task.source else 0
        return (
            len(busy) < self.total
            and of_store < self.of_store.get(task.store, self.total)
            and of_source < self.of_source.get(task.source, self.total)
        )


class Jobs:
    """All jobs of one service.  Thread safety: every method from any thread."""

    def __init__(self, folder: Path, clock: Callable[[], Instant], environment: Mapping[str, str] = os.environ) -> None:
        self._files, self._clock = Files(folder), clock
        self._environment = dict(environment)
        self._lock = threading.RLock()
        self.changed = threading.Condition()
        self.version = 0  # grows with each change
        self._files.make_dir("")
        self._files.sweep()
        self._jobs: dict[str, Job] = {}
        self._subjects: dict[str, set[str]] = {}
        for name in self._files.names(""):
            if job := self._load(name):
                self._keep(job)

    def _load(self, name: str) -> Job | None:
        try:
            value = json.loads(self._files.read(f"{name}/job.json"))
            task = value.pop("task")
            task = Task(**_known(Task, {**task, "words": tuple(map(str, task["words"]))}))
            value = _known(Job, value)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        process = Process(**p) if (p := value.pop("process")) else None
        job = Job(**{**value, "task": task, "state": State(value["state"]), "process": process})
        if job.state is State.RUNNING and process is None:
            found = started_with(str(self.folder(job.id)))
            job = replace(job, process=found[0] if found else None)
            if not found and not (self.folder(job.id) / OUT).exists():
                job = replace(job, state=State.QUEUED, began=0)  # who was about to start it was killed before
        return job

    def folder(self, job: str) -> Path:
        """Where a job's files are."""
        return self._files.path(job)

    # -- what people and the scheduler do ------------------------------------------------------------------------------

    def submit(self, task: Task) -> Job:
        """The job is on disk when this returns, and begins when there is room."""
        now = self._clock()
        made = datetime.fromtimestamp(now / SECOND, UTC).strftime("%Y%m%d-%H%M%S")
        task = replace(task, words=tuple(task.words))
        job = Job(f"{made}-{secrets.token_hex(4)}", task, State.QUEUED, now)
        self._put(job)
        return job

    def cancel(self, job_id: str) -> Job:
        """The job ends soon.  Raises NotFound, UsageError when it has ended."""
        with self._lock:
            job = self.get(job_id)
            if not job.state.is_open:
                raise UsageError(f"Job {job_id} has ended: it is {job.state}")
            now = self._clock()
            if job.state is State.QUEUED:
                return self._put(replace(job, state=State.CANCELLED, cancelled=now, ended=now))
            if job.process and job.process.is_running():
                job.process.signal(signal.SIGTERM)
            return self._put(replace(job, cancelled=job.cancelled or now))

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        with self._lock:
            if job_id not in self._jobs:
                raise NotFound(f"There is no job {job_id}; `hvbackup jobs` lists those there are")
            return self._jobs[job_id]

    def all(self) -> list[Job]:
        """Every job, newest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda j: (j.made, j.id), reverse=True)

    def of(self, subject: str) -> list[Job]:
        """The jobs of one machine, of a whole policy, or of a whole store; newest first."""
        with self._lock:
            mine = self._subjects.get(subject, set())
            return sorted((self._jobs[i] for i in mine if i in self._jobs), key=lambda j: (j.made, j.id), reverse=True)

    def open(self) -> list[Job]:
        """Those that wait or run, oldest first."""
        return [j for j in reversed(self.all()) if j.state.is_open]

    def progress(self, job_id: str) -> dict[str, Any] | None:
        """How far a running job is."""
        try:
            found = json.loads((self.folder(job_id) / "progress").read_bytes())
            return found if isinstance(found, dict) else None
        except (OSError, ValueError):
            return None

    def log(self, job_id: str) -> str:
        """The end of what its process said."""
        try:
            data = (self.folder(job_id) / "err").read_bytes()
        except OSError:
            return ""
        return data[-LOG_BYTES:].decode(errors="replace")

    def answer(self, job_id: str) -> Any:
        """What its command answered, or None."""
        try:
            lines = (self.folder(job_id) / OUT).read_bytes().splitlines()
            return json.loads(lines[-1]) if lines else None
        except (OSError, ValueError):
            return None

    def wait(self, version: int, seconds: float) -> int:
        """Returns the version once it is newer than the given one, or after some time."""
        with self.changed:
            self.changed.wait_for(lambda: self.version > version, seconds)
            return self.version

    # -- what the service's loop does ----------------------------------------------------------------------------------

    def step(self, limits: Limits) -> list[Job]:
        """Jobs that may begin have begun, and those that ended are told of; returns these."""
        with self._lock:
            running = [j for j in self._jobs.values() if j.state is State.RUNNING]
            ended = [done for job in running if (done := self._ended(job))]
            for job in self.open():
                if job.state is State.QUEUED:
                    tasks = [j.task for j in self._jobs.values() if j.state is State.RUNNING]
                    if limits.admit(job.task, tasks):
                        ended += self._begin(job)
            return ended

    def _begin(self, job: Job) -> list[Job]:
        job = self._put(replace(job, state=State.RUNNING, began=self._clock()))
        folder = self.folder(job.id)
        argv = [sys.executable, "-m", "hvbackup.cli.job", str(folder)]
        try:
            process = start_detached(argv, folder / OUT, folder / "err", self._environment)
        except HvbackupError as e:
            return [self._put(replace(job, state=State.FAILED, ended=self._clock(), error=str(e)))]
        self._put(replace(job, process=process))
        return []

    def _ended(self, job: Job) -> Job | None:
        if job.process and job.process.is_running():
            if job.cancelled and self._clock() - job.cancelled > KILL_AFTER_NS:
                job.process.signal(signal.SIGKILL)
            return None
        code = self._exit_code(job.id)
        state, error = self._verdict(job, code)
        return self._put(replace(job, state=state, ended=self._clock(), exit_code=code, error=error, process=None))

    def _exit_code(self, job_id: str) -> int | None:
        try:
            return int((self.folder(job_id) / "exit").read_text())
        except (OSError, ValueError):
            return None

    def _verdict(self, job: Job, code: int | None) -> tuple[State, str]:
        said = self.answer(job.id)
        error = said.get("error") if isinstance(said, dict) else None
        message = str(error.get("message", "")) if isinstance(error, dict) else ""
        if code == 0:
            warned = "warning: " in self.log(job.id)
            return (State.DEGRADED if warned else State.DONE), ""
        if job.cancelled or (code == INTERRUPTED and job.task.lasting):
            return State.CANCELLED, ""
        last = self.log(job.id).strip().splitlines()[-1:]
        if code is None:
            return State.FAILED, "Its process ended without a word: it was killed, or the host was restarted"
        return State.FAILED, message or "".join(last) or f"exit code {code}"

    def forget(self, older_than_ns: int) -> int:
        """Jobs that ended long ago are gone when this returns; how many."""
        with self._lock:
            ended = [j for j in self.all() if not j.state.is_open]
            limit = self._clock() - older_than_ns
            old = [j for n, j in enumerate(ended) if j.ended < limit or n >= KEPT_MAX]
            for job in old:
                del self._jobs[job.id]
                self._subjects[job.task.subject].discard(job.id)
                shutil.rmtree(self.folder(job.id), ignore_errors=True)
            return len(old)

    def _keep(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.id] = job
            self._subjects.setdefault(job.task.subject, set()).add(job.id)

    def _put(self, job: Job) -> Job:
        value = {**asdict(job), "state": str(job.state)}
        self._files.replace(f"{job.id}/job.json", json.dumps(value).encode())
        self._keep(job)
        with self.changed:
            self.version += 1
            self.changed.notify_all()
        return job


def _known(kind: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """What this version understands of what a later one may have written."""
    return {name: value[name] for name in kind.__slots__ if name in value}


def shape(job: Job, progress: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A job as JSON."""

    def when(t: int) -> str | None:
        return (
            datetime.fromtimestamp(t / SECOND, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            if t
            else None
        )

    return {
        "id": job.id,
        "kind": job.task.kind,
        "state": str(job.state),
        "command": command_line(job.task.words),
        "store": job.task.store or None,
        "source": job.task.source or None,
        "machine": {"id": job.task.machine, "name": job.task.name} if job.task.machine else None,
        "policy": job.task.policy or None,
        "who": job.task.who,
        "made": when(job.made),
        "began": when(job.began),
        "ended": when(job.ended),
        "exit_code": job.exit_code,
        "error": job.error or None,
        "progress": dict(progress) if progress else None,
    }


def command_line(words: Sequence[str]) -> str:
    """The command as a person would type it."""
    import shlex

    return shlex.join(["hvbackup", *words])
