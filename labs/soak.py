"""A machine under continuous protection for half an hour: is memory flat, lag bounded, nothing left open?

    python labs/soak.py [--minutes 30] [--rate 500] [--every 1s] [--fold 5m] [--window 10m]
    python labs/soak.py --stream [--minutes 30] [--rate 500] [--fold 5m] [--window 10m]        every write

The machine is a qemu-storage-daemon with one 1 GiB disk, and the guest an NBD client that writes 4 KiB at random places.  Every
ten seconds the worker's memory, threads and open files are looked at, and its lag; a line of figures a minute, a summary at the
end, and all rows in `.lab/figures/soak.csv` (of a stream: `soak-stream.csv`).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hvbackup.nbd.client import NbdClient
from labs.bench.cycles import Load, daemon

LOOK_SECONDS = 10.0
FIGURES = Path(__file__).resolve().parent.parent / ".lab" / "figures"


def anonymous_mib(program: str, parent: int) -> float:
    """Memory of a process's children of this name: of a stream's target, of QEMU."""
    total = 0
    for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # threads come and go
            for pid in tasks.read_text().split():
                status = Path(f"/proc/{pid}/status").read_text().splitlines()
                if program[:15] == status[0].split()[1]:
                    total += sum(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    return round(total / 1024, 1)


class Watched:
    """`hvbackup protect` as a process, and what it says and uses."""

    def __init__(self, folder: Path, monitor: Path, words: Sequence[str]) -> None:
        places = {"STORE": "store", "STATE": "state", "CONFIG": "config", "RUN": "run"}
        environment = {**os.environ, **{f"HVBACKUP_{n}": str(folder / p) for n, p in places.items()}}
        program = [sys.executable, "-m", "hvbackup"]
        subprocess.run([*program, "init", "--quiet"], env=environment, check=True, timeout=60)
        argv = [*program, "protect", f"qemu:{monitor}", "--json", *words]
        self.process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
        self.store, self.events = folder / "store", list[dict[str, Any]]()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def wait_begun(self) -> None:
        while not any(e["event"] == "begun" for e in self.events):
            if self.process.poll() is not None:
                raise SystemExit("the worker ended")
            time.sleep(0.1)

    def look(self, since: int) -> dict[str, Any]:
        """One row; `since`: the number of events that were there before."""
        proc = Path(f"/proc/{self.process.pid}")
        said = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        kib = {name: int(said[name].split()[0]) for name in ("VmRSS", "RssAnon", "VmHWM")}
        told = [e for e in self.events[since:] if e["event"] == "moment"]
        lags = sorted(e["lag_seconds"] for e in told) or [0.0]
        seconds = sorted(e["seconds"] for e in told) or [0.0]
        journal = [p for p in (self.store / "journals").rglob("*") if p.is_file()]
        return {
            "rss_mib": kib["VmRSS"] // 1024,
            "anonymous_mib": kib["RssAnon"] // 1024,
            "peak_mib": kib["VmHWM"] // 1024,
            "threads": int(said["Threads"]),
            "open_files": len(list((proc / "fd").iterdir())),
            "moments": sum(e.get("writes", 1) for e in told),
            "lag_median_s": lags[len(lags) // 2],
            "lag_worst_s": lags[-1],
            "cycle_median_s": seconds[len(seconds) // 2],
            "journal_mib": sum(p.stat().st_size for p in journal) >> 20,
            "journal_files": len(journal),
            "points": sum(e["event"] == "folded" for e in self.events),
            "troubles": sum(e["event"] == "trouble" for e in self.events),
            "target_mib": anonymous_mib("hvbackup-target", self.process.pid),
            "qemu_mib": anonymous_mib("qemu-storage-daemon", os.getpid()),
        }

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


def soak(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one soak."""
    rows: list[dict[str, Any]] = []
    with daemon(folder) as monitor:
        client = NbdClient.open(f"nbd+unix:///vda?socket={folder / 'guest.sock'}")
        rhythm = ["--stream"] if args.stream else ["--every", args.every]
        worker = Watched(folder, monitor, [*rhythm, "--fold", args.fold, "--window", args.window])
        worker.wait_begun()
        began = time.monotonic()
        with Load(client, args.rate) as load:
            while time.monotonic() - began < args.minutes * 60:
                since = len(worker.events)
                time.sleep(LOOK_SECONDS)
                load.seconds[:-1000] = []  # ours is not the memory that is looked at
                rows.append({"t_s": round(time.monotonic() - began), **worker.look(since)})
                if len(rows) % 6 == 1:
                    print(json.dumps(rows[-1]), flush=True)
        code = worker.end()
        client.close()
    if code:
        raise SystemExit(f"the worker ended with {code}")
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The second quarter against the last one: what warms up is done by then."""
    quarter = max(1, len(rows) // 4)
    early, late = rows[quarter : 2 * quarter], rows[-quarter:]
    names = ("anonymous_mib", "rss_mib", "open_files", "threads", "target_mib", "qemu_mib")
    means = {n: [round(sum(r[n] for r in part) / len(part), 1) for part in (early, late)] for n in names}
    return {
        **means,
        "peak_mib": rows[-1]["peak_mib"],
        "moments": sum(r["moments"] for r in rows),
        "lag_median_s": sorted(r["lag_median_s"] for r in rows)[len(rows) // 2],
        "lag_worst_s": max(r["lag_worst_s"] for r in rows),
        "points": rows[-1]["points"],
        "troubles": rows[-1]["troubles"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--every", default="1s")
    parser.add_argument("--stream", action="store_true", help="every write, instead of a moment now and then")
    parser.add_argument("--fold", default="5m")
    parser.add_argument("--window", default="10m")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hvbackup-soak-") as name:
        rows = soak(Path(name), args)
    FIGURES.mkdir(parents=True, exist_ok=True)
    with (FIGURES / f"soak{'-stream' if args.stream else ''}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
