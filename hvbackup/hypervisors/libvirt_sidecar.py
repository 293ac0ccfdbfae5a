"""What a machine keeps beside its disks: the firmware's variables and the state of an emulated TPM, as small disks.

They are captured with the disks, into the same chunks, and come back the same way.  Nothing tracks them, and nothing has to: a
token is the hash of the content, so an unchanged one is known, and one that changed is read whole.  A TPM's folder becomes a tar,
filled up with zeroes so that its size rarely changes; readers of tar stop there.
"""

from __future__ import annotations

import hashlib
import io
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvbackup import extents
from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors import Changes
from hvbackup.model import Continuity, Disk, DiskId, KiB, MiB, Token

NVRAM, TPM = DiskId("nvram"), DiskId("tpm")
TOKEN_KIND = "content"
STATE = Path("/var/lib/libvirt")  # of a daemon that runs as root
MAX_BYTES = 128 * MiB

_TAR_STEP = 256 * KiB
_READ_SECONDS = 20.0
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Where one is."""

    id: DiskId
    path: str


@dataclass(slots=True)
class SidecarDisk:
    """One at the moment of the snapshot."""

    disk: Disk
    token: Token | None
    data: bytes = field(repr=False)

    def changes(self, since: Token | None) -> Changes:
        """Nothing, or everything."""
        whole = extents.whole(self.disk.size)
        if since is None or since.kind != TOKEN_KIND:
            return Changes(Continuity.UNKNOWN, whole, extents.EMPTY, "No earlier checkpoint was given")
        same = self.token is not None and since.value == self.token.value
        return Changes(Continuity.INCREMENTAL, extents.EMPTY if same else whole, extents.EMPTY)

    def open(self) -> _Bytes:
        return _Bytes(self.data)


@dataclass(frozen=True, slots=True)
class _Bytes:
    data: bytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        buffer[:] = self.data[offset : offset + len(buffer)]

    def close(self) -> None:
        """Nothing to give back."""


def sidecars(uuid: str, nvram: str, *, tpm: bool, state: Path) -> Sequence[Sidecar]:
    """Those of one domain."""
    found = [Sidecar(NVRAM, nvram)] if nvram else []
    return [*found, Sidecar(TPM, str(state / "swtpm" / uuid))] if tpm else found


def read(sidecar: Sidecar, shell: Sequence[str] = ()) -> SidecarDisk:
    """As it is now; `shell` reaches another host.  Raises HostUnreachable."""
    data = _steady(sidecar, shell)
    disk = Disk(sidecar.id, len(data), path=sidecar.path)
    return SidecarDisk(disk, Token(TOKEN_KIND, hashlib.sha256(data).hexdigest(), f"size={len(data)}"), data)


def _steady(sidecar: Sidecar, shell: Sequence[str]) -> bytes:
    """The same bytes twice: the machine may be writing."""
    last: bytes | None = None
    for _ in range(_TRIES + 1):
        before, last = last, _bytes(sidecar, shell)
        if last is not None and before == last:
            return last
    raise HostUnreachable(f"{sidecar.path} changes all the time; try again")


def _bytes(sidecar: Sidecar, shell: Sequence[str]) -> bytes | None:
    """None when a file went, or got another name, while they were read."""
    if shell:
        return _padded(_remote(sidecar, shell)) if sidecar.id == TPM else _remote(sidecar, shell)
    path = Path(sidecar.path)
    try:
        path.stat()
        return _tar(path) if sidecar.id == TPM else path.read_bytes()
    except OSError as error:
        raise HostUnreachable(f"{path} can't be read: {error.strerror}") from error


def _tar(folder: Path) -> bytes | None:
    """The folder's files, always in the same order and without what says nothing of their content; None when one went."""
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return None
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.size, member.mode = len(data), 0o600
            tar.addfile(member, io.BytesIO(data))
    return _padded(into.getvalue())


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _TAR_STEP)


def _remote(sidecar: Sidecar, shell: Sequence[str]) -> bytes:
    where = shlex.quote(sidecar.path)
    command = f"cat -- {where}"
    if sidecar.id == TPM:
        command = f"cd {where} && find . -type f ! -name '.*' | sort | tar -c --format=ustar --mtime=@0 --owner=0 -T -"
    try:
        done = subprocess.run([*shell, command], capture_output=True, timeout=_READ_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise HostUnreachable(f"{sidecar.path}: no answer within {_READ_SECONDS:g} s through ssh") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise HostUnreachable(f"{sidecar.path} can't be read on the other host: {said}")
    return done.stdout


def unpack_tpm(data: bytes, folder: Path) -> None:
    """A TPM's folder is as it was.  Raises OSError."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in (m for m in tar if m.isfile()):
            path = (folder / member.name).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise OSError(f"a file of the TPM lies outside its folder: {member.name}")
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            content = tar.extractfile(member)
            path.write_bytes(content.read() if content else b"")
            path.chmod(0o600)
