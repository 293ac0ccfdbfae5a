"""`python -m hvbackup`: the same as `hvbackup`."""

from __future__ import annotations

import sys

from hvbackup.cli import main

if __name__ == "__main__":
    sys.exit(main())
