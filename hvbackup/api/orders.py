"""What calls ask for, as commands of hvbackup: the words that a person would type, built from checked parts.

A name from outside is never an option, because each is joined to its option by `=` or stands behind `--`; and it is never a path,
except below the folder for restores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from hvbackup import schedule
from hvbackup.daemon.keeper import Keeper
from hvbackup.daemon.rows import Row
from hvbackup.daemon.tasks import backup as backup_task
from hvbackup.errors import UsageError
from hvbackup.jobs import Task
from hvbackup.model import SECOND

RESTORES = "restores"  # beside the state directory, unless the configuration says otherwise
LONGEST_NS = 36_525 * 86_400 * SECOND
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=200)]
At = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=100)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Disk = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=200)]


def _within_reason(text: str) -> str:
    """A time in a hundred years can still be written down."""
    if schedule.stretch(text) > LONGEST_NS:
        raise ValueError("it is longer than a hundred years")
    return text


Stretch = Annotated[str, StringConstraints(pattern=r"^(\d{1,6}[smhdw]){1,5}$"), AfterValidator(_within_reason)]


class Order(BaseModel):
    """What a call asks for; anything it does not know is refused."""

    model_config = ConfigDict(extra="forbid")


class Which(Order):
    """A machine at a moment."""

    at: At = Field("latest", description="latest, a time, -10m, a point's id, seq:N, tag:NAME")
    disks: list[Disk] = Field(default_factory=list, max_length=256)

    def words(self) -> list[str]:
        """As options."""
        return [f"--at={self.at}", *(f"--disk={d}" for d in self.disks)]


class Restore(Which):
    """Where the disks go."""

    to: Name = Field(description="the name of a new folder in the service's folder for restores")
    format: Literal["", "raw", "qcow2"] = ""


class Boot(Which):
    """How the machine is booted."""

    name: Name | None = None
    generic: bool = Field(False, description="a plain machine, whatever was captured")
    new_identity: bool = Field(True, description="another UUID and other network addresses")


class Drill(Order):
    """Which moment is rehearsed."""

    at: At | None = Field(None, description="as for a restore; a random one of the last 30 days without")


class Backup(Order):
    """How a point is made."""

    full: bool = False
    consistency: Literal["auto", "crash", "filesystem", "application"] = "auto"


class Tag(Order):
    """The name of the present moment."""

    tag: Annotated[
        str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f;]*[^\x00-\x20\x7f;][^\x00-\x1f\x7f;]*$", max_length=100)
    ]


class Pause(Order):
    """Why, and for how long."""

    why: Line = ""
    for_: Stretch | None = Field(None, alias="for")


class Hold(Order):
    """A point that must stay."""

    point: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    until: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None
    why: Line = ""


class Prune(Order):
    """Which points stay."""

    keep: dict[Literal["last", "hourly", "daily", "weekly", "monthly", "yearly"], int] = Field(min_length=1)
    dry_run: bool = False


class Check(Order):
    """How a store is checked."""

    deep: bool = False


def machine_words(r: Row) -> list[str]:
    """The machine, for sure not an option."""
    return ["--", r.id]


def restores(keeper: Keeper) -> Path:
    """The folder that holds every restore that the API makes."""
    return Path(keeper.settings.service.restores or keeper.places.state.parent / RESTORES)


def task(keeper: Keeper, r: Row, kind: str, words: Sequence[str], who: str, *, lasting: bool = False) -> Task:
    """A job about a machine."""
    all_ = [*words, *keeper.store_words(r.store), *machine_words(r)]
    return Task(kind, all_, r.store, r.source if kind == "backup" else "", r.id, r.name, "", who, lasting)


def restore(keeper: Keeper, r: Row, order: Restore, who: str) -> Task:
    """Disks to files."""
    folder = restores(keeper)
    if not _FOLDER.fullmatch(order.to):
        raise UsageError(f"{order.to} is no name for a folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    words = ["restore", *order.words(), f"--to={folder / order.to}"]
    return task(keeper, r, "restore", [*words, *([f"--format={order.format}"] if order.format else [])], who)


def boot(keeper: Keeper, r: Row, order: Boot, who: str) -> Task:
    """A machine on overlays."""
    words = ["boot", *order.words(), *([f"--name={order.name}"] if order.name else [])]
    words += ["--generic"] * order.generic + ["--new-identity"] * order.new_identity
    return task(keeper, r, "boot", words, who)


def drill(keeper: Keeper, r: Row, order: Drill, who: str) -> Task:
    """A recovery to nowhere."""
    return task(keeper, r, "drill", ["drill", *([f"--at={order.at}"] if order.at else [])], who)


def map_(keeper: Keeper, r: Row, order: Which, who: str) -> Task:
    """Exports, until the job is cancelled."""
    return task(keeper, r, "map", ["map", *order.words()], who, lasting=True)


def backup(keeper: Keeper, r: Row, order: Backup, who: str) -> Task:
    """A point, now.  Raises UsageError when no source has the machine."""
    source = keeper.settings.sources.get(r.source)
    if source is None:
        raise UsageError(f"No source of the configuration has machine {r.name}, so it can't be captured from here")
    from dataclasses import replace

    policy = keeper.settings.policies.get(r.policy)
    from hvbackup.configuration import PolicySettings

    chosen = replace(policy or PolicySettings(), consistency=order.consistency)
    made = backup_task(r, chosen, source, keeper.store_words(r.store))
    return replace(made, words=[*made.words, *["--full"] * order.full], who=who)


def prune(keeper: Keeper, r: Row, order: Prune, who: str) -> Task:
    """Forget what the rules don't keep."""
    if any(n < 1 or n > 100_000 for n in order.keep.values()):
        raise UsageError("A rule keeps at least one point")
    words = ["prune", *(f"--keep-{rule}={n}" for rule, n in order.keep.items()), *["--dry-run"] * order.dry_run]
    return task(keeper, r, "prune", words, who)


def check(keeper: Keeper, store: str, order: Check, who: str) -> Task:
    """Look for damage."""
    words = ["check", *["--deep"] * order.deep, *keeper.store_words(store)]
    return Task("deep check" if order.deep else "check", words, store, who=who)
