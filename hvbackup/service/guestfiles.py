"""files: what is inside the disks of a machine at a moment, listed or copied out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvbackup.errors import UsageError
from hvbackup.model import DiskRoot, RecoveryPoint
from hvbackup.moments import rfc3339
from hvbackup.recover import browse
from hvbackup.recover.browse import Entry, Volumes
from hvbackup.recover.copyout import Copied, CopyOut
from hvbackup.service import shapes
from hvbackup.service.inventory import roots
from hvbackup.service.moment import choose
from hvbackup.service.recovery import Which
from hvbackup.service.session import Session


@dataclass(frozen=True, slots=True)
class Opened:
    """The disks of a machine at a moment, to be looked into for as long as the context lasts."""

    point: RecoveryPoint
    disks: Sequence[tuple[DiskRoot, Volumes]]
    notes: list[str] = field(default_factory=list)

    def one(self, path: str) -> tuple[DiskRoot, Volumes]:
        """The disk that a path is on.  Raises UsageError where there are several."""
        if len(self.disks) > 1:
            known = ", ".join(root.disk.id for root, _ in self.disks)
            raise UsageError(
                f"{self.point.machine.name} has the disks {known}; say which one {path} is on: --disk DISK"
            )
        return self.disks[0]


@dataclass(frozen=True, slots=True)
class Listed:
    """What is in a folder, or the partitions of every disk."""

    point: RecoveryPoint
    path: str
    entries: Sequence[tuple[DiskRoot, Entry]]
    notes: Sequence[str]


@contextmanager
def opened(session: Session, which: Which) -> Iterator[Opened]:
    """The chosen disks can be looked into.  Raises NotFound, JournalGap, UsageError, ChunkDamaged."""
    with session.open() as store:
        found = choose(store, which.machine, which.at, which.now)
        chosen = roots(found.point, which.disks)
        with found.pinned("files") as more:
            disks = [(root, browse.open(found.view(root), root.disk.sector)) for root in chosen]
            yield Opened(found.point, disks, [*found.notes, *more])


def listed(session: Session, which: Which, path: str) -> Listed:
    """What is in a folder; where no path is said, the partitions of every disk.  Raises as `opened`, FileSystemUnreadable."""
    with opened(session, which) as here:
        disks = here.disks if path.strip("/") == "" else [here.one(path)]
        entries = [(root, entry) for root, volumes in disks for entry in volumes.list(path)]
        notes = [*here.notes, *(note for _, volumes in disks for note in volumes.notes())]
        return Listed(here.point, path, entries, notes)


@dataclass(frozen=True, slots=True)
class CopiedOut:
    """What was copied out, and where it is."""

    point: RecoveryPoint
    root: DiskRoot
    path: str
    to: Path
    done: Copied
    notes: Sequence[str]


def copied(
    session: Session, which: Which, path: str, to: Path, progress: Callable[[int], None], *, force: bool
) -> CopiedOut:
    """The file or folder is in the folder `to` when this returns, as far as it could be read.  Raises as `listed`."""
    if path.strip("/") == "":
        raise UsageError("Say what to copy: a path such as /1/etc/hosts, or a whole partition such as /1")
    with opened(session, which) as here:
        root, volumes = here.one(path)
        out = CopyOut(volumes, progress, force=force)
        where = out.copy(volumes.find(path), to)
        return CopiedOut(here.point, root, path, where, out.done, [*here.notes, *volumes.notes()])


def shape_listed(found: Listed) -> dict[str, Any]:
    """As JSON."""
    entries = [{"disk": root.disk.id, **shape_entry(e)} for root, e in found.entries]
    return {"point": shapes.point(found.point), "path": found.path, "entries": entries, "notes": list(found.notes)}


def shape_entry(e: Entry) -> dict[str, Any]:
    """One name."""
    return {
        "path": e.path, "name": e.name, "kind": str(e.kind), "size_bytes": e.size,
        "mode": None if e.mode is None else f"{e.mode:04o}",
        "modified": None if e.mtime is None else rfc3339(e.mtime),
        "target": e.target, "note": e.note,
    }  # fmt: skip


def shape_copied(found: CopiedOut) -> dict[str, Any]:
    """As JSON."""
    d = found.done
    return {
        "point": shapes.point(found.point), "disk": found.root.disk.id, "path": found.path, "to": str(found.to),
        "files": d.files, "folders": d.folders, "links": d.links, "bytes": d.bytes, "left_out": d.left_out,
        "failed": [{"path": path, "error": shapes.error(e)} for path, e in d.failed], "failures": d.failures,
        "notes": list(found.notes),
    }  # fmt: skip
