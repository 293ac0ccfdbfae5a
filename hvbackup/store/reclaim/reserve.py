"""Space kept back in the store, so that forgetting and reclaiming work on a full disk: the file `reserve`, removed for them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from typing import TypeVar

from hvbackup.errors import HvbackupError, SpaceExhausted
from hvbackup.files import Files
from hvbackup.model import MiB

NAME = "reserve"
RESERVE_BYTES = 4 * MiB  # for tombstones, records, condemned lists, and a pack of what lives in sparse ones
LOW_BYTES = MiB  # less than this is a full disk
FREE_SHARE = 8  # it is made where there is so many times as much room: never the last of it

T = TypeVar("T")


def keep(files: Files) -> None:
    """There is a reserve when this returns, if there is room for one."""
    if files.exists(NAME) or shutil.disk_usage(files.root).free < FREE_SHARE * RESERVE_BYTES:
        return
    with contextlib.suppress(HvbackupError, OSError):  # next time
        files.allocate(NAME, RESERVE_BYTES)


def open_up(files: Files) -> None:
    """On a full disk the reserve's room is free when this returns: STATE may be on the same disk, and locks need some as well."""
    if files.exists(NAME) and shutil.disk_usage(files.root).free < LOW_BYTES:
        files.remove(NAME)


def using(files: Files, work: Callable[[], T]) -> T:
    """What `work` returns; when the disk is full it is done once more with the reserve's room.

    It must be such that it can be begun again.
    """
    try:
        return work()
    except SpaceExhausted:
        if not files.exists(NAME):
            raise
        files.remove(NAME)
        return work()
