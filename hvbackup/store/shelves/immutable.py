"""Immutable files: where the settings ask for it, what is written once can't be changed or removed by anybody, root included.

The file system does that (`chattr +i`), so it needs one that can, and CAP_LINUX_IMMUTABLE.  Where either is missing nothing is
written at all: protection that silently does nothing is worse than none.  Forgetting and reclaiming take the flag from what they
remove, right before they do; root can do the same by hand, so this is against mistakes, stray programs and broken scripts.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

from hvbackup.errors import HvbackupError, StoreDamage, UsageError
from hvbackup.files import Files
from hvbackup.store.shelves import settings
from hvbackup.store.store import Store

FOLDERS = ("packs/", "points/", "runs/", "settings/", "holds/")


def arm(store: Store) -> None:
    """What is written from now on is immutable, if the settings say so.  Raises HvbackupError where that can't be."""
    try:
        wanted = settings.load(store).immutable
    except StoreDamage:
        wanted = False  # `check` says so, and nothing is forgotten; a capture goes on
    if wanted and not store.files.immutable:
        probe(store.files)
        store.files.immutable = FOLDERS


def probe(files: Files) -> None:
    """Raises HvbackupError, saying why, when files of this store can't be made immutable."""
    name = f"tmp/{secrets.token_hex(8)}"
    files.write_new(name, b"")
    path = str(files.path(name))
    try:
        files.kernel.set_immutable(path, True)
        if not files.is_immutable(name):
            raise HvbackupError(f"The file system of {files.root} takes the flag `chattr +i` sets and does not keep it")
        files.kernel.set_immutable(path, False)
    except OSError as e:
        raise HvbackupError(
            f"The settings of the store ask for immutable files, and {files.root} has none ({e.strerror}): its file system must "
            "know `chattr +i` (ext4, xfs, btrfs), and the program must run as root; or `hvbackup settings --immutable off`"
        ) from e
    finally:
        files.remove(name)


def change(store: Store, *, on: bool) -> int:
    """All files that there are have the flag, or none has, when this returns; how many were changed.  Raises UsageError."""
    if on:
        try:
            probe(store.files)
        except HvbackupError as e:
            raise UsageError(str(e)) from e
    changed = 0
    for name in names(store):
        if store.files.is_immutable(name) != on:
            store.files.kernel.set_immutable(str(store.files.path(name)), on)
            changed += 1
    store.files.immutable = FOLDERS if on else ()
    return changed


def names(store: Store) -> Iterator[str]:
    """Every file that is to be immutable."""
    for folder in FOLDERS:
        for at, _, found in os.walk(store.files.path(folder.rstrip("/"))):
            yield from (os.path.relpath(os.path.join(at, name), store.files.root) for name in sorted(found))


def missing(store: Store) -> list[str]:
    """Files without the flag although the settings ask for it."""
    if not settings.load(store).immutable:
        return []
    return [name for name in names(store) if store.files.exists(name) and not store.files.is_immutable(name)]
