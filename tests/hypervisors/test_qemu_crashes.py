"""Our process, QEMU, or both die at any step: the next capture is right, and nothing of the dead run is left."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors import qemu as adapter
from hvbackup.hypervisors.qemu import QemuHypervisor, Settings
from hvbackup.hypervisors.qmp import Qmp
from hvbackup.model import Continuity, DiskId
from tests.hypervisors.conformance import BLOCK, Cycle, whole
from tests.hypervisors.test_qemu import DaemonRig

pytestmark = pytest.mark.real


class Killed(BaseException):
    """Stands for SIGKILL: no command leaves this process any more."""


class Mortal:
    """Makes monitors that die with their process: after the nth command was obeyed, before its answer was seen."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self, *args: Any, **kwargs: Any) -> Qmp:
        mortal = self

        class MortalQmp(Qmp):
            def command(self, name: str, /, timeout_seconds: float | None = None, **arguments: Any) -> Any:
                if mortal.left <= 0:
                    raise Killed
                answer = super().command(name, timeout_seconds, **arguments)
                mortal.left -= 1
                if mortal.left == 0:
                    raise Killed
                return answer

        return MortalQmp(*args, **kwargs)


@pytest.fixture
def rig(tmp_path: Path) -> Generator[DaemonRig]:
    rig = DaemonRig(tmp_path, ("qcow2", "raw"))
    yield rig
    rig.close()


def live(rig: DaemonRig, cycle: Cycle, lease: str, between: Callable[[], None]) -> None:
    """A whole run as capture does it; what is committed stands in `cycle` even when it dies after that."""
    hypervisor, machine = rig.hypervisor(), cycle.machine()
    with hypervisor.snapshot(machine, adapter.LeaseId(lease), cycle.tokens, None) as frozen:
        between()
        images = {disk.disk.id: cycle.fold(disk) for disk in frozen.disks}
        tokens = {disk.disk.id: disk.token for disk in frozen.disks}
        frozen.verify()
    cycle.images, cycle.tokens = images, tokens
    hypervisor.release(machine, adapter.LeaseId(lease), list(tokens.values()))


def test_killed_after_every_single_command(rig: DaemonRig, monkeypatch: pytest.MonkeyPatch) -> None:
    cycle = Cycle(rig)
    rig.write("vda", 0, b"first" * BLOCK)
    cycle.capture()
    for nth in range(1, 1000):
        mortal = Mortal(nth)
        rig.write("vda", nth % 30 * BLOCK, bytes([1 + nth % 255]) * 5000)
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(adapter, "Qmp", mortal)
            live(rig, cycle, f"run-{nth}", lambda n=nth: rig.write("vdb", n % 15 * BLOCK, b"during" * 700))
        rig.hypervisor().release(cycle.machine(), adapter.LeaseId(f"run-{nth}"), list(cycle.tokens.values()))
        assert sorted(rig.leftovers()) == sorted(f"{disk}/{token.value}" for disk, token in cycle.tokens.items())
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        assert cycle.equal()
        if mortal.left > 0:
            break
    assert nth > 30  # it did walk


def test_a_clean_restart_keeps_what_qcow2_can_store(rig: DaemonRig) -> None:
    cycle = Cycle(rig)
    rig.write("vda", 0, b"before" * BLOCK)
    cycle.capture()
    rig.hang_up()
    rig.daemon.stop()
    rig.daemon.start()
    rig.write("vda", 9 * BLOCK, b"after")
    cycle.capture()
    assert cycle.how == {DiskId("vda"): Continuity.INCREMENTAL, DiskId("vdb"): Continuity.UNKNOWN}
    assert cycle.equal()


def test_an_inconsistent_bitmap_is_named_and_replaced(rig: DaemonRig) -> None:
    cycle = Cycle(rig)
    cycle.capture()
    rig.hang_up()
    rig.daemon.stop()
    rig.daemon.start()  # the bitmap was stored, and is loaded
    rig.write("vda", 0, b"unstored")
    rig.new_life()  # by SIGKILL
    old = cycle.tokens[DiskId("vda")]
    with rig.hypervisor().snapshot(cycle.machine(), cycle.lease(), cycle.tokens, None) as frozen:
        changes = frozen.disks[0].changes(old)
        assert changes.continuity is Continuity.UNKNOWN
        assert "inconsistent: the machine was not stopped cleanly" in changes.reason
    rig.hypervisor().release(cycle.machine(), None, [old])
    cycle.capture()
    assert cycle.equal()
    assert old.value not in rig.daemon.bitmaps("vda")
    cycle.capture()
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}


def test_qemu_killed_while_its_snapshot_is_read(rig: DaemonRig) -> None:
    cycle = Cycle(rig)
    rig.write("vda", 0, b"x" * BLOCK)
    machine, lease = cycle.machine(), cycle.lease()
    with rig.hypervisor().snapshot(machine, lease, {}, None) as frozen:
        reader = frozen.disks[0].open()
        reader.read_into(0, memoryview(bytearray(BLOCK)))
        rig.hang_up()
        rig.daemon.kill()
        with pytest.raises(HostUnreachable, match="nbd"):
            reader.read_into(0, memoryview(bytearray(BLOCK)))
        with pytest.raises(HostUnreachable, match=r"qmp\.sock"):
            frozen.verify()
    with pytest.raises(HostUnreachable, match=r"qmp\.sock"):
        rig.hypervisor().release(machine, lease, [])
    assert not list((rig.daemon.folder / "s").iterdir())
    rig.daemon.start()
    rig.hypervisor().release(machine, lease, [])
    assert not rig.leftovers()
    cycle.capture()
    assert cycle.equal()


def test_both_killed(rig: DaemonRig) -> None:
    cycle = Cycle(rig)
    cycle.capture()
    machine, lease = cycle.machine(), cycle.lease()
    rig.hypervisor().snapshot(machine, lease, cycle.tokens, None).__enter__()
    rig.write("vda", 0, b"lost tracking")
    rig.new_life()
    rig.hypervisor().release(machine, lease, list(cycle.tokens.values()))
    assert not rig.leftovers()
    cycle.capture()
    assert set(cycle.how.values()) == {Continuity.UNKNOWN}
    assert cycle.equal()


def test_a_snapshot_whose_job_was_cancelled_is_not_trusted(rig: DaemonRig) -> None:
    cycle = Cycle(rig)
    rig.write("vda", 0, b"old" * BLOCK)
    with rig.hypervisor().snapshot(cycle.machine(), cycle.lease(), {}, None) as frozen:
        assert not frozen.verify()
        with rig.daemon.qmp() as qmp:
            [job] = [j["id"] for j in qmp.command("query-jobs") if j["id"].endswith("-j0")]
            qmp.command("job-cancel", id=job)
        rig.write("vda", 0, b"new" * BLOCK)
        assert whole(frozen.disks[0])[:3] == b"new"  # which is why it must not be used
        with pytest.raises(adapter.ReadFailed, match=r"did not hold: job .*-j0 is"):
            frozen.verify()


def test_the_guest_is_let_go_when_we_die(rig: DaemonRig) -> None:
    """SIGKILL of a real process of ours: a moment later nothing is copied for it any more."""
    cycle = Cycle(rig)
    cycle.capture()
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from hvbackup.hypervisors.qemu import QemuHypervisor, Settings
hypervisor = QemuHypervisor({str(rig.daemon.qmp_path)!r}, "00c0ffee", scratch_dir=Path({str(rig.daemon.folder / "s")!r}),
                            settings=Settings(scratch_reserve_bytes=0))
[machine] = hypervisor.machines()
with hypervisor.snapshot(machine, "doomed", {{}}, None) as frozen:
    print("up", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as doomed:
        assert doomed.stdout is not None
        assert doomed.stdout.readline() == b"up\n"
        assert statuses(rig) == {"running"}
        doomed.kill()
    end = time.monotonic() + 120
    while statuses(rig) != {"concluded"}:
        assert time.monotonic() < end
        time.sleep(0.05)
    rig.hypervisor().release(cycle.machine(), adapter.LeaseId("doomed"), list(cycle.tokens.values()))
    cycle.capture()
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
    assert cycle.equal()


def test_a_qemu_that_hangs_holds_nobody_up(rig: DaemonRig) -> None:
    """Every call ends, none when QEMU goes on; when QEMU wakes up, the watchdog we left behind lets its guest go."""
    cycle = Cycle(rig)
    machine, lease = cycle.machine(), cycle.lease()
    hypervisor = rig.daemon.hypervisor(settings=Settings(reply_seconds=3, settle_seconds=2, scratch_reserve_bytes=0))
    assert rig.daemon.process is not None
    with hypervisor.snapshot(machine, lease, {}, None) as frozen:
        rig.daemon.process.send_signal(signal.SIGSTOP)
        with pytest.raises(HostUnreachable, match="No answer within"):
            frozen.verify()
    for call in (hypervisor.machines, lambda: hypervisor.release(machine, lease, [])):
        with pytest.raises(HostUnreachable, match=r"No answer within|others are waiting"):
            call()
    rig.daemon.process.send_signal(signal.SIGCONT)
    end = time.monotonic() + 120
    while statuses(rig) != {"concluded"}:
        assert time.monotonic() < end
        time.sleep(0.05)
    rig.hypervisor().release(machine, lease, [])
    assert not rig.leftovers()
    cycle.capture()
    assert cycle.equal()


def statuses(rig: DaemonRig) -> set[str]:
    with rig.daemon.qmp() as qmp:
        return {job["status"] for job in qmp.command("query-jobs")}


def impatient(rig: DaemonRig) -> QemuHypervisor:
    return rig.daemon.hypervisor(settings=Settings(reply_seconds=2, settle_seconds=2, scratch_reserve_bytes=0))


def test_cycles_that_can_not_end_leave_their_watchdog(rig: DaemonRig) -> None:
    """Somebody holds the only monitor; when he lets go of it, the guest is let go too."""
    hypervisor, machine = impatient(rig), Cycle(rig).machine()
    cycles = hypervisor.cycles(machine, adapter.LeaseId("held"))
    cycles.keep([])
    with contextlib.ExitStack() as stack:
        with pytest.raises(HostUnreachable), cycles.snapshot({}) as frozen:
            holder = stack.enter_context(rig.daemon.qmp())
            frozen.verify()
        with pytest.raises(HostUnreachable):
            cycles.close()
        assert {job["status"] for job in holder.command("query-jobs")} == {"running"}
    end = time.monotonic() + 120
    while statuses(rig) != {"concluded"}:
        assert time.monotonic() < end, "nobody is left to let the guest go"
        time.sleep(0.05)
    rig.hypervisor().release(machine, adapter.LeaseId("held"), [])
    assert not rig.leftovers()


def test_a_killed_watchdog_is_replaced(rig: DaemonRig) -> None:
    cycle = Cycle(rig)
    cycle.capture()
    cycles = rig.hypervisor().cycles(cycle.machine(), adapter.LeaseId("replaced"))
    cycles.keep(list(cycle.tokens.values()))
    with cycles.snapshot(cycle.tokens):
        assert cycles._watch
        first = cycles._watch
        first._process.kill()
        first._process.wait()
    with cycles.snapshot(cycle.tokens):
        assert cycles._watch is not first
        assert not cycles._watch.dead
    cycles.keep([])
    cycles.close()
    assert not rig.leftovers()
