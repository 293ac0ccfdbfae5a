"""Pages of files inside disks: a folder at a moment, the way back up, and what can be taken out."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from hvbackup import jobs
from hvbackup.api import guestfiles, machines
from hvbackup.api.gate import Caller, Desk, TheDesk, admit, caller_of, row_of
from hvbackup.api.pages import First, page
from hvbackup.auth import Permission
from hvbackup.daemon.rows import Row

router = APIRouter()
PAGE = 500  # names of a page


def restorer(request: Request) -> Caller:
    """Who looks, and may see what machines hold."""
    caller = caller_of(request)
    admit(caller, Permission.RESTORE)
    return caller


Restorer = Annotated[Caller, Depends(restorer)]


@router.get("/machines/{key}/files")
def folder(
    request: Request, desk: TheDesk, caller: Restorer, key: machines.Key, path: guestfiles.Path = "/",
    at: guestfiles.Moment = "latest", disk: guestfiles.Disk = "", first: First = 0,
) -> HTMLResponse:  # fmt: skip
    """What is in a folder."""
    row = row_of(desk, caller, key)
    found = guestfiles.listed(desk, caller, row, at, disk, path)
    here = f"/machines/{key}/files"

    def address(disk_: str, path_: str) -> str:
        return f"{here}?{urlencode({'at': at, 'disk': disk_, 'path': path_})}"

    def file(disk_: str, path_: str) -> str:
        return f"{here}/content?{urlencode({'at': at, 'disk': disk_, 'path': path_})}"

    names = [n for n in path.split("/") if n]
    ways = ["/" + "/".join(names[: i + 1]) for i in range(len(names))]
    crumbs = [(n if i else f"{disk} partition {n}".strip(), address(disk, ways[i])) for i, n in enumerate(names)]
    return page(
        request, "files.html", caller, row=row, point=found.point, at=at, disk=disk, inside=path, top=not names,
        crumbs=crumbs, entries=[(str(r.disk.id), e) for r, e in found.entries[first : first + PAGE]],
        total=len(found.entries), first=first, size_=PAGE, notes=found.notes, folder=address, file=file,
        pages=f"{address(disk, path)}&", lines=_lines(desk, row, at, disk, path),
    )  # fmt: skip


def _lines(desk: Desk, row: Row, at: str, disk: str, path: str) -> list[str]:
    """The commands that list the folder, and that copy it out."""
    which = [f"--at={at}", *([f"--disk={disk}"] if disk else []), *desk.keeper.store_words(row.store)]
    shown = ["files", *which, "--", row.name, path]
    copied = ["files", *which, "--to=FOLDER", "--", row.name, path]
    return [jobs.command_line(words) for words in ([shown, copied] if path.strip("/") else [shown])]


@router.get("/machines/{key}/files/content")
def content(
    desk: TheDesk, caller: Restorer, key: machines.Key, path: guestfiles.Path, at: guestfiles.Moment = "latest",
    disk: guestfiles.Disk = "",
) -> StreamingResponse:  # fmt: skip
    """One file."""
    return guestfiles.download(desk, caller, row_of(desk, caller, key), at, disk, path)
