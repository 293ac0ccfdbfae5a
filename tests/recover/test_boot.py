"""Booting from a point, with real exports and a real QEMU; and that nothing is ever left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hvbackup.errors import HvbackupError, NotFound, UsageError
from hvbackup.model import (
    ZERO_CHUNK,
    Consistency,
    Disk,
    DiskId,
    DiskRoot,
    Instant,
    Machine,
    MachineConfig,
    MachineId,
    PointId,
    RecoveryPoint,
)
from hvbackup.processes import Process, listener, start_detached
from hvbackup.recover.boot import Boot, Boots, Options

SIZE = 16 << 20


def a_point(*disks: str, config: MachineConfig | None = None) -> RecoveryPoint:
    roots = tuple(DiskRoot(Disk(DiskId(name), SIZE), ZERO_CHUNK) for name in disks or ("vda",))
    machine = Machine(MachineId("8a1d4f6e-0000-4000-8000-000000000003"), "web one", "qemu")
    return RecoveryPoint(
        PointId("00c0ffee00c0ffee"), machine, Instant(1), Consistency.CRASH, roots, config or MachineConfig()
    )


class Exports:
    """Stands in for our export process: nbdkit serves a folder with one file for each disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.last = folder, 0

    def __call__(self, point: RecoveryPoint, disks: Sequence[DiskRoot], socket: Path, run_dir: Path) -> int:
        argv = ["nbdkit", "-f", "-r", "-U", str(socket), "file", f"dir={self.folder}"]
        self.last = start_detached(argv, run_dir / "export.log").pid
        return self.last


@pytest.fixture
def exports(tmp_path: Path) -> Exports:
    folder = tmp_path / "disks"
    folder.mkdir()
    for name in ("vda", "vdb"):
        with (folder / name).open("wb") as file:
            file.truncate(SIZE)
    return Exports(folder)


@pytest.fixture
def boots(tmp_path: Path) -> Iterator[Boots]:
    boots = Boots(tmp_path / "state", tmp_path / "run", lambda: Instant(time.time_ns()))
    yield boots
    for boot in boots.all():
        boots.discard(boot.name)


def assert_nothing_left(tmp_path: Path, boot: Boot | None = None) -> None:
    assert [path for path in tmp_path.glob("state/boots/*") if path.name != "tmp"] == []
    assert list(tmp_path.glob("state/boots/tmp/*")) == []
    assert list(tmp_path.glob("run/boots/*")) == []
    for process in boot.processes.values() if boot else ():
        assert not process.is_running()
    assert processes_that_mention(str(tmp_path)) == []


def processes_that_mention(text: str) -> list[str]:
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].rpartition(b"/")[2] in (b"qemu-system-x86_64", b"nbdkit") and text.encode() in b" ".join(words):
            found.append(proc.name)
    return found


@pytest.mark.real
def test_a_machine_boots_is_listed_and_is_discarded_twice(boots: Boots, exports: Exports, tmp_path: Path) -> None:
    boot = boots.boot(a_point("vda", "vdb"), exports, Options(memory_bytes=64 << 20))
    assert boot.name == "web-one-00c0ffee"
    assert boots.all() == [boot]
    assert boots.get(boot.name).state == "running"
    assert boot.seconds > 0
    assert set(boot.processes) == {"export", "qemu"}
    assert len(list(boot.folder.glob("*.qcow2"))) == 2
    command = Path(f"/proc/{boot.processes['qemu'].pid}/cmdline").read_bytes().decode().split("\0")
    assert f"guest={boot.name}" in command
    with pytest.raises(UsageError, match="booted as web-one-00c0ffee already"):
        boots.boot(a_point(), exports)
    assert boots.discard(boot.name)
    assert_nothing_left(tmp_path, boot)
    assert not boots.discard(boot.name)
    with pytest.raises(NotFound):
        boots.get(boot.name)


@pytest.mark.real
def test_a_machine_that_was_switched_off_is_stopped(boots: Boots, exports: Exports, tmp_path: Path) -> None:
    boot = boots.boot(a_point(), exports, Options(name="off", memory_bytes=64 << 20))
    os.kill(boot.processes["qemu"].pid, 15)
    assert boot.processes["qemu"].wait(120)
    assert boots.get("off").state == "stopped"
    assert boots.discard("off")
    assert_nothing_left(tmp_path, boot)


CHILD = """
    import os, sys
    from pathlib import Path
    from tests.recover import test_boot as t
    from hvbackup.recover import boot as module
    from hvbackup.recover.boot import Boots, Options
    step, folder, calls = int(sys.argv[1]), Path(sys.argv[2]), [0]

    def crash_after(owner, name):
        real = getattr(owner, name)
        def stand_in(*args, **named):
            result = real(*args, **named)
            calls[0] += 1
            if calls[0] == step:
                os._exit(9)
            return result
        setattr(owner, name, stand_in)

    crash_after(Path, "mkdir")
    crash_after(Boots, "_record")
    crash_after(t.Exports, "__call__")
    crash_after(module, "_make_overlay")
    crash_after(module, "start_detached")
    crash_after(module, "_wait_for_machine")
    module.kvm.works = lambda: False  # saves time
    exports = t.Exports(folder / "disks")
    boots = Boots(folder / "state", folder / "run", lambda: 1)
    boots.boot(t.a_point(), exports, Options(name="it", memory_bytes=64 << 20))
    print("steps", calls[0])
"""


@pytest.mark.real
def test_discard_cleans_up_after_a_crash_at_every_step(boots: Boots, exports: Exports, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    steps = 0
    while True:
        steps += 1
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(steps), str(tmp_path)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in (0, 9), done.stderr
        found = next(iter(boots.all()), None)
        assert found is None or found.name == "it"
        assert boots.discard("it") == (found is not None)
        assert_nothing_left(tmp_path, found)
        if done.returncode == 0:
            break
    assert steps >= 10


def test_discard_removes_the_record_that_a_killed_boot_was_writing(boots: Boots, tmp_path: Path) -> None:
    (tmp_path / "state/boots/it").mkdir(parents=True)
    (tmp_path / "state/boots/tmp").mkdir()
    (tmp_path / "state/boots/tmp/0123").write_bytes(b"half a rec")
    assert boots.discard("it")
    assert_nothing_left(tmp_path)


@pytest.mark.real
def test_qemu_that_ends_at_once_is_quoted_and_nothing_is_left(boots: Boots, exports: Exports, tmp_path: Path) -> None:
    argv = ["qemu-system-x86_64", "-m", "64", "-device", "virtio-blk-pci,drive=d,id=vda", "-device", "no-such-device"]
    native = json.dumps({"argv": [*argv, "-drive", "if=none,id=d,file=/gone"], "cwd": "/"})
    with pytest.raises(HvbackupError, match="no-such-device"):
        boots.boot(a_point(config=MachineConfig("qemu-argv", native)), exports)
    assert_nothing_left(tmp_path)


@pytest.mark.real
def test_the_disks_of_a_storage_daemon_run_on_a_plain_machine(boots: Boots, exports: Exports) -> None:
    native = json.dumps(
        {"argv": ["qemu-storage-daemon", "--blockdev", "file,node-name=vda,filename=/gone"], "cwd": "/"}
    )
    config = MachineConfig("qemu-argv", native, {"memory_bytes": 0, "cpus": 0})
    boot = boots.boot(a_point(config=config), exports, Options(memory_bytes=64 << 20))
    assert boot.notes == ("How the machine was started is not known: it runs on a plain machine",)


@pytest.mark.real
def test_an_export_that_ends_at_once_is_quoted_and_nothing_is_left(boots: Boots, tmp_path: Path) -> None:
    def broken(point: RecoveryPoint, disks: Sequence[DiskRoot], socket: Path, run_dir: Path) -> int:
        return start_detached(["sh", "-c", "echo store is locked"], run_dir / "export.log").pid

    with pytest.raises(HvbackupError, match="ended at once: store is locked"):
        boots.boot(a_point(), broken)
    assert_nothing_left(tmp_path)


@pytest.mark.real
def test_a_disk_the_export_does_not_have_is_named(boots: Boots, exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(HvbackupError, match="overlay for disk vdx"):
        boots.boot(a_point("vdx"), exports)
    assert_nothing_left(tmp_path)


@pytest.mark.real
def test_only_the_chosen_disks_are_attached(boots: Boots, exports: Exports) -> None:
    boot = boots.boot(a_point("vda", "vdb"), exports, Options(disks=["vdb"], memory_bytes=64 << 20))
    assert [path.name[:3] for path in boot.folder.glob("*.qcow2")] == ["vdb"]


@pytest.mark.real
def test_sockets_find_room_when_the_folder_has_a_long_name(exports: Exports, tmp_path: Path) -> None:
    boots = Boots(tmp_path / "state", tmp_path / ("long" * 30), lambda: Instant(1))
    boot = boots.boot(a_point(), exports, Options(memory_bytes=64 << 20))
    assert len(str(boot.run)) < 90
    assert boots.discard(boot.name)
    assert not boot.run.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "tmp", "x" * 65, "a\n"])
def test_a_name_is_never_a_path(boots: Boots, name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a boot"):
        boots.discard(name)


def test_a_disk_that_is_not_in_the_point_is_refused(boots: Boots, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has no disk sda; it has vda"):
        boots.boot(a_point(), Exports(tmp_path), Options(disks=["sda"]))


@pytest.mark.parametrize(
    ("program", "package"), [("qemu-img", "qemu-utils"), ("qemu-system-x86_64", "qemu-system-x86")]
)
def test_a_missing_program_is_named_with_its_package(
    boots: Boots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, package: str
) -> None:
    (tmp_path / "bin").mkdir()
    if program != "qemu-img":
        (tmp_path / "bin/qemu-img").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UsageError, match=f"{program} is missing; install Debian package {package}"):
        boots.boot(a_point(), Exports(tmp_path))
    assert not (tmp_path / "state").exists() or boots.all() == []


def test_a_process_with_the_same_id_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = Process.of(child.pid)
        assert process is not None
        for other in (
            Process(child.pid, process.started - 1, process.boot_id),
            Process(child.pid, process.started, "x"),
        ):
            other.stop(0.1)
            assert child.poll() is None
        process.stop(5)
        assert Process.of(child.pid) is None
        child.wait(120)


def test_a_process_that_ignores_being_asked_is_killed(tmp_path: Path) -> None:
    process = start_detached(["sh", "-c", "trap '' TERM; echo set; while :; do sleep 0.1; done"], tmp_path / "log")
    end = time.monotonic() + 120
    while "set" not in (tmp_path / "log").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.stop(0.3)
    assert not process.is_running()


def test_nobody_listens_on_a_socket_that_is_not_there(tmp_path: Path) -> None:
    assert listener(tmp_path / "absent.sock") is None
