"""Which files inside a disk lie on ranges of it that are lost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hvbackup.errors import FileSystemUnreadable, HvbackupError, StoreDamage
from hvbackup.recover.browse import Found, Kind, Volumes, shown
from hvbackup.recover.partitions import READABLE

Extent = tuple[int, int]  # (offset, length), in order, none overlapping


@dataclass(slots=True)
class Affected:
    """Files that can't be read whole, the first so many of them by name; and what can't be told."""

    most: int
    files: list[str] = field(default_factory=list)
    more: int = 0
    remarks: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        """One file or folder more."""
        if len(self.files) < self.most:
            self.files.append(path)
        else:
            self.more += 1


def affected(volumes: Volumes, lost: Sequence[Extent], most: int) -> Affected:
    """Every file whose bytes, or whose description, lie on what is lost.  Never raises what is wrong inside a disk."""
    found = Affected(most)
    for part in volumes.parts:
        if not _overlap([(part.start, part.size)], lost):
            continue
        if part.kind not in READABLE:
            found.remarks.append(f"/{part.number} ({part.kind or 'unknown'}): its files can't be told")
            continue
        try:
            top = volumes.find(f"/{part.number}")
        except (StoreDamage, FileSystemUnreadable) as e:
            found.remarks.append(f"its files can't be told: {e}")
            continue
        if part.kind == "btrfs":
            found.remarks.append(
                f"/{part.number}: btrfs can't tell which files lie where; `files --to` finds those that are damaged"
            )
            continue
        _folder(volumes, top, lost, found, set())
    return found


def _folder(volumes: Volumes, folder: Found, lost: Sequence[Extent], found: Affected, seen: set[Any]) -> None:
    waiting = [folder]
    while waiting:
        at = waiting.pop()
        try:
            volumes.enter(at, seen)
            children = volumes.children(at)
        except HvbackupError as e:
            found.add(f"{shown(at.path)}/ (and what is in it)")
            if not isinstance(e, StoreDamage):
                found.remarks.append(str(e))
            continue
        waiting += [child for child in children if _look(volumes, child, lost, found)]


def _look(volumes: Volumes, child: Found, lost: Sequence[Extent], found: Affected) -> bool:
    """Whether it is a folder; a file that is affected is noted."""
    try:
        kind = volumes.facts(child).kind
        if kind is Kind.FILE:
            runs = volumes.runs(child) or ()
            if _overlap([(at, n) for at, n in runs if at is not None], lost):
                found.add(child.path)
    except StoreDamage:
        found.add(child.path)  # what describes it is lost
    except FileSystemUnreadable as e:
        found.remarks.append(str(e))
    else:
        return kind is Kind.FOLDER
    return False


def _overlap(runs: Sequence[Extent], lost: Sequence[Extent]) -> bool:
    starts = [start for start, _ in lost]
    for at, length in runs:
        i = bisect_right(starts, at)
        before = i > 0 and lost[i - 1][0] + lost[i - 1][1] > at
        if before or (i < len(lost) and lost[i][0] < at + length):
            return True
    return False
