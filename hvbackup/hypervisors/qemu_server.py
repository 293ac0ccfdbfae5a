"""The folder of a lease, and QEMU's NBD server in it: one for each process, so it may be somebody else's already."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hvbackup.errors import Busy
from hvbackup.hypervisors.qemu_config import CommandLine
from hvbackup.hypervisors.qemu_names import StoreNames
from hvbackup.hypervisors.qmp import CommandRefused, Peer, Qmp
from hvbackup.nbd.uri import NbdUri

SOCKET = "nbd.sock"

_UNIX_PATH_MAX_BYTES = 107
_UCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Server:
    """Where the server of a QEMU listens."""

    at: NbdUri

    def export(self, name: str) -> NbdUri:
        """The address of one export."""
        return NbdUri(name, self.at.host, self.at.port, self.at.socket)


def socket_path(folder: Path) -> Path:
    """Where the server of a lease listens: in its folder, or in a short one of the same name where that is too long."""
    path = folder / SOCKET
    return (
        path if len(os.fsencode(path)) <= _UNIX_PATH_MAX_BYTES else Path(tempfile.gettempdir()) / folder.name / SOCKET
    )


def start(qmp: Qmp, folder: Path, line: CommandLine, names: StoreNames) -> Server:
    """A server we can reach: our own, or the one that QEMU was started with."""
    path = socket_path(folder)
    if path.parent != folder:
        make_folder(path.parent, qmp.peer)
    try:
        qmp.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    except CommandRefused as refused:
        if "already running" not in refused.reason:
            raise
        return _running(qmp, folder, line, names)
    return Server(NbdUri(socket=str(path)))


def make_folder(folder: Path, peer: Peer) -> None:
    """A private folder in which QEMU's user may work."""
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError as error:
        raise Busy(f"Folder {folder} is there already: this lease was used before; release it first") from error
    if os.geteuid() == 0:
        os.chown(folder, peer.uid, peer.gid)


def remove_folder(folder: Path) -> None:
    """The folder of a lease is gone with everything in it, whoever else removes things from it meanwhile."""
    for path in {folder, socket_path(folder).parent}:
        while path.exists():
            with contextlib.suppress(FileNotFoundError):  # also where one file of many went before we came to it
                shutil.rmtree(path)


def stop(qmp: Qmp, folder: Path) -> bool:
    """Stop the server if it is the one of this lease and nobody else exports through it; whether it is gone."""
    if not _listens(qmp, socket_path(folder)):
        return True
    if any(export["type"] == "nbd" for export in qmp.command("query-block-exports")):
        return False
    qmp.command("nbd-server-stop")
    return True


def is_dead(path: Path) -> bool:
    """Whether nobody listens at a socket, for certain."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2.0)
        try:
            sock.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:
            return False
    return False


def _running(qmp: Qmp, folder: Path, line: CommandLine, names: StoreNames) -> Server:
    for option in line.option("nbd-server"):
        if (found := address(option, line.cwd)) is not None:
            return Server(found)
    for left in map(socket_path, sorted(folder.parent.glob(f"{names.prefix}*"))):
        if _listens(qmp, left):
            return Server(NbdUri(socket=str(left)))
    raise Busy(
        f"QEMU at {qmp.path} runs an NBD server for somebody else, and has only one; "
        "end the other job (or stop that server with nbd-server-stop) and try again"
    )


def _listens(qmp: Qmp, path: Path) -> bool:
    """Whether this QEMU, and no other process, is behind the socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2.0)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            return False
        pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(pid) and pid == qmp.peer.pid


def address(option: str, cwd: str) -> NbdUri | None:
    """The address in a --nbd-server option; None when we can't use it (TLS, a file descriptor)."""
    given = _flat(json.loads(option)) if option.startswith("{") else dict(_pairs(option))
    if given.get("tls-creds"):
        return None
    if given.get("addr.type") == "unix" and given.get("addr.path"):
        return NbdUri(socket=str(Path(cwd) / given["addr.path"]))
    if given.get("addr.type") == "inet" and given.get("addr.port", "").isdigit():
        return NbdUri(host=given.get("addr.host") or "localhost", port=int(given["addr.port"]))
    return None


def _pairs(option: str) -> list[tuple[str, str]]:
    """Key and value of each part; QEMU writes a comma inside a value twice."""
    parts = option.replace(",,", "\0").split(",")
    return [(key, value.replace("\0", ",")) for key, _, value in (part.partition("=") for part in parts)]


def _flat(raw: object, prefix: str = "") -> dict[str, str]:
    if not isinstance(raw, dict):
        return {prefix.rstrip("."): str(raw)}
    return {key: value for name, below in raw.items() for key, value in _flat(below, f"{prefix}{name}.").items()}
