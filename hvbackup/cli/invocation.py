"""From the options of a command to the session it runs in."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from hvbackup import config
from hvbackup.cli.parser import interactive
from hvbackup.model import Instant

if TYPE_CHECKING:
    from hvbackup.service.session import Session


def session_of(args: argparse.Namespace) -> Session:
    """Places and keys by option, environment and habit; somebody to ask only where somebody is."""
    from hvbackup.service.session import Session

    return Session(
        config.places(args.store),
        config.key_options(args.key_file, args.passphrase_file),
        _ask if interactive() else None,
    )


def other_session(
    args: argparse.Namespace, where: str, key_file: str | None, passphrase_file: str | None = None
) -> Session:
    """The same for another store: the state is ours, a key is given for it or found where keys are kept."""
    from hvbackup.service.session import Session

    keys = config.key_options(key_file, passphrase_file, {})
    return Session(config.places(where), keys, _ask if interactive() else None)


def _ask(prompt: str) -> str:
    import getpass

    return getpass.getpass(prompt)


def now() -> Instant:
    """The moment a command begins: time comes in here and nowhere below."""
    return Instant(time.time_ns())
