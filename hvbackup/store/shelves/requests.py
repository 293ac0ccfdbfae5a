"""Requests: what one operator wants and a second one must approve, in a store whose settings ask for two.

Operators are told apart by the key that opened the store, where it is encrypted, else by the user's number on the host; those
whom the service let in by their names, and never from those who have a shell.  This is a rule that hvbackup keeps, not one of
cryptography: whoever can write the store's files can also remove them without it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hvbackup.errors import UsageError
from hvbackup.model import SECOND, Instant
from hvbackup.store.format import layout as f
from hvbackup.store.format.shelf import Shelf, Value
from hvbackup.store.store import Store

CALLER = "api:"  # no key's id begins like this
DAYS_NS = 7 * 86400 * SECOND  # nobody approves later what was asked for before


@dataclass(frozen=True, slots=True)
class Operator:
    """Who gives an order."""

    key: str  # id of the wrapped key that opened the store, or empty; or CALLER and a name, of somebody the service let in
    user: str  # name@host
    uid: int

    def is_other_than(self, other: Operator) -> bool:
        """Whether it is surely somebody else."""
        if self.key.startswith(CALLER) != other.key.startswith(CALLER):
            return False  # a user of the service may be the administrator of its host as well
        return self.key != other.key if self.key and other.key else self.uid != other.uid

    def __str__(self) -> str:
        return f"{self.user} (key {self.key})" if self.key else f"{self.user} (uid {self.uid})"


@dataclass(frozen=True, slots=True)
class Request:
    """One wish that waits."""

    id: str
    action: str  # "forget", "release", "settings"
    what: Mapping[str, Any]
    by: Operator
    t: Instant
    why: str = ""


def _dump(r: Request) -> Value:
    return {"action": r.action, "what": dict(r.what), "by": asdict(r.by), "t": r.t, "why": r.why}


def _load(name: str, v: Value) -> Request:
    by = Operator(str(v["by"]["key"]), str(v["by"]["user"]), int(v["by"]["uid"]))
    return Request(name, str(v["action"]), dict(v["what"]), by, Instant(int(v["t"])), str(v["why"]))


REQUESTS = Shelf("requests", f.KIND_REQUEST, _dump, _load)


def ask(store: Store, action: str, what: Mapping[str, Any], by: Operator, now: Instant, why: str = "") -> Request:
    """The wish waits for a second operator when this returns, and the chain says so."""
    made = Request(secrets.token_hex(8), action, what, by, now, why)
    REQUESTS.put(store.files, store.ring, made.id, made)
    store.tell("request", now, request=made.id, action=action, what=dict(what), why=why, by=str(by))
    return made


def approve(store: Store, name: str, by: Operator, now: Instant) -> Request:
    """The request, approved; whoever asks for it carries it out and then calls `done`.  Raises UsageError."""
    found = REQUESTS.get(store.files, store.ring, name) if name in REQUESTS.names(store.files) else None
    if found is None:
        known = ", ".join(REQUESTS.names(store.files)) or "none"
        raise UsageError(f"No request {name} waits in this store; there are: {known}")
    if now - found.t > DAYS_NS:
        REQUESTS.remove(store.files, name)
        raise UsageError(f"Request {name} is older than 7 days and has expired; ask again")
    if not by.is_other_than(found.by):
        raise UsageError(
            f"Request {name} was made by {found.by}, and {by} can't be told from them; "
            "somebody else has to approve it, with a key of their own (`hvbackup key add`)"
        )
    store.tell("approve", now, request=name, action=found.action, by=str(by))
    return found


def done(store: Store, found: Request) -> None:
    """The request does not wait any more."""
    REQUESTS.remove(store.files, found.id)
