"""`python -m hvbackup.cli.job FOLDER`: one job of the service, as a process that outlives it.

The folder has the words of the command; its exit code is written there, so that a service that was started anew meanwhile knows
how the job ended.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(folder: Path) -> int:
    """Run the command of the job; returns its exit code, which is in the folder as well."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ["HVBACKUP_PROGRESS"] = str(folder / "progress")
    os.environ["HVBACKUP_ALONE"] = "1"  # a job that asked the service for what it is would wait for itself
    words = json.loads((folder / "job.json").read_bytes())["task"]["words"]
    from hvbackup.cli import command, interrupt

    interrupt.install(as_json=True)
    code = command.run(["--json", *words])
    sys.stdout.flush()
    (folder / "exit").write_text(f"{code}\n")
    interrupt.done()
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
