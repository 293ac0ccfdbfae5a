"""A libvirtd reached by TLS, and its disks by NBD over TLS: what is on another host, tried on this one."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hvbackup.errors import HostUnreachable, UsageError
from hvbackup.hypervisors.libvirt import LibvirtHypervisor, Settings
from hvbackup.hypervisors.libvirt_uri import LibvirtUri
from hvbackup.model import Continuity, LeaseId
from labs.libvirtd import Libvirtd, daemon
from tests.hypervisors.conformance import BLOCK, Cycle
from tests.hypervisors.libvirtd import STORE, LibvirtMachine, machine
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

    def hypervisor(self, vm: LibvirtMachine, client: Path | None = None) -> LibvirtHypervisor:
        uri = f"qemu+tls://localhost:{self.port}/system?pkipath={self.pki}&domain={vm.uuid}&nbd-port={self.nbd_port}"
        where = LibvirtUri.parse(f"{uri}&tls-certificates={client or self.client}")
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
    assert not [p for p in vm.folder.iterdir() if "scratch" in p.name]
    cycle.capture()
    assert cycle.equal()
    assert len(vm.leftovers()) == 2


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
