"""Each machine on one line: what it is, who protects it, and whether the promise is kept.  Pure but for the notes of workers."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hvbackup import schedule
from hvbackup.configuration import PolicySettings
from hvbackup.daemon.watchers import Heard
from hvbackup.model import SECOND, Instant
from hvbackup.selection import Chosen
from hvbackup.service.estate import Known
from hvbackup.service.standing import Note

GRACE_SECONDS = 300.0  # a machine that has just appeared is not late yet


class Standing(enum.StrEnum):
    """How a machine stands."""

    PROTECTED = "protected"
    FAILING = "failing"  # within its RPO, but the newest attempt failed
    LATE = "late"
    PAUSED = "paused"  # by an administrator
    UNPROTECTED = "unprotected"  # nobody protects it, and nobody said that this is so on purpose
    LEFT_OUT = "left out"  # on purpose
    GONE = "gone"  # no source has it any more; its points are kept

    @property
    def is_alarm(self) -> bool:
        """Whether somebody should look."""
        return self in (Standing.LATE, Standing.UNPROTECTED, Standing.FAILING)


@dataclass(frozen=True, slots=True)
class Row:
    """One machine."""

    key: str
    store: str
    id: str
    name: str
    platform: str
    source: str
    tags: Sequence[str]
    policy: str
    continuous: bool
    standing: Standing
    why: str
    rpo_seconds: float | None
    age_seconds: float | None  # of what could be recovered now: the newest point, or the newest moment
    known: Known | None
    note: Note | None
    next_due: int = 0
    open_job: str = ""
    event: Heard | None = None  # what its host told of it last

    @property
    def recoverable(self) -> int:
        """The newest moment that can be recovered: of a point, or of a journal; 0 when there is none."""
        moments = [int(self.known.times[-1])] if self.known else []
        return max([*moments, self.note.newest if self.note else 0])

    @property
    def points(self) -> int:
        """How many points it has."""
        return len(self.known.times) if self.known else 0

    @property
    def size_bytes(self) -> int:
        """Of its disks."""
        return sum(d.disk.size for d in self.known.newest.disks) if self.known else 0


def row(
    chosen: Chosen, policy: PolicySettings | None, store: str, key: str, known: Known | None, note: Note | None,
    failure: str, first_seen: int, now: Instant, next_due: int = 0, open_job: str = "", event: Heard | None = None,
) -> Row:  # fmt: skip
    """A machine that a source has."""
    m = chosen.machine
    age = _age(known, note, now)
    rpo = schedule.stretch(policy.rpo) / SECOND if policy else None
    standing, why = _standing(chosen, policy, age, rpo, note, failure, (now - first_seen) / SECOND)
    return Row(
        key, store, m.id, m.name, m.platform or (known.newest.machine.platform if known else ""), m.source, tuple(m.tags),
        chosen.policy or "", bool(policy and policy.protect), standing, why, rpo, age, known, note, next_due, open_job,
        event,
    )  # fmt: skip


def gone(known: Known, store: str, now: Instant, event: Heard | None) -> Row:
    """A machine that only the store knows."""
    m = known.newest.machine
    why = "No source has it any more; its points are kept"
    age = known.age_seconds(now)
    return Row(
        known.key, store, m.id, m.name, m.platform, "", (), "", False, Standing.GONE, why, None, age, known, None,
        event=event,
    )  # fmt: skip


def _age(known: Known | None, note: Note | None, now: Instant) -> float | None:
    ages = [known.age_seconds(now)] if known else []
    if note and note.newest:
        ages.append(max(0.0, (now - note.newest) / SECOND))
    return min(ages, default=None)


def _standing(
    chosen: Chosen, policy: PolicySettings | None, age: float | None, rpo: float | None, note: Note | None,
    failure: str, seen_seconds: float,
) -> tuple[Standing, str]:  # fmt: skip
    if policy is None or rpo is None:
        if chosen.unprotected_on_purpose:
            return Standing.LEFT_OUT, "The configuration says so"
        return Standing.UNPROTECTED, "No policy names it"
    if note and note.paused:
        return Standing.PAUSED, f"An administrator has paused it: {note.paused}"
    trouble = (note.trouble if note else "its worker does not run") if policy.protect else ""
    why = trouble or failure
    if age is None and seen_seconds < max(GRACE_SECONDS, rpo):
        return (Standing.FAILING, why) if why else (Standing.PROTECTED, "Its first point is under way")
    if age is None:
        return Standing.LATE, why or "It has no point yet"
    if age > rpo:
        return Standing.LATE, why or "Its newest point is older than the target"
    return (Standing.FAILING, why) if why else (Standing.PROTECTED, "")


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many machines stand how."""
    found = {str(s): 0 for s in Standing}
    for r in rows:
        found[str(r.standing)] += 1
    return found
