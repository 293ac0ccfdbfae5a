"""A list of changed extents that somebody else knows: a storage array, a file system's own diff, a script.

Two forms, told apart by the first character.  Lines of `offset length` in bytes, decimal or 0x…, with blank lines and
`#` comments; or a JSON list of objects with `offset` and `length` (what `nbdinfo --map --json` prints; other keys are
ignored, so clean extents in such a list are merely read for nothing).

That the list is complete since the newest recovery point is the claim of whoever gave it; the capture samples it.

So that such a claim has something to refer to, disks that record nothing themselves get a mark as their token: it proves
nothing, and says that there is a newest point and how large the disk was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from hvbackup.errors import UsageError
from hvbackup.extents import Spans, complement, intersect, spans, subtract, union
from hvbackup.hypervisors import Changes
from hvbackup.model import Continuity, LeaseId, Token

MARK = "mark"  # the kind of a token that records nothing

FILE_MAX_BYTES = 256 * 1024**2  # some 10 million extents: more than a list is good for


def read(path: Path, size: int) -> Spans:
    """The extents of a disk of `size` bytes that the file names.  Raises UsageError with file and line."""
    text = _text(path)
    rows = _from_json(path, text) if text.lstrip()[:1] == "[" else _from_lines(path, text)
    return spans([_checked(where, offset, length, size) for where, offset, length in rows])


def mark(lease: LeaseId, size: int) -> Token:
    """The token of a disk that records nothing."""
    return Token(MARK, lease, f"size={size}")


def size_at(since: Token, now: int) -> int:
    """How large the disk was at the token; as large as now if it does not say."""
    size = since.life.partition(";")[0].removeprefix("size=")
    return int(size) if size.isdecimal() else now


def changes(changed: Spans | None, since: Token | None, allocated: Spans, size: int, reason: str) -> Changes:
    """What became of a disk: `changed` if it is known and there is something to refer to; else all, for `reason`.

    Without a reason comparing is all that was to be expected, of a disk that records nothing.
    """
    if changed is None or since is None:
        reason = reason if since else "No earlier checkpoint was given"
        return Changes(Continuity.UNKNOWN, allocated, complement(allocated, size), reason)
    grown = spans([(old, size - old)]) if (old := size_at(since, size)) < size else changed[:0]
    touched = union(changed, grown)
    return Changes(Continuity.INCREMENTAL, intersect(touched, allocated), subtract(touched, allocated))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise UsageError(f"{path}: a list of changed extents has at most {FILE_MAX_BYTES} bytes; leave it out")
        return path.read_text(encoding="ascii")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: no list of changed extents: byte {error.start} is not ASCII") from error
    except OSError as error:
        raise UsageError(f"{path}: can't read this list of changed extents: {error.strerror}") from error


def _from_lines(path: Path, text: str) -> Iterator[tuple[str, int, int]]:
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        try:
            offset, length = (int(word, 0) for word in words)
        except ValueError:
            raise UsageError(f"{where}: '{line.strip()[:60]}' is not `offset length` in bytes") from None
        yield where, offset, length


def _from_json(path: Path, text: str) -> Iterator[tuple[str, int, int]]:
    try:
        items = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        at = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError(f"{path}{at}: not a JSON list of extents: {error}") from error
    for number, item in enumerate(items, 1):
        where = f"{path}, extent {number}"
        match item:
            case {"offset": int(offset), "length": int(length)}:
                yield where, offset, length
            case _:
                raise UsageError(f"{where}: not an object with whole numbers `offset` and `length`")


def _checked(where: str, offset: int, length: int, size: int) -> tuple[int, int]:
    if offset < 0 or length < 0:
        raise UsageError(f"{where}: offset {offset} and length {length} must not be negative")
    if offset + length > size:
        raise UsageError(f"{where}: ends at byte {offset + length}, beyond the end of the disk at {size}")
    return offset, length
