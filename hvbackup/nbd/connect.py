"""From the name of an export to a server that waits for options, over a unix socket, TCP or TLS."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from hvbackup.errors import HostUnreachable
from hvbackup.nbd.handshake import ExportName, Haggler, Refused
from hvbackup.nbd.protocol import ProtocolError
from hvbackup.nbd.uri import NbdUri
from hvbackup.nbd.wire import TlsWire, Wire


@dataclass(frozen=True, slots=True)
class Settings:
    """How a client behaves; the defaults suit a local server."""

    connect_seconds: float = 10.0  # to connect, and again for the handshake
    reply_seconds: float = 60.0  # without a byte of any reply: then the server counts as hung
    request_bytes: int = 1 << 20  # larger reads and writes are split into requests of this size
    in_flight: int = 16  # requests on the wire at a time; qemu stops reading at 16
    in_flight_bytes: int = 8 << 20  # and their data: more only fills socket buffers and caches


def list_exports(
    target: str | NbdUri, *, tls: ssl.SSLContext | None = None, settings: Settings | None = None
) -> list[ExportName]:
    """The names that a server offers; the export in the URI is ignored."""
    uri = target if isinstance(target, NbdUri) else NbdUri.parse(target)
    settings = settings or Settings()
    wire, haggler = connect(uri, settings, tls)
    try:
        found = haggler.exports()
        haggler.abort()
    except (OSError, ProtocolError, Refused) as error:
        raise HostUnreachable(f"{uri}: Cannot list the exports, {reason(error, settings.connect_seconds)}") from error
    finally:
        wire.close()
    return found


def connect(uri: NbdUri, settings: Settings, tls: ssl.SSLContext | None) -> tuple[Wire, Haggler]:
    """A wire on which the server waits for options."""
    try:
        sock = _socket(uri, settings.connect_seconds)
    except OSError as error:
        raise HostUnreachable(f"{uri}: Cannot connect, {reason(error, settings.connect_seconds)}") from error
    wire = Wire(sock, settings.connect_seconds)
    try:
        haggler = Haggler(wire, settings.connect_seconds)
        haggler.greet()
        if uri.tls or tls is not None:
            haggler.start_tls()
            wire.set_timeout(settings.connect_seconds)
            wire = TlsWire(wire, tls or _tls_context(uri), uri.host, settings.connect_seconds)
            haggler.switch_wire(wire, settings.connect_seconds)
    except (OSError, ProtocolError, Refused) as error:
        wire.close()
        raise HostUnreachable(
            f"{uri}: Cannot agree with the server, {reason(error, settings.connect_seconds)}"
        ) from error
    return wire, haggler


def _socket(uri: NbdUri, timeout_seconds: float) -> socket.socket:
    if not uri.socket:
        return socket.create_connection((uri.host, uri.port), timeout_seconds)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout_seconds)
        sock.connect(uri.socket)
    except OSError:
        sock.close()
        raise
    return sock


def _tls_context(uri: NbdUri) -> ssl.SSLContext:
    """The system's certificates, or those in the folder that the URI names (the file names are libnbd's and qemu's)."""
    if not uri.certificates:
        return ssl.create_default_context()
    folder = Path(uri.certificates)
    context = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
    if (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


def reason(error: Exception, seconds: float) -> str:
    """The error in words that follow a comma."""
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} seconds"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror.lower()
    return str(error)
