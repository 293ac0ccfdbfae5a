"""A libvirtd of the lab's own, which neither sees nor disturbs one that runs on this host, and leaves nothing behind.

It runs in a mount namespace in which libvirt's directories are folders of ours.  Needs root, and Debian's libvirt-daemon and
libvirt-daemon-driver-qemu; libvirt-python is what asks whether it answers.

Machines are no children of the daemon's, nor of ours: a guard, which waits for our end however it comes, ends them.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt

_START = """\
set -e
[ -z "$3" ] || echo "$3" >/proc/sys/kernel/hostname
while read -r _ _ _ _ where rest; do  # file systems of other tests, which would stay alive here when they are unmounted there
    case "$rest" in *" - "*" /dev/loop"*) case "$where" in "${TMPDIR:-/tmp}"/*) umount -l "$where" || true;; esac;; esac
done </proc/self/mountinfo
for d in etc lib run log; do mkdir -p "$1/$d"; done
mkdir -p /etc/libvirt /var/lib/libvirt /run/libvirt /var/log/libvirt /var/cache/libvirt
cp /etc/passwd "$1/passwd"; cp /etc/group "$1/group"
grep -q ^libvirt-qemu: "$1/passwd" || echo "libvirt-qemu:x:64055:64055::/:/bin/false" >>"$1/passwd"
for group in libvirt-qemu kvm; do grep -q "^$group:" "$1/group" || echo "$group:x:6405$((${#group} % 10)):" >>"$1/group"; done
mount --bind "$1/passwd" /etc/passwd; mount --bind "$1/group" /etc/group
mount --bind "$1/etc" /etc/libvirt; mount --bind "$1/lib" /var/lib/libvirt; mount --bind "$1/run" /run/libvirt
mount --bind "$1/log" /var/log/libvirt; mount --bind "$2" /var/cache/libvirt
shift 3
exec /usr/sbin/libvirtd "$@"
"""
# Standard input ends when our process does.  What is ended is what a pid file names and still is what it was.
_GUARD = """\
cat >/dev/null
for f in "$1"/libvirtd.pid "$1"/run/qemu/*.pid "$1"/run/qemu/swtpm/*.pid; do
  pid=$(cat "$f" 2>/dev/null) || continue
  case $(cat "/proc/$pid/comm" 2>/dev/null) in libvirtd|qemu-*|swtpm) kill -KILL "$pid" ;; esac
done
rm -rf "$1"
"""

START_SECONDS = 180.0


class Libvirtd:
    """One daemon; with a hostname, it takes itself for one of another host."""

    def __init__(
        self, folder: Path, qemu_conf: str = "", libvirtd_conf: str = "", *options: str, hostname: str = ""
    ) -> None:
        self.folder, self._hostname = folder, hostname
        libvirtd_conf += f'host_uuid = "{uuid.uuid4()}"\n' if hostname else ""
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        (folder / "etc").mkdir(parents=True)
        (folder / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{folder}"\nauth_unix_rw = "none"\nlog_outputs = "2:file:{folder}/libvirtd.log"\n'
            + libvirtd_conf
        )
        (folder / "etc/qemu.conf").write_text(
            'user = "root"\ngroup = "root"\nsecurity_driver = "none"\ndynamic_ownership = 0\nremember_owner = 0\n'
            'namespaces = []\ncgroup_controllers = []\nstdio_handler = "file"\n'
            'swtpm_user = "root"\nswtpm_group = "root"\n' + qemu_conf
        )

    @property
    def uri(self) -> str:
        return f"qemu:///system?socket={self.folder}/libvirt-sock"

    def start(self) -> Libvirtd:
        """It answers when this returns."""
        command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "--uts", "--propagation", "slave"]
        command += ["bash", "-c", _START, "libvirtd"]
        command += [str(self.folder), str(_cache()), self._hostname]
        self._guard = self._guard or subprocess.Popen(
            ["bash", "-c", _GUARD, "libvirtd-guard", str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        options = ["-f", f"{self.folder}/libvirtd.conf", "-p", f"{self.folder}/libvirtd.pid", *self._options]
        self._process = self._run([*command, *options])
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                self.connection().close()
                return self
            except libvirt.libvirtError as error:
                if time.monotonic() > end:
                    log = (self.folder / "libvirtd.log").read_text()
                    raise RuntimeError(f"libvirtd did not start: {log}{self._said()}") from error
                if self._process.poll() is not None:  # what a killed one has begun still holds its lock, for a moment
                    time.sleep(1)
                    self._process = self._run([*command, *options])
                time.sleep(0.05)

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "out").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _said(self) -> str:
        return (self.folder / "out").read_text()

    def connection(self) -> libvirt.virConnect:
        """A connection to it."""
        libvirt.registerErrorHandler(lambda *_: None, None)
        return libvirt.open(self.uri)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """The daemon ends; its machines go on."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(120)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(120)
            self._process = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(120)
            self._process = None

    def end(self) -> None:
        """Daemon, machines and everything else are gone."""
        self.kill()
        if self._guard is not None:
            self._guard.communicate(timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)


def _cache() -> Path:
    """What libvirtd found out of the QEMUs here, which takes it ten seconds: kept from one test run to the next."""
    folder = Path(__file__).resolve().parents[1] / ".lab/libvirt-cache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def daemon(*arguments: str, hostname: str = "") -> Iterator[Libvirtd]:
    """A daemon for as long as the context lasts."""
    folder = Path(tempfile.mkdtemp(prefix="hvt-lv-"))
    made = Libvirtd(folder / "d", *arguments, hostname=hostname)
    try:
        yield made.start()
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def disk_xml(target: str, path: Path, driver: str = "qcow2") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{driver}' discard='unmap'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
    )
