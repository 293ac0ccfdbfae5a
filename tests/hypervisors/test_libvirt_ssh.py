"""A libvirtd behind a real sshd on loopback: only `make soak` runs this, for nobody's machine should get an sshd from tests.

It needs `apt install openssh-server`, and fails without it.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.hypervisors.libvirt import LibvirtHypervisor, Settings
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.model import Continuity
from labs.libvirtd import Libvirtd, run
from tests.hypervisors.conformance import BLOCK, Cycle
from tests.hypervisors.libvirtd import LibvirtMachine, machine, wait_until
from tests.ports import free_port

pytestmark = [pytest.mark.real, pytest.mark.soak]

_NETCAT = """#!{python}
import socket, sys, threading
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[-1])
def up():
    while data := sys.stdin.buffer.raw.read(65536): s.sendall(data)
    s.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := s.recv(65536): sys.stdout.buffer.write(data); sys.stdout.buffer.flush()
"""


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[Path]:
    """A program that is ssh, and finds the sshd of the test."""
    assert shutil.which("sshd"), "apt install openssh-server"
    port, host, key = free_port(), tmp_path / "host", tmp_path / "key"
    for path in (host, key):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)
    (tmp_path / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host}\nAuthorizedKeysFile {key}.pub\nStrictModes no\n"
        f"PidFile {tmp_path}/pid\nUsePAM no\nPermitRootLogin prohibit-password\n"
    )
    (tmp_path / "ssh.conf").write_text(
        f"Host *\nPort {port}\nUserKnownHostsFile {tmp_path}/known\nStrictHostKeyChecking no\nIdentityFile {key}\n"
    )
    program = tmp_path / "ssh"
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp_path}/ssh.conf "$@"\n')
    program.chmod(0o700)
    (tmp_path / "nc").write_text(_NETCAT.format(python=sys.executable))
    (tmp_path / "nc").chmod(0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", tmp_path / "sshd.conf"], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port))
        yield program
    finally:
        server.terminate()
        server.wait(120)


def test_a_machine_of_another_host_is_read_through_ssh(libvirtd: Libvirtd, ssh: Path) -> None:
    with machine(libvirtd) as vm:
        loader = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
        nvram = f"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{vm.folder}/vars.fd</nvram>"
        text = vm.xml().replace("</type></os>", f"</type>{loader}{nvram}</os><features><acpi/></features>")
        vm.connection.defineXML(text)
        vm.start()
        uri = f"qemu+ssh://root@localhost/system?socket={libvirtd.folder}/libvirt-sock&command={ssh}"
        where = LibvirtUri.parse(f"{uri}&netcat={ssh.with_name('nc')}&domain={vm.uuid}")

        store = secrets.token_hex(4)  # what is below /var/tmp is seen by everybody

        def hypervisor(**_: object) -> LibvirtHypervisor:
            settings = Settings(15.0, 15.0, 0)
            return LibvirtHypervisor(
                where, store, scratch_dir=vm.folder / "s", runtime=vm.folder / "r", settings=settings
            )

        vm.hypervisor = hypervisor  # type: ignore[method-assign]
        cycle, seen = Cycle(vm), list[str]()
        vm.write("vda", 0, b"first" * BLOCK)
        cycle.capture(lambda _: seen.extend(p.name for p in vm.folder.glob("*.scratch")))
        assert len(seen) == 2, "scratch is beside the images, written by us"
        assert not vm.connection.listAllStoragePools(), "through a pool that was there for a moment"
        assert cycle.images.pop("nvram") == (vm.folder / "vars.fd").read_bytes()  # type: ignore[call-overload]
        assert cycle.equal()
        cycle.images["nvram"] = bytearray((vm.folder / "vars.fd").read_bytes())  # type: ignore[index]
        vm.write("vda", BLOCK, b"second" * 1000)
        cycle.capture()
        assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
        assert cycle.equal()
        left = [p.name for p in Path("/var/tmp").glob(f"hvb-{store}-*")] + [p.name for p in vm.folder.glob("*.scratch")]
        assert not left
        _only_checkpoints(vm)


def _only_checkpoints(vm: LibvirtMachine) -> None:
    assert len(vm.leftovers()) == len(vm.disks)
