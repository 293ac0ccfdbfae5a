"""What others do between two calls of ours, planted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import libvirt
import pytest

from hvbackup.errors import Busy, HostUnreachable
from hvbackup.files import Files
from hvbackup.hypervisors import libvirt_away, libvirt_sidecar, qemu_server
from hvbackup.hypervisors.libvirt_host import Host, LibvirtRefused
from hvbackup.hypervisors.libvirt_pull import Pull
from hvbackup.hypervisors.libvirt_room import Room
from hvbackup.hypervisors.libvirt_sidecar import TPM, Sidecar

URI = "qemu:///system"


def refusal(code: int, domain: int = libvirt.VIR_FROM_QEMU) -> libvirt.libvirtError:
    error = libvirt.libvirtError("planted")
    error.err = (code, domain, "planted", libvirt.VIR_ERR_ERROR, "", "", "", -1, -1)
    return error


# -- a backup job that ends while its end is asked for -----------------------------------------------------------------


class Ending:
    """A domain whose backup job can't be aborted, and ends by itself meanwhile, or does not."""

    def __init__(self, *, ends: bool) -> None:
        self._ends, self._open = ends, True

    def backup_xml(self) -> str:
        disk = "<disk name='vda' backup='yes' type='file' exportname='hvb-1-vda'/>" if self._open else ""
        return f"<domainbackup><disks>{disk}</disks></domainbackup>"

    def abort_job(self) -> None:
        self._open = not self._ends
        raise LibvirtRefused(URI, "ending a job", refusal(libvirt.VIR_ERR_OPERATION_INVALID))

    def paused_by_error(self) -> bool:
        return False


def end(domain: Ending) -> None:
    room = SimpleNamespace(limits=SimpleNamespace(settle_seconds=0.0))
    machine = SimpleNamespace(name="m1")
    Pull(cast(Any, room), cast(Any, domain), cast(Any, machine)).end_job("hvb-1-")


def test_a_job_that_ends_before_it_is_aborted_has_ended() -> None:
    end(Ending(ends=True))


def test_a_job_that_can_not_be_aborted_and_goes_on_is_told_of() -> None:
    with pytest.raises(LibvirtRefused):
        end(Ending(ends=False))


# -- a folder that two remove --------------------------------------------------------------------------------------------


def test_a_folder_goes_even_if_somebody_else_removes_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, remove = tmp_path / "lease", shutil.rmtree
    folder.mkdir()
    (folder / "left").write_bytes(b"")

    def halfway(path: Path) -> None:
        monkeypatch.setattr(shutil, "rmtree", remove)
        raise FileNotFoundError(path / "gone")

    monkeypatch.setattr(shutil, "rmtree", halfway)
    qemu_server.remove_folder(folder)
    assert not folder.exists()


# -- a connection that breaks while events are asked for -----------------------------------------------------------------


class Connection:
    """One of which a call may fail, or that breaks during one."""

    def __init__(self, fails: str = "", breaks: str = "") -> None:
        self._fails, self._breaks, self._alive = fails, breaks, True
        self.lost: Callable[..., None] | None = None
        self.ids: set[int] = set()

    def isAlive(self) -> bool:  # noqa: N802 - libvirt's
        return self._alive

    def domainEventRegisterAny(self, _: None, event: int, __: object, ___: None) -> int:  # noqa: N802
        self._at("event")
        self.ids.add(event)
        return event

    def domainEventDeregisterAny(self, number: int) -> None:  # noqa: N802
        self.ids.remove(number)

    def registerCloseCallback(self, lost: Callable[..., None], _: None) -> None:  # noqa: N802
        self._at("close")
        self.lost = lost

    def unregisterCloseCallback(self) -> None:  # noqa: N802
        self.lost = None

    def _at(self, call: str) -> None:
        if self._fails == call:
            raise refusal(libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_FROM_RPC)
        if self._breaks == call:
            self._alive = False
            if self.lost:
                self.lost()


def watched(connection: Connection, lost: list[bool]) -> Callable[[], None]:
    host = Host(URI)
    host._connection = cast(Any, connection)
    return host.watch(lambda _: None, lambda: lost.append(True))


@pytest.mark.parametrize("call", ["event", "close"])
def test_a_daemon_that_dies_while_it_is_asked_for_events_is_told_as_unreachable(call: str) -> None:
    connection = Connection(fails=call)
    with pytest.raises(HostUnreachable, match="Cannot reach"):
        watched(connection, [])
    assert (connection.lost, connection.ids) == (None, set())


@pytest.mark.parametrize("call", ["event", "close"])
def test_a_connection_that_breaks_before_all_events_are_asked_for_is_not_watched(call: str) -> None:
    with pytest.raises(HostUnreachable, match="broke"):
        watched(Connection(breaks=call), [])


def test_a_connection_is_watched_until_it_breaks() -> None:
    connection, lost = Connection(), list[bool]()
    stop = watched(connection, lost)
    assert connection.lost
    connection.lost()
    assert lost == [True]
    stop()
    assert not connection.ids


# -- the storage of another host -----------------------------------------------------------------------------------------


class Storage:
    """A host with files, where nobody may be beside us."""

    uri = URI

    def __init__(self, room: Path) -> None:
        self._room, self.files = room, dict[str, bytes]()

    def put_file(self, path: str, content: bytes, *_: int) -> None:
        self._is_ours()
        self.files[path] = content

    def remove_file(self, path: str) -> None:
        self._is_ours()
        self.files.pop(path, None)

    def _is_ours(self) -> None:
        [lock] = self._room.glob("libvirt-storage-*.lock")
        with pytest.raises(Busy), Files(self._room).owner(lock.name, "It"):
            pytest.fail("somebody else may use the pool")


def test_whoever_removes_scratch_on_another_host_is_alone_there(tmp_path: Path) -> None:
    """Two of us would share a pool that one of them forgets while the other uses it."""
    runtime, folder = tmp_path / "run", tmp_path / "lease"
    folder.mkdir()
    host = Storage(runtime)
    room = cast(Room, SimpleNamespace(runtime=runtime, uid=0, gid=0))
    assert libvirt_away.put(room, cast(Host, host), folder, {"/a": b"1", "/b": b"2"})
    assert set(host.files) == {"/a", "/b"}
    shutil.rmtree(runtime)  # as after a restart of our host
    for _ in range(2):
        libvirt_away.remove(cast(Host, host), folder)
        assert not host.files
        assert not (folder / libvirt_away.RECORD).exists()


# -- a TPM that writes ---------------------------------------------------------------------------------------------------


def test_a_file_of_a_tpm_that_gets_another_name_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tpm2-00.permall").write_bytes(b"old")
    new, read = tmp_path / "TMP2-00.permall", Path.read_bytes
    new.write_bytes(b"new")

    def renamed(path: Path) -> bytes:
        if path == new:
            new.replace(tmp_path / "tpm2-00.permall")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", renamed)
    assert b"new" in libvirt_sidecar.read(Sidecar(TPM, str(tmp_path))).data


def test_a_folder_of_a_tpm_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(HostUnreachable, match="can't be read"):
        libvirt_sidecar.read(Sidecar(TPM, str(tmp_path / "none")))
