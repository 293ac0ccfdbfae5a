"""A libvirtd reached by TLS, and its disks by NBD over TLS: what is on another host, tried on this one."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hvbackup.errors import HostUnreachable, UsageError
from hvbackup.hypervisors.libvirt import LibvirtHypervisor, Settings
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.hypervisors.libvirt_watch import LibvirtWatch
from hvbackup.model import Continuity, LeaseId
from labs.libvirtd import Libvirtd, daemon
from tests.hypervisors.conformance import BLOCK, Cycle
from tests.hypervisors.libvirtd import STORE, LibvirtMachine, machine, wait_until
from tests.hypervisors.test_libvirt_looks import Watched, begin_while_others_look
from tests.ports import free_port

pytestmark = pytest.mark.real


@dataclass
class Authority:
    """Signs certificates for localhost."""

    folder: Path

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hvbackup tests")])
        self.certificate = self._sign(self.name, self.key.public_key(), authority=True)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=authority, crl_sign=authority, key_encipherment=not authority,
            content_commitment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        made = (
            x509.CertificateBuilder(self.name, subject, key, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        made = made if authority else made.add_extension(purposes, critical=False)
        return made.sign(self.key, hashes.SHA256())

    def write(self, folder: Path, authority: str, certificate: str, key_name: str) -> Path:
        """A folder with a new pair under these names."""
        folder.mkdir(parents=True)
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), key.public_key())
        pem = serialization.Encoding.PEM
        (folder / authority).write_bytes(self.certificate.public_bytes(pem))
        (folder / certificate).write_bytes(signed.public_bytes(pem))
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / key_name).write_bytes(private)
        return folder


@dataclass
class Far:
    """A daemon behind TLS, with the certificates that open it."""

    libvirtd: Libvirtd
    port: int
    pki: Path
    client: Path
    nbd_port: int

    def uri(self, vm: LibvirtMachine, client: Path | None = None) -> str:
        uri = f"qemu+tls://localhost:{self.port}/system?pkipath={self.pki}&domain={vm.uuid}&nbd-port={self.nbd_port}"
        return f"{uri}&tls-certificates={client or self.client}"

    def hypervisor(self, vm: LibvirtMachine, client: Path | None = None) -> LibvirtHypervisor:
        where = LibvirtUri.parse(self.uri(vm, client))
        settings = Settings(60.0, 60.0, 0)
        return LibvirtHypervisor(where, STORE, scratch_dir=vm.folder / "s", runtime=vm.folder / "r", settings=settings)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    folder = tmp_path_factory.mktemp("pki")
    authority, port = Authority(folder), free_port()
    server = authority.write(folder / "server", "cacert.pem", "servercert.pem", "serverkey.pem")
    qemu = authority.write(folder / "qemu", "ca-cert.pem", "server-cert.pem", "server-key.pem")
    pki = authority.write(folder / "pki", "cacert.pem", "clientcert.pem", "clientkey.pem")
    client = authority.write(folder / "client", "ca-cert.pem", "client-cert.pem", "client-key.pem")
    listening = (
        f'listen_tls = 1\ntls_port = "{port}"\nlisten_addr = "127.0.0.1"\nca_file = "{server}/cacert.pem"\n'
        f'cert_file = "{server}/servercert.pem"\nkey_file = "{server}/serverkey.pem"\n'
    )
    with daemon(f'backup_tls_x509_cert_dir = "{qemu}"\nbackup_tls_x509_verify = 1\n', listening, "-l") as made:
        yield Far(made, port, pki, client, free_port())


@pytest.fixture
def vm(far: Far) -> Iterator[LibvirtMachine]:
    with machine(far.libvirtd) as made:
        yield made.define()


def scratch(vm: LibvirtMachine) -> list[Path]:
    """What lies beside the images, on the machine's host."""
    return sorted(vm.folder.glob("*.scratch"))


def pools(far: Far) -> list[str]:
    return [pool.name() for pool in far.libvirtd.connection().listAllStoragePools()]


def test_a_machine_of_another_host_is_read_over_tls(far: Far, vm: LibvirtMachine) -> None:
    vm.start()
    vm.hypervisor = lambda **_: far.hypervisor(vm)  # type: ignore[assignment,misc]
    cycle = Cycle(vm)
    vm.write("vda", 0, b"first" * BLOCK)
    with socket.create_server(("0.0.0.0", far.nbd_port)):  # another port is taken then
        cycle.capture()
    assert cycle.equal()
    vm.write("vda", BLOCK, b"second" * 1000)
    cycle.capture(lambda frozen: vm.write("vda", 0, b"meanwhile" * BLOCK))
    assert set(cycle.how.values()) == {Continuity.INCREMENTAL}
    assert vm.path("vda").parent == vm.path("vdb").parent
    assert not scratch(vm)
    cycle.capture()
    assert cycle.equal()
    assert len(vm.leftovers()) == 2


def test_whoever_looks_while_backups_begin_on_another_host_does_no_harm(far: Far, tmp_path: Path) -> None:
    """QEMU 7.2 fails an assertion when its nodes are listed while it formats scratch, which ends the guest."""
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder, contextlib.ExitStack() as leaving:
        vm = Watched(far.libvirtd, Path(folder))
        leaving.callback(vm.remove)
        vm.define().start()
        begin_while_others_look(vm, far.hypervisor(vm))
        assert not scratch(vm)
        assert not pools(far)


def test_scratch_on_another_host_is_ours_and_goes_with_its_lease(far: Far, vm: LibvirtMachine) -> None:
    vm.start()
    hypervisor = far.hypervisor(vm)
    [found] = hypervisor.machines()
    for there in ("no pool", "a pool"):
        if there == "a pool":
            target = f"<target><path>{vm.folder}</path></target>"
            pool = vm.connection.storagePoolCreateXML(f"<pool type='dir'><name>kept</name>{target}</pool>", 0)
        with hypervisor.snapshot(found, LeaseId("l"), {}, None):
            assert [p.name.rpartition("-")[2] for p in scratch(vm)] == ["vda.scratch", "vdb.scratch"]
            assert all(p.stat().st_mode & 0o077 == 0 for p in scratch(vm))
        assert not scratch(vm)
        hypervisor.release(found, LeaseId("l"), [])
        assert not vm.leftovers()
    assert pools(far) == ["kept"], "a pool that was there stays, and ours do not"
    pool.destroy()


def test_a_host_whose_storage_is_not_for_us_formats_scratch_itself(far: Far, vm: LibvirtMachine) -> None:
    vm.start()
    hypervisor = far.hypervisor(vm)
    [found] = hypervisor.machines()
    target = f"<target><path>{vm.folder}</path></target>"
    pool = vm.connection.storagePoolDefineXML(f"<pool type='dir'><name>off</name>{target}</pool>", 0)
    with hypervisor.snapshot(found, LeaseId("l"), {}, None) as frozen:
        assert len(frozen.disks) == 2
        assert scratch(vm)
    hypervisor.release(found, LeaseId("l"), [])
    assert not scratch(vm)
    assert not vm.leftovers()
    pool.undefine()


def test_scratch_on_another_host_goes_when_its_process_dies(far: Far, vm: LibvirtMachine) -> None:
    vm.start()
    code = (
        "import os; from tests.hypervisors.libvirtd import *; from pathlib import Path\n"
        "from hvbackup.hypervisors.libvirt import *; from hvbackup.model import LeaseId\n"
        f"h = LibvirtHypervisor(LibvirtUri.parse({far.uri(vm)!r}), {STORE!r}, "
        f"scratch_dir=Path({str(vm.folder / 's')!r}), runtime=Path({str(vm.folder / 'r')!r}))\n"
        "f = h.snapshot(h.machines()[0], LeaseId('dead'), {}, None).__enter__()\n"
        f"assert len(list(Path({str(vm.folder)!r}).glob('*.scratch'))) == 2\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not scratch(vm))
    wait_until(lambda: vm.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)
    wait_until(lambda: not list((vm.folder / "s").rglob("away.json")))
    hypervisor = far.hypervisor(vm)
    hypervisor.release(hypervisor.machines()[0], LeaseId("dead"), [])
    assert not vm.leftovers()


def test_scratch_of_a_machine_that_is_gone_is_removed_with_its_lease(far: Far, vm: LibvirtMachine) -> None:
    """Machine and watchdog died together, as when both hosts lose their power."""
    vm.start()
    hypervisor = far.hypervisor(vm)
    [found] = hypervisor.machines()
    watches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LibvirtWatch, "start", lambda self, command, fds=(): watches.append(command))
        hypervisor.snapshot(found, LeaseId("l"), {}, None).__enter__()
    assert watches
    os.kill(vm.qemu_pid(), signal.SIGKILL)
    wait_until(lambda: not vm.domain.isActive())
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    assert scratch(vm)
    hypervisor.release(found, LeaseId("l"), [])
    assert not scratch(vm)
    assert not list((vm.folder / "s").iterdir())


def test_nobody_reads_without_a_certificate(far: Far, vm: LibvirtMachine, tmp_path: Path) -> None:
    vm.start()
    stranger = Authority(tmp_path).write(tmp_path / "c", "ca-cert.pem", "client-cert.pem", "client-key.pem")
    (stranger / "ca-cert.pem").write_bytes((far.client / "ca-cert.pem").read_bytes())
    hypervisor = far.hypervisor(vm, stranger)
    [found] = hypervisor.machines()
    with hypervisor.snapshot(found, LeaseId("l"), {}, None) as frozen, pytest.raises(HostUnreachable):
        frozen.disks[0].changes(None)
        frozen.disks[0].open().read_into(0, memoryview(bytearray(512)))
    hypervisor.release(found, LeaseId("l"), [])
    assert not vm.leftovers()


def test_a_machine_of_another_host_that_is_off_is_refused(far: Far, vm: LibvirtMachine) -> None:
    hypervisor = far.hypervisor(vm)
    [found] = hypervisor.machines()
    assert not hypervisor.can.cycles
    with pytest.raises(UsageError, match="virsh start --paused"), hypervisor.snapshot(found, LeaseId("l"), {}, None):
        pytest.fail("A snapshot began")
