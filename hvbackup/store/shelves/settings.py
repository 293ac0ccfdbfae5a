"""Settings: what a store demands of whoever wants to forget something.

`settings/NUMBER` is sealed and written once; the highest number counts, and a run record tells of each, so that going back to an
older one is noticed by `check`.  A file that can't be read is no reason to demand less: then nothing is forgotten at all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hvbackup.model import SECOND, Instant
from hvbackup.store.format import layout as f
from hvbackup.store.format.shelf import Shelf, Value
from hvbackup.store.store import Store

HOUR_NS = 3600 * SECOND


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything there is to set."""

    min_age_ns: int = 0  # no point is forgotten before it is so old
    trash_ns: int = 24 * HOUR_NS  # forgotten points can be had back for so long
    two_person: bool = False  # forgetting and releasing wait for a second operator
    immutable: bool = False  # files are made immutable (chattr +i)

    def is_weaker_than(self, other: Settings) -> bool:
        """Whether anything that protects is less than before."""
        return (
            self.min_age_ns < other.min_age_ns
            or self.trash_ns < other.trash_ns
            or (other.two_person and not self.two_person)
            or (other.immutable and not self.immutable)
        )


def _load(_name: str, value: Value) -> Settings:
    return Settings(
        min_age_ns=int(value["min_age_ns"]),
        trash_ns=int(value["trash_ns"]),
        two_person=bool(value["two_person"]),
        immutable=bool(value["immutable"]),
    )


SETTINGS = Shelf("settings", f.KIND_SETTINGS, asdict, _load, pattern=r"\d{8}")


def load(store: Store) -> Settings:
    """What counts now.  Raises StoreDamage."""
    names = SETTINGS.names(store.files)
    return (SETTINGS.get(store.files, store.ring, names[-1]) if names else None) or Settings()


def change(store: Store, new: Settings, now: Instant, *, by: str) -> None:
    """These count, and the chain says so, when this returns."""
    names = SETTINGS.names(store.files)
    name = f"{int(names[-1]) + 1 if names else 0:08d}"
    SETTINGS.put(store.files, store.ring, name, new)
    store.tell("settings", now, added=[SETTINGS.path(name)], settings=asdict(new), by=by)
