"""Any NBD export as a machine: real servers of every temper."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from hvbackup import extents
from hvbackup.errors import HostUnreachable, NotFound, ReadFailed, UsageError
from hvbackup.hypervisors.changedlist import MARK
from hvbackup.hypervisors.nbdsource import DISK_ID, NbdSource, NbdSpec
from hvbackup.model import Consistency, Continuity, LeaseId, Machine, MachineId, MiB
from hvbackup.nbd.client import Settings
from hvbackup.nbd.uri import NbdUri
from tests.hypervisors.imagerig import content, frozen, make, poke, run, wait_for

pytestmark = pytest.mark.real

PATIENT = Settings(connect_seconds=60, reply_seconds=20)
Serve = Callable[..., NbdUri]


@pytest.fixture
def serve() -> Generator[Serve]:
    """Starts a server on a socket of its own: `serve("nbdkit", "memory", "1M")`, `serve("qemu-nbd", "-r", path)`."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hvb", dir="/tmp")))

        def start(program: str, *arguments: str | Path, export: str = "") -> NbdUri:
            socket = folder / "s"
            given = ["-f", "--unix", socket] if program == "nbdkit" else ["-k", socket]
            stack.enter_context(server(folder, [program, *map(str, given), *map(str, arguments)]))
            return NbdUri(export, socket=str(socket))

        yield start


@contextmanager
def server(folder: Path, command: list[str]) -> Generator[None]:
    """It listens: its socket is there before it does, its process id only after that."""
    listens = folder / "pid"
    option = "--pid-file" if command[0] == "qemu-nbd" else "--pidfile"
    process = subprocess.Popen([command[0], option, str(listens), *command[1:]], stderr=subprocess.DEVNULL)
    try:
        wait_for(listens.exists)
        yield
    finally:
        process.kill()
        process.wait(120)


def source(uri: NbdUri, *, bitmap: str = "", changed: Path | None = None, name: str = "") -> NbdSource:
    return NbdSource(NbdSpec(uri, bitmap, changed), name=name, settings=PATIENT)


@pytest.mark.parametrize("size", [1, 513, 3 * MiB + 123])
def test_an_export_is_a_machine_with_one_disk(serve: Serve, tmp_path: Path, size: int) -> None:
    (tmp_path / "disk").write_bytes(bytes(size // 2) + b"x" * (size - size // 2))
    uri = serve("nbdkit", "file", tmp_path / "disk", export="vm")
    [machine] = source(uri).machines()
    assert (machine.id, machine.name, machine.platform) == (str(uri), "vm", "nbd")
    [named] = source(uri, name="database").machines()
    assert (named.id, named.name) == (machine.id, "database")
    with frozen(source(uri)) as found:
        [disk] = found.disks
        changes = disk.changes(None)
        assert disk.disk.size == size
        assert content(disk) == content(disk, changes.data) == (tmp_path / "disk").read_bytes()
        assert found.verify() == []
        assert disk.token is not None
        assert disk.token.kind == MARK


def test_holes_are_not_read_where_the_server_knows_them(serve: Serve) -> None:
    with frozen(source(serve("nbdkit", "sparse-random", "1G", "percent=1", "seed=1"))) as found:
        assert 0 < extents.total(found.disks[0].changes(None).data) < 100 * MiB
    assert found.machine.disks[0].size == 1024 * MiB


def test_a_server_that_knows_no_holes_is_read_whole(serve: Serve) -> None:
    with frozen(source(serve("nbdkit", "--no-sr", "memory", "1M"))) as found:
        assert found.disks[0].changes(None).data.tolist() == [[0, MiB]]
        assert content(found.disks[0]) == bytes(MiB)


def test_a_server_for_one_client_gets_one(serve: Serve, tmp_path: Path) -> None:
    """A plain qemu-nbd serves one client and ends with it; several readers, `changes` and `verify` share that one."""
    path = make(tmp_path / "vm.qcow2", MiB)
    poke(path, "write -P 5 0 1M")
    uri = serve("qemu-nbd", "-f", "qcow2", path)
    client = source(uri)
    machine = Machine(MachineId(str(uri)), "vm", "nbd")
    with client.snapshot(machine, LeaseId("l"), {}, None) as found:
        [disk] = found.disks
        readers = [disk.open() for _ in range(client.can.readers)]
        for reader in readers:
            buffer = bytearray(MiB)
            reader.read_into(0, memoryview(buffer))
            assert buffer == b"\x05" * MiB
            reader.close()
        assert disk.changes(None).data.tolist() == [[0, MiB]]
        assert found.verify() == []


def test_a_bitmap_of_the_server_counts_from_the_second_point_on(serve: Serve, tmp_path: Path) -> None:
    path = make(tmp_path / "vm.qcow2", 4 * MiB)
    poke(path, "write -P 1 0 1M")
    run("qemu-img", "bitmap", "--add", path, "since-monday")
    poke(path, "write -P 2 64k 64k", "write -z 192k 64k")
    uri = serve("qemu-nbd", "-t", "-r", "-f", "qcow2", "-B", "since-monday", path)
    with frozen(source(uri, bitmap="since-monday")) as found:
        token = found.disks[0].token
        assert token is not None
        assert found.disks[0].changes(None).continuity is Continuity.UNKNOWN
    with frozen(source(uri, bitmap="since-monday"), {DISK_ID: token}, "two") as found:
        changes = found.disks[0].changes(token)
        assert changes.continuity is Continuity.INCREMENTAL
        assert (changes.data.tolist(), changes.zero.tolist()) == ([[65536, 65536]], [[196608, 65536]])
    with frozen(source(uri, bitmap="since-friday"), {DISK_ID: token}, "three") as found:
        changes = found.disks[0].changes(token)
        assert changes.continuity is Continuity.UNKNOWN
        assert "does not show the bitmap since-friday" in changes.reason
    with frozen(source(uri), {DISK_ID: token}, "four") as found:
        assert found.disks[0].changes(token).reason == ""


def test_a_list_of_changes_counts_from_the_second_point_on(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "changed").write_text("0 100\n")
    uri = serve("nbdkit", "memory", "1M")
    with frozen(source(uri, changed=tmp_path / "changed")) as found:
        [disk] = found.disks
        assert disk.changes(None).continuity is Continuity.UNKNOWN
        assert disk.changes(disk.token).continuity is Continuity.INCREMENTAL
    (tmp_path / "changed").write_text(f"{MiB} 1\n")
    with frozen(source(uri, changed=tmp_path / "changed")) as found, pytest.raises(UsageError, match="line 1"):
        found.disks[0].changes(found.disks[0].token)


def test_bytes_that_cannot_be_read_are_named_and_the_rest_is_read(serve: Serve, tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    faults = ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}"]
    with frozen(source(serve("nbdkit", "--filter=error", "memory", "1M", *faults))) as found:
        trigger.touch()
        with pytest.raises(ReadFailed, match=r"(?i)at 0.*input/output error"):
            content(found.disks[0])
        trigger.unlink()
        assert content(found.disks[0]) == bytes(MiB)


def test_a_slow_server_is_waited_for(serve: Serve) -> None:
    uri = serve("nbdkit", "--filter=delay", "memory", "8k", "rdelay=300ms")
    with frozen(source(uri)) as found:
        assert content(found.disks[0]) == bytes(8192)


def test_a_hung_server_is_named(serve: Serve) -> None:
    uri = serve("nbdkit", "--filter=delay", "memory", "8k", "rdelay=100")
    hasty = NbdSource(NbdSpec(uri), settings=replace(PATIENT, reply_seconds=1))
    with frozen(hasty) as found, pytest.raises(HostUnreachable, match=r"no answer within 1 seconds"):
        content(found.disks[0])


def test_a_server_that_went_away_gives_no_point(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hvb", dir="/tmp") as folder:
        socket = Path(folder) / "s"
        with ExitStack() as stack:
            stack.enter_context(server(socket.parent, ["nbdkit", "-f", "--unix", str(socket), "memory", "1M"]))
            with frozen(source(NbdUri(socket=str(socket)))) as found:
                stack.close()
                with pytest.raises(ReadFailed, match="went away before the point was made"):
                    found.verify()
        with pytest.raises(HostUnreachable, match="Cannot connect"):
            source(NbdUri(socket=str(socket))).machines()


def test_what_cannot_be_done_is_refused(serve: Serve) -> None:
    hypervisor = source(serve("nbdkit", "null", "1M"))
    [machine] = hypervisor.machines()
    assert machine.name == "s"
    wrong = Machine(MachineId("nbd://elsewhere"), "gone", "nbd")
    for asked, level, error in ((machine, Consistency.FILESYSTEM, UsageError), (wrong, None, NotFound)):
        with pytest.raises(error), hypervisor.snapshot(asked, LeaseId("l"), {}, level):
            pytest.fail("A snapshot began")
    hypervisor.release(machine, None, [])
