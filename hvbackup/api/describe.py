"""`python -m hvbackup.api.describe FILE`: write the OpenAPI description that docs/ ships."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hvbackup.api.app import create

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(create(None).openapi(), indent=1) + "\n")
