"""What a worker needed while it made a point is given back: it runs for months beside machines that need their memory."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from hvbackup.model import KiB, MiB
from hvbackup.store.store import init
from tests.hypervisors.daemon import Daemon, make_image, node
from tests.test_stream_kills import StreamWorker

DISK = 128 * MiB
KEPT_BYTES = 8 * MiB  # between points; they keep 11 MiB with the blocks a fold has read, 35 if nothing is given back


class FoldingWorker(StreamWorker):
    """Makes a point every third second."""

    rhythm = ("--stream", "--fold", "3s", "--window", "6s")

    @property
    def folded(self) -> int:
        """How many points it has made."""
        return sum(e["event"] == "folded" for e in self.events)

    def anonymous_bytes(self) -> int:
        """Memory of the process that is nobody's but its own."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) * KiB for line in status if line.startswith("RssAnon"))


@pytest.mark.real
def test_what_points_needed_is_given_back(tmp_path: Path) -> None:
    machine = Daemon(tmp_path, [node("vda", make_image(tmp_path / "vda.raw", DISK, "raw"), "raw")]).start()
    init(tmp_path / "store", None)
    try:
        worker = FoldingWorker(tmp_path, f"qemu:{machine.qmp_path}")
        worker.wait_for("moment")
        before, client, rng = worker.anonymous_bytes(), machine.guest("vda"), random.Random(1)
        kept = []
        while worker.folded < 4:  # between two of them it has what it needs to go on
            client.write(4 * KiB * rng.randrange(DISK // (4 * KiB)), rng.randbytes(4 * KiB))
            if worker.folded > 1:
                kept.append(worker.anonymous_bytes() - before)
        client.close()
        assert min(kept) <= KEPT_BYTES
        assert worker.end(signal.SIGTERM) == 0
    finally:
        machine.kill()
