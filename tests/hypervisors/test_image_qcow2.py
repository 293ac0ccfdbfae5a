"""qcow2 and its relatives: served by our own qemu-nbd, tracked by persistent bitmaps of our own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import pytest

from hvbackup import extents
from hvbackup.errors import Busy, ReadFailed, UsageError
from hvbackup.hypervisors import imageformat, qemuimg, qemunbd
from hvbackup.hypervisors.changedlist import MARK
from hvbackup.hypervisors.image import ImageSource, ImageSpec
from hvbackup.hypervisors.imagedisk import TOKEN_KIND
from hvbackup.model import Continuity, DiskId, KiB, LeaseId, MiB, Token
from tests.hypervisors.imagerig import (
    STORE,
    content,
    frozen,
    make,
    poke,
    run,
    running_machine,
    runtime,
    servers,
    source,
    wait_for,
)

pytestmark = pytest.mark.real

VM = DiskId("vm")


@pytest.fixture
def run_folder() -> Generator[Path]:
    with runtime() as folder:
        yield folder
        assert servers(folder) == []
        assert not list(folder.glob("*"))


def flags(path: Path) -> Mapping[str, Sequence[str]]:
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {entry["name"]: entry["flags"] for entry in found}


def plain(path: Path, format_: str = "qcow2") -> bytes:
    """The guest's view, by qemu-img."""
    run("qemu-img", "convert", "-f", format_, "-O", "raw", path, path.with_suffix(".copy"))
    return path.with_suffix(".copy").read_bytes()


def capture(hypervisor: ImageSource, since: Mapping[DiskId, Token], lease: str) -> dict[DiskId, Token]:
    """A committed capture; the tokens it names."""
    with frozen(hypervisor, since, lease) as found:
        tokens = {disk.disk.id: disk.token for disk in found.disks if disk.token}
    hypervisor.release(found.machine, LeaseId(lease), list(tokens.values()))
    return tokens


def reason(hypervisor: ImageSource, since: Mapping[DiskId, Token]) -> str:
    """Why a capture has to compare; "" when it has not."""
    with frozen(hypervisor, since, "ask") as found:
        [disk] = found.disks
        changes = disk.changes(since[disk.disk.id])
        assert (changes.continuity is Continuity.UNKNOWN) == bool(changes.reason)
        assert content(disk) == content(disk, changes.data) or not changes.reason
    hypervisor.release(found.machine, LeaseId("ask"), list(since.values()))
    return changes.reason


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 512, 65536 - 512, 65536 + 512, 3 * MiB + 1536])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_both_versions_and_every_size_are_read(tmp_path: Path, run_folder: Path, compat: str, size: int) -> None:
    path = make(tmp_path / "vm.qcow2", size, "-o", f"compat={compat}")
    if size:
        poke(path, f"write -P 7 {size - 512} 512", "write -P 8 0 512")
    with frozen(source(run_folder, path)) as found:
        [disk] = found.disks
        changes = disk.changes(None)
        assert disk.disk.size == size
        assert content(disk) == content(disk, changes.data) == plain(path)
        assert found.verify() == []
        assert disk.token is not None
        assert disk.token.kind == (TOKEN_KIND if compat == "1.1" and size else MARK)
        assert found.notes == []
    assert bool(flags(path)) == (compat == "1.1" and size > 0)


@pytest.mark.parametrize(
    "option", ["preallocation=metadata", "preallocation=full", "extended_l2=on", "cluster_size=4k"]
)
def test_every_layout_reads_the_same(tmp_path: Path, run_folder: Path, option: str) -> None:
    path = make(tmp_path / "vm.qcow2", 8 * MiB, "-o", option)
    poke(path, "write -P 1 1M 100k", "write -z 1050k 8k", "write -P 3 8387584 1024")
    with frozen(source(run_folder, path)) as found:
        [disk] = found.disks
        assert content(disk, disk.changes(None).data) == plain(path)


@pytest.mark.parametrize("format_", ["qed", "vmdk", "vdi", "vhdx", "vpc"])
def test_what_qemu_reads_we_read(tmp_path: Path, run_folder: Path, format_: str) -> None:
    path = tmp_path / f"vm.{format_}"
    run("qemu-img", "create", "-q", "-f", format_, path, "16M")
    poke(path, "write -P 9 5M 70000", format_=format_)
    with frozen(source(run_folder, path)) as found:
        [disk] = found.disks
        data = content(disk, disk.changes(None).data)
        assert data == plain(path, format_)
        assert data[5 * MiB :][:70000] == b"\x09" * 70000
        assert disk.token is not None
        assert disk.token.kind == MARK


def test_64_tib_are_described_and_read(tmp_path: Path, run_folder: Path) -> None:
    size = 64 << 40
    path = make(tmp_path / "vm.qcow2", size, "-o", "cluster_size=2M")
    poke(path, f"write -P 5 {size - 4096} 4096")
    with frozen(source(run_folder, ImageSpec(path, track=False))) as found:
        changes = found.disks[0].changes(None)
        assert extents.total(changes.data) == 2 * MiB
        buffer = bytearray(4096)
        reader = found.disks[0].open()
        reader.read_into(size - 4096, memoryview(buffer))
        reader.close()
        assert buffer == b"\x05" * 4096


def test_raw_and_qcow2_are_one_machine(tmp_path: Path, run_folder: Path) -> None:
    make(tmp_path / "vm.qcow2", MiB)
    (tmp_path / "data.raw").write_bytes(b"d" * 1001)
    with frozen(source(run_folder, tmp_path / "vm.qcow2", tmp_path / "data.raw")) as found:
        assert [content(disk) for disk in found.disks] == [bytes(MiB), b"d" * 1001]
        formats = [(disk["id"], disk["format"]) for disk in found.config.portable["disks"]]
        assert formats == [("vm", "qcow2"), ("data", "raw")]


def test_sixteen_readers_at_once(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    poke(path, "write -P 6 0 1M")
    with frozen(source(run_folder, path)) as found:
        readers = [found.disks[0].open() for _ in range(qemunbd.CONNECTIONS_MAX - 1)]
        for reader in readers:
            buffer = bytearray(MiB)
            reader.read_into(0, memoryview(buffer))
            assert buffer == b"\x06" * MiB
        for reader in readers:
            reader.close()


# --- tracking --------------------------------------------------------------------------------------------------------


def test_the_second_capture_reads_what_a_machine_wrote_in_between(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", 16 * MiB)
    poke(path, "write -P 1 0 4M")
    run("qemu-img", "bitmap", "--add", path, "libvirt-7")
    tokens = capture(source(run_folder, path), {}, "one")
    poke(path, "write -P 2 1M 4k", "write -z 2M 64k", "discard 3M 64k")
    with frozen(source(run_folder, path), tokens, "two") as found:
        changes = found.disks[0].changes(tokens[VM])
        assert changes.continuity is Continuity.INCREMENTAL
        assert changes.data.tolist() == [[MiB, 64 * KiB]]
        assert changes.zero.tolist() == [[2 * MiB, 64 * KiB], [3 * MiB, 64 * KiB]]
        assert found.disks[0].token != tokens[VM]
        assert sorted(flags(path)) == sorted([tokens[VM].value, found.disks[0].token.value, "libvirt-7"])  # type: ignore[union-attr]
    source(run_folder, path).release(found.machine, None, [])
    assert flags(path) == {"libvirt-7": ["auto"]}


def test_a_capture_that_was_never_committed_costs_nothing(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", 16 * MiB)
    tokens = capture(source(run_folder, path), {}, "one")
    poke(path, "write -P 2 1M 64k")
    with contextlib.suppress(ZeroDivisionError), frozen(source(run_folder, path), tokens, "lost") as found:
        raise ZeroDivisionError
    poke(path, "write -P 3 5M 64k")
    source(run_folder, path).release(found.machine, LeaseId("lost"), list(tokens.values()))
    assert list(flags(path)) == [tokens[VM].value]
    with frozen(source(run_folder, path), tokens, "two") as found:
        assert found.disks[0].changes(tokens[VM]).data.tolist() == [[MiB, 64 * KiB], [5 * MiB, 64 * KiB]]
    source(run_folder, path).release(found.machine, None, [])


def test_a_killed_machine_leaves_an_inconsistent_bitmap(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    tokens = capture(source(run_folder, path), {}, "one")
    with running_machine(path, "qcow2") as machine:
        machine.send_signal(signal.SIGKILL)
        machine.wait(120)
    assert "in-use" in flags(path)[tokens[VM].value]
    assert "inconsistent: the machine was not stopped cleanly" in reason(source(run_folder, path), tokens)
    fresh = capture(source(run_folder, path), tokens, "two")
    assert list(flags(path)) == [fresh[VM].value]
    assert reason(source(run_folder, path), fresh) == ""


def test_what_bitmaps_can_suffer_is_said(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    tokens = capture(source(run_folder, path), {}, "one")
    run("qemu-img", "bitmap", "--disable", path, tokens[VM].value)
    assert "was switched off and missed changes" in reason(source(run_folder, path), tokens)
    run("qemu-img", "bitmap", "--remove", path, tokens[VM].value)
    assert "is not in" in reason(source(run_folder, path), tokens)
    other = {VM: Token("qemu-bitmap", tokens[VM].value, tokens[VM].life)}
    assert "is not in" in reason(source(run_folder, path), other)


def test_a_base_that_changed_is_not_trusted(tmp_path: Path, run_folder: Path) -> None:
    base = make(tmp_path / "base.qcow2", MiB)
    path = make(tmp_path / "vm.qcow2", MiB, "-b", str(base), "-F", "qcow2")
    tokens = capture(source(run_folder, path), {}, "one")
    assert reason(source(run_folder, path), tokens) == ""
    poke(base, "write -P 4 0 64k")
    assert "The files below" in reason(source(run_folder, path), tokens)
    with frozen(source(run_folder, path), tokens) as found:
        assert content(found.disks[0])[: 64 * KiB] == b"\x04" * 64 * KiB


def test_a_grown_image_is_still_tracked(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    tokens = capture(source(run_folder, path), {}, "one")
    run("qemu-img", "resize", "-q", path, "2M")
    poke(path, "write -P 4 1536k 64k")
    with frozen(source(run_folder, path), tokens, "two") as found:
        changes = found.disks[0].changes(tokens[VM])
        assert changes.data.tolist() == [[1536 * KiB, 64 * KiB]]
        assert extents.union(changes.data, changes.zero).tolist() == [[MiB, MiB]]


def test_tracking_can_be_left_out(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    before = path.read_bytes()
    capture(source(run_folder, ImageSpec(path, track=False)), {}, "one")
    assert path.read_bytes() == before


def test_a_token_that_was_not_asked_for_proves_nothing(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    tokens = capture(source(run_folder, path), {}, "one")
    with frozen(source(run_folder, path), {}, "two") as found:
        assert "was not asked for" in found.disks[0].changes(tokens[VM]).reason


def test_a_list_takes_the_bitmaps_place(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    tokens = capture(source(run_folder, path), {}, "one")
    (tmp_path / "changed").write_text("0 512")
    with frozen(source(run_folder, ImageSpec(path, changed=tmp_path / "changed")), tokens, "two") as found:
        changes = found.disks[0].changes(tokens[VM])
        assert (changes.continuity, changes.zero.tolist()) == (Continuity.INCREMENTAL, [[0, 512]])


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_a_running_machine_is_refused_untouched(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    hypervisor = source(run_folder, path)
    [machine] = hypervisor.machines()
    with running_machine(path, "qcow2"):
        for attempt in (hypervisor.machines, lambda: hypervisor.snapshot(machine, LeaseId("l"), {}, None).__enter__()):
            with pytest.raises(Busy, match=r"vm\.qcow2 is in use by a running machine"):
                attempt()
        with pytest.raises(Busy):
            hypervisor.release(machine, None, [])
    assert flags(path) == {}


def test_no_machine_starts_while_we_read(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    with frozen(source(run_folder, path)) as found:
        with pytest.raises(subprocess.CalledProcessError) as refused:
            poke(path, "write 0 512")
        assert 'Failed to get "write" lock' in refused.value.stderr
        with pytest.raises(Busy, match="has an open snapshot"), frozen(source(run_folder, path), lease="other"):
            pytest.fail("A second snapshot began")
        assert content(found.disks[0]) == bytes(MiB)


def test_a_file_that_changes_behind_qemus_back_is_noted(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    poke(path, "write -P 1 0 1M")
    with frozen(source(run_folder, path)) as found:
        os.utime(path)
        [note] = found.verify()
        assert "was written to while it was read: this point may mix moments" in note
        os.truncate(path, 70000)
        with pytest.raises(ReadFailed, match="shrank or vanished"):
            found.verify()


@pytest.mark.parametrize("format_", [f for f in imageformat.FORMATS if f != "raw"])
def test_rubbish_is_refused_in_the_programs_words(tmp_path: Path, run_folder: Path, format_: str) -> None:
    path = tmp_path / "vm"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(ReadFailed, match=r"vm: qemu-img can't read it: .*\w"):
        source(run_folder, ImageSpec(path, format_)).machines()


def test_a_corrupt_image_is_noted(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\x02")  # the corrupt bit of the incompatible features
    with frozen(source(run_folder, path)) as found:
        notes = " ".join(found.notes)
        assert "is marked corrupt" in notes
        assert "Changes can't be recorded" in notes
        assert found.disks[0].token is not None
        assert found.disks[0].token.kind == MARK


def test_a_missing_program_names_its_package(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UsageError, match=r"qemu-img is needed .* apt install qemu-utils"):
        source(run_folder, path).machines()
    for program in ("qemu-nbd", "setpriv"):
        with pytest.raises(UsageError, match=f"{program} is needed"):
            qemunbd.serve(path, "qcow2", tmp_path, 0)
        (tmp_path / "bin" / program).symlink_to("/bin/true")


def test_a_long_path_for_the_socket_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    with pytest.raises(UsageError, match="too long for a socket"), frozen(source(tmp_path / ("x" * 90), path)):
        pytest.fail("A snapshot began")


def test_a_folder_of_somebody_else_is_refused(run_folder: Path) -> None:
    (run_folder / "lease").mkdir(parents=True, mode=0o755)
    with pytest.raises(UsageError, match="belongs to somebody else or is open to others"):
        qemunbd.private_folder(run_folder, "lease")
    shutil.rmtree(run_folder / "lease")


def test_a_hanging_qemu_img_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "qemu-img"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(qemuimg, "_INFO_SECONDS", 0.2)
    with pytest.raises(Exception, match=r"vm\.qcow2: qemu-img info did not end within 0\.2 seconds") as caught:
        qemuimg.info(tmp_path / "vm.qcow2", "qcow2")
    assert getattr(caught.value, "exit_code", 0) == 4


# --- our own death ---------------------------------------------------------------------------------------------------

_DIE = """
import os, sys
from pathlib import Path
from hvbackup.hypervisors import qemunbd
from hvbackup.hypervisors.image import ImageSource, ImageSpec
from hvbackup.model import LeaseId
when, path, run = sys.argv[1:]
if when == "starting":
    qemunbd._connect = lambda *_: os.kill(os.getpid(), 9)
hypervisor = ImageSource([ImageSpec(Path(path))], "00c0ffee", runtime=Path(run))
[machine] = hypervisor.machines()
with hypervisor.snapshot(machine, LeaseId("dead"), {}, None) as frozen:
    reader = frozen.disks[0].open()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("when", ["starting", "reading"])
def test_when_we_are_killed_nothing_keeps_running(tmp_path: Path, run_folder: Path, when: str) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    done = subprocess.run([sys.executable, "-c", _DIE, when, str(path), str(run_folder)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not servers(run_folder))
    assert len(list(run_folder.iterdir())) == 1
    assert len(flags(path)) == 1
    hypervisor = source(run_folder, path)
    [machine] = hypervisor.machines()
    with pytest.raises(Busy, match="release its lease"), frozen(hypervisor):
        pytest.fail("A snapshot began over a dead one")
    for _ in range(2):
        hypervisor.release(machine, LeaseId("dead"), [])
        assert flags(path) == {}
        assert not list(run_folder.iterdir())


def test_release_ends_a_server_and_not_a_stranger(tmp_path: Path, run_folder: Path) -> None:
    path = make(tmp_path / "vm.qcow2", MiB)
    folder = qemunbd.private_folder(run_folder, f"hvb-{STORE}-x")
    server = qemunbd.serve(path, "qcow2", folder, 0)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (folder / "d1.pid").write_text(f"{stranger.pid} 12345\n")
        (folder / "d2.pid").write_text("torn")
        qemunbd.release(run_folder, f"hvb-{STORE}-")
        assert server.process.wait(120) == -signal.SIGKILL
        assert not folder.exists()
        assert stranger.poll() is None
    finally:
        server.stop()
        stranger.kill()
        stranger.wait(120)
