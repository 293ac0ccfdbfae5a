"""Who comes in: passwords, tokens, second factors, and guessers."""

from __future__ import annotations

import base64
import json
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hvbackup import auth
from hvbackup.auth import FREE_TRIES, Accounts, Guard, Refused, Role, TooMany, hotp
from hvbackup.errors import HvbackupError, NotFound, UsageError
from hvbackup.model import SECOND, Instant

PASSWORD = "correct horse battery"


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000 * SECOND

    def __call__(self) -> Instant:
        return Instant(self.now)


@pytest.mark.parametrize(
    ("seconds", "code"),
    [(59, "94287082"), (1111111109, "07081804"), (1111111111, "14050471"), (1234567890, "89005924"),
     (2000000000, "69279037"), (20000000000, "65353130")],
)  # fmt: skip
def test_codes_are_those_of_rfc_6238(seconds: int, code: str) -> None:
    assert hotp(b"12345678901234567890", seconds // 30, 8) == code


@pytest.mark.parametrize(
    ("counter", "code"), list(enumerate(["755224", "287082", "359152", "969429", "338314", "254676"]))
)
def test_codes_are_those_of_rfc_4226(counter: int, code: str) -> None:
    assert hotp(b"12345678901234567890", counter) == code


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts(tmp_path: Path, clock: Clock) -> Accounts:
    return Accounts(tmp_path, clock)


def test_a_token_lets_in_until_it_expires_or_is_removed_and_is_kept_nowhere(
    accounts: Accounts, clock: Clock, tmp_path: Path
) -> None:
    token, text = accounts.add_token("ci", Role.OPERATOR, ["web*"], 60 * SECOND)
    assert accounts.by_token(text).role is Role.OPERATOR
    book = tmp_path / "accounts.json"
    assert text not in book.read_text()
    assert text.removeprefix("hvb_") not in book.read_text()
    assert stat.S_IMODE(book.stat().st_mode) == 0o600
    clock.now += 60 * SECOND
    with pytest.raises(Refused, match="expired"):
        accounts.by_token(text)
    accounts.remove_token(token.id)
    with pytest.raises(Refused, match="not known"):
        accounts.by_token(text)
    with pytest.raises(NotFound):
        accounts.remove_token(token.id)


def test_another_process_sees_a_change_at_once(accounts: Accounts, tmp_path: Path, clock: Clock) -> None:
    other = Accounts(tmp_path, clock)
    assert other.users() == []
    accounts.add_user("ann", Role.ADMIN, [], PASSWORD, totp=False)
    assert other.by_password("ann", PASSWORD, "", "a").may is not None
    accounts.remove_user("ann")
    with pytest.raises(Refused):
        other.still(other.by_token(accounts.add_token("t", Role.ADMIN, [], 0)[1]))


def test_a_second_factor_counts_once(accounts: Accounts, clock: Clock) -> None:
    user = accounts.add_user("ann", Role.ADMIN, [], PASSWORD, totp=True)
    code = hotp(base64.b32decode(user.totp), int(clock() // SECOND) // 30)
    with pytest.raises(Refused, match="wrong"):
        accounts.by_password("ann", PASSWORD, "", "a")
    assert accounts.by_password("ann", PASSWORD, code, "a").name == "ann"
    with pytest.raises(Refused, match="wrong"):
        accounts.by_password("ann", PASSWORD, code, "a")
    clock.now += 30 * SECOND
    assert accounts.by_password("ann", PASSWORD, hotp(base64.b32decode(user.totp), int(clock() // SECOND) // 30), "a")


def test_a_wrong_name_and_a_wrong_password_look_the_same(accounts: Accounts) -> None:
    accounts.add_user("ann", Role.VIEWER, [], PASSWORD, totp=False)
    said = set()
    for name, password in (("ann", "x"), ("bob", PASSWORD), ("", "")):
        with pytest.raises(Refused) as caught:
            accounts.by_password(name, password, "", f"from {name}")
        said.add(str(caught.value))
    assert len(said) == 1


def test_a_guesser_waits_ever_longer_and_the_owner_of_another_name_does_not() -> None:
    now = [0.0]
    guard = Guard(lambda: now[0])
    for _ in range(FREE_TRIES):
        guard.admit(["user ann", "address 1"])
        guard.failed(["user ann", "address 1"])
    waits = []
    for _ in range(12):
        with pytest.raises(TooMany) as caught:
            guard.admit(["user ann", "address 2"])
        waits.append(caught.value.seconds)
        now[0] += caught.value.seconds
        guard.admit(["user ann"])
        guard.failed(["user ann"])
    assert waits == sorted(waits)
    assert waits[0] == 1.0
    assert waits[-1] == 900.0
    guard.admit(["user bob", "address 3"])
    guard.succeeded(["user ann"])
    guard.admit(["user ann"])


def test_bad_accounts(accounts: Accounts, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 10"):
        accounts.add_user("ann", Role.ADMIN, [], "short", totp=False)
    with pytest.raises(UsageError, match="printable"):
        accounts.add_token("a\nb", Role.ADMIN, [], 0)
    (tmp_path / "accounts.json").write_text(json.dumps({"users": [{"name": "x"}]}))
    with pytest.raises(HvbackupError, match=r"accounts\.json can't be read"):
        accounts.users()


def test_guessers_with_many_hands_get_no_more_tries(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty at once: only so many passwords are looked at as one after the other would be."""
    looked: list[str] = []
    at_once: list[int] = []

    def fits(_: str, password: str) -> bool:
        looked.append(password)
        at_once.append(len(looked))
        time.sleep(0.01)
        at_once[-1] -= len(looked)  # 0: nobody else came in meanwhile
        return False

    monkeypatch.setattr(auth, "_fits", fits)
    accounts.guard.clock = lambda: 0.0  # however long the forty take, the pause is not over
    accounts.add_user("ann", Role.ADMIN, [], PASSWORD, totp=False)

    def guess(number: int) -> str:
        try:
            accounts.by_password("ann", f"guess {number}", "", f"host {number}")
        except Refused as e:
            return type(e).__name__
        return "in"

    with ThreadPoolExecutor(40) as pool:
        said = list(pool.map(guess, range(40)))
    assert len(looked) == FREE_TRIES == said.count("Refused")
    assert said.count("TooMany") == 40 - FREE_TRIES
    assert set(at_once) == {0}


def test_a_code_counts_once_also_after_a_restart(accounts: Accounts, tmp_path: Path, clock: Clock) -> None:
    user = accounts.add_user("ann", Role.ADMIN, [], PASSWORD, totp=True)
    code = hotp(base64.b32decode(user.totp), clock.now // SECOND // 30)
    assert accounts.by_password("ann", PASSWORD, code, "a").name == "ann"
    with pytest.raises(Refused):
        Accounts(tmp_path, clock).by_password("ann", PASSWORD, code, "a")


@pytest.mark.parametrize("name", ["local", "nobody", "schedule", "token ci"])
def test_nobody_looks_like_somebody_else_in_the_audit(accounts: Accounts, name: str) -> None:
    with pytest.raises(UsageError, match="audit"):
        accounts.add_user(name, Role.VIEWER, [], PASSWORD, totp=False)


def test_what_a_later_version_wrote_survives_a_change_by_this_one(accounts: Accounts, tmp_path: Path) -> None:
    """Unknown fields of users, of tokens and of the file stay; whoever has an unknown role stays too, and comes in as nobody."""
    accounts.add_user("ann", Role.ADMIN, [], PASSWORD, totp=False)
    accounts.add_user("bob", Role.VIEWER, [], PASSWORD, totp=False)
    _, text = accounts.add_token("ci", Role.VIEWER, [], 0)
    _, other = accounts.add_token("nightly", Role.VIEWER, [], 0)
    path = tmp_path / auth.FILE
    later = json.loads(path.read_text())
    later["groups"] = {"night": ["ann"]}
    later["users"][0]["mail"] = "ann@example.com"
    later["users"][1]["role"] = "auditor"
    later["tokens"][0]["from"] = ["10.0.0.0/8"]
    later["tokens"][1]["role"] = "auditor"
    path.write_text(json.dumps(later))
    assert accounts.by_token(text).role is Role.VIEWER
    for refused in (lambda: accounts.by_token(other), lambda: accounts.by_password("bob", PASSWORD, "", "")):
        with pytest.raises(Refused):
            refused()
    accounts.add_token("more", Role.VIEWER, [], 0)
    now = json.loads(path.read_text())
    assert now["groups"] == later["groups"]
    assert now["users"] == later["users"]
    assert [t for t in now["tokens"] if t["name"] != "more"] == later["tokens"]
    accounts.add_user("ann", Role.ADMIN, [], "another password", totp=False)
    assert "mail" not in next(u for u in json.loads(path.read_text())["users"] if u["name"] == "ann"), "a new user"
    accounts.remove_user("bob")
    accounts.remove_token(later["tokens"][1]["id"])
    now = json.loads(path.read_text())
    assert ([u["name"] for u in now["users"]], {t["name"] for t in now["tokens"]}) == (["ann"], {"ci", "more"})
    with pytest.raises(NotFound):
        accounts.remove_user("bob")
