"""The traps of a mirror that only a booted guest springs: events without end, targets nobody can kill, other jobs, zeroes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hvbackup.hypervisors
from hvbackup.errors import Busy, HostUnreachable, StreamBroken
from hvbackup.hypervisors import qemu_stream_guard as guarding
from hvbackup.hypervisors.qemu_stop import marker
from hvbackup.hypervisors.qemu_stream import QemuStream
from hvbackup.hypervisors.qemu_stream_guard import HUNG_SECONDS, RESUME_SECONDS
from hvbackup.hypervisors.qemu_wire import Wire
from hvbackup.protect.streaming import StreamLife
from hvbackup.store.format import layout as f
from hvbackup.store.journal.history import History
from hvbackup.store.store import Store
from hvbackup.target.process import PROGRAM
from labs import guest as labs
from labs.guest import Guest, GuestError
from tests.scribe import Metronome
from tests.test_protect_guest import FILES, SIZE
from tests.test_stream_guest import WRITER, Stepping, assert_is_the_disk, begun, folder, guest, protection_of, store

__all__ = ["folder", "guest", "store"]
pytestmark = [pytest.mark.real, pytest.mark.guest, pytest.mark.timeout(300)]
IN_FLIGHT = 16  # writes of a mirror at a time, in QEMU


class Listening:
    """What a QEMU says by itself, as long as the context lasts."""

    def __init__(self, path: Path) -> None:
        self._qmp = labs.Qmp(path)
        self.heard: list[str] = []  # names of events
        self.resumed = 0  # mirrors
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._qmp._lines:
                event = json.loads(line)
                self.heard.append(event.get("event", ""))
                self.resumed += event.get("data", {}).get("status") == "ready"

    def __enter__(self) -> Listening:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._qmp._socket.shutdown(2)
        self._thread.join(10)
        self._qmp.close()


def writes(guest: Guest) -> int:
    """So many writes the guest has made."""
    return sum(row["stats"]["wr_operations"] for row in guest.qmp("query-blockstats"))


def mirrors(guest: Guest) -> list[str]:
    return [job["id"] for job in guest.qmp("query-jobs") if job["type"] == "mirror"]


def stopped(guest: Guest) -> None:
    """The witness has ended, and nothing is on its way to the disks."""
    guest.stop_writer()
    guest.sh("sync")
    guest.pause()


def test_a_killed_target_costs_no_write_and_no_storm_of_events(guest: Guest, store: Store, folder: Path) -> None:
    """A mirror that ignored its errors would say so 27,000 times a second, to every monitor."""
    protection = protection_of(store, guest, folder)
    life = begun(protection)
    guest.start_writer(*FILES, mode="overwrite", options=WRITER)
    guest.wait_acked(20)
    assert life.target
    metronome = Metronome()
    with Listening(folder / "third.sock") as monitor, Stepping(life) as stepping:
        began = time.monotonic()
        guest.wait_acked(guest.acked() + 40)
        pace = time.monotonic() - began  # of this guest, on this machine
        before, written = guest.acked(), writes(guest)
        os.kill(life.target.pid, signal.SIGKILL)
        killed = time.monotonic()
        guest.wait_acked(before + 20)
        assert time.monotonic() - killed < metronome.bound(1.0 + 2 * pace)
        assert isinstance(stepping.wait(), StreamBroken)
        time.sleep(HUNG_SECONDS + 1.0)
        written = writes(guest) - written
        tries = len(FILES) * (1 + (time.monotonic() - killed) / RESUME_SECONDS)
    metronome.stop()
    assert monitor.resumed <= tries
    # Each write of the guest's meets the error once, and so does what a mirror sends anew each time that it is resumed.
    assert 1 <= monitor.heard.count("BLOCK_JOB_ERROR") <= written + IN_FLIGHT * monitor.resumed
    assert "BLOCK_IO_ERROR" not in monitor.heard, "the guest saw no error"
    with contextlib.suppress(StreamBroken):
        life.close()
    assert not mirrors(guest)
    again = begun(protection)
    assert again.how == "resumed"
    stopped(guest)
    again.step()
    again.close()
    assert_is_the_disk(guest, folder, History(store, protection.setting.machine.id))


_STUBBORN = """
import sys
sys.path.insert(0, sys.argv[1])
import qemu_stream_guard as guard
guard.killed = lambda pid: False
guard.DRAIN_SECONDS = 3.0
sys.exit(guard.main(sys.argv[2:]))
"""


@contextlib.contextmanager
def guarded(path: Path, second: Path, life: StreamLife) -> Iterator[subprocess.Popen[bytes]]:
    """A guard in whose world processes don't die: as where one waits for a disk in the kernel.  The life's own is gone."""
    stream, target = life.stream, life.target
    assert isinstance(stream, QemuStream)
    assert target
    assert stream._guard
    stream._guard._process.kill()
    stream._guard._process.wait()
    home = str(Path(hvbackup.hypervisors.__file__).parent)
    words = ["watch", str(path), stream._set.names.prefix, str(PROGRAM)]
    words += [str(target.pid), str(target.ring_path), f"--marker={marker(stream._set.folder)}"]
    command = [sys.executable, "-I", "-S", "-c", _STUBBORN, home, *words]
    with Wire(second, 5, out_of_band=True) as line:
        process = subprocess.Popen(
            [*command, str(line.fileno())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[line.fileno()]
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_target_that_can_not_be_killed_is_cut_off_out_of_band(guest: Guest, store: Store, folder: Path) -> None:
    """The guard yanks before it asks the main loop for anything, and stops the machine to cancel what then never drains."""
    protection = protection_of(store, guest, folder)
    life = begun(protection)
    guest.start_writer(*FILES, mode="overwrite", options=WRITER)
    guest.wait_acked(20)
    assert life.target
    metronome = Metronome()
    with (
        guarded(guest.qmp_path, folder / "second.sock", life) as process,
        Listening(folder / "third.sock") as monitor,
    ):
        os.kill(life.target.pid, signal.SIGSTOP)
        began, before = time.monotonic(), guest.acked()
        guest.wait_acked(before + 2)  # one may have been under way
        assert time.monotonic() - began < metronome.bound(HUNG_SECONDS + 2.0)
        assert process.wait(60) == 0
        assert process.stdout
        assert b"no sign of life" in process.stdout.read()
        assert not mirrors(guest)
        assert guest.qmp("query-status")["running"]
        guest.wait_acked(guest.acked() + 20)
    metronome.stop()
    assert "STOP" in monitor.heard, "nothing was under way when they were cancelled"
    assert "BLOCK_IO_ERROR" not in monitor.heard
    os.kill(life.target.pid, signal.SIGKILL)
    with contextlib.suppress(StreamBroken):
        life.close()
    again = begun(protection)
    stopped(guest)
    again.step()
    again.close()
    assert_is_the_disk(guest, folder, History(store, protection.setting.machine.id))


class StuckMirror:
    """A QEMU, as far as the guard asks: its one mirror does not end but by force."""

    def __init__(self) -> None:
        self.running, self.mirrors, self.said = True, ["p-m0"], list[str]()

    def command(self, _: object, what: str, arguments: object = None) -> dict[str, object]:
        self.said.append(what)
        if what in ("stop", "cont"):
            self.running = what == "cont"
        if what == "job-cancel":
            assert not self.running
            self.mirrors.clear()
        if what == "query-status":
            return {"return": {"running": self.running, "status": "running" if self.running else "paused"}}
        jobs = [{"id": name, "type": "mirror", "status": "ready"} for name in self.mirrors]
        return {"return": jobs if what == "query-jobs" else []}


@pytest.mark.parametrize("named", ["", "no/such/folder/stopped", "stopped"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_machine_that_was_stopped_goes_on_whether_or_not_that_could_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, cut: bool
) -> None:
    """Older workers name no marker; a folder may be gone, and a disk full.  The monitor breaks off after `stop`, with `cut`."""
    qemu, breaks = StuckMirror(), [cut]

    def command(lines: object, what: str, arguments: object = None) -> dict[str, object]:
        said = qemu.command(lines, what, arguments)
        if what == "stop" and breaks[0]:
            raise OSError("no answer in time")
        if what == "cont" and breaks[0]:
            breaks[0], qemu.running = False, False
            raise OSError("no answer in time")
        return said

    monkeypatch.setattr(guarding, "command", command)
    monkeypatch.setattr(guarding, "speak", lambda _, work: work(None))
    monkeypatch.setattr(guarding, "RETRY_SECONDS", 0.01)
    place = str(tmp_path / named) if named else ""
    guarding.relieve("socket", "p-", "program", place)
    assert qemu.running
    assert not qemu.mirrors
    assert qemu.said.count("cont") == 1 + cut
    assert not list(tmp_path.iterdir())


class CutAtStop:
    """A monitor whose line breaks as soon as the machine has been stopped through it, once; other clients are served as ever."""

    def __init__(self, path: Path, behind: Path) -> None:
        self.path, self._behind, self.stopped = path, behind, threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> CutAtStop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._listener.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, socket.socket(socket.AF_UNIX) as qemu, contextlib.suppress(ConnectionError):
                    qemu.connect(str(self._behind))
                    self._serve(client, qemu)

    def _serve(self, client: socket.socket, qemu: socket.socket) -> None:
        while True:
            for line in select.select([client, qemu], [], [])[0]:
                data = line.recv(1 << 16)
                if not data:
                    return
                if b'"event": "STOP"' in data and not self.stopped.is_set():
                    self.stopped.set()
                    return
                (qemu if line is client else client).sendall(data)


@pytest.mark.parametrize("killed", [False, True], ids=["cut", "killed"])
def test_a_guard_that_breaks_off_leaves_no_machine_stopped(
    guest: Guest, store: Store, folder: Path, killed: bool
) -> None:
    """Between `stop` and `cont`: the guard's next try lets it go on, or, when nobody is left to try, the release."""
    protection = protection_of(store, guest, folder)
    life = begun(protection)
    guest.start_writer(*FILES, mode="overwrite", options=WRITER)
    guest.wait_acked(20)
    assert life.target
    with (
        CutAtStop(folder / "cut.sock", guest.qmp_path) as monitor,
        guarded(monitor.path, folder / "second.sock", life) as process,
    ):
        os.kill(life.target.pid, signal.SIGSTOP)
        assert monitor.stopped.wait(120)
        if killed:
            process.kill()
            process.wait()
        else:
            assert process.wait(120) == 0
            assert not mirrors(guest)
            assert guest.qmp("query-status")["running"]
    os.kill(life.target.pid, signal.SIGKILL)
    with contextlib.suppress(StreamBroken):
        life.close()
    assert not mirrors(guest)
    assert guest.qmp("query-status")["running"]
    again = begun(protection)
    stopped(guest)
    again.step()
    again.close()
    assert guest.qmp("query-status")["status"] == "paused", "what somebody else has stopped stays so"
    assert_is_the_disk(guest, folder, History(store, protection.setting.machine.id))


def test_other_jobs_of_a_guest_and_a_stream_exclude_each_other(guest: Guest, store: Store, folder: Path) -> None:
    protection = protection_of(store, guest, folder)
    guest.qmp("blockdev-add", driver="null-co", node_name="elsewhere", size=SIZE)
    life = begun(protection)
    with pytest.raises(HostUnreachable):  # the guard has it, from before anything can hang
        Wire(folder / "second.sock", 1.0)
    guest.sh("echo 1 >/mnt/b/f; sync")
    with pytest.raises(GuestError, match="in use by block job: mirror"):
        guest.qmp("blockdev-backup", job_id="b", device="disk1", target="elsewhere", sync="full")
    with pytest.raises(GuestError, match="Need a root block node"):  # there is one above it now
        guest.qmp("blockdev-mirror", job_id="b", device="disk1", target="elsewhere", sync="full")
    with pytest.raises(GuestError, match=r"in use|busy"):
        guest.qmp("block_resize", node_name="disk1", size=64 << 20)
    guest.sh("echo 2 >>/mnt/b/f; sync")
    life.step()
    life.close()
    guest.qmp("blockdev-mirror", job_id="admin", device="disk1", target="elsewhere", sync="none")
    assert mirrors(guest) == ["admin"]
    with pytest.raises(Busy, match="wait for the other"):
        begun(protection)
    guest.sh("echo 3 >>/mnt/b/f; sync")
    assert mirrors(guest) == ["admin"], "theirs, and nothing of ours"
    guest.qmp("block-job-cancel", device="admin", force=True)
    while guest.qmp("query-jobs"):
        time.sleep(0.05)
    again = begun(protection)
    assert again.how == "resumed"
    guest.sh("sync")
    guest.pause()
    again.step()
    again.close()
    assert_is_the_disk(guest, folder, History(store, protection.setting.machine.id))


def test_zeroes_arrive_and_flushes_do_not(guest: Guest, store: Store, folder: Path) -> None:
    """ext4 zeroes the rest of a short unwritten extent by a command of its own; whatever the guest syncs, nobody tells us."""
    guest.sh("umount /mnt/b; mount -o dioread_lock /dev/vdb /mnt/b")
    protection = protection_of(store, guest, folder)
    life = begun(protection)
    since = life.newest.seq
    for n in range(20):
        guest.sh(
            f"fallocate -l 16384 /mnt/b/f{n}; dd if=/dev/urandom of=/mnt/b/f{n} bs=4096 count=1 seek=1 conv=notrunc,fsync"
        )
    guest.sh("sync")
    assert life.target
    flushes = sum(row["stats"]["flush_operations"] for row in guest.qmp("query-blockstats"))
    assert flushes >= 20
    assert life.target.ring.heads.flushes <= 3, "a journal that waited for them would never be durable"
    guest.pause()
    life.step()
    life.close()
    history = History(store, protection.setting.machine.id)
    kinds = np.concatenate([run.facts["kind"][max(0, since + 1 - run.name.first) :] for run in history.runs])
    assert np.count_nonzero(kinds == f.FACT_ZERO), "they came as what they are"
    assert_is_the_disk(guest, folder, history)
