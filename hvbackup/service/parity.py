"""parity: packs get a tenth more, out of which damaged ones can be mended."""

from __future__ import annotations

from collections.abc import Callable

from hvbackup.errors import UsageError
from hvbackup.files import Files
from hvbackup.service.session import Session
from hvbackup.store.format import parity
from hvbackup.store.shelves import immutable

Progress = Callable[[int, int], None]


def cover(session: Session, progress: Progress) -> parity.Covered:
    """Every pack has parity, and whatever is added gets it from now on.  Raises UsageError where the package is missing."""
    with session.open() as store:
        immutable.arm(store)
        parity.want(store.files)
        return parity.cover(store.files, progress)


def keep_covered(session: Session) -> list[str]:
    """Packs that were added have parity if this store's packs are to have it; why not, for people."""
    if not parity.is_wanted(Files(session.places.store)):
        return []
    try:
        with session.open() as store:
            immutable.arm(store)
            damaged = parity.cover(store.files).damaged
    except UsageError as e:
        return [f"New packs have no parity yet: {e}"]
    return [f"Pack {name} is damaged and got no parity; run `hvbackup check --deep`" for name in damaged]


def uncover(session: Session) -> int:
    """No pack has parity any more; how many had."""
    with session.open() as store:
        immutable.arm(store)
        return parity.drop(store.files)
