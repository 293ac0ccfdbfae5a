"""watch: what happens to the machines of a source, as it happens."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import cast

from hvbackup.errors import HostUnreachable, UsageError
from hvbackup.hypervisors import Watching
from hvbackup.hypervisors.source import SourceOptions, open_source
from hvbackup.service.session import Session

LOOK_SECONDS = 1.0

Report = Callable[[str, str, str], None]  # what happened, the machine's id, its name


def watch(session: Session, source: str, report: Report) -> None:
    """Every event is reported until whoever started us has ended; the first, without a machine, says that we listen.

    Raises UsageError where the source tells of none, HostUnreachable, also when the connection is lost.
    """
    options = SourceOptions(store_id="0" * 8, scratch=session.places.scratch, runtime=session.places.run)
    hypervisor = open_source(source, options)
    if not hypervisor.can.events:
        raise UsageError(f"{source} does not say what happens to its machines; `hvbackup backup --dry-run` looks")
    lost, parent = threading.Event(), os.getppid()
    with cast(Watching, hypervisor).watching(report, lost.set):
        report("watching", "", "")
        while not lost.wait(LOOK_SECONDS):
            if os.getppid() != parent:
                return
    raise HostUnreachable(f"{source} ended the connection; what happens there now is not seen")
