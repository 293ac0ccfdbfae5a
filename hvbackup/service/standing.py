"""How a machine's continuous protection stands, as its worker notes it in the run directory: nobody has to read its journal.

The note is replaced whole, survives neither a restart of the host nor needs to, and is believed only while its process lives.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hvbackup import __version__
from hvbackup.config import Places
from hvbackup.errors import HvbackupError
from hvbackup.files import Files, Kernel
from hvbackup.model import Machine
from hvbackup.processes import Process
from hvbackup.protect.events import Begun, Cycle, Event, Folded, Paused, Streamed, Trouble

FOLDER = "workers"  # in the run directory


@dataclass(frozen=True, slots=True)
class Note:
    """What a worker says of itself."""

    machine: str
    name: str
    process: Process
    version: str = __version__
    since: int = 0  # this life of its protection
    newest: int = 0  # the time of its newest moment
    seq: int = 0
    lag_seconds: float = 0.0  # of that moment: from the moment to its durability
    folded: int = 0  # the time of its newest point
    trouble: str = ""  # what keeps it from recording, now
    paused: str = ""  # why an administrator wants it left alone


def noting(places: Places, key: Callable[[Machine], str]) -> Callable[[Machine, Event], None]:
    """Keeps the notes of a process's workers; what killed ones had not written to its end is gone when this returns."""
    me = Process.of(os.getpid())
    assert me is not None
    with contextlib.suppress(OSError):
        _files(places).sweep()
    notes: dict[str, Note] = {}

    def note(machine: Machine, event: Event) -> None:
        old = notes.get(machine.id) or Note(machine.id, machine.name, me)
        notes[machine.id] = new = _after(old, event)
        write(places, key(machine), new)

    return note


def _after(note: Note, event: object) -> Note:
    if isinstance(event, Cycle | Streamed):
        return replace(
            note, newest=int(event.moment.t), seq=event.moment.seq, lag_seconds=round(event.lag_seconds, 3),
            trouble="", paused="",
        )  # fmt: skip
    if isinstance(event, Begun):
        return replace(
            note, since=int(event.moment.t), newest=int(event.moment.t), seq=event.moment.seq, trouble="", paused=""
        )
    if isinstance(event, Paused):
        return replace(note, paused=event.pause.why or "paused", trouble="")
    if isinstance(event, Folded):
        return replace(note, folded=int(event.point.t))
    return replace(note, trouble=str(event.error)) if isinstance(event, Trouble) else note


class _Fleeting(Kernel):
    """What is renamed is whole for whoever reads it; nothing waits for a disk."""

    def fsync(self, fd: int) -> None:
        """A power cut may take it."""

    def sync_dir(self, path: str) -> None:
        """Likewise."""


def _files(places: Places) -> Files:
    return Files(places.run / FOLDER, _Fleeting())


def path_of(places: Places, key: str) -> Path:
    """Where the note of a machine is; `key` is its keyed name in the store."""
    return places.run / FOLDER / f"{key}.json"


def write(places: Places, key: str, note: Note) -> None:
    """Whoever reads the note has this one, whole, when this returns; where that fails, nobody is protected less."""
    with contextlib.suppress(OSError, HvbackupError):
        _files(places).replace(path_of(places, key).name, json.dumps(asdict(note)).encode() + b"\n")


def read(places: Places, key: str) -> Note | None:
    """The note of a living worker, or None."""
    try:
        value = json.loads(path_of(places, key).read_text())
        known = {name: value[name] for name in Note.__slots__ if name in value}  # a later version may say more
        note = Note(**{**known, "process": Process(**value["process"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if note.process.is_running() else None
