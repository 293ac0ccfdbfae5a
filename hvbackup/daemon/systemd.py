"""What systemd is told (sd_notify), over its socket; nothing happens where there is none."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


def notify(*lines: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether systemd was told: READY=1, STATUS=…, WATCHDOG=1, STOPPING=1."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        try:
            line.sendto("\n".join(lines).encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            return False
    return True


def reloading() -> bool:
    """systemd waits for READY=1 from here on."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How often WATCHDOG=1 is due; 0 when nobody waits for it."""
    pid = environment.get("WATCHDOG_PID", str(os.getpid()))
    usec = environment.get("WATCHDOG_USEC", "")
    return int(usec) / 2_000_000 if usec.isdecimal() and pid == str(os.getpid()) else 0.0
