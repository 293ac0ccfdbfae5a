"""The lab's libvirtd ends with whoever started it, and so do its machines."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.hypervisors.libvirtd import wait_until

pytestmark = pytest.mark.real
CODE = """
import sys, time
from pathlib import Path
from labs.libvirtd import Libvirtd
from tests.hypervisors.libvirtd import LibvirtMachine
folder = Path(sys.argv[1])
daemon = Libvirtd(folder / "d").start()
machine = LibvirtMachine(daemon, folder / "m", formats=("qcow2",)).define().start()
print(daemon.pid, machine.qemu_pid(), flush=True)
time.sleep(600)
"""


def test_a_run_that_is_killed_leaves_neither_daemon_nor_machines() -> None:
    with tempfile.TemporaryDirectory(prefix="hvt-lv-") as folder:
        run = subprocess.Popen([sys.executable, "-c", CODE, folder], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        daemon, qemu = map(int, run.stdout.readline().split())
        assert (_name(daemon), _name(qemu)) == ("libvirtd", "qemu-system-x86")
        run.send_signal(signal.SIGKILL)
        run.wait(20)
        wait_until(lambda: not _name(qemu) and not _name(daemon) and not (Path(folder) / "d").exists())


def _name(pid: int) -> str:
    """What a process is, while it lives."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state.rpartition(")")[2].split()[0] == "Z" else state[state.index("(") + 1 : state.rindex(")")]
