"""A provider of OpenID Connect that checks what it is sent, and can be told to answer wrongly."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

CLIENT, SECRET = "hvbackup:console", "a secret, 100 % of it"


@dataclass
class Provider:
    """What it knows, and how it misbehaves."""

    console: str
    address: str = ""
    person: str = "sam"
    flaw: str = ""
    key: Any = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    hangs: str = ""  # what it does not answer until `wakes` is set
    wakes: threading.Event = field(default_factory=threading.Event)
    waiting: list[str] = field(default_factory=list)  # what it was asked while it hung
    stolen: list[str] = field(default_factory=list)

    def known(self) -> dict[str, Any]:
        """RFC 8414, what is needed of it."""
        return {
            "issuer": self.address + ("/other" if self.flaw == "calls itself otherwise" else ""),
            "authorization_endpoint": f"{self.address}/authorize",
            "token_endpoint": "http://example.org/token" if self.flaw == "token over http" else f"{self.address}/token",
            "jwks_uri": f"{self.address}/keys",
        }

    def keys(self) -> dict[str, Any]:
        key = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key()))
        return {"keys": [{**key, "kid": "one", "use": "sig", "alg": "RS256"}]}

    def authorize(self, ask: dict[str, str]) -> str:
        """Where the browser goes back to."""
        wanted = {
            "response_type": "code", "client_id": CLIENT, "code_challenge_method": "S256",
            "redirect_uri": self.console + "/login/provider/back",
        }  # fmt: skip
        assert {k: ask.get(k) for k in wanted} == wanted
        assert "openid" in ask["scope"].split()
        assert len(ask["state"]) >= 32
        assert len(ask["nonce"]) >= 22
        assert len(ask["code_challenge"]) == 43
        if self.flaw == "says no":
            return f"{ask['redirect_uri']}?{urlencode({'state': ask['state'], 'error': 'access_denied'})}"
        code = secrets.token_urlsafe(16)
        self.codes[code] = ask
        return f"{ask['redirect_uri']}?{urlencode({'state': ask['state'], 'code': code})}"

    def token(self, ask: dict[str, str], authorization: str) -> dict[str, Any] | None:
        """An identity token; None for whoever does not prove what they must."""
        word = base64.b64encode(f"{quote(CLIENT, safe='')}:{quote(SECRET, safe='')}".encode()).decode()
        begun = self.codes.pop(ask.get("code", ""), None)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(ask.get("code_verifier", "").encode()).digest()).rstrip(
            b"="
        )
        if (
            authorization != f"Basic {word}"
            or begun is None
            or begun["code_challenge"] != challenge.decode()
            or ask.get("grant_type") != "authorization_code"
            or ask.get("redirect_uri") != begun["redirect_uri"]
        ):
            self.refused.append(ask.get("code", ""))
            return None
        return {"token_type": "Bearer", "access_token": "x", "id_token": self.signed(begun["nonce"])}

    def signed(self, nonce: str) -> str:
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": self.address, "sub": "1", "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": nonce,
            "preferred_username": self.person,
        }  # fmt: skip
        wrong: dict[str, dict[str, Any]] = {
            "nonce": {"nonce": "another"}, "audience": {"aud": "another"}, "expired": {"iat": now - 900, "exp": now - 600},
            "issuer": {"iss": "https://example.org"}, "another program": {"azp": "another"},
            "nameless": {"preferred_username": None},
        }  # fmt: skip
        claims |= wrong.get(self.flaw, {})
        if self.flaw == "without an end":
            del claims["exp"]
        public = self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        if self.flaw == "unsigned":
            return jwt.encode(claims, None, algorithm="none", headers={"kid": "one"})
        if self.flaw == "signed with the public key":
            head, body = (
                base64.urlsafe_b64encode(json.dumps(v).encode()).rstrip(b"=")
                for v in ({"alg": "HS256", "kid": "one"}, claims)
            )
            import hmac

            mac = base64.urlsafe_b64encode(hmac.digest(public, head + b"." + body, "sha256")).rstrip(b"=")
            return b".".join((head, body, mac)).decode()
        if self.flaw == "another key":
            return jwt.encode(claims, rsa.generate_private_key(65537, 2048), algorithm="RS256", headers={"kid": "one"})
        if self.flaw == "an unknown key":
            return jwt.encode(
                claims, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256", headers={"kid": "two"}
            )
        return jwt.encode(claims, self.key, algorithm="RS256", headers={"kid": "one"})


@contextmanager
def answering(provider: Provider) -> Iterator[Provider]:
    """It listens while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            self.hang(parts.path)
            if parts.path == "/authorize":
                ask = {k: v[0] for k, v in parse_qs(parts.query).items()}
                self.send_response(303)
                self.send_header("Location", provider.authorize(ask))
                self.end_headers()
            elif parts.path == "/stolen":
                provider.stolen.append(self.headers["Authorization"] or "")
                self.say({})
            elif parts.path == "/keys":
                self.say(provider.keys())
            else:
                assert parts.path == "/.well-known/openid-configuration"
                self.say(provider.known())

        def do_POST(self) -> None:
            self.hang(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            said = provider.token({k: v[0] for k, v in parse_qs(body).items()}, self.headers["Authorization"] or "")
            if provider.flaw == "sends our secret on":
                self.send_response(302)
                self.send_header("Location", f"{provider.address}/stolen")
                self.end_headers()
            else:
                self.say(said or {"error": "invalid_grant"}, 200 if said else 400)

        def hang(self, path: str) -> None:
            if provider.hangs and path.startswith(provider.hangs):
                provider.waiting.append(path)
                provider.wakes.wait(60)

        def say(self, value: dict[str, Any], status: int = 200) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        provider.wakes.set()
        server.shutdown()
        thread.join()
        server.server_close()
