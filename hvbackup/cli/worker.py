"""`python -m hvbackup.cli.worker NAME protect …`: a worker of the service; NAME is how a later service finds it again."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from hvbackup.cli import main

    sys.argv = ["hvbackup", *sys.argv[2:]]
    sys.exit(main())
