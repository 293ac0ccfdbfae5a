"""The service of this host, over its local socket; and, where none runs, what it left on disk."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from hvbackup.config import Places
from hvbackup.errors import HostUnreachable, HvbackupError, NotFound, UsageError

SOCKET = "api.sock"
ANSWER_SECONDS = 30.0


def ask(places: Places, method: str, path: str, body: Any = None) -> Any:
    """What the service answers, or None when none runs.  Raises what it refuses with, HostUnreachable."""
    address = places.run / SOCKET
    if not address.exists():
        return None
    from hvbackup.cli.line import Failed, Line

    line = Line(str(address), ANSWER_SECONDS)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        line.request(method, path, None if body is None else json.dumps(body), headers)
        answer = line.getresponse()
        text = answer.read()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, Failed) as e:
        raise HostUnreachable(f"The service at {address} does not answer: {e}") from e
    finally:
        line.close()
    found = json.loads(text) if answer.headers.get_content_type() == "application/json" else text.decode()
    if answer.status >= 400:
        kind = {404: NotFound, 422: UsageError}.get(answer.status, HvbackupError)
        raise kind(found["error"]["message"] if isinstance(found, dict) else found)
    return found


def is_ours(places: Places) -> bool:
    """Whether a service runs here as the same user as we."""
    try:
        return (places.run / SOCKET).stat().st_uid == os.geteuid()
    except OSError:
        return False


def jobs(places: Places, count: int) -> list[dict[str, Any]]:
    """The newest jobs."""
    found = ask(places, "GET", f"/api/v1/jobs?count={min(count, 500)}")
    if found is not None:
        listed: list[dict[str, Any]] = found["jobs"]
        return listed
    from hvbackup.jobs import shape

    return [shape(j) for j in _left(places).all()[:count]]


def job(places: Places, job_id: str) -> dict[str, Any]:
    """One job with its log.  Raises NotFound."""
    found = ask(places, "GET", f"/api/v1/jobs/{job_id}")
    if found is not None:
        return {**found, "log": ask(places, "GET", f"/api/v1/jobs/{job_id}/log")}
    from hvbackup.jobs import shape

    left = _left(places)
    return {**shape(left.get(job_id)), "answer": left.answer(job_id), "log": left.log(job_id)}


def _left(places: Places) -> Any:
    from hvbackup.jobs import Jobs
    from hvbackup.model import Instant

    return Jobs(places.state / "jobs", lambda: Instant(time.time_ns()))
