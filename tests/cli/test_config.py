"""Where things are."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvbackup import config
from hvbackup.errors import KeyRefused, UsageError


def test_root_has_the_system_s_places() -> None:
    found = config.places("", {}, root=True)
    assert (str(found.store), str(found.state)) == ("/var/lib/hvbackup/store", "/var/lib/hvbackup/state")
    assert (str(found.configuration), str(found.run)) == ("/etc/hvbackup", "/run/hvbackup")


def test_everybody_else_has_the_xdg_places() -> None:
    found = config.places(
        "", {"HOME": "/home/ann", "XDG_STATE_HOME": "/s", "XDG_DATA_HOME": "not/absolute"}, root=False
    )
    assert str(found.store) == "/home/ann/.local/share/hvbackup/store"
    assert str(found.state) == "/s/hvbackup"
    assert str(found.configuration) == "/home/ann/.config/hvbackup"
    assert config.places("", {"XDG_RUNTIME_DIR": "/run/user/7"}, root=False).run == Path("/run/user/7/hvbackup")


def test_an_option_beats_the_environment_and_that_beats_habit() -> None:
    environment = {"HVBACKUP_STORE": "/a/store", "HVBACKUP_STATE": "/a/state"}
    assert config.places("", environment, root=True).store == Path("/a/store")
    assert config.places("/b", environment, root=True).store == Path("/b")
    given = {"HVBACKUP_KEY_FILE": "/k", "HVBACKUP_PASSPHRASE_FILE": "/p"}
    assert config.key_options(None, None, given) == config.KeyOptions(Path("/k"), Path("/p"))
    assert config.key_options("/mine", None, given) == config.KeyOptions(Path("/mine"), None)


@pytest.mark.parametrize(("store", "state"), [("/a", "/a"), ("/a/b", "/a"), ("/a", "/a/b"), ("/x/../a/b", "/a")])
def test_removing_the_state_can_never_take_the_store_along(store: str, state: str) -> None:
    with pytest.raises(UsageError, match="must not contain each other"):
        config.places(store, {"HVBACKUP_STATE": state}, root=True)


def test_a_key_that_init_could_not_name_is_found(tmp_path: Path) -> None:
    folder = tmp_path / config.KEYS
    folder.mkdir()
    left = folder / f"{config.UNFINISHED_KEY}1234.key"
    left.touch()
    assert config.kept_keys(tmp_path, "abc") == [left]
    config.key_path(tmp_path, "abc").touch()
    assert config.kept_keys(tmp_path, "abc") == [config.key_path(tmp_path, "abc")]


def test_a_secret_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"\xff\xfe")
    for name, why in (("k", "is not text"), ("gone", "can't be read")):
        with pytest.raises(KeyRefused, match=f"Key file {tmp_path}/{name} {why}"):
            config.read_secret(tmp_path / name, "Key file")


def test_a_run_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    assert config.private(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "file").touch()
    for name in ("open", "link", "file"):
        with pytest.raises(UsageError, match=f"{tmp_path}/{name}"):
            config.private(tmp_path / name)
