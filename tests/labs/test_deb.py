"""The Debian package: built, installed on a bare system, used, and removed, with stores and keys left where they are."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvbackup import __version__
from labs import deb

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

SECONDS = 600
MOUNTS = ("proc", "sys", "dev")


def run(*words: str | Path, check: bool = True, **environment: str) -> str:
    done = subprocess.run(
        [str(w) for w in words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", **environment},
    )
    assert done.returncode == 0 or not check, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout + done.stderr


def release() -> tuple[str, str]:
    """(code name, mirror) of this system."""
    lines = Path("/etc/os-release").read_text().splitlines()
    [name] = [line.partition("=")[2].strip('"') for line in lines if line.startswith("VERSION_CODENAME=")]
    sites = run("apt-get", "indextargets", "--format", "$(RELEASE) $(SITE)", "Created-By: Packages").splitlines()
    return name, next(site for codename, site in (line.split() for line in sites) if codename == name)


@contextmanager
def bare_system(folder: Path) -> Iterator[Path]:
    """The smallest system of this release."""
    name, mirror = release()
    run("debootstrap", "--variant=minbase", name, folder, mirror)
    shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")
    mounted = []
    try:
        for mount in MOUNTS:
            run("mount", "--bind", f"/{mount}", folder / mount)
            mounted.append(folder / mount)
        yield folder
    finally:
        for mount in reversed(mounted):
            run("umount", mount)


@pytest.mark.skipif(os.geteuid() != 0, reason="a system is made and mounted")
def test_installed_used_and_removed(tmp_path: Path) -> None:
    package = deb.build(tmp_path)
    assert f"Version: {__version__}" in run("dpkg-deb", "--field", package)
    with bare_system(tmp_path / "system") as system:
        shutil.copy(package, system / "tmp")

        def inside(*words: str, check: bool = True) -> str:
            return run("chroot", system, *words, check=check)

        inside("apt-get", "install", "-y", "-qq", "--no-install-recommends", f"/tmp/{package.name}")
        assert inside("hvbackup", "--version").startswith("hvbackup ")
        inside("hvbackup", "init")
        inside("sh", "-c", "head -c 3000000 /dev/urandom >/srv/disk.raw")
        inside("hvbackup", "backup", "image:/srv/disk.raw", "--name", "web1")
        assert "/srv/disk.raw" in inside("hvbackup", "sql", "select machine from points")
        inside("hvbackup", "check", "--deep")
        inside("hvbackup", "restore", "web1", "--to", "/srv/back")
        inside("cmp", "/srv/disk.raw", "/srv/back/disk.raw")
        assert (system / "usr/share/man/man1/hvbackup.1.gz").exists()
        used = set(inside("find", "/usr/lib/hvbackup", "-name", "__pycache__", "-newer", "/srv/disk.raw").split())
        assert used == set()  # nothing is written where only dpkg should write
        inside("apt-get", "purge", "-y", "-qq", "hvbackup")
        assert not (system / "usr/bin/hvbackup").exists()
        assert not (system / "usr/lib/hvbackup").exists()
        assert list((system / "var/lib/hvbackup/store/points").rglob("*-*"))
        assert list((system / "etc/hvbackup/keys").iterdir())
