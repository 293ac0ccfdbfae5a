"""The NBD export of a stored image, measured from outside: labs.bench.nbd against `hvbackup map`, and what the server used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SYSTEM_PYTHON = "/usr/bin/python3"  # Debian's libnbd belongs to Debian's Python
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0


def measure(serve: Sequence[str], address: Path, uri: str, image: Path, env: Mapping[str, str]) -> None:
    """Prints how fast the export answers that `serve` offers at `address`, and the server's CPU and memory."""
    server = subprocess.Popen(serve, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_for(server, address)
        client = [SYSTEM_PYTHON, "-m", "labs.bench.nbd", uri, "--image", str(image)]
        subprocess.run(client, cwd=ROOT, check=True, timeout=600)
    finally:
        server.send_signal(signal.SIGINT)
        _, status, usage = os.wait4(server.pid, 0)
        server.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    print(f"server: {cpu:.1f} CPU-s in all, peak RSS {usage.ru_maxrss * 1024 / 1e6:.0f} MB", flush=True)


def wait_for(server: subprocess.Popen[bytes], address: Path) -> None:
    """The server's socket is there."""
    deadline = time.monotonic() + START_SECONDS
    while not address.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{address}: the export did not start; {' '.join(map(str, server.args))}")  # type: ignore[arg-type]
        time.sleep(0.05)
