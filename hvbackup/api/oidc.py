"""Single sign-on: OpenID Connect Core 1.0, the authorization code flow with PKCE (RFC 7636).

    browser                         we                                      provider
    /login/provider            ->   state, nonce and verifier are new  ->   its page, its second factor
    keeps the state, signed by us
    /login/provider/back       ->   the state is that browser's own         code
                                    code and verifier                  ->   identity, signed
                                    signature, issuer, audience, times, nonce fit; whom it names is a user of ours

A provider says who somebody is; what they may do stays in `accounts.json`, and only users made with `--single-sign-on` come in
this way.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from hvbackup import config
from hvbackup.auth import Refused
from hvbackup.configuration import ProviderSettings
from hvbackup.errors import Busy, HostUnreachable, HvbackupError

BACK = "/login/provider/back"
COOKIE = "__Host-hvbackup-provider"
ASK_SECONDS = 10.0
ASKING_MAX = 4  # logins that wait for the provider at once: no more threads of the API are held by one that hangs
ANSWER_BYTES = 1 << 20
LOGIN_SECONDS = 600.0  # for a person to answer the provider
KNOWN_SECONDS = 3600.0  # what a provider says of itself
ALGORITHMS = (
    "RS256",
    "PS256",
    "ES256",
    "EdDSA",
)  # signed with a key of the provider's; never with a secret, never unsigned
LEEWAY_SECONDS = 60
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Login:
    """A browser that was sent to the provider."""

    state: str
    verifier: str
    nonce: str
    to: str
    ends: float


@dataclass(slots=True)
class Logins:
    """Browsers that are with the provider; a restart ends their logins.  Thread safety: any thread.

    Each keeps its own login in a cookie that only we can write, and we keep none: whoever begins any number crowds nobody out.
    The verifier and the nonce follow from the state by a key that never leaves us.
    """

    clock: Callable[[], float] = time.monotonic
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    _used: dict[str, float] = field(default_factory=dict)  # states that let somebody in, and when they end
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, to: str) -> tuple[Login, str]:
        """A new one, and the cookie that its browser keeps."""
        login = self._login(secrets.token_urlsafe(32), to, self.clock() + LOGIN_SECONDS)
        said = _text(json.dumps([login.state, login.to, login.ends]).encode())
        return login, f"{said}.{self._word('cookie', said)}"

    def get(self, state: str, cookie: str) -> Login:
        """The login that this browser began.  Raises Refused."""
        said, _, word = cookie.partition(".")
        if hmac.compare_digest(word.encode(), self._word("cookie", said).encode()):
            found = self._login(*json.loads(base64.urlsafe_b64decode(said + "=" * (-len(said) % 4))))
            if found.ends > self.clock() and hmac.compare_digest(found.state.encode(), state.encode()):
                return found
        raise Refused("This login was not begun in this browser, or too long ago; log in again")

    def end(self, login: Login) -> None:
        """It lets in whom the provider named, once.  Raises Refused.  Only who may come in gets here, so it stays small."""
        now = self.clock()
        with self._lock:
            self._used = {state: ends for state, ends in self._used.items() if ends > now}
            if login.state in self._used:
                raise Refused("This login has let somebody in already; log in again")
            self._used[login.state] = login.ends

    def _login(self, state: str, to: str, ends: float) -> Login:
        return Login(state, self._word("verifier", state), self._word("nonce", state), to, ends)

    def _word(self, purpose: str, text: str) -> str:
        return _text(hmac.digest(self._key, f"{purpose} {text}".encode(), hashlib.sha256))


class Provider:
    """Who the configuration trusts to say who somebody is.  Thread safety: any thread."""

    def __init__(self, settings: ProviderSettings) -> None:
        self.settings = settings
        self._known: tuple[float, dict[str, Any]] | None = None
        self._asking = threading.BoundedSemaphore(ASKING_MAX)

    def address(self, login: Login) -> str:
        """Where the browser is sent.  Raises Busy, HostUnreachable, HvbackupError."""
        challenge = _text(hashlib.sha256(login.verifier.encode()).digest())
        ask = {
            "response_type": "code",
            "client_id": self.settings.client,
            "redirect_uri": self.settings.console + BACK,
            "scope": "openid profile email",
            "state": login.state,
            "nonce": login.nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        place = self._endpoint("authorization_endpoint")
        return f"{place}{'&' if urlsplit(place).query else '?'}{urlencode(ask)}"

    def name(self, code: str, login: Login) -> str:
        """Whom the provider named.  Raises Refused, Busy, HostUnreachable, HvbackupError."""
        ask = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self.settings.console + BACK,
            "code_verifier": login.verifier,
        }
        secret = config.read_secret(Path(self.settings.secret_file), "Secret file").strip()
        word = base64.b64encode(f"{quote(self.settings.client, safe='')}:{quote(secret, safe='')}".encode()).decode()
        said = self._asked(
            self._endpoint("token_endpoint"), urlencode(ask).encode(), {"Authorization": f"Basic {word}"}
        )
        claims = self._verified(str(said.get("id_token", "")))
        if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), login.nonce.encode()):
            raise Refused("The provider's answer belongs to another login")
        name = claims.get(self.settings.claim)
        if not isinstance(name, str) or not name:
            raise Refused(f"The provider does not say the {self.settings.claim} of who logged in")
        if self.settings.claim == "email" and claims.get("email_verified") is False:
            raise Refused(f"The provider has not verified that {name} is theirs")
        return name

    def _verified(self, token: str) -> dict[str, Any]:
        """What an identity token says.  Raises Refused unless it was signed by the provider, for us, and is not too old."""
        import jwt

        place = self._endpoint("jwks_uri")
        try:
            keys = jwt.PyJWKClient(place, timeout=ASK_SECONDS, ssl_context=self._trust(), cache_keys=False)
            with self._turn():
                key = keys.get_signing_key_from_jwt(token)
            found: dict[str, Any] = jwt.decode(
                token, key, algorithms=list(ALGORITHMS), audience=self.settings.client, issuer=self.settings.issuer,
                leeway=LEEWAY_SECONDS, options={"require": ["exp", "iat", "iss", "aud", "sub", "nonce"]},
            )  # fmt: skip
        except jwt.PyJWKClientConnectionError as e:
            raise HostUnreachable(f"The keys of {self.settings.issuer} can't be had: {e}") from e
        except (jwt.PyJWTError, ValueError, TypeError) as e:
            raise Refused(f"The provider's answer can't be trusted: {e}") from e
        if found.get("azp", self.settings.client) != self.settings.client:
            raise Refused("The provider's answer is for another program")
        return found

    def _endpoint(self, what: str) -> str:
        """An address of the provider.  Raises Busy, HostUnreachable, HvbackupError."""
        if self._known is None or time.monotonic() - self._known[0] > KNOWN_SECONDS:
            said = self._asked(self.settings.issuer.rstrip("/") + "/.well-known/openid-configuration")
            if said.get("issuer") != self.settings.issuer:
                raise HvbackupError(
                    f"{self.settings.issuer} calls itself {said.get('issuer')}; correct [provider] issuer"
                )
            self._known = time.monotonic(), said
        place = str(self._known[1].get(what, ""))
        if not is_safe(place):
            raise HvbackupError(f"{self.settings.issuer} has no safe {what}: {place or 'none'}")
        return place

    def _asked(self, place: str, data: bytes | None = None, more: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A JSON object from the provider.  Raises Busy, HostUnreachable, Refused."""
        headers = {"Accept": "application/json", **(more or {})}
        request = urllib.request.Request(place, data, headers)
        try:
            with self._turn(), self._opener().open(request, timeout=ASK_SECONDS) as answer:
                said = json.loads(answer.read(ANSWER_BYTES))
        except urllib.error.HTTPError as e:
            raise Refused(f"{urlsplit(place).netloc} answered {e.code} {e.reason}") from e
        except (OSError, ValueError) as e:
            raise HostUnreachable(f"{urlsplit(place).netloc} does not answer as a provider: {e}") from e
        if not isinstance(said, dict):
            raise HostUnreachable(f"{urlsplit(place).netloc} does not answer as a provider")
        return said

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """We may wait for the provider while the context lasts.  Raises Busy when enough others do."""
        if not self._asking.acquire(blocking=False):
            who = urlsplit(self.settings.issuer).netloc
            raise Busy(f"{who} is slow to answer, and others wait for it; try again in a moment")
        try:
            yield
        finally:
            self._asking.release()

    def _opener(self) -> urllib.request.OpenerDirector:
        return urllib.request.build_opener(urllib.request.HTTPSHandler(context=self._trust()), _Straight())

    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.settings.ca or None)


class _Straight(urllib.request.HTTPRedirectHandler):
    """Our secret goes where it was meant to go, and nowhere else."""

    def redirect_request(self, *_: object) -> None:
        """Nothing is followed."""


def _text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def is_safe(place: str) -> bool:
    """Whether what goes there can't be read on the way."""
    parts = urlsplit(place)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOCAL)
