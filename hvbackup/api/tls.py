"""The certificate that is made at the first start, for a host that was given none."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from pathlib import Path

from hvbackup.files import Files

FOLDER = "tls"
DAYS = 825


def certificate(configuration: Path) -> tuple[Path, Path]:
    """The files of a certificate and its key; made when there are none, or when it ends within 30 days."""
    files = Files(configuration / FOLDER)
    cert, key = files.path("certificate.pem"), files.path("key.pem")
    if not (cert.exists() and key.exists() and _lasts(cert)):
        pem, secret = _made()
        files.replace("key.pem", secret)
        files.replace("certificate.pem", pem)
    return cert, key


def _lasts(path: Path) -> bool:
    from cryptography import x509

    try:
        end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except ValueError:
        return False
    return end > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=30)


def _made() -> tuple[bytes, bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, host = ec.generate_private_key(ec.SECP256R1()), socket.gethostname()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    names = [x509.DNSName(n) for n in dict.fromkeys((host, socket.getfqdn(), "localhost"))]
    addresses = [x509.IPAddress(ipaddress.ip_address(a)) for a in ("127.0.0.1", "::1")]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName([*names, *addresses]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM), secret
