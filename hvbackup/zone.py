"""The zone of this host's clock on the wall, with its changes of the clocks where they can be known."""

from __future__ import annotations

import os
from datetime import datetime, tzinfo


def local_zone() -> tzinfo:
    """What calendar expressions and windows of time mean here."""
    from zoneinfo import ZoneInfo

    name = os.environ.get("TZ", "").lstrip(":")
    link = os.path.realpath("/etc/localtime").partition("zoneinfo/")[2]
    for candidate in (name, link):
        try:
            if candidate:
                return ZoneInfo(candidate)
        except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
            continue
    found = datetime.now().astimezone().tzinfo
    assert found is not None
    return found
