"""The Debian package under a real systemd: started, reloaded, hung, restarted and removed, while a machine stays protected.

It needs `apt install systemd-container`, and fails without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from labs import deb
from tests.labs.test_deb import bare_system, run

pytestmark = [pytest.mark.real, pytest.mark.soak, pytest.mark.timeout(1800)]

PACKAGES = ("systemd", "systemd-sysv", "dbus", "qemu-utils", "qemu-system-common")
SECONDS = 120
DAEMON = """\
qemu-img create -q -f qcow2 /srv/vda.qcow2 64M
exec qemu-storage-daemon --chardev socket,id=c,path=/srv/qmp.sock,server=on,wait=off --monitor chardev=c \
  --blockdev '{"driver":"qcow2","node-name":"vda","file":{"driver":"file","filename":"/srv/vda.qcow2"}}' \
  --nbd-server addr.type=unix,addr.path=/srv/guest.sock --export type=nbd,id=g,node-name=vda,name=vda,writable=on
"""
CONFIG = """\
[source.web1]
uri = "qemu:/srv/qmp.sock"
name = "web1"

[policy.continuous]
machines = ["*"]
protect = true
every = "2s"
window = "1h"
rpo = "1m"
keep = {hourly = 4}
"""
HURRY = "[Service]\nWatchdogSec=5\nTimeoutAbortSec=5\n"


class Host:
    """A system that runs, with systemd as its first process."""

    def __init__(self, root: Path, first: int) -> None:
        self.root, self._first = root, first

    def run(self, *words: str, check: bool = True) -> str:
        enter = ("nsenter", "-t", str(self._first), "-m", "-u", "-i", "-p", "-n")
        return run(*enter, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", *words, check=check)

    def show(self, what: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", what, "hvbackup").strip()

    def protection(self) -> dict[str, Any]:
        """What `status` says of the machine's, {} while there is none."""
        machines = json.loads(self.run("hvbackup", "status", "--json"))["machines"]
        return next((m["protection"] for m in machines if m["protection"]), {})

    def newest(self) -> int:
        """The number of the newest moment, 0 while there is none."""
        return int(self.protection().get("newest", {}).get("seq", 0))

    def wait(self, what: str, is_so: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not is_so():
            assert time.monotonic() < end, (
                f"{what}: {self.run('journalctl', '-u', 'hvbackup', '-n', '40', check=False)}"
            )
            time.sleep(0.5)


@contextmanager
def booted(root: Path) -> Iterator[Host]:
    assert shutil.which("systemd-nspawn"), "apt install systemd-container"
    words = ["systemd-nspawn", "-q", "-D", str(root), "--machine=hvbackup-test", "--register=no", "--keep-unit", "-b"]
    with (root.parent / "console").open("wb") as console:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        end = time.monotonic() + SECONDS
        while not children.read_text().split():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        host = Host(root, int(children.read_text().split()[0]))
        host.wait("boot", lambda: host.run("systemctl", "is-system-running", check=False).strip() == "running")
        yield host
    finally:
        process.kill()
        process.wait(60)


@pytest.mark.skipif(os.geteuid() != 0, reason="a system is made and booted")
def test_under_a_systemd(tmp_path: Path) -> None:
    package = deb.build(tmp_path)
    with bare_system(tmp_path / "system") as root:
        shutil.copy(package, root / "root")
        run("chroot", root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES)
        run("chroot", root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", f"/root/{package.name}")
    with booted(root) as host:
        host.run("hvbackup", "init")
        (root / "srv/daemon.sh").write_text(DAEMON)
        host.run("systemd-run", "--unit=machine", "sh", "/srv/daemon.sh")
        host.wait("the machine", (root / "srv/qmp.sock").exists)
        (root / "etc/hvbackup/conf.d").mkdir(exist_ok=True)
        (root / "etc/hvbackup/conf.d/web1.toml").write_text(CONFIG)
        host.run("systemctl", "enable", "--now", "hvbackup")  # returns when it says that it is ready
        host.wait("a worker", lambda: host.protection().get("worker"))
        worker = host.protection()["worker"]
        host.wait("moments", lambda: host.newest() > 3)

        (root / "etc/hvbackup/conf.d/wrong.toml").write_text("nonsense = 3\n")
        assert "failed" in host.run("systemctl", "reload", "hvbackup", check=False)
        (root / "etc/hvbackup/conf.d/wrong.toml").unlink()
        host.run("systemctl", "reload", "hvbackup")
        assert "The configuration was reloaded" in host.run("journalctl", "-u", "hvbackup")
        host.wait("a job in the journal", lambda: host.run("journalctl", "-F", "HVBACKUP_RUN").split())
        run_id = host.run("journalctl", "-F", "HVBACKUP_RUN").split()[0]
        assert run_id in host.run("journalctl", "-u", "hvbackup", f"HVBACKUP_RUN={run_id}")

        extra = root / "etc/systemd/system/hvbackup.service.d/hurry.conf"
        extra.parent.mkdir()
        extra.write_text(HURRY)
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "restart", "hvbackup")
        hung = host.show("MainPID")
        host.run("sh", "-c", f"kill -STOP {hung}")
        host.wait("the watchdog", lambda: host.show("NRestarts") == "1" and host.show("ActiveState") == "active")
        assert host.show("MainPID") != hung

        host.run("systemctl", "stop", "hvbackup")
        assert host.protection()["worker"] == worker, "it outlives reload, hang, restart and stop of the service"
        before = host.newest()
        host.wait("more moments", lambda: host.newest() > before + 2)
        assert "mode is different" not in host.run("journalctl", "-u", "hvbackup")
        host.run("systemctl", "start", "hvbackup")
        host.run("apt-get", "install", "--reinstall", "-y", "-qq", f"/root/{package.name}")
        assert host.protection()["worker"] == worker, "it outlives an upgrade"
        assert host.show("ActiveState") == "active"
        host.run("hvbackup", "check", "--deep")
        host.run("apt-get", "purge", "-y", "-qq", "hvbackup")
        assert "there" not in host.run("sh", "-c", f"test -e /proc/{worker} && echo there", check=False), (
            "nor does it outlive the package"
        )
