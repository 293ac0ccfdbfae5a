"""Figures and times as the console shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hvbackup.model import SECOND

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
SIGNS = {"protected": "✓", "failing": "!", "late": "⏱", "unprotected": "✗", "paused": "‖", "left out": "–", "gone": "∅",
         "queued": "…", "running": "▸", "done": "✓", "degraded": "!", "failed": "✗", "cancelled": "–"}  # fmt: skip


def size(count: float | None) -> str:
    """Bytes for people."""
    value, unit = float(count or 0), 0
    while value >= 1023.95 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


def stretch(seconds: float | None) -> str:
    """A stretch of time, in its two largest units."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next(i for i, (n, _) in enumerate(parts) if n)
    return " ".join(f"{n} {unit}" for n, unit in parts[first : first + 2] if n)


def ago(seconds: float | None) -> str:
    """How old something is."""
    return "never" if seconds is None else "now" if seconds < 1 else f"{stretch(seconds)} ago"


def moment(t: int | str | None) -> str:
    """A time in the zone of the host, to the second."""
    if not t:
        return "–"
    found = datetime.fromisoformat(t) if isinstance(t, str) else datetime.fromtimestamp(t // SECOND, UTC)
    return found.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def took(job: Mapping[str, Any], now: int) -> str:
    """How long a job ran, or runs already."""
    if not job["began"]:
        return "–"
    began = datetime.fromisoformat(job["began"]).timestamp()
    ended = datetime.fromisoformat(job["ended"]).timestamp() if job["ended"] else now / SECOND
    return stretch(max(0.0, ended - began))


def far(progress: Mapping[str, Any]) -> str:
    """How far a job is; `live.js` says the same while it goes on."""
    done, total = int(progress["done_bytes"]), int(progress["total_bytes"])
    return f"{100 * done // total} % of {size(total)}"


def sign(state: object) -> str:
    """A sign beside the word, for those who don't see the colour."""
    return SIGNS.get(str(state), "")


def bars(values: Sequence[float]) -> list[tuple[float, float, float]]:
    """Bars of a chart of 100 by 100: x, height, width."""
    top, width = max(values, default=0) or 1, 100 / max(1, len(values))
    return [(round(i * width, 3), round(100 * v / top, 2), round(width * 0.8, 3)) for i, v in enumerate(values)]
