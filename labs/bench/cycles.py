"""What continuous protection costs a machine, and what it reads: A without, B with, A without again, in one run.

    python labs/bench/cycles.py [--every 1s] [--rate 500] [--seconds 12]      at a steady rate of random 4 KiB writes
    python labs/bench/cycles.py --rate 0                                       as many as one connection can make

The machine is a qemu-storage-daemon with one 1 GiB raw disk, and the guest an NBD client: no emulated processor is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from hvbackup.nbd.client import NbdClient

DISK_BYTES = 1 << 30
WRITE = 4096


class Load:
    """Random writes, one after the other, and how long each took."""

    def __init__(self, client: NbdClient, rate: int) -> None:
        self._client, self._rate = client, rate
        self.seconds: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        rng, due = random.Random(1), time.monotonic()
        blocks = [rng.randbytes(WRITE) for _ in range(64)]
        while not self._stop.is_set():
            began = time.monotonic()
            self._client.write(rng.randrange(DISK_BYTES // WRITE) * WRITE, blocks[len(self.seconds) % 64])
            self.seconds.append(time.monotonic() - began)
            if self._rate:
                due = max(due + 1 / self._rate, began)
                self._stop.wait(max(0.0, due - time.monotonic()))


@contextmanager
def daemon(folder: Path) -> Iterator[Path]:
    """A storage daemon with one exported disk; its monitor's socket.

    The disk is in memory where that is possible, as a machine's disk is seldom on the disk of the store: on one, each fsync of
    the journal waits for hundreds of megabytes that the machine has written.
    """
    image, monitor, guest = in_memory(folder) / "disk.raw", folder / "qmp.sock", folder / "guest.sock"
    image.parent.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    node = {"driver": "raw", "node-name": "vda", "file": {"driver": "file", "filename": str(image)}}
    words = [
        "qemu-storage-daemon",
        "--chardev",
        f"socket,id=c,path={monitor},server=on,wait=off",
        "--monitor",
        "chardev=c",
    ]
    words += ["--nbd-server", f"addr.type=unix,addr.path={guest}", "--blockdev", json.dumps(node)]
    words += ["--export", "type=nbd,id=guest,node-name=vda,name=vda,writable=on"]
    process = subprocess.Popen(words)
    try:
        while not guest.exists() or not monitor.exists():
            time.sleep(0.02)
        yield monitor
    finally:
        process.terminate()
        process.wait(20)
        if image.parent != folder:
            shutil.rmtree(image.parent)


def in_memory(folder: Path) -> Path:
    """A folder of this name in memory, if the system has such a place."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of a name nobody else has
    return memory / f"{folder.name}-disk" if os.access(memory, os.W_OK) else folder


def stretch(client: NbdClient, rate: int, seconds: float) -> dict[str, Any]:
    """The load alone for so long."""
    with Load(client, rate) as load:
        time.sleep(seconds)
    return figures(load.seconds, seconds)


def figures(taken: Sequence[float], seconds: float) -> dict[str, Any]:
    ordered = sorted(taken)
    share = {f"p{p}_ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 3) for p in (50, 95, 99)}
    return {"writes_per_second": round(len(taken) / seconds), **share}


def protected(folder: Path, monitor: Path, client: NbdClient, every: str, rate: int, seconds: float) -> dict[str, Any]:
    """The load with a worker that has begun."""
    places = {"STORE": "store", "STATE": "state", "CONFIG": "config", "RUN": "run"}
    environment = {**os.environ, **{f"HVBACKUP_{n}": str(folder / p) for n, p in places.items()}}
    program = [sys.executable, "-m", "hvbackup"]
    if not (folder / "store").exists():
        subprocess.run([*program, "init", "--quiet"], env=environment, check=True, timeout=60)
    words = [*program, "protect", f"qemu:{monitor}", "--every", every, "--json"]
    worker = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    events: list[dict[str, Any]] = [json.loads(worker.stdout.readline())]
    reader = threading.Thread(target=lambda: events.extend(json.loads(line) for line in worker.stdout or ()))
    reader.start()
    time.sleep(2.5)  # the first cycle reads what was written while the point was made
    first = len(events)
    with Load(client, rate) as load:
        time.sleep(seconds)
        told = [e for e in events[first:] if e["event"] == "moment"]
    worker.send_signal(signal.SIGINT)
    worker.wait(60)
    reader.join()
    cycles = sorted(e["seconds"] for e in told)
    lag = sorted(e["lag_seconds"] for e in told)
    return {
        **figures(load.seconds, seconds),
        "cycles": len(told),
        "cycle_median_s": cycles[len(cycles) // 2],
        "cycle_p95_s": cycles[len(cycles) * 95 // 100],
        "lag_median_s": lag[len(lag) // 2],
        "achieved_interval_s": round(seconds / len(told), 2),
        "read_per_written": round(sum(e["read_bytes"] for e in told[1:]) / (len(load.seconds) * WRITE), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", default="1s")
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hvbackup-cycles-") as name, daemon(Path(name)) as monitor:
        folder = Path(name)
        client = NbdClient.open(f"nbd+unix:///vda?socket={folder / 'guest.sock'}")
        for _ in range(args.rounds):
            before = stretch(client, args.rate, args.seconds / 2)
            with_it = protected(folder, monitor, client, args.every, args.rate, args.seconds)
            after = stretch(client, args.rate, args.seconds / 2)
            alone = (before["writes_per_second"] + after["writes_per_second"]) / 2
            share = round(with_it["writes_per_second"] / alone, 2)
            print(json.dumps({"A": before, "B": with_it, "A again": after, "throughput_B_over_A": share,
                              "load_average": os.getloadavg()[0]}))  # fmt: skip
        client.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
