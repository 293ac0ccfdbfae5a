"""What every kind of life is able to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from hvbackup.model import DiskId, RecoveryPoint, Token
from hvbackup.protect.points import Points
from hvbackup.store.journal.history import Moment
from hvbackup.store.journal.recorder import Recorder


class Life(Protocol):
    """One life of protection: from a capture, or the newest barrier, to the loss of continuity."""

    recorder: Recorder
    points: Points
    point: RecoveryPoint  # that its facts are laid over
    tokens: Mapping[DiskId, Token]  # named by the newest barrier
    newest: Moment  # durable
    how: str  # "resumed" from the newest barrier, or "captured"
    told_gap: Mapping[str, object] | None  # that its first barrier told

    def step(self) -> float:
        """One more moment is durable, or what passed since the last step is; seconds until the next step is due.

        Raises ContinuityLost, HostUnreachable, ReadFailed, SpaceExhausted: then the life is over.
        """

    def close(self, *, seal: bool = True) -> None:
        """The journal is sealed, and nothing of the life is left on the host but what barrier and point name.

        Without `seal` the journal is sealed by and by: the next life need not wait for it.
        """
