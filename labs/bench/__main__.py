"""`make bench`: the images, hvbackup beside its peers, the NBD export of what was kept, and machines of libvirt."""

from __future__ import annotations

import os
import subprocess
import sys


def main() -> None:
    """Run every part; ROUNDS in the environment says how many rounds, BENCH_OUT where the images are."""
    out = ["--out", os.environ["BENCH_OUT"]] if "BENCH_OUT" in os.environ else []
    for part in ("labs.bench.images", "labs.bench.peers", "labs.bench.libvirt"):
        code = subprocess.run([sys.executable, "-m", part, *(out if part != "labs.bench.libvirt" else [])]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
