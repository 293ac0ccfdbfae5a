"""Groups: machines that meet now and then, so that there are moments which all of them have in common."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence

from hvbackup.model import SECOND
from hvbackup.protect.meeting import Meeting
from hvbackup.protect.protection import Protection


class Group:
    """Lets its members meet until told to end.  Thread safety: any thread."""

    def __init__(self, name: str, members: Sequence[Protection], every_ns: int) -> None:
        self.name = name
        self._members, self._every = members, every_ns / SECOND
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"group {name}", daemon=True)

    def start(self) -> None:
        """It runs when this returns."""
        self._thread.start()

    def end(self) -> None:
        """Nobody meets any more when this returns."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            # Who has not yet sat down for the last meeting would be waited for in two.
            if not any(member.setting.seat for member in self._members):
                self.meet()

    def meet(self) -> Meeting:
        """All members that are alive make their next moment a common one, at once; the others are left out, and named."""
        meeting = Meeting(secrets.token_hex(4), self.name, [m.setting.machine.id for m in self._members])
        for member in self._members:
            if member.setting.rhythm.stream:
                meeting.leave(member.setting.machine.id, "its stream can't be held still")
            elif member.begun:
                member.meet(meeting)
            else:
                meeting.leave(member.setting.machine.id, "nothing of it is recorded at present")
        return meeting
