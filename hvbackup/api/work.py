"""Routes of jobs: what runs, how far it is, and its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

from hvbackup import jobs
from hvbackup.api.gate import Caller, Desk, TheDesk, audited, is_still_admitted, needs
from hvbackup.auth import Permission
from hvbackup.errors import NotFound
from hvbackup.jobs import Job, State

router = APIRouter(prefix="/api/v1", tags=["jobs"])
Reader = Annotated[Caller, Depends(needs(Permission.READ))]
Operator = Annotated[Caller, Depends(needs(Permission.OPERATE))]
JobId = Annotated[str, Path(pattern=r"^\d{8}-\d{6}-[0-9a-f]{8}$")]
TICK_SECONDS = 1.0


def visible(desk: Desk, caller: Caller, job: Job) -> bool:
    """Whether the caller may know of the job."""
    if caller.principal.is_unlimited:
        return True
    return any(r.id == job.task.machine and caller.sees(r) for r in desk.keeper.rows())


def job_of(desk: Desk, caller: Caller, job_id: str) -> Job:
    """Raises NotFound, also when it is somebody else's."""
    job = desk.keeper.jobs.get(job_id)
    if not visible(desk, caller, job):
        raise NotFound(f"There is no job {job_id}")
    return job


def shown(desk: Desk, job: Job) -> dict[str, Any]:
    """A job as JSON, with how far it is."""
    return jobs.shape(job, desk.keeper.jobs.progress(job.id) if job.state is State.RUNNING else None)


@router.get("/jobs")
def all_jobs(
    desk: TheDesk,
    caller: Reader,
    state: State | None = None,
    machine: Annotated[str, Query(max_length=500)] = "",
    first: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
    count: Annotated[int, Query(ge=1, le=500)] = 50,
) -> dict[str, Any]:
    """Jobs, newest first."""
    found = [
        j for j in desk.keeper.jobs.all()
        if (state is None or j.state is state) and (not machine or j.task.machine == machine) and visible(desk, caller, j)
    ]  # fmt: skip
    return {"total": len(found), "jobs": [shown(desk, j) for j in found[first : first + count]]}


@router.get("/jobs/{job_id}")
def one(desk: TheDesk, caller: Reader, job_id: JobId) -> dict[str, Any]:
    """One job, and what its command answered."""
    job = job_of(desk, caller, job_id)
    return {**shown(desk, job), "answer": desk.keeper.jobs.answer(job_id)}


@router.get("/jobs/{job_id}/log", response_class=PlainTextResponse)
def log(desk: TheDesk, caller: Reader, job_id: JobId) -> str:
    """The end of what it said."""
    return desk.keeper.jobs.log(job_of(desk, caller, job_id).id)


@router.delete("/jobs/{job_id}")
def cancel(desk: TheDesk, caller: Operator, job_id: JobId) -> dict[str, Any]:
    """End it; what it committed stays."""
    job = job_of(desk, caller, job_id)
    with audited(desk, caller, "cancel", job.task.machine, job=job_id):
        return jobs.shape(desk.keeper.jobs.cancel(job_id))


@router.get("/events", response_class=StreamingResponse)
async def events(request: Request, desk: TheDesk, caller: Reader) -> StreamingResponse:
    """Open jobs each time one changes or gets further, as server-sent events named `jobs`."""
    return StreamingResponse(
        _events(request, desk, caller), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


async def _events(request: Request, desk: Desk, caller: Caller) -> AsyncIterator[str]:
    told, quiet = "", 0
    while is_still_admitted(request) and not await request.is_disconnected():
        found = [shown(desk, j) for j in desk.keeper.jobs.all()[:200] if visible(desk, caller, j)]
        recent = [j for j in found if j["ended"] is None] + [j for j in found if j["ended"]][:10]
        text = json.dumps({"jobs": recent})
        if text != told or quiet >= 15:
            told, quiet = text, 0
            yield f"event: jobs\ndata: {text}\n\n"
        quiet += 1
        await asyncio.sleep(TICK_SECONDS)
