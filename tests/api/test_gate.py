"""Browsers: a session opens what its user may, for as long as it is alive, and no other site can use it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request

from hvbackup.api import gate
from hvbackup.api.gate import COOKIE, Desk, Forbidden, needs
from hvbackup.auth import Accounts, Permission, Refused, Role
from hvbackup.model import SECOND, Instant


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    accounts = Accounts(tmp_path, lambda: Instant(1_800_000_000 * SECOND))
    accounts.add_user("ada", Role.OPERATOR, ["*"], "correct horse battery", totp=False)
    keeper: Any = None  # nothing here asks for machines
    return Desk(keeper, accounts)


def asked(desk: Desk, cookie: str, method: str = "POST", **headers: str) -> Request:
    named = {"host": "backup.example", "cookie": f"{COOKIE}={cookie}", **headers}
    written = [(k.replace("_", "-").encode(), v.encode()) for k, v in named.items()]
    app = SimpleNamespace(state=SimpleNamespace(desk=desk))
    return Request({"type": "http", "method": method, "headers": written, "client": ("192.0.2.1", 1), "app": app})


def logged_in(desk: Desk) -> tuple[str, str]:
    """A cookie, and the word of its session."""
    cookie = desk.sessions.begin(desk.accounts.by_password("ada", "correct horse battery", "", "192.0.2.1"))
    session = desk.sessions.get(cookie)
    assert session
    return cookie, session.csrf


def test_what_changes_anything_carries_the_word_of_its_session(desk: Desk) -> None:
    cookie, word = logged_in(desk)
    operate = needs(Permission.OPERATE)
    assert operate(asked(desk, cookie, x_hvbackup_csrf=word)).name == "ada"
    for wrong in ("", "guessed", logged_in(desk)[1]):
        with pytest.raises(Forbidden, match="word of its session"):
            operate(asked(desk, cookie, x_hvbackup_csrf=wrong))
    assert needs(Permission.READ)(asked(desk, cookie, "GET")).name == "ada", "reading needs no word"


def test_another_site_is_refused_whatever_it_carries(desk: Desk) -> None:
    cookie, word = logged_in(desk)
    operate = needs(Permission.OPERATE)
    operate(asked(desk, cookie, x_hvbackup_csrf=word, origin="https://backup.example"))
    for origin in ("https://evil.example", "https://backup.example.evil.example", "null"):
        with pytest.raises(Forbidden, match="another site"):
            operate(asked(desk, cookie, x_hvbackup_csrf=word, origin=origin))


def test_a_session_ends_with_its_user_and_changes_with_their_role(desk: Desk) -> None:
    cookie, word = logged_in(desk)
    desk.accounts.add_user("ada", Role.VIEWER, ["web1"], "correct horse battery", totp=False)
    with pytest.raises(Forbidden, match="permission to operate"):
        needs(Permission.OPERATE)(asked(desk, cookie, x_hvbackup_csrf=word))
    with pytest.raises(Forbidden, match="limited to some machines"):
        needs(Permission.READ, everything=True)(asked(desk, cookie, "GET"))
    desk.accounts.remove_user("ada")
    with pytest.raises(Refused, match="not known any more"):
        needs(Permission.READ)(asked(desk, cookie, "GET"))


def test_a_session_ends_after_a_while(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(gate.time, "monotonic", lambda: now)
    cookie, _ = logged_in(desk)
    for _ in range(8):
        now += gate.IDLE_SECONDS - 1
        assert desk.sessions.get(cookie), "it is being used"
    now += 60
    assert desk.sessions.get(cookie) is None, "it is eight hours old"
    cookie, _ = logged_in(desk)
    now += gate.IDLE_SECONDS + 1
    assert desk.sessions.get(cookie) is None, "nobody used it for an hour"
