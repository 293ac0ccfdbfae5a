"""The console: pages that the server renders, usable with a keyboard and on a phone, and a timeline that a script draws.

Every order is a form that carries its session's word, and shows the command that does the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from pydantic import ValidationError

from hvbackup import __version__, configuration, jobs
from hvbackup.api import machines, oidc, orders, people, scrape, show, stores, work
from hvbackup.api.gate import Caller, Desk, Forbidden, TheDesk, admit, caller_of, check_origin, row_of
from hvbackup.api.timeline import band
from hvbackup.auth import Permission, Refused, TooMany
from hvbackup.daemon import rows
from hvbackup.daemon.rows import Row, Standing
from hvbackup.errors import Busy, HostUnreachable, HvbackupError, NotFound, UsageError
from hvbackup.model import Instant
from hvbackup.moments import rfc3339

router = APIRouter()
PAGE = 100  # rows of a page
STATIC = {
    "style.css": "text/css",
    "timeline.js": "text/javascript",
    "live.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
FORM_BYTES = 64 * 1024


def visitor(request: Request) -> Caller:
    """Who looks."""
    return caller_of(request)


def reader(request: Request) -> Caller:
    """Who looks, and may see machines."""
    caller = caller_of(request)
    admit(caller, Permission.READ)
    return caller


def overseer(request: Request) -> Caller:
    """Who looks, and may see everything."""
    caller = caller_of(request)
    admit(caller, Permission.READ, everything=True)
    return caller


def admin(request: Request) -> Caller:
    """Who looks, and may see what others did."""
    caller = caller_of(request)
    admit(caller, Permission.ADMIN, everything=True)
    return caller


Reader = Annotated[Caller, Depends(reader)]
Overseer = Annotated[Caller, Depends(overseer)]
Admin = Annotated[Caller, Depends(admin)]
First = Annotated[int, Query(ge=0, le=10_000_000)]


def wants_html(request: Request) -> bool:
    """Whether a person with a browser asks."""
    path = request.url.path
    return not path.startswith(("/api/", "/metrics", "/healthz", "/static/"))


@functools.cache
def _templates() -> Any:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("hvbackup.api", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(
        size=show.size,
        ago=show.ago,
        stretch=show.stretch,
        moment=show.moment,
        sign=show.sign,
        took=show.took,
        far=show.far,
    )
    made.globals.update(static=_static, version=__version__)
    return made


def warm() -> None:
    """The first visitor does not wait for what could be made ready before."""
    for name in _templates().list_templates():
        _templates().get_template(name)


@functools.cache
def _content(name: str) -> bytes:
    return (resources.files("hvbackup.api") / "static" / name).read_bytes()


def _static(name: str) -> str:
    """The address of a static file; it changes with its content."""
    return f"/static/{name}?{hashlib.sha256(_content(name)).hexdigest()[:12]}"


def page(request: Request, name: str, caller: Caller | None, code: int = 200, **values: Any) -> HTMLResponse:
    """A page, with what every page has."""
    desk: Desk | None = request.app.state.desk
    now = desk.keeper.clock() if desk else Instant(0)
    common = {"caller": caller, "path": request.url.path, "now": now, "csrf": caller.csrf if caller else "",
              "may": (lambda p: caller.principal.may(Permission(p))) if caller else (lambda _: False)}  # fmt: skip
    return HTMLResponse(_templates().get_template(name).render(**common, **values), code)


def error(request: Request, status: int, text: str) -> Response:
    """A page that says what is wrong; who is not known is asked to log in."""
    if status == 401 and request.method == "GET":
        back = request.url.path if request.url.path != "/login" else "/"
        return RedirectResponse(f"/login?{urlencode({'to': back})}", 303)
    try:
        caller: Caller | None = caller_of(request)
    except HvbackupError:
        caller = None
    return page(request, "error.html", caller, status, status=status, text=text)


@router.get("/static/{name}")
def static(name: Annotated[str, Path(max_length=40)]) -> Response:
    """Style and scripts; there is nothing else."""
    if name not in STATIC:
        raise NotFound(f"There is no file {name}")
    return Response(
        _content(name), media_type=STATIC[name], headers={"Cache-Control": "public, max-age=31536000, immutable"}
    )


async def form(request: Request) -> dict[str, str]:
    """The fields of a form, each once.  Raises UsageError."""
    body = await request.body()
    if len(body) > FORM_BYTES or not request.headers.get("content-type", "").startswith(
        "application/x-www-form-urlencoded"
    ):
        raise UsageError("This is no form of ours")
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=bool(body), max_num_fields=100))
    except (ValueError, UnicodeDecodeError) as e:
        raise UsageError(f"This is no form of ours: {e}") from e


Form = Annotated[dict[str, str], Depends(form)]


# -- coming in ---------------------------------------------------------------------------------------------------------------


@router.get("/login")
def login_page(request: Request, to: Annotated[str, Query(max_length=200)] = "/") -> HTMLResponse:
    """Name and password."""
    return _login_page(request, 200, _within(to), "")


def _login_page(request: Request, code: int, to: str, said: str) -> HTMLResponse:
    desk: Desk = request.app.state.desk
    provider = desk.keeper.settings.provider
    return page(
        request, "login.html", None, code, to=to, said=said, nobody=not said and not desk.accounts.users(),
        provider=provider.label if provider.issuer else "",
    )  # fmt: skip


@router.post("/login")
def login(request: Request, desk: TheDesk, fields: Form) -> Response:
    """A session, or the page again."""
    address = request.client.host if request.client else "local"
    to = _within(fields.get("to", "/"))
    origin = request.headers.get("origin", "")
    if origin and origin.partition("://")[2] != request.headers.get("host", ""):
        raise Forbidden("The request comes from another site")
    try:
        cookie, _, _ = people.enter(
            desk, fields.get("name", ""), fields.get("password", ""), fields.get("code", ""), address
        )
    except Refused as e:
        return _login_page(request, 401, to, str(e))
    answer = RedirectResponse(to, 303)
    people.set_cookie(answer, cookie)
    return answer


@router.get("/login/provider")
def to_provider(desk: TheDesk, to: Annotated[str, Query(max_length=200)] = "/") -> Response:
    """Off to who says who somebody is."""
    login, cookie = desk.logins.begin(_within(to))
    answer = RedirectResponse(desk.who_vouches().address(login), 303)
    # It comes back from another site, which a strict cookie would not.
    answer.set_cookie(
        oidc.COOKIE, cookie, secure=True, httponly=True, samesite="lax", path="/", max_age=int(oidc.LOGIN_SECONDS)
    )
    return answer


@router.get(oidc.BACK)
def from_provider(
    request: Request, desk: TheDesk, state: Annotated[str, Query(max_length=100)] = "",
    code: Annotated[str, Query(max_length=4000)] = "", error: Annotated[str, Query(max_length=200)] = "",
) -> Response:  # fmt: skip
    """A session for whom the provider named, or the login page again."""
    address = request.client.host if request.client else "local"
    keys, to, name = (f"provider from {address}",), "/", ""
    try:
        desk.accounts.guard.admit(keys)
        login = desk.logins.get(state, request.cookies.get(oidc.COOKIE, ""))
        to = login.to
        if error or not code:
            raise Refused(f"The provider refused: {error or 'it gave no code'}")
        name = desk.who_vouches().name(code, login)
        principal = desk.accounts.signed_on(name)
        desk.logins.end(login)
    except TooMany as e:
        return _login_page(request, 429, to, str(e))
    except HvbackupError as e:
        people.refused(desk, name, address, e)
        if isinstance(e, (Busy, HostUnreachable)):  # no fault of who comes in
            return _login_page(request, 409 if isinstance(e, Busy) else 502, to, str(e))
        desk.accounts.guard.failed(keys)
        return _login_page(request, 401, to, str(e))
    desk.accounts.guard.succeeded(keys)
    cookie, _, _ = people.begun(desk, principal, address)
    # A page of ours goes on: the browser would not send a strict cookie where another site sent it.
    answer = page(request, "entered.html", None, to=to)
    people.set_cookie(answer, cookie)
    answer.delete_cookie(oidc.COOKIE, secure=True, httponly=True, samesite="lax", path="/")
    return answer


def _within(to: str) -> str:
    """A page of ours, never another site's."""
    return to if to.startswith("/") and not to.startswith(("//", "/\\")) and to.isprintable() else "/"


@router.post("/logout")
def logout(request: Request, desk: TheDesk, caller: Annotated[Caller, Depends(visitor)], fields: Form) -> Response:
    """Goodbye."""
    check_origin(request, caller, fields.get("csrf", ""))
    answer = RedirectResponse("/login", 303)
    people.logout(request, answer, desk, caller)
    return answer


# -- looking -----------------------------------------------------------------------------------------------------------------


@router.get("/")
def home() -> Response:
    """The estate."""
    return RedirectResponse("/machines", 303)


@router.get("/machines")
def estate(
    request: Request, desk: TheDesk, caller: Reader, state: str = "", q: Annotated[str, Query(max_length=200)] = "",
    first: First = 0,
) -> HTMLResponse:  # fmt: skip
    """Every machine at a glance."""
    every = machines.seen(desk, caller)
    found = machines.seen(desk, caller, state if state in list(Standing) else "", q)
    order = [
        Standing.LATE,
        Standing.UNPROTECTED,
        Standing.FAILING,
        Standing.PAUSED,
        Standing.PROTECTED,
        Standing.LEFT_OUT,
        Standing.GONE,
    ]
    found.sort(key=lambda r: order.index(r.standing))
    names = {r.name for r in every}
    alarms = [a for a in desk.keeper.alarms if caller.principal.is_unlimited or a.subject in names]
    other = [a for a in alarms if not a.key.startswith("machine:")]
    return page(
        request, "machines.html", caller, rows=found[first : first + PAGE], total=len(found), first=first, size_=PAGE,
        counts=rows.counts(every), every=len(every), state=state, q=q, alarms=other,
        busy={j.task.machine for j in desk.keeper.jobs.open()},
    )  # fmt: skip


@router.get("/machines/{key}")
def machine(request: Request, desk: TheDesk, caller: Reader, key: machines.Key) -> HTMLResponse:
    """One machine: its timeline, and what can be done at the cursor."""
    row = row_of(desk, caller, key)
    data: dict[str, Any] = {}
    newest = []
    if row.known:
        now = desk.keeper.clock()
        opened = desk.keeper.estate(row.store)
        data = band(opened, machines.histories, row.known, now, None, None).shape()
        newest = opened.points(row.known, 0, 10)
    mine = [j for j in desk.keeper.jobs.of(row.id) if work.visible(desk, caller, j)][:8]
    setup = {
        "key": key, "id": row.id, "name": row.name, "now": rfc3339(desk.keeper.clock()), "band": data,
        "words": desk.keeper.store_words(row.store),
        "restores": str(orders.restores(desk.keeper)),
    }  # fmt: skip
    return page(
        request, "machine.html", caller, row=row, points=newest, jobs=mine, setup=json.dumps(setup).replace("<", "\\u003c"),
        lines=_lines(desk, row),
    )  # fmt: skip


def _lines(desk: Desk, row: Row) -> Mapping[str, str]:
    """The commands that do what the page's own buttons do."""
    found = {
        "pause": jobs.command_line(["protect", "pause", row.name]),
        "resume": jobs.command_line(["protect", "resume", row.name]),
    }
    try:
        found["backup"] = jobs.command_line(orders.backup(desk.keeper, row, orders.Backup(), "").words)
    except UsageError:
        found["backup"] = ""
    return found


@router.get("/machines/{key}/points")
def points(request: Request, desk: TheDesk, caller: Reader, key: machines.Key, first: First = 0) -> HTMLResponse:
    """All points of a machine, newest first."""
    row = row_of(desk, caller, key)
    known = machines.known_of(row)
    found = desk.keeper.estate(row.store).points(known, first, PAGE)
    return page(request, "points.html", caller, row=row, points=found, total=len(known.times), first=first, size_=PAGE)


@router.get("/jobs")
def all_jobs(request: Request, desk: TheDesk, caller: Reader, first: First = 0) -> HTMLResponse:
    """What runs, waits and ended."""
    found = [j for j in desk.keeper.jobs.all() if work.visible(desk, caller, j)]
    shown = [work.shown(desk, j) for j in found[first : first + PAGE]]
    return page(request, "jobs.html", caller, jobs=shown, total=len(found), first=first, size_=PAGE)


@router.get("/jobs/{job_id}")
def job(request: Request, desk: TheDesk, caller: Reader, job_id: work.JobId) -> HTMLResponse:
    """One job and its log."""
    found = work.job_of(desk, caller, job_id)
    answer = desk.keeper.jobs.answer(job_id)
    text = json.dumps(answer, indent=1, ensure_ascii=False) if answer is not None else ""
    return page(request, "job.html", caller, job=work.shown(desk, found), log=desk.keeper.jobs.log(job_id), answer=text)


@router.get("/stores")
def all_stores(request: Request, desk: TheDesk, caller: Overseer) -> HTMLResponse:
    """Room, growth, deduplication."""
    found = [scrape.store_shape(desk.keeper, name) for name in desk.keeper.stores]
    charts = {s["name"]: show.bars([g["stored_bytes"] for g in s["growth"][-60:]]) for s in found}
    return page(request, "stores.html", caller, stores=found, charts=charts)


@router.get("/policies")
def policies(request: Request, desk: TheDesk, caller: Overseer) -> HTMLResponse:
    """Who protects what."""
    text = "\n".join(configuration.lines(desk.keeper.settings, every=False))
    return page(request, "policies.html", caller, found=stores.policies(desk, caller), text=text)


@router.get("/audit")
def audit(request: Request, desk: TheDesk, caller: Admin, first: First = 0) -> HTMLResponse:
    """Who did what."""
    found = stores.audit(desk, caller, first, PAGE)
    return page(request, "audit.html", caller, entries=found["entries"], total=found["total"], first=first, size_=PAGE)


# -- ordering ----------------------------------------------------------------------------------------------------------------


def _boot(desk: Desk, caller: Caller, row: Row, f: dict[str, str]) -> dict[str, Any]:
    return machines.boot(
        desk, caller, row.key, orders.Boot(at=f["at"], new_identity="keep_identity" not in f, generic=False)
    )


def _map(desk: Desk, caller: Caller, row: Row, f: dict[str, str]) -> dict[str, Any]:
    return machines.map_(desk, caller, row.key, orders.Which(at=f["at"]))


def _drill(desk: Desk, caller: Caller, row: Row, f: dict[str, str]) -> dict[str, Any]:
    return machines.drill(desk, caller, row.key, orders.Drill(at=f["at"]))


def _restore(desk: Desk, caller: Caller, row: Row, f: dict[str, str]) -> dict[str, Any]:
    return machines.restore(desk, caller, row.key, orders.Restore(at=f["at"], to=f["to"], format=f.get("format", "")))  # type: ignore[arg-type]


def _backup(desk: Desk, caller: Caller, row: Row, _: dict[str, str]) -> dict[str, Any]:
    return machines.backup(desk, caller, row.key, orders.Backup())


def _tag(desk: Desk, caller: Caller, row: Row, f: dict[str, str]) -> dict[str, Any]:
    return machines.tag(desk, caller, row.key, orders.Tag(tag=f["tag"]))


def _hold(desk: Desk, caller: Caller, row: Row, f: dict[str, str]) -> dict[str, Any]:
    return machines.hold(desk, caller, row.key, orders.Hold(point=f["at"], why=f.get("why", "")))


def _pause(desk: Desk, caller: Caller, row: Row, f: dict[str, str]) -> dict[str, Any]:
    return machines.pause(desk, caller, row.key, orders.Pause.model_validate({"why": f.get("why", "")}))


def _resume(desk: Desk, caller: Caller, row: Row, _: dict[str, str]) -> dict[str, Any]:
    return machines.resume(desk, caller, row.key)


Do = Callable[[Desk, Caller, Row, dict[str, str]], dict[str, Any]]
ACTIONS: Mapping[str, tuple[Permission, Do]] = {
    "backup": (Permission.OPERATE, _backup),
    "tag": (Permission.OPERATE, _tag),
    "hold": (Permission.OPERATE, _hold),
    "pause": (Permission.OPERATE, _pause),
    "resume": (Permission.OPERATE, _resume),
    "drill": (Permission.OPERATE, _drill),
    "boot": (Permission.RESTORE, _boot),
    "map": (Permission.RESTORE, _map),
    "restore": (Permission.RESTORE, _restore),
}


@router.post("/machines/{key}")
def order(request: Request, desk: TheDesk, caller: Reader, key: machines.Key, fields: Form) -> Response:
    """What a button of the machine's page asks for."""
    check_origin(request, caller, fields.get("csrf", ""))
    permission, do = ACTIONS.get(fields.get("action", ""), (Permission.ADMIN, None))
    admit(caller, permission)
    if do is None:
        raise UsageError("There is no such action")
    try:
        made = do(desk, caller, row_of(desk, caller, key), fields)
    except (ValidationError, KeyError) as e:
        what = e.errors()[0]["msg"] if isinstance(e, ValidationError) else f"{e} is missing"
        raise UsageError(f"{fields['action']}: {what}") from e
    where = f"/jobs/{made['id']}" if "command" in made else f"/machines/{key}"
    return RedirectResponse(where, 303)


@router.post("/jobs/{job_id}")
def cancel(request: Request, desk: TheDesk, caller: Reader, job_id: work.JobId, fields: Form) -> Response:
    """End a job."""
    check_origin(request, caller, fields.get("csrf", ""))
    admit(caller, Permission.OPERATE)
    work.cancel(desk, caller, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)
