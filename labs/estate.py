"""What the console costs on a large estate: 1,000 machines with 1,000 points each, every page asked five times.

    python labs/estate.py [MACHINES [POINTS]]

Points are named as real ones are; those whose content is read are real.  Server times in milliseconds, the first (with everything
cold) and the median, and the memory of the process.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hvbackup import config
from hvbackup.config import KeyOptions
from hvbackup.daemon.keeper import Keeper
from hvbackup.model import (
    ZERO_CHUNK,
    Consistency,
    Disk,
    DiskId,
    DiskRoot,
    GiB,
    Instant,
    Machine,
    MachineId,
    PointId,
    RecoveryPoint,
)
from hvbackup.store.format import point as points
from hvbackup.store.store import Store, init

HOUR_NS = 3600 * 10**9
READ = 110  # points of one machine that a page reads
ASKED = 5
PAGES = ("/machines", "/machines?q=vm-09", "/machines?first=900", "/machines/{key}", "/machines/{key}/points", "/jobs", "/stores",
         "/policies", "/audit", "/audit?first=4900", "/api/v1/machines?count=1000", "/api/v1/machines/{key}/timeline",
         "/api/v1/machines/{key}/at?time=-5d", "/metrics")  # fmt: skip
CONFIGURATION = """
[policy.all]
machines = ["*"]
schedule = "*-02-29"
[store.main]
check = ""
reclaim = ""
"""


def main() -> None:
    """Make the estate, and ask."""
    machines, each = map(int, [*sys.argv[1:3], "1000", "1000"][:2])
    with tempfile.TemporaryDirectory(prefix="hvbackup-estate-") as folder:
        names = {"STORE": "store", "STATE": "state", "CONFIG": "conf", "RUN": "run"}
        places = config.places(environment={f"HVBACKUP_{k}": f"{folder}/{v}" for k, v in names.items()}, root=False)
        init(places.store, None)
        with Store.open(places.store, places.state, []) as store:
            for number in range(machines):
                _machine(store, number, each)
        places.configuration.mkdir()
        (places.configuration / "config.toml").write_text(CONFIGURATION)
        _ask(places, folder)


def _machine(store: Store, number: int, each: int) -> None:
    disk = Disk(DiskId("vda"), 64 * GiB)
    machine = Machine(MachineId(f"uuid-{number:04d}"), f"vm-{number:04d}", "qemu", (disk,))
    folder = store.files.path(f"points/{store.ring.machine_name(machine.id)}")
    folder.mkdir(parents=True)
    now = time.time_ns()
    for n in range(each):
        t = Instant(now - (each - n) * HOUR_NS)
        point_id = PointId(f"{random.getrandbits(64):016x}")
        made = RecoveryPoint(point_id, machine, t, Consistency.CRASH, (DiskRoot(disk, ZERO_CHUNK),))
        is_read = n == each - 1 or (number == 7 and n >= each - READ)
        (folder / f"{t:020d}-{point_id}").write_bytes(points.dump(store.ring, made) if is_read else b"")


def _ask(places: config.Places, folder: str) -> None:
    from starlette.testclient import TestClient

    from hvbackup.api import pages
    from hvbackup.api.app import create
    from hvbackup.api.gate import AUDIT_KEPT, Desk
    from hvbackup.api.server import Local
    from hvbackup.auth import Accounts

    keeper = Keeper(places, KeyOptions())
    for what in ("first look", "next look"):
        began = time.perf_counter()
        keeper.refresh()
        print(f"{what:52} {1000 * (time.perf_counter() - began):8.0f} ms", flush=True)
    pages.warm()
    desk = Desk(keeper, Accounts(Path(folder) / "conf", keeper.clock))
    desk.audited = [_audited(number) for number in range(AUDIT_KEPT)]
    client: Any = TestClient(Local(create(desk)), "https://testserver")
    key = next(r.key for r in keeper.rows() if r.name == "vm-0007")
    for page in PAGES:
        times = sorted(_timed(client, page.format(key=key)) for _ in range(ASKED))
        print(f"{page:52} {times[ASKED // 2]:8.0f} ms, at most {times[-1]:.0f}", flush=True)
    print(f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB, load {os.getloadavg()[0]:.1f}")
    keeper.close()


def _audited(number: int) -> dict[str, Any]:
    return {"t": time.time_ns(), "what": "hold", "who": "ann", "address": "192.0.2.7", "status": "done",
            "machine": f"uuid-{number % 1100:04d}", "details": {"point": f"{number:016x}"}}  # fmt: skip


def _timed(client: Any, path: str) -> float:
    began = time.perf_counter()
    answer = client.get(path)
    assert answer.status_code == 200, (path, answer.status_code)
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
