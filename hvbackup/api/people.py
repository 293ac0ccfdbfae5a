"""Routes of people: logging in and out, users, tokens."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import Field

from hvbackup.api.gate import COOKIE, Caller, TheDesk, audited, needs
from hvbackup.api.orders import Line, Order, Stretch
from hvbackup.auth import Permission, Principal, Refused, Role, Token, User
from hvbackup.errors import HvbackupError, UsageError
from hvbackup.model import Instant
from hvbackup.moments import rfc3339
from hvbackup.schedule import stretch

router = APIRouter(prefix="/api/v1", tags=["people"])
Admin = Annotated[Caller, Depends(needs(Permission.ADMIN, everything=True))]
Reader = Annotated[Caller, Depends(needs(Permission.READ))]
Words = Annotated[list[Line], Field(max_length=100)]


class Login(Order):
    """Who comes in."""

    name: Line
    password: Annotated[str, Field(max_length=1000)]
    code: Annotated[str, Field(max_length=10)] = ""


class NewUser(Order):
    """A person."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    password: Annotated[str, Field(max_length=1000)] = ""
    role: Role
    machines: Words = Field(default_factory=lambda: ["*"])
    totp: bool = False
    single_sign_on: bool = False  # instead of a password


class NewToken(Order):
    """A program's way in."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    role: Role
    machines: Words = Field(default_factory=lambda: ["*"])
    lasts: Stretch = "90d"


@router.post("/login")
def login(request: Request, response: Response, desk: TheDesk, order: Login) -> dict[str, Any]:
    """Begin a session: the answer sets its cookie, and has the word that each change must carry in X-Hvbackup-Csrf."""
    address = request.client.host if request.client else "local"
    cookie, csrf, principal = enter(desk, order.name, order.password, order.code, address)
    set_cookie(response, cookie)
    return {"name": principal, "csrf": csrf}


def enter(desk: TheDesk, name: str, password: str, code: str, address: str) -> tuple[str, str, str]:
    """A new session's cookie, its word, and whose it is.  Raises Refused; either way it is in the audit."""
    try:
        principal = desk.accounts.by_password(name, password, code, address)
    except Refused as e:
        refused(desk, name, address, e)
        raise
    return begun(desk, principal, address)


def refused(desk: TheDesk, name: str, address: str, why: HvbackupError) -> None:
    """It is in the audit that somebody did not come in."""
    desk.audit(Caller(Principal(name[:64] or "nobody", Role.VIEWER), address), "login", f"refused: {why}")


def begun(desk: TheDesk, principal: Principal, address: str) -> tuple[str, str, str]:
    """A new session's cookie, its word, and whose it is; it is in the audit."""
    cookie = desk.sessions.begin(principal)
    session = desk.sessions.get(cookie)
    assert session is not None
    desk.audit(Caller(principal, address), "login", "done")
    return cookie, session.csrf, principal.name


def set_cookie(response: Response, cookie: str) -> None:
    """Scripts can't read it, other sites can't send it, and it never travels in the clear."""
    response.set_cookie(COOKIE, cookie, secure=True, httponly=True, samesite="strict", path="/")


@router.post("/logout")
def logout(request: Request, response: Response, desk: TheDesk, caller: Reader) -> dict[str, Any]:
    """End the session."""
    desk.sessions.end(request.cookies.get(COOKIE, ""))
    response.delete_cookie(COOKIE, secure=True, httponly=True, samesite="strict", path="/")
    return {"name": caller.name}


@router.get("/me")
def me(caller: Reader) -> dict[str, Any]:
    """Who asks, and what they may do."""
    return {"name": caller.name, "role": str(caller.principal.role), "machines": list(caller.principal.machines)}


@router.get("/users")
def users(desk: TheDesk, caller: Admin) -> dict[str, Any]:
    """Everybody."""
    return {"users": [user_shape(u) for u in desk.accounts.users()]}


@router.post("/users", status_code=201)
def add_user(desk: TheDesk, caller: Admin, order: NewUser) -> dict[str, Any]:
    """A new user; the secret of their authenticator is shown once."""
    with audited(desk, caller, "user add", user=order.name, role=str(order.role)):
        if order.single_sign_on and order.password:
            raise UsageError("Whoever comes in by single sign-on has no password here")
        password = None if order.single_sign_on else order.password
        user = desk.accounts.add_user(order.name, order.role, order.machines, password, totp=order.totp)
    return {**user_shape(user), "totp": user.totp or None}


@router.delete("/users/{name}")
def remove_user(desk: TheDesk, caller: Admin, name: Annotated[str, Path(max_length=64)]) -> dict[str, Any]:
    """Remove a user; their sessions end."""
    with audited(desk, caller, "user remove", user=name):
        desk.accounts.remove_user(name)
    return {"removed": name}


@router.get("/tokens")
def tokens(desk: TheDesk, caller: Admin) -> dict[str, Any]:
    """Every token, without what opens."""
    return {"tokens": [token_shape(t) for t in desk.accounts.tokens()]}


@router.post("/tokens", status_code=201)
def add_token(desk: TheDesk, caller: Admin, order: NewToken) -> dict[str, Any]:
    """A new token; its text is shown once and kept nowhere."""
    with audited(desk, caller, "token add", token=order.name, role=str(order.role)):
        token, text = desk.accounts.add_token(order.name, order.role, order.machines, stretch(order.lasts))
    return {**token_shape(token), "token": text}


@router.delete("/tokens/{token}")
def remove_token(desk: TheDesk, caller: Admin, token: Annotated[str, Path(pattern="^[0-9a-f]{12}$")]) -> dict[str, Any]:
    """The token opens nothing any more."""
    with audited(desk, caller, "token remove", token=token):
        desk.accounts.remove_token(token)
    return {"removed": token}


def user_shape(u: User) -> dict[str, Any]:
    """A user as JSON."""
    return {
        "name": u.name,
        "role": str(u.role),
        "machines": list(u.machines),
        "second_factor": bool(u.totp),
        "single_sign_on": u.signs_on,
    }


def token_shape(t: Token) -> dict[str, Any]:
    """A token as JSON."""
    expires = rfc3339(Instant(t.expires)) if t.expires else None
    return {"id": t.id, "name": t.name, "role": str(t.role), "machines": list(t.machines), "expires": expires}
