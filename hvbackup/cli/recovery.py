"""map, restore, boot, discard: from points back to disks and machines."""

from __future__ import annotations

from hvbackup.cli.parser import Verbs


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
