"""What follows `libvirt:` in a source: libvirt's own connection URI, with a few options of ours among its own.

    qemu:///system                                  every machine of this host
    qemu:///system?domain=web1,web2                 only these, by name or UUID
    qemu+ssh://root@host/system                     a host behind ssh: its NBD sockets are forwarded by ssh as well
    qemu+tls://host/system?tls-certificates=/path   NBD over TCP with TLS

Ours are `domain`, `scratch` (a folder on the host for what a machine overwrites while it is read), `nbd-port` (the first port
that may be used on a host reached by TLS) and `tls-certificates`; all others are libvirt's and go to it unchanged.  Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit, urlunsplit

from hvbackup.errors import UsageError

NBD_PORT = 10809
CERTIFICATES = "/etc/pki/qemu"  # where libvirt and QEMU look by themselves

_OURS = ("domain", "scratch", "nbd-port", "tls-certificates")
_LIBVIRTS = (
    *("command", "keyfile", "known_hosts", "known_hosts_verify", "mode", "name", "netcat", "no_sanity", "no_tty"),
    *("no_verify", "pkipath", "proxy", "root", "socket", "sshauth", "tls_priority"),
)
_TRANSPORTS = ("", "unix", "ssh", "libssh", "libssh2", "tls")


@dataclass(frozen=True, slots=True)
class LibvirtUri:
    """Which daemon, which of its machines, and how their disks are reached."""

    uri: str  # as libvirt takes it
    domains: Sequence[str] = ()  # names or UUIDs; none: all
    scratch: str = ""
    nbd_port: int = NBD_PORT
    certificates: str = CERTIFICATES
    transport: str = ""  # "" or unix: this host
    login: str = ""  # user@host, for ssh
    host: str = ""
    ssh_port: int = 0
    keyfile: str = ""
    ssh: str = "ssh"  # the program
    verify: bool = True  # whether the host's key must be known

    @property
    def local(self) -> bool:
        """Whether the daemon's files are our files."""
        return not self.host

    @property
    def by_ssh(self) -> bool:
        """Whether there is a shell on the other side."""
        return self.transport in ("ssh", "libssh", "libssh2") and not self.local

    @classmethod
    def parse(cls, text: str) -> LibvirtUri:
        """From what follows `libvirt:`.  Raises UsageError."""
        parts = urlsplit(text)
        driver, _, transport = parts.scheme.partition("+")
        if driver != "qemu" or transport not in _TRANSPORTS:
            raise UsageError(
                f"libvirt:{text}: Not a connection to QEMU; write libvirt:qemu:///system, libvirt:qemu+ssh://HOST/system "
                "or libvirt:qemu+tls://HOST/system"
            )
        given = parse_qsl(parts.query, keep_blank_values=True)
        _refuse_unknown(text, [key for key, _ in given])
        ours = {key: value for key, value in given if key in _OURS}
        theirs = [(key, value) for key, value in given if key not in _OURS]
        if transport == "ssh" and "no_tty" not in dict(theirs):
            theirs.append(("no_tty", "1"))  # nobody may be there to answer
        return cls(
            uri=_plain(parts, theirs),
            domains=tuple(n for key, value in given if key == "domain" for n in value.split(",") if n),
            scratch=ours.get("scratch", ""),
            nbd_port=_port(text, ours.get("nbd-port", str(NBD_PORT))),
            certificates=ours.get("tls-certificates", CERTIFICATES),
            transport=transport,
            login=parts.netloc.rpartition(":")[0] if parts.port else parts.netloc,
            host=parts.hostname or "",
            ssh_port=parts.port or 0,
            keyfile=dict(theirs).get("keyfile", ""),
            ssh=dict(theirs).get("command", "ssh"),
            verify="no_verify" not in dict(theirs),
        )


def _plain(parts: SplitResult, theirs: Sequence[tuple[str, str]]) -> str:
    query = "&".join(f"{key}={quote(value, safe='/')}" for key, value in theirs)
    path = parts.path or "/system"
    made = urlunsplit((parts.scheme, parts.netloc, path, query, ""))
    # An empty host needs its three slashes, which urlunsplit leaves out.
    return made if "://" in made else made.replace(":", "://", 1)


def _refuse_unknown(text: str, keys: Sequence[str]) -> None:
    known = (*_OURS, *_LIBVIRTS)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(
                f"libvirt:{text}: unknown option {key}{hint}; ours are {', '.join(_OURS)}, the others libvirt's"
            )


def _port(text: str, given: str) -> int:
    if not given.isdigit() or not 0 < int(given) < 65000:
        raise UsageError(f"libvirt:{text}: nbd-port is a number from 1 to 64999, not {given}")
    return int(given)
