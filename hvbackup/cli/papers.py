"""completion, man: made out of the parser, so that they can't be wrong."""

from __future__ import annotations

from hvbackup.cli.parser import Verbs


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
