"""Audit: whether the store is the one that our records, and what was kept of them elsewhere, tell of.

Run records are a chain; its newest hash is kept under STATE by whoever writes, and, where somebody asks for it, in a file of
heads: the newest hash of every chain.  Kept on another machine it shows that the store was put back from an older copy, or that
its newest records were cut off, even where STATE was rolled back with it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from hvbackup.errors import UsageError
from hvbackup.files import TMP, Files
from hvbackup.store.format.layout import parse_json
from hvbackup.store.format.runs import Head
from hvbackup.store.shelves import immutable
from hvbackup.store.store import Store

TOLD_MAX = 5


def problems(store: Store) -> list[str]:
    """Everything that is wrong with the chains and with what they tell of, and files that lack a flag they should have."""
    open_ = immutable.missing(store)
    found = [*store.runs.problems(store.heads), *([store.heads_trouble] if store.heads_trouble else [])]
    found += [f"{name} is not immutable, and the settings ask for it" for name in open_[:TOLD_MAX]]
    more = len(open_) - TOLD_MAX
    return [*found, f"{more} more files are not immutable"] if more > 0 else found


def keep(path: Path, store: bytes, heads: Iterable[Head]) -> None:
    """These are in the file of heads when this returns, each instead of the one of its chain that was there."""
    old = load(path, store) if path.exists() else []
    newest = {h.writer: h for h in [*old, *heads]}
    value = {"store": store.hex(), "heads": [asdict(newest[w]) for w in sorted(newest)]}
    Files(path.parent).replace(path.name, json.dumps(value, indent=1).encode() + b"\n")
    with contextlib.suppress(OSError):  # it may be in use
        (path.parent / TMP).rmdir()


def follow(store: Store, path: Path) -> None:
    """The file counts as heads that must be there, and our own are kept in it from now on, if it exists."""
    if not path.exists():
        return
    try:
        store.heads = merged([store.heads, load(path, store.id)])
    except UsageError as e:
        store.heads_trouble = str(e)  # `check` says so; what it can't tell any more is no reason not to restore
        return
    store.runs.on_head = lambda head: keep(path, store.id, [head])


def load(path: Path, store: bytes) -> list[Head]:
    """The heads in such a file.  Raises UsageError when it is none, or of another store."""
    try:
        value = parse_json(path.read_bytes())
        if value["store"] != store.hex():
            raise UsageError(f"{path} has the heads of store {value['store']}, and this is {store.hex()}")
        return [Head(str(h["writer"]), int(h["seq"]), str(h["digest"])) for h in value["heads"]]
    except OSError as e:
        raise UsageError(f"{path} can't be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path} is no file of heads; `hvbackup audit keep` writes one") from e


def merged(several: Iterable[Sequence[Head]]) -> list[Head]:
    """All of them, each once."""
    return list(dict.fromkeys(head for heads in several for head in heads))
