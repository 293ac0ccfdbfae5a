"""Everything that can be wrong outside of us: a message that names it, the documented exit code, no damage."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.cli.rig import PRIVATE_MOUNTS, World, make_disk
from tests.nbd.conftest import listens, wait_for

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\r\n'
)


def edited(descriptor: Path, **fields: object) -> None:
    descriptor.write_text(json.dumps(json.loads(descriptor.read_text()) | fields))


def points_of(world: World) -> list[str]:
    return [p["id"] for p in world.done("points", "--json").json["points"]]


# -- stores ----------------------------------------------------------------------------------------------------------------


def test_a_missing_store(world: World) -> None:
    message = world.refused(2, "points")
    assert str(world.store) in message
    assert "hvbackup init" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Signature: 8a477f597d28d172789f06886806bc55", "is not readable"),
        (b'{"id": 7}', "is not the description of a store"),
        (b"[]", "is not the description of a store"),
        (b"", "is not readable"),
        (b"\xff\xfe", "is not readable"),
    ],
)
def test_a_foreign_or_damaged_descriptor(world: World, content: bytes, said: str) -> None:
    world.store.mkdir()
    (world.store / "HVBACKUP").write_bytes(content)
    message = world.refused(2, "status")
    assert said in message
    assert str(world.store) in message
    world.refused(2, "init")
    assert (world.store / "HVBACKUP").read_bytes() == content


def test_a_store_of_an_unknown_version_or_cipher(stored: World) -> None:
    edited(stored.store / "HVBACKUP", format=9)
    assert "format 9" in stored.refused(2, "status")
    edited(stored.store / "HVBACKUP", format=1, cipher="rot13")
    assert "rot13" in stored.refused(2, "status")


def test_a_store_that_is_a_file(world: World) -> None:
    world.store.write_text("x")
    assert str(world.store) in world.refused(2, "status")


def test_two_stores_in_one_place(stored: World) -> None:
    assert "already" in stored.refused(2, "init")


def test_a_damaged_point_is_said_and_never_stands_for_another(stored: World) -> None:
    stored.done("backup", f"image:{stored.folder}/disk.raw")
    old, new = points_of(stored)
    [path] = (stored.store / "points").rglob(f"*{new}")
    path.write_bytes(path.read_bytes()[:-9])
    ran = stored.run("points", "--json", "--strict")
    assert ran.code == 3
    assert new in ran.err
    ran = stored.run("restore", "web1", "--to", stored.folder / "out", "--json")
    assert ran.code == 0
    assert ran.json["point"]["id"] == old
    assert new in ran.err, "whoever asked for the latest is told that it is not"
    ran = stored.run("check", "--json")
    assert ran.code == 20


# -- names and moments -----------------------------------------------------------------------------------------------------


def test_unknown_names_and_moments(stored: World) -> None:
    [point] = points_of(stored)
    to = ("--to", str(stored.folder / "out"))
    assert "did you mean web1?" in stored.refused(2, "restore", "wbe1", *to)
    assert "It has: disk" in stored.refused(2, "restore", "web1", "--disk", "sda", *to)
    assert point in stored.refused(2, "restore", "web1", "--at", "2001-01-01 00:00", *to)
    assert point in stored.refused(2, "restore", "web1", "--at", "0123456789abcdef", *to)
    assert "-10m" in stored.refused(2, "restore", "web1", "--at", "yesterday", *to)
    assert "-10m" in stored.refused(2, "map", "web1", "--at", "-10parsecs")
    assert not (stored.folder / "out").exists()


def test_a_target_without_its_folder(stored: World) -> None:
    assert "no directory" in stored.refused(2, "restore", "web1", "--disk", "disk", "--to", stored.folder / "a/b.raw")


# -- sources ---------------------------------------------------------------------------------------------------------------


def test_disks_that_are_not_there(stored: World) -> None:
    assert "gone.raw" in stored.refused(2, "backup", f"image:{stored.folder}/gone.raw")
    assert "neither a file nor" in stored.refused(2, "backup", f"image:{stored.folder}")
    assert "did you mean image:" in stored.refused(2, "backup", f"{stored.folder}/disk.raw")
    assert "x.list" in stored.refused(
        2, "backup", f"image:{stored.folder}/disk.raw", "--changed", stored.folder / "x.list"
    )
    assert len(points_of(stored)) == 1


def test_a_qmp_socket_that_is_absent_or_refused(stored: World) -> None:
    gone = stored.folder / "gone.sock"
    assert str(gone) in stored.refused(4, "backup", f"qemu:{gone}")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(gone))
    assert str(gone) in stored.refused(4, "backup", f"qemu:{gone}")


@contextmanager
def listening(path: Path, behave: Callable[[socket.socket], object]) -> Iterator[None]:
    """Somebody listens there, and does this with everybody who comes."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=behave, args=(client,), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join(120)


def test_a_service_that_takes_no_more_connections(world: World) -> None:
    path = world.folder / "run/api.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as server, ExitStack() as waiting:
        server.bind(str(path))
        server.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
        assert f"The service at {path} does not answer" in world.refused(4, "jobs")


def dies_half_way(client: socket.socket) -> None:
    with client:
        client.sendall(GREETING)
        client.recv(4096)
        client.sendall(b'{"return": {}}\r\n{"ret')


def speaks_another_language(client: socket.socket) -> None:
    with client:
        client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        client.recv(4096)


@pytest.mark.parametrize("behave", [dies_half_way, speaks_another_language])
def test_a_qmp_socket_that_dies_or_is_none(stored: World, behave: Callable[[socket.socket], object]) -> None:
    path = stored.folder / "qmp.sock"
    with listening(path, behave):
        assert str(path) in stored.refused(4, "backup", f"qemu:{path}")
    assert len(points_of(stored)) == 1


@pytest.mark.real
def test_a_qmp_socket_that_is_silent(stored: World) -> None:
    path = stored.folder / "qmp.sock"
    with listening(path, lambda client: time.sleep(100)):
        assert "No answer within" in stored.refused(4, "backup", f"qemu:{path}")


@contextmanager
def nbdkit(folder: Path, *words: str) -> Iterator[str]:
    """An nbdkit with these plugins and filters; its URI."""
    path = folder / "nbdkit.sock"
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), *words], stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: listens(path))
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.kill()
        process.wait(120)
        path.unlink(missing_ok=True)


@pytest.mark.real
def test_reads_that_fail_make_no_point(stored: World) -> None:
    disk = str(stored.folder / "disk.raw")
    with nbdkit(stored.folder, "--filter=error", "file", disk, "error-pread-rate=100%") as uri:
        assert uri in stored.refused(4, "backup", uri)
    assert len(points_of(stored)) == 1
    with nbdkit(stored.folder, "file", disk) as uri:
        assert stored.run("backup", uri).code == 0
    assert len(points_of(stored)) == 2


# -- who else is there -----------------------------------------------------------------------------------------------------


@contextmanager
def slow_backup(world: World, milliseconds: int = 1500) -> Iterator[subprocess.Popen[str]]:
    """A backup that is reading, and will be for long."""
    log = world.folder / "requests.log"
    slow = ("--filter=log", "--filter=delay", "--filter=noextents", "memory", "64M", f"delay-read={milliseconds}ms")
    with nbdkit(world.folder, *slow, f"logfile={log}") as uri:
        process = world.start("backup", uri, "--json")
        try:
            end = time.monotonic() + 120
            while not log.exists() or " Read id=" not in log.read_text():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end
                time.sleep(0.02)
            yield process
        finally:
            process.kill()
            process.wait(120)


@pytest.mark.real
def test_two_processes_on_one_store(stored: World) -> None:
    """The same machine is one process's at a time; others are captured beside it."""
    with slow_backup(stored, 20_000) as process:
        assert isinstance(process.args, list)
        uri = str(process.args[-2])
        message = stored.refused(5, "backup", uri)
        assert uri in message
        assert f"process {process.pid}" in message
        assert len(points_of(stored)) == 1, "readers are welcome meanwhile"
        [lease] = stored.done("status", "--json").json["leases"]
        assert lease["expired"] is False
        stored.done("backup", f"image:{stored.folder}/disk.raw")
        assert len(points_of(stored)) == 2
        assert process.poll() is None
    assert stored.run("backup", f"image:{stored.folder}/disk.raw").code == 0


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_backup_leaves_no_point_and_no_lock(stored: World, number: signal.Signals) -> None:
    with slow_backup(stored) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert json.loads(out)["error"]["kind"] == "Interrupted"
    assert err == "hvbackup: error: Interrupted; nothing that was committed is lost\n"
    assert len(points_of(stored)) == 1
    stored.done("backup", f"image:{stored.folder}/disk.raw")
    assert stored.done("check", "--deep", "--json").json["ok"]


@pytest.mark.real
def test_a_second_signal_ends_at_once_and_the_next_run_cleans_up(stored: World) -> None:
    """The first one ends things in order, and so waits for a read that hangs; the second waits for nothing."""
    with slow_backup(stored, 300_000) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # as make and sudo do: the same wish
        time.sleep(3)  # a second later it is another wish, counted from when the first was heard
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert json.loads(out)["error"]["kind"] == "Interrupted"
    assert err == "hvbackup: error: Interrupted again; the next run cleans up what this one left\n"
    stored.done("backup", f"image:{stored.folder}/disk.raw")
    assert not list((stored.store / "tmp").glob("*"))
    assert stored.done("check", "--deep", "--json").json["ok"]


def listens_to_signals(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM, which Python itself has not."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_ctrl_c_at_any_moment_ends_with_its_code_or_with_a_point(stored: World) -> None:
    source = f"image:{stored.folder}/disk.raw"
    before = points_of(stored)
    for milliseconds in (0, 20, 60, 120, 200, 300, 450, 650):
        process = stored.start("backup", source, "--json")
        while not listens_to_signals(process.pid):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode in (0, 130), err
        assert "Traceback" not in err, err
        assert json.loads(out).keys() & {"runs", "error"}
    assert points_of(stored)[: len(before)] == before
    stored.run("backup", source)
    assert stored.done("check", "--deep", "--json").json["ok"]


# -- room ------------------------------------------------------------------------------------------------------------------


def may_mount() -> bool:
    mount = "mount -t tmpfs -o size=1m none /mnt"
    return subprocess.run([*PRIVATE_MOUNTS, "sh", "-c", mount], check=False).returncode == 0


@pytest.mark.real
def test_a_full_disk_while_writing(world: World) -> None:
    """The point does not exist, and the next run succeeds when there is room again."""
    if not may_mount():
        pytest.skip("no small file system can be mounted here")
    make_disk(world.folder / "disk.raw", 6_000_128)
    program = shutil.which("sh") or "sh"
    run = " ".join(world.command())
    source = f"image:{world.folder}/disk.raw"
    script = f"""
        set -e
        mkdir {world.store}
        mount -t tmpfs -o size=3m none {world.store}
        {run} init --quiet
        code=0; {run} backup {source} --json > full.json 2> full.err || code=$?
        test $code = 1
        {run} points --json > none.json
        mount -o remount,size=64m {world.store}
        {run} backup {source} --json > room.json
        {run} check --deep --json > check.json
    """
    where = [*PRIVATE_MOUNTS, program, "-c", script]
    ran = subprocess.run(
        where, cwd=world.folder, env=world.environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, (ran, (world.folder / "full.err").read_text())
    said = json.loads((world.folder / "full.json").read_text())["error"]
    assert said["kind"] == "SpaceExhausted"
    assert str(world.store) in said["message"]
    assert json.loads((world.folder / "none.json").read_text())["points"] == []
    assert json.loads((world.folder / "room.json").read_text())["runs"][0]["point"]
    assert json.loads((world.folder / "check.json").read_text())["ok"] is True


def test_a_place_that_may_not_be_written(world: World) -> None:
    (world.folder / "file").write_text("x")
    assert "file" in world.refused(1, "init", world.folder / "file" / "store")


def test_what_has_a_copy_is_put_back(stored: World) -> None:
    [point] = [p for p in (stored.store / "points").rglob("*") if p.is_file()]
    point.unlink()
    assert stored.run("check").code == 20
    ran = stored.done("check", "--repair", "--json")
    assert ran.json["ok"] is True
    assert len(ran.json["repaired"]) == 1
    assert len(points_of(stored)) == 1
