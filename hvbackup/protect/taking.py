"""What a journal takes at once, and when another point is made first: how protection begins where a guest never stops writing.

A point takes as long as what it reads.  What the guest writes meanwhile is the first set behind it, what it writes while that is
read the second one, and so on.

    a point        reads, hashes and stores a whole block for each byte that has changed: 64 KiB for a write of 4 KiB
    a set          reads what has changed, in grains of 4 KiB

So sets shrink wherever we read faster than the guest writes, and points need not, however many are made.  Hence:

1.  What changed behind a point is taken as a set, however much that is, as long as the journal's budget has room.  So is what
    changed behind any other moment of a life.  Of a stream one set is enough: what comes meanwhile arrives by itself.
2.  After a gap a point holds what is more than a usual set: the store has it once then, and not in the journal as well.
3.  What is more than the budget has room for is held by another point, as long as each leaves less than the one before.
4.  Else no number of points would do: TooBusy.  The next attempt comes when as much time has passed as leaves four fifths of it
    to the machine, at the latest when a point is due anyway.  Each attempt offers the moment of its point.

Budgets of less than a usual set are overrun by one, and relieved by the point that is due then.
"""

from __future__ import annotations

from typing import NoReturn

from hvbackup.protect.events import ContinuityLost, TooBusy
from hvbackup.protect.setting import Setting

LESS = 0.8  # what another point has to leave at most of what the one before it left


def limit(room: int, usual: int, *, gap: bool) -> int:
    """How many bytes a set may have; `room` is what the budget has left, `usual` the size of a usual set.  Pure."""
    return min(usual, room) if gap else max(usual, room)


def refuse(setting: Setting, total: int, room: int, *, behind_point: bool) -> NoReturn:
    """Raises ContinuityLost where a point is to be made instead of a set of so many bytes, TooBusy where none would help."""
    before, setting.left = setting.left, total if behind_point else setting.left
    if behind_point and before is not None and total > before * LESS:
        raise TooBusy(
            f"Machine {setting.machine.name} writes too much for its journal: {total} bytes changed while a point was made, "
            f"and {before} while the one before was; the journal has room for {room}. Points are made now and then until a "
            "quieter hour; raise --journal-budget to record what is between them"
        )
    raise ContinuityLost(f"{total} bytes changed, more than the journal takes at once")
