"""audit: what was done to the store and by whom, whether the records are whole, and heads to keep elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvbackup import config
from hvbackup.model import Instant
from hvbackup.moments import rfc3339
from hvbackup.service.session import Session
from hvbackup.store.check import audit

ORDERS = ("forget", "restored", "hold", "release", "settings", "request", "approve", "reclaim")  # kinds of records


@dataclass(frozen=True, slots=True)
class Entry:
    """One record."""

    t: Instant
    kind: str
    path: str
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the chains are whole."""

    problems: Sequence[str]
    heads: int  # how many newest records were known from elsewhere


def entries(session: Session, *, everything: bool) -> list[Entry]:
    """Orders of people and what came of them (with `everything`, captures and folds as well), oldest first."""
    with session.open() as store:
        found = [Entry(Instant(int(r.value["t"])), str(r.value["kind"]), r.path, r.value) for r in store.runs]
        return sorted((e for e in found if everything or e.kind in ORDERS), key=lambda e: (e.t, e.path))


def verify(session: Session, heads: Path | None) -> Verdict:
    """What is wrong with the records, by themselves and compared with heads that were kept.  Raises UsageError."""
    with session.open() as store:
        if heads:
            store.heads = audit.merged([store.heads, audit.load(heads, store.id)])
        return Verdict(audit.problems(store), len(store.heads))


def keep(session: Session, to: Path | None) -> Path:
    """The newest record of every chain is in the file when this returns; without one, where every later run keeps its own."""
    with session.open() as store:
        path = to or config.heads_path(session.places.configuration, store.id.hex())
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        audit.keep(path, store.id, store.runs.heads())
        return path


def shape(e: Entry) -> dict[str, Any]:
    """A record as JSON."""
    rest = {k: v for k, v in e.value.items() if k not in ("t", "kind", "previous")}
    return {"time": rfc3339(e.t), "kind": e.kind, "record": e.path, **rest}
