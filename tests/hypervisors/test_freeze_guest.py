"""Freezing real guests: the agent is the real one, the file systems are, and everybody may be killed at the worst moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from hvbackup.errors import Busy, HostUnreachable, UsageError
from hvbackup.hypervisors import qemu_fleece
from hvbackup.hypervisors.guestagent import Freezer, GuestAgent
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.hypervisors.qemu_freeze import LIMIT_SECONDS, MARKER, Freezing
from hvbackup.model import Consistency, LeaseId, Machine, MiB
from labs.guest import Guest, make_disk
from tests.hypervisors.conformance import whole
from tests.hypervisors.daemon import SETTINGS, STORE

pytestmark = [pytest.mark.real, pytest.mark.guest]

PATIENCE_SECONDS = 120.0  # a guest without KVM on a busy machine
THAWED_SECONDS = 60.0  # at once, or after a limit of 12 s: far from the 300 of a freeze that nobody looks after


class Rig:
    """A guest with two mounted file systems and an agent."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest, self.folder, self.leases = guest, folder, 0

    def hypervisor(self, **freezing: Any) -> QemuHypervisor:
        how = Freezing(**freezing)
        return QemuHypervisor(self.guest.qmp_path, STORE, scratch_dir=self.scratch, settings=SETTINGS, freezing=how)

    @property
    def scratch(self) -> Path:
        return self.folder / "s"

    def machine(self) -> Machine:
        [machine] = self.hypervisor().machines()
        return machine

    def lease(self) -> LeaseId:
        self.leases += 1
        return LeaseId(f"lease-{self.leases}")

    def release(self) -> None:
        self.hypervisor().release(self.machine(), None, [])

    def hook(self, script: str) -> None:
        """What the guest does around a freeze."""
        self.guest.sh(f"cat >/tmp/hook <<'END'\n#!/bin/sh\n{script}\nEND\nchmod +x /tmp/hook")

    def agent(self, options: str, wait: bool = True) -> None:
        """The agent again, started in another way."""
        self.guest.sh("kill -9 $(pidof qemu-ga); while pidof qemu-ga; do sleep 0.1; done", check=False)
        if options:
            self.guest.sh(
                f"qemu-ga -m virtio-serial -p /dev/vport0p1 -t /tmp -f /tmp/ga.pid {options} </dev/null >/tmp/ga.out 2>&1 &"
            )
        if wait:
            self.wait_for_agent()

    def wait_for_agent(self) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with GuestAgent(self.guest.agent_path):
                    return
            except HostUnreachable:
                assert time.monotonic() < end
                time.sleep(0.2)

    def writes(self) -> bool:
        """Whether the guest's file systems let somebody write, however slow the guest."""
        return not self.stands_still(PATIENCE_SECONDS)

    def stands_still(self, seconds: float = 2) -> bool:
        """Whether somebody who writes has to wait for so long."""
        self.guest.console.start("echo x >/mnt/w; sync /mnt/w")
        try:
            self.guest.console.finish(seconds)
        except TimeoutError:
            return True
        return False

    def goes_on(self) -> float:
        """How long it took until the command that `writes` began ended."""
        begun = time.monotonic()
        self.guest.console.finish(PATIENCE_SECONDS)
        return time.monotonic() - begun


@pytest.fixture(scope="module")
def running() -> Generator[Rig]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as name:
        folder = Path(name)
        disks = [make_disk(folder / "a.qcow2", 32 * MiB), make_disk(folder / "b.raw", 32 * MiB, "raw")]
        with Guest(folder / "g", disks, agent=True) as guest:
            guest.sh("mount /dev/vda /mnt; mkdir -p /mnt/data; mount /dev/vdb /mnt/data")
            yield Rig(guest, folder)


@pytest.fixture
def rig(running: Rig) -> Generator[Rig]:
    running.guest.sh("rm -f /tmp/hook /tmp/fsfreeze-hook.log")
    running.wait_for_agent()
    yield running
    running.release()
    running.wait_for_agent()
    running.guest.sh("rm -f /tmp/hook")
    with GuestAgent(running.guest.agent_path) as agent:
        left_frozen = agent.frozen()
        agent.ask("guest-fsfreeze-thaw")
    running.agent("-F/etc/fsfreeze-hook")
    assert not left_frozen
    assert running.writes()


def test_the_guest_stands_still_around_the_transaction_and_no_longer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    transaction = qemu_fleece.freeze

    def watched(*arguments: Any) -> Any:
        seen.append(rig.guest.sh("cat /tmp/fsfreeze-hook.log"))
        seen.append(rig.stands_still())
        return transaction(*arguments)

    monkeypatch.setattr("hvbackup.hypervisors.qemu_fleece.freeze", watched)
    with rig.hypervisor(limit_seconds=60).snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        rig.goes_on()
        assert rig.writes()
        assert frozen.consistency is Consistency.APPLICATION
        assert frozen.standstill.filesystems == 2
        assert 2 < frozen.standstill.frozen_seconds < 60  # `stands_still` waited for two
        assert not frozen.notes
        assert not list(rig.scratch.glob(f"*/{MARKER}"))
    assert seen[0].startswith("freeze ")
    assert seen[1] is True, "it stood still"
    assert [line.split()[0] for line in rig.guest.sh("cat /tmp/fsfreeze-hook.log").splitlines()] == ["freeze", "thaw"]


def test_a_frozen_guest_is_clean_where_one_that_was_not_has_a_journal_to_replay(rig: Rig) -> None:
    """ext4 says itself whether it was at rest: the flag `needs_recovery` is off in a frozen file system, on in a live one."""
    recovering = {}
    for wanted in (Consistency.CRASH, Consistency.FILESYSTEM):
        rig.guest.start_writer("/mnt/sequence", "/mnt/data/sequence", rate=100)
        rig.guest.wait_acked(20)
        with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, wanted) as frozen:
            image = rig.folder / "image"
            image.write_bytes(whole(frozen.disks[0]))
        rig.release()
        rig.guest.stop_writer()
        rig.guest.sh("rm /mnt/sequence /mnt/data/sequence")
        recovering[wanted] = (
            b"needs_recovery"
            in subprocess.run(
                ["/usr/sbin/dumpe2fs", "-h", str(image)], check=True, capture_output=True, timeout=120
            ).stdout
        )
        assert (frozen.consistency is Consistency.CRASH) == (wanted is Consistency.CRASH)
    assert recovering == {Consistency.CRASH: True, Consistency.FILESYSTEM: False}


def test_the_guest_is_frozen_for_a_moment(rig: Rig) -> None:
    """Less than a second, where the host has time for it; it is let go after ten by anybody's clock."""
    rig.guest.start_writer("/mnt/sequence", rate=200)
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert 0 < frozen.standstill.frozen_seconds < LIMIT_SECONDS
        assert frozen.standstill.freezing_seconds < PATIENCE_SECONDS
    rig.guest.wait_acked(rig.guest.acked() + 50)
    rig.guest.stop_writer()
    rig.guest.sh("rm /mnt/sequence")


def test_crash_consistency_leaves_the_guest_alone(rig: Rig) -> None:
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, Consistency.CRASH) as frozen:
        assert frozen.consistency is Consistency.CRASH
        assert frozen.standstill.frozen_seconds == 0
    assert "freeze" not in rig.guest.sh("cat /tmp/fsfreeze-hook.log", check=False).splitlines()


def test_excluded_mountpoints_go_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    transaction = qemu_fleece.freeze

    def watched(*arguments: Any) -> Any:
        rig.guest.sh("echo x >/mnt/data/w; sync /mnt/data/w", 30)
        assert rig.stands_still()
        return transaction(*arguments)

    monkeypatch.setattr("hvbackup.hypervisors.qemu_fleece.freeze", watched)
    with rig.hypervisor(excluded=["/mnt/data"], limit_seconds=60).snapshot(
        rig.machine(), rig.lease(), {}, Consistency.FILESYSTEM
    ) as frozen:
        rig.goes_on()
        assert frozen.standstill.filesystems == 1
        assert frozen.consistency is Consistency.FILESYSTEM
        assert frozen.notes == ["Mountpoint /mnt/data was not frozen, as asked"]


@pytest.mark.parametrize(
    ("excluded", "message"), [(["/srv"], "mounted on /srv.*/mnt, /mnt/data"), (["/mnt", "/mnt/data"], "left to freeze")]
)
def test_exclusions_that_make_no_sense(rig: Rig, excluded: list[str], message: str) -> None:
    with (
        pytest.raises(UsageError, match=message),
        rig.hypervisor(excluded=excluded).snapshot(rig.machine(), rig.lease(), {}, None),
    ):
        pytest.fail("A snapshot began")


# --- application ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("", "no hook"),
        ("-F/tmp/dispatcher", "forgets whether they failed"),
        ("-F/etc/fsfreeze-hook -b guest-file-open", "does not let us see"),
    ],
)
def test_application_is_refused_where_it_can_not_be_proved(rig: Rig, options: str, reason: str) -> None:
    rig.guest.sh("printf '#!/bin/sh\\nls /etc/fsfreeze-hook.d >/dev/null 2>&1\\nexit 0\\n' >/tmp/dispatcher")
    rig.guest.sh("chmod +x /tmp/dispatcher")
    rig.agent(options or "-v")
    with (
        pytest.raises(UsageError, match=reason),
        rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, Consistency.APPLICATION),
    ):
        pytest.fail("A snapshot began")
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert frozen.consistency is Consistency.FILESYSTEM
        assert reason in frozen.standstill.remark
        assert not frozen.notes


def test_a_hook_that_fails_means_that_nothing_is_frozen(rig: Rig) -> None:
    rig.hook("exit 3")
    for wanted in (Consistency.FILESYSTEM, Consistency.APPLICATION):
        with (
            pytest.raises(HostUnreachable, match="hook has failed with status 3"),
            rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, wanted),
        ):
            pytest.fail("A snapshot began")
        assert rig.writes()
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert frozen.consistency is Consistency.CRASH
        [note] = frozen.notes
        assert "only crash-consistent" in note
        assert "hook has failed" in note


def test_a_hook_that_fails_at_the_thaw_is_told_of(rig: Rig) -> None:
    rig.hook('[ "$1" = freeze ]')
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert rig.writes()
        assert any("hook has failed" in note for note in frozen.notes)


# --- agents that are not as they should be -------------------------------------------------------------------------------


def test_without_an_agent(rig: Rig) -> None:
    rig.agent("", wait=False)
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert frozen.consistency is Consistency.CRASH
        assert not frozen.notes
        assert "no guest agent runs" in frozen.standstill.remark
    with (
        pytest.raises(UsageError, match="crash-consistent: no guest agent"),
        rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, Consistency.FILESYSTEM),
    ):
        pytest.fail("A snapshot began")
    rig.agent("-F/etc/fsfreeze-hook")


def test_an_agent_that_hangs(rig: Rig) -> None:
    rig.guest.sh("kill -STOP $(pidof qemu-ga)")
    with (
        pytest.raises(HostUnreachable, match="no answer in time"),
        rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, Consistency.FILESYSTEM),
    ):
        pytest.fail("A snapshot began")
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert frozen.consistency is Consistency.CRASH
        assert "no answer in time" in frozen.notes[0]
    rig.guest.sh("kill -CONT $(pidof qemu-ga)")
    rig.wait_for_agent()


def test_an_agent_that_hangs_while_it_freezes_lets_go_in_the_end(rig: Rig) -> None:
    rig.hook('[ "$1" = thaw ] || sleep 4')
    with (
        pytest.raises(HostUnreachable, match="did not freeze within 1 s"),
        rig.hypervisor(limit_seconds=1).snapshot(rig.machine(), rig.lease(), {}, Consistency.FILESYSTEM),
    ):
        pytest.fail("A snapshot began")
    rig.guest.sh("while [ $(grep -c thaw /tmp/fsfreeze-hook.log) = 0 ]; do sleep 0.2; done", PATIENCE_SECONDS)
    assert rig.writes()


def test_a_transaction_that_takes_too_long_is_no_frozen_moment(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    transaction = qemu_fleece.freeze

    def slow(*arguments: Any) -> Any:
        assert rig.writes()  # once the limit has passed, and before the snapshot is there
        return transaction(*arguments)

    monkeypatch.setattr("hvbackup.hypervisors.qemu_fleece.freeze", slow)
    hypervisor = rig.hypervisor(limit_seconds=5)  # the freezing itself is within it
    with (
        pytest.raises(HostUnreachable, match="let go after 5 s"),
        hypervisor.snapshot(rig.machine(), rig.lease(), {}, Consistency.FILESYSTEM),
    ):
        pytest.fail("A snapshot began")
    rig.release()
    with hypervisor.snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert frozen.consistency is Consistency.CRASH
        assert "let go after 5 s" in frozen.notes[0]


def test_a_transaction_that_fails_thaws(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise Busy("Somebody holds a disk")

    monkeypatch.setattr("hvbackup.hypervisors.qemu_fleece.freeze", failing)
    with pytest.raises(Busy, match="holds a disk"), rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None):
        pytest.fail("A snapshot began")
    assert rig.writes()


def test_a_guest_that_somebody_else_froze_or_thawed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    with GuestAgent(rig.guest.agent_path) as agent:
        agent.ask("guest-fsfreeze-freeze")
    with (
        pytest.raises(Busy, match="frozen already"),
        rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, Consistency.FILESYSTEM),
    ):
        pytest.fail("A snapshot began")
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert frozen.consistency is Consistency.CRASH
        assert "frozen" in frozen.notes[0]
    assert rig.stands_still(), "what others froze is theirs to thaw"
    with GuestAgent(rig.guest.agent_path) as agent:
        agent.ask("guest-fsfreeze-thaw")
    rig.goes_on()
    transaction = qemu_fleece.freeze

    def thawed_meanwhile(*arguments: Any) -> Any:
        rig.guest.sh("fsfreeze --unfreeze /mnt")
        return transaction(*arguments)

    monkeypatch.setattr("hvbackup.hypervisors.qemu_fleece.freeze", thawed_meanwhile)
    with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
        assert frozen.consistency is Consistency.CRASH
        assert "only 1 still were" in frozen.notes[0]


def test_another_program_holds_the_agent(rig: Rig) -> None:
    with GuestAgent(rig.guest.agent_path):
        with (
            pytest.raises(Busy, match="one at a time"),
            rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, Consistency.FILESYSTEM),
        ):
            pytest.fail("A snapshot began")
        with rig.hypervisor().snapshot(rig.machine(), rig.lease(), {}, None) as frozen:
            assert frozen.consistency is Consistency.CRASH
            assert "one at a time" in frozen.standstill.remark


# --- our own death -------------------------------------------------------------------------------------------------------

DOOMED = """
import sys, time
from pathlib import Path
from hvbackup.hypervisors import qemu_fleece
from hvbackup.hypervisors.guestagent import Freezer
from hvbackup.hypervisors.qemu import QemuHypervisor
from hvbackup.hypervisors.qemu_freeze import Freezing
from hvbackup.model import Consistency, LeaseId

qmp, store, scratch = sys.argv[1:]
ready = Freezer.ready

def told(freezer):
    ready(freezer)
    print("guard", freezer.pid, flush=True)

def for_ever(*_):
    print("frozen", flush=True)
    time.sleep(600)

Freezer.ready, qemu_fleece.freeze = told, for_ever
hypervisor = QemuHypervisor(qmp, store, scratch_dir=Path(scratch), freezing=Freezing(limit_seconds=LIMIT))
[machine] = hypervisor.machines()
hypervisor.snapshot(machine, LeaseId("doomed"), {}, Consistency.FILESYSTEM).__enter__()
"""


def doomed(rig: Rig, limit_seconds: int = 300) -> tuple[subprocess.Popen[str], int]:
    """A process that has frozen the guest and will never thaw it, and its guard."""
    command = [sys.executable, "-c", DOOMED.replace("LIMIT", str(limit_seconds))]
    command += [str(rig.guest.qmp_path), STORE, str(rig.scratch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    guard = int(process.stdout.readline().split()[1])
    assert process.stdout.readline() == "frozen\n"
    return process, guard


def ended(pid: int) -> None:
    """The process is gone, or will be in a moment."""
    end = time.monotonic() + PATIENCE_SECONDS
    while Path(f"/proc/{pid}/stat").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_our_death_thaws_within_seconds(rig: Rig) -> None:
    process, guard = doomed(rig)
    assert rig.stands_still()
    process.kill()
    process.wait(120)
    assert rig.goes_on() < THAWED_SECONDS
    ended(guard)
    assert not list(rig.scratch.glob(f"*/{MARKER}"))


def test_a_process_that_stands_still_itself_does_not_keep_the_guest(rig: Rig) -> None:
    """It holds every descriptor it has and runs nothing: the limit lets the guest go all the same."""
    process, guard = doomed(rig, limit_seconds=12)
    process.send_signal(signal.SIGSTOP)
    try:
        assert rig.stands_still()
        assert rig.goes_on() < THAWED_SECONDS
    finally:
        process.kill()
        process.wait(120)
    ended(guard)


def test_a_service_that_is_ended_with_all_its_processes_thaws(rig: Rig) -> None:
    process, guard = doomed(rig)
    os.kill(guard, signal.SIGTERM)
    assert rig.stands_still()
    process.terminate()
    process.wait(120)
    assert rig.goes_on() < THAWED_SECONDS
    ended(guard)


def test_both_dead_the_next_run_thaws(rig: Rig) -> None:
    process, guard = doomed(rig)
    os.kill(guard, signal.SIGKILL)
    process.kill()
    process.wait(120)
    assert rig.stands_still()
    [marker] = rig.scratch.glob(f"*/{MARKER}")
    rig.hypervisor().release(rig.machine(), LeaseId("doomed"), [])
    assert rig.goes_on() < THAWED_SECONDS
    assert not marker.exists()


def test_freezing_and_thawing_again_and_again_loses_no_write(rig: Rig) -> None:
    rig.guest.start_writer("/mnt/sequence", "/mnt/data/sequence", rate=100)
    for number in range(5):
        marker = rig.folder / f"marker{number}"
        with Freezer(rig.guest.agent_path, marker, 10) as freezer:
            freezer.ready()
            assert freezer.freeze() == 2
            stood = freezer.thaw()
        assert not stood.doubt
        assert not marker.exists()
    rig.guest.wait_acked(rig.guest.acked() + 20)
    last = rig.guest.stop_writer()
    assert last <= rig.guest.verify("/mnt/sequence", "/mnt/data/sequence") <= last + 1
    rig.guest.sh("rm /mnt/sequence /mnt/data/sequence")
