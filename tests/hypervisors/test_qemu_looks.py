"""Others may look at a QEMU whenever they like, also while a snapshot of ours begins."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hvbackup.hypervisors.qmp import Qmp
from hvbackup.model import MiB
from tests.hypervisors.daemon import Daemon, lease, make_image, node, only

pytestmark = pytest.mark.real


def test_a_stranger_who_lists_nodes_while_snapshots_begin_does_no_harm(tmp_path: Path) -> None:
    """QEMU 7.2 fails an assertion when it is looked at while it formats an image: within three snapshots, where we let it."""
    daemon = Daemon(tmp_path, [node(n, make_image(tmp_path / f"{n}.qcow2", 8 * MiB)) for n in ("vda", "vdb")]).start()
    ended, looks = threading.Event(), [0]

    def look() -> None:
        with Qmp(tmp_path / "stranger.sock", timeout_seconds=60) as qmp:
            while not ended.is_set():
                qmp.command("query-named-block-nodes", flat=True)
                looks[0] += 1

    stranger = threading.Thread(target=look)
    try:
        stranger.start()
        hypervisor = daemon.hypervisor()
        machine = only(hypervisor)
        for number in range(15):
            with hypervisor.snapshot(machine, lease(number), {}, None) as frozen:
                assert len(frozen.disks) == 2
            hypervisor.release(machine, lease(number), [])
        assert daemon.process
        assert daemon.process.poll() is None
    finally:
        ended.set()
        stranger.join(120)
        daemon.kill()
    assert looks[0] > 15
