"""Where an NBD export is: `nbd://host:port/export`, `nbds://...` with TLS, `nbd+unix:///export?socket=/path`."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hvbackup.errors import UsageError
from hvbackup.nbd.protocol import DEFAULT_PORT, NAME_MAX_BYTES

_SCHEMES = {"nbd": (False, False), "nbds": (True, False), "nbd+unix": (False, True), "nbds+unix": (True, True)}


@dataclass(frozen=True, slots=True)
class NbdUri:
    """One export of one server; `str()` gives the URI back in its usual form."""

    export: str = ""
    host: str = ""  # empty means a unix socket
    port: int = DEFAULT_PORT
    socket: str = ""
    tls: bool = False
    certificates: str = ""  # folder with ca-cert.pem and, where the server asks, client-cert.pem and client-key.pem

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """The parts of an NBD URI; UsageError when it is not one."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"{text}: Not an NBD URI ({error}); {_EXPECTED}") from error
        if parts.scheme not in _SCHEMES:
            raise UsageError(f"{text}: Not an NBD URI; {_EXPECTED}")
        tls, local = _SCHEMES[parts.scheme]
        query = parse_qs(parts.query)
        socket = query.get("socket", [""])[-1]
        _check(text, local=local, socket=socket, host=parts.hostname or "")
        export = unquote(parts.path.removeprefix("/"))
        if len(export.encode()) > NAME_MAX_BYTES:
            raise UsageError(f"{text[:80]}...: The export's name is longer than {NAME_MAX_BYTES} bytes")
        return cls(
            export=export,
            host="" if local else parts.hostname or "localhost",
            port=DEFAULT_PORT if port is None else port,
            socket=socket,
            tls=tls,
            certificates=query.get("tls-certificates", [""])[-1],
        )

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        certificates = f"tls-certificates={quote(self.certificates)}" if self.certificates else ""
        if self.socket:
            query = "&".join(filter(None, (f"socket={quote(self.socket)}", certificates)))
            return f"{scheme}+unix:///{quote(self.export)}?{query}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{quote(self.export)}" + (f"?{certificates}" if certificates else "")


_EXPECTED = "expected nbd://host:port/export or nbd+unix:///export?socket=/path"


def _check(text: str, *, local: bool, socket: str, host: str) -> None:
    if local and not socket:
        raise UsageError(f"{text}: No socket named; add ?socket=/path")
    if local and host:
        raise UsageError(f"{text}: A unix socket has no host; write three slashes, nbd+unix:///export?socket=/path")
    if socket and not local:
        raise UsageError(f"{text}: A socket path needs nbd+unix:///export?socket=/path")
