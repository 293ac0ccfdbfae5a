"""Single sign-on: a provider says who somebody is, and is believed only where everything fits."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import islice
from typing import Any

import httpx
import pytest

from hvbackup.api.gate import COOKIE
from hvbackup.api.oidc import ASKING_MAX, LOGIN_SECONDS, Logins
from hvbackup.api.oidc import COOKIE as COOKIE_OF_LOGIN
from hvbackup.auth import Refused, Role
from hvbackup.configuration import ProviderSettings
from hvbackup.errors import UsageError
from tests.api.conftest import Site
from tests.api.provider import CLIENT, SECRET, Provider, answering

PASSWORD = "correct horse battery"


@pytest.fixture
def provider(site: Site) -> Iterator[Provider]:
    before, secret = site.keeper.settings, site.world.folder / "client-secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    site.desk.accounts.guard._failures.clear()
    site.desk.accounts.add_user("sam", Role.OPERATOR, ["tag:web"], None, totp=False)
    with answering(Provider("https://testserver")) as found:
        settings = ProviderSettings(
            issuer=found.address,
            client=CLIENT,
            secret_file=str(secret),
            console=found.console,
            label="the <b>house</b>",
        )
        site.keeper.settings = replace(before, provider=settings)
        yield found
        site.keeper.settings, site.desk.provider = before, None


def sent(client: httpx.Client, to: str = "/jobs") -> str:
    """Where the provider sends the browser back to."""
    there = client.get("/login/provider", params={"to": to}, follow_redirects=False)
    assert there.status_code == 303, there.text
    return httpx.get(there.headers["location"]).headers["location"]


def test_a_person_comes_in_and_may_what_their_role_may(site: Site, provider: Provider) -> None:
    client = site.client()
    assert "Log in with the &lt;b&gt;house&lt;/b&gt;" in client.get("/login").text
    entered = client.get(sent(client))
    assert entered.status_code == 200
    assert 'content="0; url=/jobs"' in entered.text
    cookie = next(c for c in entered.headers.get_list("set-cookie") if c.startswith(COOKIE + "="))
    assert "SameSite=strict" in cookie
    assert "HttpOnly" in cookie
    assert "Secure" in cookie
    assert client.get("/api/v1/me").json() == {"name": "sam", "role": "operator", "machines": ["tag:web"]}
    last = site.desk.audited[-1]
    assert (last["what"], last["who"], last["status"]) == ("login", "sam", "done")
    site.desk.accounts.remove_user("sam")
    assert client.get("/api/v1/me").status_code == 401, "a session ends with its user"


FLAWS = (
    "nonce", "audience", "expired", "issuer", "another program", "nameless", "without an end", "unsigned",
    "signed with the public key", "another key", "an unknown key", "says no", "sends our secret on", "token over http",
)  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS)
def test_an_answer_that_does_not_fit_is_not_believed(site: Site, provider: Provider, flaw: str) -> None:
    client = site.client()
    provider.flaw = flaw
    answer = client.get(sent(client))
    assert answer.status_code == 401
    assert 'role="alert"' in answer.text
    assert client.get("/api/v1/me").status_code == 401
    assert provider.stolen == []
    last = site.desk.audited[-1]
    assert (last["what"], last["who"]) == ("login", "nobody")
    assert last["status"].startswith("refused")


def test_a_provider_under_another_name_is_refused(site: Site, provider: Provider) -> None:
    provider.flaw = "calls itself otherwise"
    assert "correct [provider] issuer" in site.client().get("/login/provider").text


@pytest.mark.parametrize("person", ["nobody-here", "ann", "local"])
def test_who_was_not_made_to_come_in_that_way_does_not(site: Site, provider: Provider, person: str) -> None:
    site.desk.accounts.add_user("ann", Role.ADMIN, [], PASSWORD, totp=False)
    provider.person, client = person, site.client()
    answer = client.get(sent(client))
    assert answer.status_code == 401
    assert "--single-sign-on" in answer.text
    assert client.get("/api/v1/me").status_code == 401
    assert site.desk.audited[-1]["who"] == person


def test_a_login_is_its_browsers_own_and_counts_once(site: Site, provider: Provider) -> None:
    victim, attacker = site.client(), site.client()
    back = sent(attacker)
    assert victim.get(back).status_code == 401, "somebody else's code makes nobody somebody else"
    assert attacker.get(back).status_code == 200, "and nobody else ends a login"
    back = sent(victim)
    kept = victim.cookies[COOKIE_OF_LOGIN]
    assert victim.get(back).status_code == 200
    assert victim.get(back).status_code == 401
    victim.cookies.set(COOKIE_OF_LOGIN, kept)
    assert victim.get(back).status_code == 401
    logins = Logins()
    login, cookie = logins.begin("/")
    logins.end(logins.get(login.state, cookie))
    with pytest.raises(Refused, match="already"):
        logins.end(logins.get(login.state, cookie))


def test_whoever_begins_thousands_of_logins_crowds_nobody_out(site: Site, provider: Provider) -> None:
    client, stranger = site.client(), site.client()
    back = sent(client)
    for _ in range(20):
        assert stranger.get("/login/provider", follow_redirects=False).status_code == 303
    for _ in range(5000):
        site.desk.logins.begin("/")
    assert client.get(back).status_code == 200


def test_a_login_is_what_we_wrote_and_ends() -> None:
    """The browser keeps it, and can neither change it nor make one."""
    now = [0.0]
    logins = Logins(clock=lambda: now[0])
    login, cookie = logins.begin("/jobs")
    assert logins.get(login.state, cookie) == login
    assert login.verifier not in cookie
    said, _, word = cookie.partition(".")
    other = base64.urlsafe_b64encode(json.dumps([login.state, "//example.org", 1e9]).encode()).decode()
    foreign = Logins().begin("/")
    forged = ("", ".", cookie[:-1], f"{other}.{word}", f"{said}.", f"{said}.\u00e9", foreign[1])
    for wrong in forged:
        with pytest.raises(Refused):
            logins.get(login.state, wrong)
    with pytest.raises(Refused):
        logins.get(foreign[0].state, cookie)
    now[0] = LOGIN_SECONDS + 1
    with pytest.raises(Refused):
        logins.get(login.state, cookie)


def test_no_other_site_is_gone_to(site: Site, provider: Provider) -> None:
    client = site.client()
    assert 'content="0; url=/"' in client.get(sent(client, "//example.org")).text


def test_the_provider_may_be_away(site: Site, provider: Provider) -> None:
    settings = site.keeper.settings.provider
    site.keeper.settings = replace(site.keeper.settings, provider=replace(settings, issuer="http://127.0.0.1:1"))
    answer = site.client().get("/login/provider")
    assert answer.status_code == 502
    assert "does not answer as a provider" in answer.text
    site.keeper.settings = replace(site.keeper.settings, provider=ProviderSettings())
    assert site.client().get("/login/provider").status_code == 404


@pytest.mark.parametrize("hangs", ["/.well-known", "/token", "/keys"])
def test_a_provider_that_hangs_holds_few_and_the_others_are_told(
    site: Site, provider: Provider, hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each login that waits holds a thread of the API, which everybody else needs as well."""
    monkeypatch.setattr("hvbackup.api.oidc.ASK_SECONDS", 60.0)
    clients = [site.client() for _ in range(3 * ASKING_MAX)]
    begins = hangs == "/.well-known"
    places = ["/login/provider" if begins else sent(client) for client in clients]
    provider.hangs = hangs

    def ask(client: httpx.Client, place: str) -> httpx.Response:
        return client.get(place, follow_redirects=False)

    with ThreadPoolExecutor(len(clients)) as pool:
        try:
            asked = [pool.submit(ask, *each) for each in zip(clients, places, strict=True)]
            refused = [f.result() for f in islice(as_completed(asked, timeout=30), 2 * ASKING_MAX)]
            assert len(provider.waiting) <= ASKING_MAX
            assert site.client("viewer").get("/api/v1/machines").status_code == 200
        finally:
            provider.wakes.set()
        answers = [f.result(60).status_code for f in asked]
    assert {a.status_code for a in refused} == {409}
    assert all("try again in a moment" in a.text for a in refused)
    assert (303 if begins else 200) in answers, "who waited comes in"
    provider.hangs = ""
    assert site.client().get("/login/provider", follow_redirects=False).status_code == 303, "each gives its turn back"
    assert clients[0].get(sent(clients[0])).status_code == 200, "who was told to try again was taken for no guesser"


@pytest.mark.walk
def test_a_provider_that_does_not_answer_is_nobodys_guess(
    site: Site, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = site.client()
    back = sent(client)
    provider.hangs = "/token"
    with monkeypatch.context() as hasty:
        hasty.setattr("hvbackup.api.oidc.ASK_SECONDS", 0.2)
        for _ in range(8):
            answer = client.get(back)
            assert answer.status_code == 502
            assert "does not answer as a provider" in answer.text
            assert site.desk.audited[-1]["status"].startswith("refused")
    provider.hangs = ""
    assert client.get(sent(client)).status_code == 200


def test_no_password_fits_who_has_none(site: Site) -> None:
    accounts = site.desk.accounts
    accounts.add_user("sam", Role.OPERATOR, [], None, totp=False)
    for word in ("", "single sign-on", "None"):
        accounts.guard._failures.clear()
        assert site.client().post("/api/v1/login", json={"name": "sam", "password": word}).status_code == 401
    with pytest.raises(UsageError, match="second factor"):
        accounts.add_user("sam", Role.OPERATOR, [], None, totp=True)


def test_an_administrator_adds_them(site: Site) -> None:
    admin = site.client("admin")

    def add(**order: Any) -> httpx.Response:
        return admin.post("/api/v1/users", json={"role": "viewer", **order})

    made = add(name="kim", single_sign_on=True)
    assert made.status_code == 201
    assert made.json()["single_sign_on"] is True
    assert add(name="lee", single_sign_on=True, password=PASSWORD).status_code == 422
    assert add(name="lee").status_code == 422
    world = site.world
    world.done("user", "add", "pat", "--role", "viewer", "--single-sign-on")
    assert "the provider's" in world.done("user", "list").out
    assert "no password" in world.refused(
        2, "user", "add", "pat", "--role", "viewer", "--single-sign-on", "--password-file", "x"
    )
