"""How the lab guest is made: a Debian cloud kernel, and an initramfs of busybox, modules, witness and guest agent.

What this machine already has is reused; the rest is downloaded as Debian packages and unpacked, never installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "guest"
HOME = Path(os.environ.get("HVBACKUP_LAB") or Path(__file__).resolve().parent.parent / ".lab") / "guest"

BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console")  # loaded by init; ext4 is part of Debian's cloud kernel
MORE_MODULES = ("virtio_net", "virtio_scsi", "sd_mod", "ahci", "nvme", "loop", "xfs", "dm_mod", "dm_snapshot")
FOLDERS = "bin dev proc sys tmp mnt etc lib lib64 modules var run var/run"


class GuestError(Exception):
    """The lab guest cannot be built, does not start, or a command in it failed."""


def build() -> Path:
    """The guest in HOME is current when this returns; what did not change is kept."""
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp, wanted = HOME / "stamp", _stamp()
        if not stamp.exists() or stamp.read_text() != wanted:
            with tempfile.TemporaryDirectory(dir=HOME) as work:
                _build_in(Path(work))
            stamp.write_text(wanted)
    return HOME


def _stamp() -> str:
    digest = hashlib.sha256()
    for path in [Path(__file__).resolve(), *sorted(SOURCES.iterdir())]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _build_in(work: Path) -> None:
    kernel, modules = _kernel(work)
    writer = _compile_writer(work)
    initramfs = work / "initramfs"
    with initramfs.open("wb") as out:
        for name, mode, data in _initramfs_files(work, writer, modules):
            out.write(_cpio_entry(name, mode, data))
        out.write(_cpio_entry("TRAILER!!!", 0, b""))
    shutil.copyfile(kernel, work / "vmlinuz")
    for name in ("vmlinuz", "initramfs", "writer"):
        (work / name).replace(HOME / name)


def _kernel(work: Path) -> tuple[Path, Path]:
    """A Debian cloud kernel and its modules: the set-up's, this machine's, else downloaded and unpacked."""
    if (HOME.parent / "kernel" / "vmlinuz").exists():
        return HOME.parent / "kernel" / "vmlinuz", HOME.parent / "kernel" / "modules"
    for kernel in sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"), reverse=True):
        modules = Path("/lib/modules") / kernel.name.removeprefix("vmlinuz-")
        if os.access(kernel, os.R_OK) and modules.is_dir():
            return kernel, modules
    found = re.search(r"Depends: (linux-image-\S+)", run("apt-cache", "depends", "linux-image-cloud-amd64"))
    if not found:
        raise GuestError("No Debian cloud kernel is known to apt here: run `apt-get update`")
    root = _unpacked(found[1], work)
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    return kernel, next(root.glob("**/lib/modules/*"))


def _unpacked(package: str, work: Path) -> Path:
    """The files of a Debian package, which is not installed on this machine."""
    into = Path(tempfile.mkdtemp(dir=work))
    try:
        run("apt-get", "download", "-o", "APT::Sandbox::User=root", package, cwd=into)
    except GuestError as error:
        raise GuestError(f"Package {package} cannot be downloaded: run `apt-get update`\n{error}") from None
    (deb,) = into.glob("*.deb")
    run("dpkg-deb", "-x", deb, into / "root")
    return into / "root"


def _compile_writer(work: Path) -> Path:
    if not shutil.which("gcc"):
        raise GuestError("The lab guest's writer needs a compiler: apt-get install gcc libc6-dev")
    run("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", work / "writer", SOURCES / "writer.c")
    return work / "writer"


def _initramfs_files(work: Path, writer: Path, modules: Path) -> Iterator[tuple[str, int, bytes]]:
    """Every entry of the initramfs: name, mode with its type, content."""
    busybox = Path("/bin/busybox")
    if not busybox.exists() or _libraries(busybox):  # only a static one works without its libraries
        busybox = next(_unpacked("busybox-static", work).glob("**/bin/busybox"))
    for folder in FOLDERS.split():
        yield folder, stat.S_IFDIR | 0o755, b""
    yield "init", stat.S_IFREG | 0o755, (SOURCES / "init").read_bytes()
    yield "etc/fsfreeze-hook", stat.S_IFREG | 0o755, (SOURCES / "fsfreeze-hook").read_bytes()
    yield "bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()
    for applet in run(busybox, "--list").split():
        if applet != "busybox":
            yield f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox"
    yield "bin/writer", stat.S_IFREG | 0o755, writer.read_bytes()
    yield from _module_files(modules)
    yield from _agent_files(work)


def _module_files(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    paths = {_module_name(path): path for path in folder.glob("kernel/**/*.ko*")}
    contents: dict[str, bytes] = {}  # dependencies come before their users

    def visit(name: str) -> None:
        if name in contents or name not in paths:  # not there: part of the kernel itself
            return
        data = lzma.decompress(paths[name].read_bytes()) if paths[name].suffix == ".xz" else paths[name].read_bytes()
        needed = re.search(rb"\0depends=([^\0]+)\0", data)
        for other in needed[1].decode().split(",") if needed else ():
            visit(other.replace("-", "_"))
        contents[name] = data

    for name in BOOT_MODULES:
        visit(name)
    boot = list(contents)
    for name in MORE_MODULES:
        visit(name)
    for name, data in contents.items():
        yield f"modules/{name}.ko", stat.S_IFREG | 0o644, data
    yield "modules/boot", stat.S_IFREG | 0o644, "".join(f"{name}.ko\n" for name in boot).encode()
    yield "modules/order", stat.S_IFREG | 0o644, "".join(f"{name}.ko\n" for name in contents).encode()


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _agent_files(work: Path) -> Iterator[tuple[str, int, bytes]]:
    """qemu-ga from its Debian package, and its libraries from this machine: QEMU needs the same ones."""
    program = next(_unpacked("qemu-guest-agent", work).glob("**/qemu-ga"))
    yield "bin/qemu-ga", stat.S_IFREG | 0o755, program.read_bytes()
    for library in _libraries(program):
        folder = "lib64" if library.name.startswith("ld-linux") else "lib"
        yield f"{folder}/{library.name}", stat.S_IFREG | 0o755, library.read_bytes()


def _libraries(program: Path) -> list[Path]:
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, timeout=30, check=False).stdout
    if "not found" in listed:
        raise GuestError(f"Libraries of {program.name} are missing: apt-get install qemu-system-x86\n{listed}")
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", listed)]


def _cpio_entry(name: str, mode: int, data: bytes) -> bytes:
    """One entry in the `newc` form the kernel unpacks, without times and owners."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    argv = [str(part) for part in command]
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        raise GuestError(f"The program {argv[0]} is missing") from None
    if done.returncode:
        raise GuestError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
    return done.stdout
