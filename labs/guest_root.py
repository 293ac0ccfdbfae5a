"""More programs for a lab guest: a folder to be made a disk of, which the guest mounts and changes its root into.

add_lvm(root)         lvm and mkfs.ext4: device-mapper is in the guest's kernel, not in every host's
add_hvbackup(root)    this Python with hvbackup and what it needs, at the same paths as here
enter(guest, device)  the disk is mounted on /root, and `chroot /root PROGRAM` works
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from labs.guest import Guest
from labs.guest_image import GuestError, _unpacked

HERE = Path(__file__).resolve().parent.parent
PACKAGES = ("argon2-cffi", "blake3", "cryptography", "duckdb", "numpy", "qemu.qmp", "zstandard")
LVM_PACKAGES = ("lvm2", "libdevmapper-event1.02.1", "libaio1", "libedit2", "libbsd0")
NO_UDEV = "activation{udev_sync=0 udev_rules=0 monitoring=0} backup{backup=0 archive=0}"


def add_lvm(root: Path) -> None:
    """`/sbin/lvm` and `/sbin/mkfs.ext4` work in the root: this machine's own, or what Debian's packages hold."""
    with tempfile.TemporaryDirectory() as work:
        unpacked = [_unpacked(package, Path(work)) for package in LVM_PACKAGES]
        lvm = next(path for folder in unpacked for path in folder.glob("**/sbin/lvm"))
        libraries = [str(path.parent) for folder in unpacked for path in folder.glob("**/*.so*")]
        add_program(root, lvm, "/sbin/lvm", libraries)
    mkfs = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")
    if mkfs is None:
        raise GuestError("mkfs.ext4 is missing: apt-get install e2fsprogs")
    add_program(root, Path(mkfs), "/sbin/mkfs.ext4")


def add_hvbackup(root: Path) -> None:
    """`/bin/hvbackup` works in the root."""
    stdlib, python = Path(sysconfig.get_paths()["stdlib"]), Path(os.path.realpath(sys.executable))
    # What is compiled is taken along: without KVM a guest compiles for ten seconds at each start.
    ignored = shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "config-*", "ensurepip")
    shutil.copytree(stdlib, _inside(root, stdlib), ignore=ignored, symlinks=True)
    add_program(root, python, str(python))
    packages = root / "packages"
    for name in PACKAGES:
        _add_package(packages, name)
    shutil.copytree(HERE / "hvbackup", packages / "hvbackup")
    _add_libraries(root, [*root.glob("packages/**/*.so*"), *_inside(root, stdlib).glob("**/*.so*")])
    command = root / "bin" / "hvbackup"
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(f'#!/bin/busybox sh\nPYTHONPATH=/packages exec {python} -B -m hvbackup "$@"\n')
    command.chmod(0o755)


def enter(guest: Guest, device: str) -> None:
    """The root on this device is ready in the guest, with the guest's own devices and busybox in it."""
    guest.sh(f"mkdir -p /root && mount {device} /root && mkdir -p /root/dev /root/proc /root/sys /root/tmp /root/run")
    guest.sh("for f in dev proc sys; do mount -o bind /$f /root/$f; done; mount -t tmpfs tmp /root/tmp")
    guest.sh("mount -t tmpfs run /root/run; mkdir -p /root/bin; cp /bin/busybox /root/bin/busybox")


def lvm(guest: Guest, command: str, *devices: str) -> str:
    """An LVM command in the guest, without udev, which sees these devices and no others."""
    seen = ",".join([*(f'"a|^{device}$|"' for device in devices), '"r|.*|"'])
    config = f"{NO_UDEV} devices{{use_devicesfile=0 global_filter=[{seen}]}}"
    return guest.sh(f"LVM_SUPPRESS_FD_WARNINGS=1 chroot /root /sbin/lvm {command} --config '{config}'")


def add_program(root: Path, program: Path, at: str, libraries: Iterable[str] = ()) -> None:
    """A program of this machine, or an unpacked one, and the libraries it needs."""
    target = _inside(root, Path(at))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, target)
    _add_libraries(root, [program], libraries)


def _add_libraries(root: Path, programs: Iterable[Path], folders: Iterable[str] = ()) -> None:
    """What the programs need, at the paths where their loader looks."""
    found: set[str] = set()
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)}
    for program in programs:
        done = subprocess.run(
            ["ldd", str(program)], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        if "not found" in done.stdout:
            raise GuestError(f"Libraries of {program} are missing:\n{done.stdout}")
        found.update(re.findall(r"(/\S+) \(0x", done.stdout))
    for name in found:
        # What was unpacked elsewhere is put where the loader looks without being told.
        at = (
            Path(name)
            if not name.startswith(tempfile.gettempdir())
            else Path("/lib/x86_64-linux-gnu") / Path(name).name
        )
        target = _inside(root, at)
        if not target.exists() and not at.is_relative_to(root):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, target)


def _add_package(into: Path, name: str) -> None:
    """A distribution that is installed here, and what it needs."""
    found = metadata.distribution(name)
    for file in found.files or ():
        source = Path(str(found.locate_file(file))).resolve()
        if ".." in file.parts or "tests" in file.parts or not source.exists() or (into / file).exists():
            continue
        (into / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, into / file)
    for required in found.requires or ():
        if "extra ==" not in required:
            needed = re.split(r"[^A-Za-z0-9_.-]", required, maxsplit=1)[0]
            if needed not in ("typing-extensions", "pycparser") and not list(
                into.glob(f"{needed.replace('-', '_')}-*")
            ):
                _add_package(into, needed)


def _inside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")
