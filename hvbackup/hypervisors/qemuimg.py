"""What we ask of `qemu-img`: what an image is, and its persistent bitmaps.

`qemu-img` takes QEMU's own image locks, so an image on which a machine runs is refused here and never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvbackup.errors import HostUnreachable, ReadFailed, UsageError
from hvbackup.hypervisors import rawfile

BITMAP_GRAIN_BYTES = 64 * 1024  # the store's block: finer would only read more exactly what is stored whole

_INFO_SECONDS = 60.0
# Killing qemu-img while it writes leaves every bitmap of the image inconsistent, so it gets all the time it can need.
_BITMAP_SECONDS = 600.0
_LOCKED = ('"write" lock', '"consistent read" lock', "another process using the image")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image as qemu-img describes it."""

    size: int
    bitmaps: Mapping[str, frozenset[str]]  # name -> flags; empty where the format has none
    can_track: bool  # persistent bitmaps are possible
    corrupt: bool
    files: tuple[Path, ...]  # the image, and what it is based on

    def backing(self) -> str:
        """Changes when the files below the image do; bitmaps know nothing of those."""
        seen = [(str(path), *_stamp(path)) for path in self.files[1:]]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16] if seen else ""

    def stamps(self) -> tuple[tuple[int, ...], ...]:
        """Changes when anybody writes to any of the files."""
        return tuple(_stamp(path) for path in self.files)


def info(path: Path, format_: str, *, in_use: bool = False) -> ImageInfo:
    """Describe an image at rest, or one that a machine is known to run on.  Raises Busy, ReadFailed."""
    asked = ["info", *(["-U"] if in_use else []), "-f", format_, "--backing-chain", "--output=json", "--", str(path)]
    chain = json.loads(_run(path, asked, _INFO_SECONDS))
    top = chain[0]
    details: dict[str, Any] = top.get("format-specific", {}).get("data", {})
    bitmaps = {entry["name"]: frozenset(entry["flags"]) for entry in details.get("bitmaps", [])}
    return ImageInfo(
        size=top["virtual-size"],
        bitmaps=bitmaps,
        can_track=top["format"] == "qcow2" and details.get("compat") != "0.10" and top["virtual-size"] > 0,
        corrupt=bool(details.get("corrupt")),
        files=tuple(Path(layer["filename"]) for layer in chain if not layer["filename"].startswith("json:")),
    )


def add_bitmap(path: Path, name: str) -> None:
    """From now on every write to the qcow2 image is recorded under this name.  Raises Busy, ReadFailed."""
    grain = ["-g", str(BITMAP_GRAIN_BYTES)]
    _run(path, ["bitmap", "--add", *grain, "-f", "qcow2", str(path), name], _BITMAP_SECONDS)


def remove_bitmap(path: Path, name: str) -> None:
    """The bitmap is gone.  Raises Busy, ReadFailed."""
    _run(path, ["bitmap", "--remove", "-f", "qcow2", str(path), name], _BITMAP_SECONDS)


def missing_program(program: str) -> UsageError:
    """The error for a program of QEMU's that is not installed."""
    return UsageError(f"{program} is needed for images that are not raw and is not installed: apt install qemu-utils")


def refused(path: Path, program: str, words: str) -> HostUnreachable:
    """The error for a program that gave up with these words."""
    lines = [line for line in words.splitlines() if line.strip()]
    return ReadFailed(f"{path}: {program} can't read it: {lines[-1].strip() if lines else 'it says nothing'}")


def is_locked(words: str) -> bool:
    """Whether a program gave up because a machine runs on the image."""
    return any(sign in words for sign in _LOCKED)


def _run(path: Path, arguments: Sequence[str], timeout_seconds: float) -> str:
    try:
        done = subprocess.run(
            ["qemu-img", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise missing_program("qemu-img") from None
    except subprocess.TimeoutExpired:
        raise HostUnreachable(
            f"{path}: qemu-img {arguments[0]} did not end within {timeout_seconds:g} seconds; is its file system hanging?"
        ) from None
    if done.returncode == 0:
        return done.stdout
    if is_locked(done.stderr):
        raise rawfile.in_use(path)
    raise refused(path, "qemu-img", done.stderr)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()  # the base may be no file at all: an NBD address, say
    return status.st_size, status.st_mtime_ns
