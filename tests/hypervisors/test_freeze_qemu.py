"""Where a real QEMU says its guest agent is: as libvirt starts it, as people do; no guest runs in it."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvbackup.errors import Busy, HostUnreachable
from hvbackup.hypervisors import qemu_freeze
from hvbackup.hypervisors.qemu_freeze import PORT, find_agent
from hvbackup.hypervisors.qmp import Qmp
from tests.hypervisors.daemon import Daemon, make_image

pytestmark = pytest.mark.real


@pytest.fixture
def folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as name:
        yield Path(name)


@contextmanager
def qemu(folder: Path, *arguments: str, pass_fds: Sequence[int] = ()) -> Generator[Qmp]:
    """A QEMU that never begins to run."""
    argv = [
        "qemu-system-x86_64",
        "-S",
        "-machine",
        "q35",
        "-accel",
        "tcg",
        "-nodefaults",
        "-display",
        "none",
        "-m",
        "64",
    ]
    argv += ["-qmp", f"unix:{folder / 'qmp.sock'},server=on,wait=off", "-device", "virtio-serial-pci", *arguments]
    process = subprocess.Popen(argv, cwd=folder, pass_fds=pass_fds)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with Qmp(folder / "qmp.sock") as qmp:
                    yield qmp
                return
            except HostUnreachable:
                assert time.monotonic() < end
                time.sleep(0.05)
    finally:
        process.kill()
        process.wait(120)


def opened(monkeypatch: pytest.MonkeyPatch, qmp: Qmp) -> None:
    """As if the guest ran an agent on all its ports."""
    command = qmp.command

    def with_agents(name: str, /, timeout_seconds: float | None = None, **arguments: object) -> object:
        answer = command(name, timeout_seconds, **arguments)
        return [{**chardev, "frontend-open": True} for chardev in answer] if name == "query-chardev" else answer

    monkeypatch.setattr(qmp, "command", with_agents)


def test_as_libvirt_starts_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is a descriptor that QEMU was given, and the device is described in JSON."""
    path = folder / "org.qemu.guest_agent.0"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        device = {"driver": "virtserialport", "nr": 1, "chardev": "charchannel0", "id": "channel0", "name": PORT}
        chardev = f"socket,id=charchannel0,fd={listening.fileno()},server=on,wait=off"
        arguments = ["-chardev", chardev, "-device", json.dumps(device)]
        with qemu(folder, *arguments, pass_fds=[listening.fileno()]) as qmp:
            assert find_agent(qmp, str(folder)) is None, "nobody in the guest has opened the port"
            opened(monkeypatch, qmp)
            assert find_agent(qmp, str(folder)) == path
            with socket.socket(socket.AF_UNIX) as libvirt:
                libvirt.connect(str(path))
                until_busy(qmp, folder)
            assert find_agent_again(qmp, folder) == path


def until_busy(qmp: Qmp, folder: Path) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            find_agent(qmp, str(folder))
        except Busy:
            return
        assert time.monotonic() < end
        time.sleep(0.05)


def find_agent_again(qmp: Qmp, folder: Path) -> Path | None:
    """After a client has left."""
    end = time.monotonic() + 120
    while True:
        try:
            return find_agent(qmp, str(folder))
        except Busy:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.parametrize("path", ["agent.sock", "a,,b.sock"])
def test_as_people_start_it(folder: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A relative path is one of QEMU's own folder; other ports and serial lines are not agents."""
    other = [
        "-chardev",
        "socket,id=o,path=other.sock,server=on,wait=off",
        "-device",
        "virtserialport,chardev=o,name=x.0",
    ]
    serial = ["-chardev", "socket,id=s,path=serial.sock,server=on,wait=off", "-serial", "chardev:s"]
    agent = ["-chardev", f"socket,id=qga0,path={path},server=on,wait=off"]
    agent += ["-device", f"virtserialport,chardev=qga0,name={PORT}"]
    with qemu(folder, *other, *serial, *agent) as qmp:
        opened(monkeypatch, qmp)
        assert find_agent(qmp, str(folder)) == folder / path.replace(",,", ",")


def test_where_there_is_no_agent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pty = ["-chardev", "null,id=qga0", "-device", f"virtserialport,chardev=qga0,name={PORT}"]
    with qemu(folder, *pty) as qmp:
        opened(monkeypatch, qmp)
        assert find_agent(qmp, str(folder)) is None


def test_a_storage_daemon_has_no_guest(folder: Path) -> None:
    node = {
        "driver": "qcow2",
        "node-name": "a",
        "file": {"driver": "file", "filename": str(make_image(folder / "a", 1 << 20))},
    }
    daemon = Daemon(folder, [node]).start()
    try:
        with Qmp(daemon.qmp_path) as qmp:
            assert qemu_freeze.plan(qmp, "/", "m", None, qemu_freeze.Freezing()).freezes is False
    finally:
        daemon.stop()
