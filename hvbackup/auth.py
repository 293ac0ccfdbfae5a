"""Who may do what: users with passwords, tokens for programs, their roles, and what slows a guesser down.

Everybody who may come in is in `accounts.json` of the configuration directory, readable by its owner alone: passwords as
argon2id, tokens as BLAKE2b of 32 random bytes, which no guesser needs slowing down for.  The file is read again when it changed.
What a later version wrote into it stays through changes made by this one; whoever has a role that is not known here comes in as
nobody.

    role        may
    viewer      see machines, points, timelines, jobs
    operator    also capture, pause, tag, hold, check, cancel
    restorer    also boot, map and restore
    admin       everything: prune, release, people, audit

A role may be limited to machines by the words that policies use: names, patterns, `tag:`, `source:`, `id:`.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import hashlib
import hmac
import json
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from hvbackup.errors import HvbackupError, NotFound, UsageError
from hvbackup.files import Files
from hvbackup.model import SECOND, Instant

FILE = "accounts.json"
USED = "codes.json"  # beside it
SIGNED_ON = "single sign-on"  # in the place of a password: no password fits it, and a provider says who it is
RESERVED = ("local", "nobody", "schedule")  # who else the audit names
PREFIX = "hvb_"  # of a token, so that scanners of leaked secrets know it
TOTP_STEP_SECONDS = 30
TOTP_DRIFT = 1  # steps a clock may be off, either way
FREE_TRIES = 5  # before each further one waits twice as long
WAIT_MAX_SECONDS = 900.0
TURN_SECONDS = 1.0  # that a try waits for the one before it; a password takes a tenth of that
PASSWORD_MIN = 10
LONGEST_NS = 36_525 * 86_400 * SECOND


class Role(enum.StrEnum):
    """What somebody is."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    RESTORER = "restorer"
    ADMIN = "admin"


class Permission(enum.StrEnum):
    """What a call needs."""

    READ = "read"
    OPERATE = "operate"
    RESTORE = "restore"
    ADMIN = "admin"


GRANTS: Mapping[Role, frozenset[Permission]] = {
    Role.VIEWER: frozenset({Permission.READ}),
    Role.OPERATOR: frozenset({Permission.READ, Permission.OPERATE}),
    Role.RESTORER: frozenset({Permission.READ, Permission.OPERATE, Permission.RESTORE}),
    Role.ADMIN: frozenset(Permission),
}


class Refused(HvbackupError):
    """Who asks is not known, or not allowed."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    name: str
    role: Role
    machines: Sequence[str] = ("*",)

    def may(self, permission: Permission) -> bool:
        """Whether the role allows it."""
        return permission in GRANTS[self.role]

    @property
    def is_unlimited(self) -> bool:
        """Whether every machine is theirs."""
        return "*" in self.machines and not any(w.startswith("!") for w in self.machines)


@dataclass(frozen=True, slots=True)
class User:
    """A person."""

    name: str
    role: Role
    machines: Sequence[str]
    password: str  # argon2id, or SIGNED_ON
    totp: str = ""  # base32
    made: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)  # what a later version says of them

    @property
    def signs_on(self) -> bool:
        """Whether a provider says who they are."""
        return self.password == SIGNED_ON


@dataclass(frozen=True, slots=True)
class Token:
    """A program's way in."""

    id: str
    name: str
    role: Role
    machines: Sequence[str]
    digest: str
    made: int = 0
    expires: int = 0  # 0: never
    more: Mapping[str, Any] = field(default_factory=dict)  # what a later version says of it


@dataclass(frozen=True, slots=True)
class _Book:
    users: Mapping[str, User] = field(default_factory=dict)
    tokens: Mapping[str, Token] = field(default_factory=dict)
    foreign: Mapping[str, Sequence[Mapping[str, Any]]] = field(
        default_factory=dict
    )  # entries with roles of a later version
    more: Mapping[str, Any] = field(default_factory=dict)  # besides users and tokens

    def dump(self) -> bytes:
        """As the file has it."""
        users, tokens = map(_entry, self.users.values()), map(_entry, self.tokens.values())
        value = {kind: [*found, *self.foreign.get(kind, ())] for kind, found in (("users", users), ("tokens", tokens))}
        return json.dumps({**self.more, **value}, indent=1).encode()

    def without(self, kind: str, key: str, value: str) -> _Book:
        """No entry of the kind, also none of a later version, has this name or id any more."""
        kept = {k: v for k, v in getattr(self, kind).items() if k != value}
        foreign = {**self.foreign, kind: [e for e in self.foreign.get(kind, ()) if e.get(key) != value]}
        return replace(self, **{kind: kept}, foreign=foreign)

    def has_foreign(self, kind: str, key: str, value: str) -> bool:
        """Whether an entry of a later version has this name or id."""
        return any(e.get(key) == value for e in self.foreign.get(kind, ()))


def _entry(found: User | Token) -> dict[str, Any]:
    value = asdict(found)
    return {**value.pop("more"), **value}


class Accounts:
    """Everybody who may come in.  Thread safety: every method from any thread."""

    def __init__(self, configuration: Path, clock: Callable[[], Instant]) -> None:
        self._files, self._clock = Files(configuration), clock
        self._lock = threading.RLock()
        self._book, self._stamp = _Book(), (0, 0)
        self._counters: Mapping[str, int] | None = (
            None  # the newest code that each user has used, once it was looked up
        )
        self.guard = Guard()

    # -- coming in -----------------------------------------------------------------------------------------------------

    def by_token(self, text: str) -> Principal:
        """Whose token it is.  Raises Refused."""
        digest = _digest(text)
        for token in self._now().tokens.values():
            if hmac.compare_digest(token.digest, digest):
                if token.expires and self._clock() >= token.expires:
                    raise Refused(f"Token {token.name} has expired; make another with `hvbackup token add`")
                return Principal(f"token {token.name}", token.role, tuple(token.machines))
        raise Refused("This token is not known")

    def by_password(self, name: str, password: str, code: str, address: str) -> Principal:
        """The person with this name.  Raises Refused; whoever guesses waits ever longer, and learns nothing else."""
        keys = (f"user {name}", f"address {address}")
        with self.guard.one_try(keys):
            user = self._now().users.get(name)
            good = _fits(user.password if user else _NOBODY, password) and user is not None
            if not good or user is None or not self._code_fits(user, code):
                self.guard.failed(keys)
                raise Refused("Name, password or code is wrong")
            self.guard.succeeded(keys)
        return Principal(user.name, user.role, tuple(user.machines))

    def signed_on(self, name: str) -> Principal:
        """The person whom a provider named.  Raises Refused unless they were made to come in that way."""
        user = self._now().users.get(name)
        if user is None or not user.signs_on:
            raise Refused(
                f"The provider knows {name}, and here is no such user; an admin adds it with --single-sign-on"
            )
        return Principal(user.name, user.role, tuple(user.machines))

    def still(self, principal: Principal) -> Principal:
        """The person as they are now: a session ends with its user, and changes with their role.  Raises Refused."""
        user = self._now().users.get(principal.name)
        if user is None:
            raise Refused("This user is not known any more")
        return Principal(user.name, user.role, tuple(user.machines))

    def _code_fits(self, user: User, code: str) -> bool:
        """Each code counts once: whoever looked over a shoulder comes too late."""
        if not user.totp:
            return True
        now = int(self._clock() // SECOND) // TOTP_STEP_SECONDS
        with self._lock:
            for counter in range(now - TOTP_DRIFT, now + TOTP_DRIFT + 1):
                fits = hmac.compare_digest(hotp(_secret(user.totp), counter), code.strip())
                if fits and counter > self._used().get(user.name, -1):
                    self._counters = {**self._used(), user.name: counter}
                    self._files.replace(USED, json.dumps(self._counters).encode())
                    return True
        return False

    def _used(self) -> Mapping[str, int]:
        """Which code each user has used last, also with the service before this one."""
        if self._counters is None:
            try:
                self._counters = {str(name): int(n) for name, n in json.loads(self._files.read(USED)).items()}
            except (FileNotFoundError, ValueError, AttributeError, TypeError):
                self._counters = {}
        return self._counters

    # -- changing ------------------------------------------------------------------------------------------------------

    def users(self) -> list[User]:
        """Everybody."""
        return list(self._now().users.values())

    def tokens(self) -> list[Token]:
        """Every token."""
        return list(self._now().tokens.values())

    def add_user(self, name: str, role: Role, machines: Sequence[str], password: str | None, *, totp: bool) -> User:
        """The user is known when this returns; one of that name is replaced.  None: they come in by single sign-on.

        Raises UsageError.
        """
        if not name.isprintable() or not 1 <= len(name) <= 64:
            raise UsageError("A user's name has 1 to 64 printable characters")
        if name in RESERVED or name.startswith("token "):
            raise UsageError(f"A user can't be called {name}: the audit would take them for somebody else")
        if password is None and totp:
            raise UsageError("Whoever comes in by single sign-on has the provider's second factor, and none here")
        if password is not None and len(password) < PASSWORD_MIN:
            raise UsageError(f"A password has at least {PASSWORD_MIN} characters")
        secret = base64.b32encode(secrets.token_bytes(20)).decode() if totp else ""
        hashed = SIGNED_ON if password is None else _hashed(password)
        user = User(name, role, list(machines) or ["*"], hashed, secret, self._clock())
        self._change(lambda book: _with_user(book.without("users", "name", name), user))
        return user

    def remove_user(self, name: str) -> None:
        """Nobody of this name comes in any more.  Raises NotFound."""
        if name not in self._now().users and not self._now().has_foreign("users", "name", name):
            raise NotFound(f"There is no user {name}")
        self._change(lambda book: book.without("users", "name", name))

    def add_token(self, name: str, role: Role, machines: Sequence[str], lasts_ns: int) -> tuple[Token, str]:
        """A token, and its text, which is kept nowhere.  Raises UsageError."""
        if not name.isprintable() or not 1 <= len(name) <= 64:
            raise UsageError("A token's name has 1 to 64 printable characters")
        if lasts_ns > LONGEST_NS:
            raise UsageError("A token lasts a hundred years at most")
        text, now = PREFIX + secrets.token_urlsafe(32), self._clock()
        expires = now + lasts_ns if lasts_ns else 0
        token = Token(secrets.token_hex(6), name, role, list(machines) or ["*"], _digest(text), now, expires)
        self._change(lambda book: replace(book, tokens={**book.tokens, token.id: token}))
        return token, text

    def remove_token(self, token_id: str) -> None:
        """The token opens nothing any more.  Raises NotFound."""
        if token_id not in self._now().tokens and not self._now().has_foreign("tokens", "id", token_id):
            raise NotFound(f"There is no token {token_id}")
        self._change(lambda book: book.without("tokens", "id", token_id))

    def _change(self, change: Callable[[_Book], _Book]) -> None:
        with self._lock, self._files.owner("accounts.lock", "The accounts", wait_seconds=10.0):
            self._files.replace(FILE, change(self._now()).dump())

    def _now(self) -> _Book:
        path = self._files.path(FILE)
        with self._lock:
            try:
                found = path.stat()
            except FileNotFoundError:
                return _Book()
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp != self._stamp:
                self._book, self._stamp = _load(path), stamp
            return self._book


def _load(path: Path) -> _Book:
    """Raises HvbackupError: who can't be read comes in as nobody."""
    try:
        value = json.loads(path.read_bytes())
        (users, strange), (tokens, odd) = _entries(User, value.pop("users")), _entries(Token, value.pop("tokens"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise HvbackupError(
            f"{path} can't be read: {e}; put a copy of it back, or remove it and add users again"
        ) from e
    foreign = {"users": strange, "tokens": odd}
    return _Book({u.name: u for u in users}, {t.id: t for t in tokens}, foreign, value)


_Kind = TypeVar("_Kind", User, Token)


def _entries(kind: type[_Kind], found: Sequence[Mapping[str, Any]]) -> tuple[list[_Kind], list[Mapping[str, Any]]]:
    """Those that this version understands, and those whose role it does not know.  Raises as JSON that is none of ours."""
    names = set(kind.__slots__) - {"more"}
    known, foreign = [], []
    for entry in found:
        if str(entry["role"]) not in list(Role):
            foreign.append(entry)
            continue
        more = {k: v for k, v in entry.items() if k not in names}
        mine = {k: v for k, v in entry.items() if k in names}
        known.append(kind(**{**mine, "role": Role(entry["role"]), "more": more}))
    return known, foreign


def _with_user(book: _Book, user: User) -> _Book:
    return replace(book, users={**book.users, user.name: user})


@dataclass(slots=True)
class Guard:
    """Slows guessers down, by name and by address.  Thread safety: any thread."""

    clock: Callable[[], float] = time.monotonic
    _failures: dict[str, tuple[int, float]] = field(default_factory=dict)  # how many, and when the next try may come
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turn: threading.Condition = field(default_factory=threading.Condition)
    _looked_at: set[str] = field(default_factory=set)

    def admit(self, keys: Sequence[str]) -> None:
        """Raises Refused while one of them has to wait."""
        with self._lock:
            wait = max((self._failures[k][1] - self.clock() for k in keys if k in self._failures), default=0.0)
        if wait > 0:
            raise TooMany(wait)

    @contextlib.contextmanager
    def one_try(self, keys: Sequence[str]) -> Iterator[None]:
        """Nobody else's try with one of these keys is looked at while the context lasts.  Raises Refused like `admit`."""
        mine = frozenset(keys)
        with self._turn:
            if not self._turn.wait_for(lambda: not self._looked_at & mine, TURN_SECONDS):
                raise TooMany(TURN_SECONDS)
            self._looked_at |= mine
        try:
            self.admit(keys)
            yield
        finally:
            with self._turn:
                self._looked_at -= mine
                self._turn.notify_all()

    def failed(self, keys: Sequence[str]) -> None:
        """One more wrong try."""
        with self._lock:
            now = self.clock()
            if len(self._failures) > 10_000:  # an attacker with many names does not fill our memory
                self._failures = {k: v for k, v in self._failures.items() if v[1] > now}
            for key in keys:
                count = self._failures.get(key, (0, 0.0))[0] + 1
                pause = 0.0 if count < FREE_TRIES else min(WAIT_MAX_SECONDS, 2.0 ** (count - FREE_TRIES))
                self._failures[key] = (count, now + pause)

    def succeeded(self, keys: Sequence[str]) -> None:
        """Those who know are not slowed down by others' tries any more."""
        with self._lock:
            for key in keys:
                self._failures.pop(key, None)


class TooMany(Refused):
    """Too many wrong tries; `seconds` until the next one is looked at."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"Too many wrong tries; wait {seconds:.0f} seconds")


# -- secrets -----------------------------------------------------------------------------------------------------------------


def hotp(secret: bytes, counter: int, digits: int = 6) -> str:
    """RFC 4226: the code of a counter."""
    mac = hmac.new(secret, struct.pack(">Q", counter), hashlib.sha1).digest()
    at = mac[-1] & 15
    return f"{(int.from_bytes(mac[at : at + 4], 'big') & 0x7FFFFFFF) % 10**digits:0{digits}d}"


def totp_uri(user: User, host: str) -> str:
    """What an authenticator app reads as a QR code."""
    from urllib.parse import quote

    return f"otpauth://totp/hvbackup:{quote(user.name)}@{quote(host)}?secret={user.totp}&issuer=hvbackup"


def _secret(text: str) -> bytes:
    return base64.b32decode(text + "=" * (-len(text) % 8))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _hashed(password: str) -> str:
    from argon2 import PasswordHasher

    return PasswordHasher().hash(password)


# The hash of a password that nobody has: who is not known takes as long as who is.
_NOBODY = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHRzb21lc2FsdA$4eDkKxY9Yd3H6m4vCk9sY4m0h1uT2f4b3kq1q0c8q5w"


def _fits(hashed: str, password: str) -> bool:
    from argon2 import PasswordHasher
    from argon2.exceptions import InvalidHashError, VerificationError

    try:
        return PasswordHasher().verify(hashed, password)
    except (VerificationError, InvalidHashError):
        return False
