"""The application: routes, errors as JSON with the fitting status, and headers that keep browsers out of trouble."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hvbackup import __version__
from hvbackup.api import folders, guestfiles, machines, pages, people, stores, upkeep, work
from hvbackup.api.gate import Desk, Forbidden
from hvbackup.auth import Refused, TooMany
from hvbackup.errors import Busy, FileSystemUnreadable, HostUnreachable, HvbackupError, NotFound, UsageError

BODY_MAX_BYTES = 256 * 1024
HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), geolocation=(), microphone=()",
    b"strict-transport-security": b"max-age=31536000",
}


def create(desk: Desk | None) -> FastAPI:
    """The application; without a desk, only its description can be asked for."""
    app = FastAPI(
        title="hvbackup", version=__version__, docs_url=None, redoc_url=None, openapi_url="/api/v1/openapi.json",
        description="Continuous backup of virtual machines, and any moment of them back.",
        license_info={"name": "AGPL-3.0-or-later"},
    )  # fmt: skip
    app.state.desk = desk
    for router in (
        stores.router,
        upkeep.router,
        machines.router,
        guestfiles.router,
        work.router,
        people.router,
        stores.outside,
    ):
        app.include_router(router, responses=RESPONSES)
    app.include_router(pages.router, include_in_schema=False)
    app.include_router(folders.router, include_in_schema=False)
    app.add_exception_handler(HvbackupError, _failed)
    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(Shell)
    return app


RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"description": "Who asks is not known"},
    403: {"description": "Who asks may not"},
    404: {"description": "There is no such thing, or it is somebody else's"},
    409: {"description": "Somebody else holds it"},
    422: {"description": "What was asked makes no sense"},
    429: {"description": "Too many wrong tries"},
    500: {"description": "It failed"},
    502: {"description": "A host or worker does not answer"},
}


def status_of(e: HvbackupError) -> int:
    """The HTTP status of an error."""
    order = (
        (TooMany, 429),
        (Forbidden, 403),
        (Refused, 401),
        (NotFound, 404),
        (UsageError, 422),
        (FileSystemUnreadable, 422),
        (Busy, 409),
        (HostUnreachable, 502),
    )
    return next((status for kind, status in order if isinstance(e, kind)), 500)


def _failed(request: Request, e: Exception) -> Response:
    assert isinstance(e, HvbackupError)
    status = status_of(e)
    if pages.wants_html(request):
        return pages.error(request, status, str(e))
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if isinstance(e, TooMany):
        headers["Retry-After"] = str(int(e.seconds) + 1)
    shape = {"kind": type(e).__name__, "message": str(e), "exit_code": e.exit_code}
    return JSONResponse({"error": shape}, status, headers)


def _not_understood(request: Request, e: Exception) -> Response:
    assert isinstance(e, RequestValidationError)
    first = e.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _failed(request, UsageError(f"{where}: {first['msg']}"))


def _http(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    if pages.wants_html(request):
        return pages.error(request, e.status_code, str(e.detail))
    shape = {"kind": "HTTP", "message": str(e.detail), "exit_code": 1}
    return JSONResponse({"error": shape}, e.status_code, dict(e.headers or {}))


class Shell:
    """Around everything: headers on each answer, and no request longer than it may be."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > BODY_MAX_BYTES:
                raise HTTPException(413, f"A request has at most {BODY_MAX_BYTES} bytes")
            return message

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {k.lower() for k, _ in message["headers"]}
                extra = dict(HEADERS)
                if not scope["path"].startswith("/static/"):
                    extra[b"cache-control"] = b"no-store"
                message["headers"] = [*message["headers"], *((k, v) for k, v in extra.items() if k not in present)]
            await send(message)

        await self._app(scope, bounded, dressed)
