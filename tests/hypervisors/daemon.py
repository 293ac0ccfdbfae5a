"""A qemu-storage-daemon as the machine under test: NBD clients play the guest, so nothing has to boot."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors.qemu import QemuHypervisor, Settings
from hvbackup.hypervisors.qmp import Qmp
from hvbackup.model import LeaseId, Machine, MiB
from hvbackup.nbd.client import NbdClient
from tests.protecting import DIES_WITH_US

STORE = "00c0ffee"
SETTINGS = Settings(reply_seconds=60.0, settle_seconds=60.0, scratch_reserve_bytes=8 * MiB)


def make_image(path: Path, size: int, driver: str = "qcow2", *options: str) -> Path:
    """An empty image."""
    subprocess.run(["qemu-img", "create", "-q", "-f", driver, *options, str(path), str(size)], check=True, timeout=120)
    return path


class Daemon:
    """One qemu-storage-daemon; `nodes` are -blockdev descriptions, each exported writable under its node name."""

    def __init__(
        self, folder: Path, nodes: Sequence[Mapping[str, Any]], *, server: bool = True, user: str | None = None
    ) -> None:
        self.folder = folder
        self.qmp_path = folder / "qmp.sock"
        self.nodes = nodes
        self._server = server  # without one there is no guest
        self._user = user
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Daemon:
        """A new life; the NBD server for the guest is its own process's only one."""
        strangers = self.folder / "stranger.sock"
        for path in (self.qmp_path, strangers):
            path.unlink(missing_ok=True)
        arguments = ["--chardev", f"socket,id=c,path={self.qmp_path},server=on,wait=off", "--monitor", "chardev=c"]
        arguments += ["--chardev", f"socket,id=d,path={strangers},server=on,wait=off", "--monitor", "chardev=d"]
        if self._server:
            arguments += ["--nbd-server", f"addr.type=unix,addr.path={self.folder / 'guest.sock'}"]
        for node in self.nodes:
            name = node["node-name"]
            arguments += ["--blockdev", json.dumps(node)]
            if self._server and not node.get("read-only"):
                arguments += ["--export", f"type=nbd,id=guest-{name},node-name={name},name={name},writable=on"]
        log = (self.folder / "qsd.log").open("wb")
        command = [*DIES_WITH_US, "qemu-storage-daemon", *arguments]
        self.process = subprocess.Popen(command, stderr=log, user=self._user)
        log.close()
        self._wait_until_up()
        return self

    def stop(self) -> None:
        """A clean end: bitmaps are stored."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(120)
            self.process = None

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(120)
            self.process = None

    def guest(self, node: str) -> NbdClient:
        """A connection that plays the guest."""
        return NbdClient.open(f"nbd+unix:///{node}?socket={self.folder / 'guest.sock'}")

    def qmp(self) -> Qmp:
        return Qmp(self.qmp_path, timeout_seconds=60)

    def hypervisor(self, **extra: Any) -> QemuHypervisor:
        """Our side, as a new process would make it."""
        given = {"scratch_dir": self.folder / "s", "settings": SETTINGS, **extra}
        return QemuHypervisor(self.qmp_path, STORE, **given)

    def plug(self, qmp: Qmp, name: str) -> None:
        """The guest gets its disk back."""
        qmp.command("block-export-add", type="nbd", id=f"guest-{name}", node_name=name, name=name, writable=True)

    def unplug(self, qmp: Qmp, name: str) -> None:
        """The guest's connection to a disk is cut."""
        with qmp.events("BLOCK_EXPORT_DELETED") as events:
            qmp.command("block-export-del", id=f"guest-{name}", mode="hard")
            assert events.next(60)["data"]["id"] == f"guest-{name}"

    def bitmaps(self, node: str) -> dict[str, Mapping[str, Any]]:
        with self.qmp() as qmp:
            nodes = qmp.command("query-named-block-nodes", flat=True)
        return {
            b["name"]: b for n in nodes if n["node-name"] == node for b in n.get("dirty-bitmaps", []) if "name" in b
        }

    def leftovers(self) -> list[str]:
        """Everything of ours in the daemon and in the scratch directory but checkpoints."""
        with self.qmp() as qmp:
            found = [n["node-name"] for n in qmp.command("query-named-block-nodes", flat=True)]
            found += [j["id"] for j in qmp.command("query-jobs")]
            found += [e["id"] for e in qmp.command("query-block-exports")]
        scratch = self.folder / "s"
        return [f for f in found if f.startswith("hvb-")] + [str(p) for p in scratch.glob("*")]

    def _wait_until_up(self) -> None:
        end = time.monotonic() + 120
        while True:
            try:
                with Qmp(self.qmp_path, timeout_seconds=60):
                    return
            except HostUnreachable:
                if time.monotonic() > end or self.process is None or self.process.poll() is not None:
                    sys.stderr.write((self.folder / "qsd.log").read_text())
                    raise
                time.sleep(0.02)


def node(name: str, path: Path, driver: str = "qcow2", **extra: Any) -> dict[str, Any]:
    """A -blockdev description of an image file."""
    below = {"driver": extra.pop("protocol", "file"), "filename": str(path), "discard": "unmap"}
    return {"driver": driver, "node-name": name, "file": below, "discard": "unmap", **extra}


def content(frozen_disk: Any) -> bytes:
    """All bytes of a frozen disk."""
    buffer = bytearray(frozen_disk.disk.size)
    reader = frozen_disk.open()
    reader.read_into(0, memoryview(buffer))
    reader.close()
    return bytes(buffer)


def only(hypervisor: QemuHypervisor) -> Machine:
    [machine] = hypervisor.machines()
    return machine


def lease(number: int) -> LeaseId:
    return LeaseId(f"lease-{number}")
