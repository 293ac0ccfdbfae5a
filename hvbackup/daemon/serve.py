"""The process of the service: one on a host, told by signals to reload or end, watched by systemd."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

from hvbackup.config import KeyOptions, Places, private
from hvbackup.daemon import log as lines
from hvbackup.daemon import systemd
from hvbackup.daemon.keeper import Keeper
from hvbackup.errors import HvbackupError
from hvbackup.files import Files

STEP_SECONDS = 0.5
log = logging.getLogger("hvbackup")

Front = Callable[[Keeper], AbstractContextManager[object]]  # the API, while its context lasts


def no_front(_: Keeper) -> AbstractContextManager[object]:
    """Nobody is answered."""
    return nullcontext()


def serve(places: Places, keys: KeyOptions, front: Front = no_front) -> None:
    """Keep machines protected until told to end.  Raises Problems in the configuration, Busy when a service runs already."""
    lines.begin()
    private(places.run)
    with Files(places.run).owner("service.lock", "The service of this host"), _signals() as told:
        keeper = Keeper(places, keys)
        try:
            with front(keeper):
                _loop(keeper, told)
        finally:
            systemd.notify("STOPPING=1")
            keeper.close()


class _Told:
    """What signals asked for."""

    def __init__(self) -> None:
        self.wake = threading.Event()
        self.end = self.reload = False


def _loop(keeper: Keeper, told: _Told) -> None:
    pause = systemd.watchdog_seconds()
    alive = 0.0
    keeper.refresh()
    systemd.notify("READY=1")
    log.info("Ready: sources %d, policies %d", len(keeper.settings.sources), len(keeper.settings.policies))
    if not keeper.settings.sources:
        log.warning("Nothing is protected: no [source.NAME] in %s", keeper.places.configuration / "config.toml")
    while not told.end:
        if told.reload:
            told.reload = False
            systemd.reloading()
            keeper.reload()
            systemd.notify("READY=1")
        try:
            keeper.step()
        except (HvbackupError, OSError) as e:  # a full disk, a store that went away: it may come back
            log.error("%s", e)
        if pause and time.monotonic() - alive >= pause:
            alive = time.monotonic()
            systemd.notify("WATCHDOG=1", f"STATUS={len(keeper.rows())} machines, {len(keeper.alarms)} alarms")
        told.wake.wait(STEP_SECONDS)
        told.wake.clear()


@contextmanager
def _signals() -> Iterator[_Told]:
    told = _Told()

    def handle(number: int, _: FrameType | None) -> None:
        told.reload |= number == signal.SIGHUP
        told.end |= number != signal.SIGHUP
        told.wake.set()

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield told
    finally:
        for number, old in before.items():
            signal.signal(number, old)
