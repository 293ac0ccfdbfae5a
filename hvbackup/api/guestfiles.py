"""Routes of files inside disks: folders are listed and files are downloaded, as they were at a moment.

What is read is a guest's: its names are never paths of this host, never markup, and what it holds is only ever saved and never
shown.  Each look is in the audit before its answer leaves, and a file leaves in pieces, however long it is.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse

from hvbackup.api.gate import Caller, Desk, TheDesk, audited, needs, row_of
from hvbackup.api.machines import Key, known_of
from hvbackup.api.orders import At, Line
from hvbackup.auth import Permission
from hvbackup.daemon.rows import Row
from hvbackup.errors import Busy, HvbackupError
from hvbackup.service import guestfiles
from hvbackup.service.guestfiles import Listed
from hvbackup.service.recovery import Which

router = APIRouter(prefix="/api/v1", tags=["files"])
Restorer = Annotated[Caller, Depends(needs(Permission.RESTORE))]
Moment = Annotated[At, Query(description="latest, a time, -10m, a point's id, seq:N, tag:NAME")]
Disk = Annotated[Line, Query(description="the disk that the path is on; may be left out where there is one")]
Path = Annotated[str, Query(min_length=1, max_length=4096, description="partition and path, such as /1/etc/hosts")]
OPEN_MAX = 8  # looks and downloads at once: each keeps up to 16 MiB of a file system's tables
BINARY = {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}
_open = threading.BoundedSemaphore(OPEN_MAX)
log = logging.getLogger("hvbackup.api")


@contextmanager
def _turn() -> Iterator[None]:
    """One of the few who look into disks at the same time.  Raises Busy."""
    if not _open.acquire(blocking=False):
        raise Busy(f"{OPEN_MAX} disks are being looked into already; try again when one of those is done")
    try:
        yield
    finally:
        _open.release()


def which(desk: Desk, row: Row, at: str, disk: str) -> Which:
    """The disks that are looked into."""
    return Which(row.id, at, desk.keeper.clock(), [disk] if disk else [])


def listed(desk: Desk, caller: Caller, row: Row, at: str, disk: str, path: str) -> Listed:
    """A folder, which is in the audit.  Raises as `guestfiles.listed`, Busy."""
    known_of(row)
    with _turn(), audited(desk, caller, "list files", row.id, store=row.store, at=at, disk=disk, path=path):
        return guestfiles.listed(desk.session(caller, row.store), which(desk, row, at, disk), path)


def download(desk: Desk, caller: Caller, row: Row, at: str, disk: str, path: str) -> StreamingResponse:
    """A file, which is in the audit.  Raises as `guestfiles.listed`, Busy."""
    known_of(row)
    with audited(desk, caller, "download file", row.id, store=row.store, at=at, disk=disk, path=path) as note:
        pieces = _pieces(desk, caller, row, which(desk, row, at, disk), path)
        note["bytes"] = size = int(
            next(pieces)
        )  # whatever is wrong is known now, while there is still a status to say it
    headers = {"Content-Length": str(size), "Content-Disposition": disposition(path.rsplit("/", 1)[1]),
               "Content-Security-Policy": "default-src 'none'; sandbox"}  # fmt: skip
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


def _pieces(desk: Desk, caller: Caller, row: Row, what: Which, path: str) -> Iterator[Any]:
    """How long the file is, then its bytes; a download that breaks is shorter than it said, never filled up."""
    with _turn(), guestfiles.opened(desk.session(caller, row.store), what) as here:
        _, volumes = here.one(path)
        yield volumes.file_size(volumes.find(path))
        try:
            yield from volumes.read(path)
        except HvbackupError as e:
            log.error("The download of %s of %s by %s broke: %s", path, row.name, caller.name, e)
            raise


def disposition(name: str) -> str:
    """A file of this name is saved, by every browser, and nowhere but among downloads."""
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", name).lstrip(". ") or "file"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


@router.get("/machines/{key}/files")
def files(
    desk: TheDesk, caller: Restorer, key: Key, path: Path = "/", at: Moment = "latest", disk: Disk = "",
    first: Annotated[int, Query(ge=0, le=10_000_000)] = 0, count: Annotated[int, Query(ge=1, le=5000)] = 1000,
) -> dict[str, Any]:  # fmt: skip
    """What is in a folder of one of its disks, as it was at a moment; `/` are the partitions of every disk."""
    shape = guestfiles.shape_listed(listed(desk, caller, row_of(desk, caller, key), at, disk, path))
    return {**shape, "total": len(shape["entries"]), "entries": shape["entries"][first : first + count]}


@router.get("/machines/{key}/files/content", response_class=StreamingResponse, responses=BINARY)  # type: ignore[arg-type]
def content(
    desk: TheDesk, caller: Restorer, key: Key, path: Path, at: Moment = "latest", disk: Disk = ""
) -> StreamingResponse:
    """One file, as it was at a moment."""
    return download(desk, caller, row_of(desk, caller, key), at, disk, path)
