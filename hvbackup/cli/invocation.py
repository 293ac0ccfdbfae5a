"""From the options of a command to the session it runs in."""

from __future__ import annotations

import argparse
import getpass
from typing import TYPE_CHECKING

from hvbackup import config
from hvbackup.cli.parser import interactive

if TYPE_CHECKING:
    from hvbackup.service.session import Session


def session_of(args: argparse.Namespace) -> Session:
    """Places and keys by option, environment and habit; somebody to ask only where somebody is."""
    from hvbackup.service.session import Session

    return Session(
        config.places(args.store),
        config.key_options(args.key_file, args.passphrase_file),
        getpass.getpass if interactive() else None,
    )
