"""The gate: every call passes here, and says who asks, what it needs, and of which machine.

Programs send `Authorization: Bearer TOKEN`.  Browsers have a session: a cookie that scripts can't read and other sites can't make
the browser send; what changes anything also needs the session's own word in a header or form, and an Origin that is us.
Whoever reaches the local socket is root or who runs the service, and may do everything.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import Depends, Request

from hvbackup.api.oidc import Logins, Provider
from hvbackup.auth import Accounts, Permission, Principal, Refused, Role
from hvbackup.configuration import PolicySettings
from hvbackup.daemon.keeper import Keeper
from hvbackup.daemon.rows import Row
from hvbackup.errors import HvbackupError, NotFound
from hvbackup.selection import Found, closeness
from hvbackup.service.estate import Estate
from hvbackup.service.session import Session

COOKIE = "__Host-hvbackup"
SESSION_SECONDS = 8 * 3600.0
IDLE_SECONDS = 3600.0
SESSIONS_MAX = 1000
AUDIT_KEPT = 5000
log = logging.getLogger("hvbackup.api")


class Forbidden(Refused):
    """Who asks is known, and may not."""


@dataclass(slots=True)
class _Session:
    principal: Principal
    csrf: str
    began: float
    seen: float


@dataclass(slots=True)
class Sessions:
    """Browsers that have logged in; they log in again after a restart.  Thread safety: any thread."""

    _all: dict[str, _Session] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, principal: Principal) -> str:
        """The cookie of a new session."""
        cookie, now = secrets.token_urlsafe(32), time.monotonic()
        with self._lock:
            self._all = {k: s for k, s in self._all.items() if _alive(s, now)}
            while len(self._all) >= SESSIONS_MAX:
                self._all.pop(next(iter(self._all)))
            self._all[_key(cookie)] = _Session(principal, secrets.token_urlsafe(16), now, now)
        return cookie

    def get(self, cookie: str, *, used: bool = True) -> _Session | None:
        """The session of a cookie, while it lasts; not for longer, unless it is being used."""
        now = time.monotonic()
        with self._lock:
            found = self._all.get(_key(cookie))
            if found is None or not _alive(found, now):
                self._all.pop(_key(cookie), None)
                return None
            found.seen = now if used else found.seen
            return found

    def end(self, cookie: str) -> None:
        """The cookie opens nothing any more."""
        with self._lock:
            self._all.pop(_key(cookie), None)


def _alive(s: _Session, now: float) -> bool:
    return now - s.began < SESSION_SECONDS and now - s.seen < IDLE_SECONDS


def _key(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()


@dataclass(slots=True)
class Desk:
    """What every route works with."""

    keeper: Keeper
    accounts: Accounts
    sessions: Sessions = field(default_factory=Sessions)
    provider: Provider | None = None  # of single sign-on, while the configuration names one
    logins: Logins = field(default_factory=Logins)
    port: int = 0  # of the network, once we listen
    audited: list[dict[str, Any]] = field(default_factory=list)
    _audit_lock: threading.Lock = field(default_factory=threading.Lock)
    _provider_lock: threading.Lock = field(default_factory=threading.Lock)

    def audit(self, caller: Caller, what: str, status: str, machine: str = "", **more: Any) -> None:
        """The call is in the chain of records of the store it concerns, or else of the first one, when this returns."""
        now = self.keeper.clock()
        entry = {
            "what": what,
            "who": caller.name,
            "address": caller.address,
            "status": status,
            "machine": machine,
            "details": more,
        }
        with self._audit_lock:
            self.audited.append({"t": now, **entry})
            del self.audited[:-AUDIT_KEPT]
            estate = self._estate_of(str(more.get("store", "")), machine)
            if estate is None:
                log.warning("Audit without a store: %s", entry)
                return
            try:
                estate.store.tell("audit", now, **entry)
            except (HvbackupError, OSError) as e:
                log.error("The audit record %s could not be written: %s", entry, e)
                raise

    def _estate_of(self, store: str, machine: str) -> Estate | None:
        """Of the store that is named, or that has the machine, or else of the first one that is open."""
        name = store or next((r.store for r in self.keeper.rows() if machine and r.id == machine), "")
        opened = self.keeper.stores.get(name)
        if opened and opened.estate:
            return opened.estate
        return next((o.estate for o in self.keeper.stores.values() if o.estate), None)

    def who_vouches(self) -> Provider:
        """The provider as it is configured now: one for everybody, who wait for it in turn.  Raises NotFound."""
        settings = self.keeper.settings.provider
        if not settings.issuer:
            raise NotFound("There is no [provider] in the configuration")
        with self._provider_lock:
            if self.provider is None or self.provider.settings != settings:
                self.provider = Provider(settings)
            return self.provider

    def session(self, caller: Caller, store: str = "") -> Session:
        """A store (the first one for nothing), opened for somebody.  Raises NotFound."""
        if store and store not in self.keeper.stores:
            raise NotFound(f"There is no store {store}; there are {', '.join(self.keeper.stores)}")
        opened = self.keeper.stores[store or next(iter(self.keeper.stores))]
        return replace(opened.session, caller=caller.name)

    def load_audit(self) -> None:
        """What earlier services wrote is known when this returns."""
        found: list[dict[str, Any]] = []
        for opened in self.keeper.stores.values():
            if opened.estate:
                records = opened.estate.store.runs.recent(AUDIT_KEPT)
                found += [r.value for r in records if r.value.get("kind") == "audit"]
        keep = ("t", "what", "who", "address", "status", "machine", "details")
        shown = [{k: v[k] for k in keep if k in v} for v in sorted(found, key=lambda v: int(v["t"]))]
        with self._audit_lock:
            self.audited = shown[-AUDIT_KEPT:]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, from where."""

    principal: Principal
    address: str
    csrf: str = ""  # of a browser's session

    @property
    def name(self) -> str:
        """For people."""
        return self.principal.name

    def sees(self, row: Row) -> bool:
        """Whether the machine is theirs."""
        if self.principal.is_unlimited:
            return True
        found = Found(row.id, row.name, row.source, row.tags, row.platform)
        return closeness(PolicySettings(machines=list(self.principal.machines)), found) is not None


def desk_of(request: Request) -> Desk:
    """What the application was made with."""
    desk: Desk = request.app.state.desk
    return desk


def caller_of(request: Request) -> Caller:
    """Who asks.  Raises Refused."""
    desk = desk_of(request)
    address = request.client.host if request.client else "local"
    if request.scope.get("hvbackup.local"):
        return Caller(Principal("local", Role.ADMIN), "local")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if token:
        if scheme.lower() != "bearer":
            raise Refused("Authorization is `Bearer TOKEN`")
        keys = (f"token from {address}",)
        desk.accounts.guard.admit(keys)
        try:
            principal = desk.accounts.by_token(token.strip())
        except Refused:
            desk.accounts.guard.failed(keys)
            raise
        desk.accounts.guard.succeeded(keys)
        return Caller(principal, address)
    session = desk.sessions.get(request.cookies.get(COOKIE, ""))
    if session is None:
        raise Refused("Log in, or send `Authorization: Bearer TOKEN`")
    return Caller(desk.accounts.still(session.principal), address, session.csrf)


def is_still_admitted(request: Request) -> bool:
    """Whether who asked long ago still may: a stream of events ends with its session, token or user."""
    desk = desk_of(request)
    if request.scope.get("hvbackup.local"):
        return True
    token = request.headers.get("authorization", "").partition(" ")[2]
    try:
        if token:
            return desk.accounts.by_token(token.strip()).may(Permission.READ)
        session = desk.sessions.get(request.cookies.get(COOKIE, ""), used=False)
        return session is not None and desk.accounts.still(session.principal).may(Permission.READ)
    except HvbackupError:
        return False


def check_origin(request: Request, caller: Caller, word: str) -> None:
    """Raises Forbidden when another site made the browser ask."""
    if not caller.csrf or request.method in ("GET", "HEAD"):
        return
    origin = request.headers.get("origin", "")
    if origin and origin.partition("://")[2] != request.headers.get("host", ""):
        raise Forbidden("The request comes from another site")
    if not hmac.compare_digest(word, caller.csrf):
        raise Forbidden("The request does not carry the word of its session; load the page again")


def needs(permission: Permission, *, everything: bool = False) -> Callable[..., Caller]:
    """A dependency: who asks may do this; with `everything`, only those who are not limited to some machines."""

    def admitted(request: Request) -> Caller:
        caller = caller_of(request)
        check_origin(request, caller, request.headers.get("x-hvbackup-csrf", ""))
        admit(caller, permission, everything=everything)
        return caller

    admitted.permission, admitted.everything = permission, everything  # type: ignore[attr-defined]
    return admitted


def admit(caller: Caller, permission: Permission, *, everything: bool = False) -> None:
    """Raises Forbidden."""
    if not caller.principal.may(permission):
        raise Forbidden(f"{caller.name} is {caller.principal.role}, and this needs the permission to {permission}")
    if everything and not caller.principal.is_unlimited:
        raise Forbidden(f"{caller.name} is limited to some machines, and this concerns all")


def row_of(desk: Desk, caller: Caller, key: str) -> Row:
    """The machine with this key.  Raises NotFound, also when it is somebody else's."""
    for row in desk.keeper.rows():
        if row.key == key and caller.sees(row):
            return row
    raise NotFound(f"There is no machine {key}")


@contextmanager
def audited(desk: Desk, caller: Caller, what: str, machine: str = "", **more: Any) -> Iterator[dict[str, Any]]:
    """What is done inside is in the audit, however it ends."""
    note: dict[str, Any] = dict(more)
    try:
        yield note
    except HvbackupError as e:
        desk.audit(caller, what, f"refused: {e}", machine, **note)
        raise
    desk.audit(caller, what, "done", machine, **note)


TheDesk = Annotated[Desk, Depends(desk_of)]
