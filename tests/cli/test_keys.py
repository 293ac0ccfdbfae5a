"""Keys: kept, given, lost, stolen, wrong.  What `docs/keys.md` says to do is done here, word for word."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hvbackup import config
from hvbackup.config import KeyOptions
from hvbackup.errors import KeyRefused, UsageError
from hvbackup.service import stores
from hvbackup.service.session import Session
from tests.cli.rig import World


def files_of(store: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}


def test_a_lost_key_is_replaced_by_the_one_on_paper(stored: World) -> None:
    text = stored.done("key", "paper", "--quiet").out.strip()
    kept = stored.key_file
    kept.unlink()
    message = stored.refused(2, "points")
    assert str(kept) in message, "where to put the key back"
    typed = stored.folder / "typed"
    typed.write_text(text.lower().replace("-", " ") + "\n")
    assert stored.done("points", "--key-file", typed, "--json").json["points"]
    stored.done("key", "add", "--key-file", typed, "--new-key-file", kept)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    stored.done("points")


def test_a_stolen_key_is_locked_out(stored: World) -> None:
    stolen = stored.folder / "stolen"
    stolen.write_bytes(stored.key_file.read_bytes())
    [old] = stored.done("key", "list", "--json").json["keys"]
    stored.done("key", "add", "--new-key-file", stored.folder / "new.key", "--label", "after the theft")
    (stored.folder / "new.key").rename(stored.key_file)
    stored.done("key", "remove", old["id"])
    stored.done("points")
    assert "does not open store" in stored.refused(2, "points", "--key-file", stolen)
    assert [k["label"] for k in stored.done("key", "list", "--json").json["keys"]] == ["after the theft"]


def test_removing_the_key_in_use_is_said_and_the_last_one_stays(stored: World) -> None:
    [first] = stored.done("key", "list", "--json").json["keys"]
    assert "the only key" in stored.refused(2, "key", "remove", first["id"])
    assert first["id"] in stored.refused(2, "key", "remove", "0123")
    stored.done("key", "paper")
    ran = stored.run("key", "remove", first["id"])
    assert ran.code == 0
    assert "does not open the store any more" in ran.err


def test_a_wrong_key_is_refused_before_anything_is_written(stored: World) -> None:
    other = World(stored.folder / "other")
    other.folder.mkdir()
    other.done("init")
    before = files_of(stored.store)
    source = f"image:{stored.folder}/disk.raw"
    message = stored.refused(2, "backup", source, "--key-file", other.key_file)
    assert str(other.key_file) in message
    assert "nothing was written" in message
    assert files_of(stored.store) == before


@pytest.mark.parametrize("content", [b"", b"HVB1-AAAA", b"not a key", b"\xff\xfe\x00", b"# only a comment\n"])
def test_a_damaged_key_file_is_named(stored: World, content: bytes) -> None:
    bad = stored.folder / "bad.key"
    bad.write_bytes(content)
    assert str(bad) in stored.refused(2, "status", "--key-file", bad)


def test_a_passphrase_opens_the_store_it_made(world: World) -> None:
    (world.folder / "pass").write_text("correct horse\n")
    (world.folder / "wrong").write_text("battery staple\n")
    world.done("init", "--passphrase-file", world.folder / "pass")
    assert not world.configuration.exists(), "no key file besides"
    assert "passphrase" in world.refused(2, "status")
    assert "wrong" in world.refused(2, "status", "--passphrase-file", world.folder / "wrong")
    world.done("status", HVBACKUP_PASSPHRASE_FILE=str(world.folder / "pass"))
    world.done(
        "key", "add", "--passphrase-file", world.folder / "pass", "--new-passphrase-file", world.folder / "wrong"
    )
    world.done("status", "--passphrase-file", world.folder / "wrong")


def test_a_key_file_that_was_chosen_is_made_there_or_used(world: World) -> None:
    key = world.folder / "usb" / "our.key"
    made = world.done("init", "--key-file", key, "--json").json
    assert made["key_file"] == str(key)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert [p.name for p in key.parent.iterdir()] == ["our.key"]
    world.done("init", world.folder / "second", "--key-file", key)
    world.done("status", HVBACKUP_KEY_FILE=str(key))
    assert "its key is not here" in world.refused(2, "status")


def test_a_key_is_never_kept_in_the_state_or_the_store(world: World) -> None:
    for place in (world.state, world.store):
        assert "A key can't be kept" in world.refused(2, "init", "--key-file", place / "k")
    assert "A key can't be kept" in world.refused(2, "init", HVBACKUP_CONFIG=str(world.state / "conf"))
    assert not world.store.exists()


def test_an_init_that_fails_leaves_no_key(world: World) -> None:
    (world.store / "mine").mkdir(parents=True)
    assert "is not empty" in world.refused(2, "init")
    assert "is not empty" in world.refused(2, "init", "--key-file", world.folder / "k")
    assert not list(world.configuration.rglob("*.key"))
    assert not (world.folder / "k").exists()


def test_keys_make_no_sense_without_encryption(world: World) -> None:
    world.run("init", "--no-encryption")
    assert "not encrypted" in world.refused(2, "key", "paper")
    assert "leave out either" in world.refused(2, "init", world.folder / "b", "--no-encryption", "--key-file", "k")


def test_nobody_is_asked_where_nobody_is(stored: World) -> None:
    assert "Nobody is there to type" in stored.refused(2, "key", "add")


def test_a_person_is_asked_twice_for_a_new_passphrase_and_once_for_an_old_one(tmp_path: Path) -> None:
    answers = iter(["secret", "secrte", "secret", "secret"])
    places = config.Places(tmp_path / "store", tmp_path / "state", tmp_path / "conf", tmp_path / "run")
    session = Session(places, ask=lambda _: next(answers))
    made = stores.init(session, block=65536)
    with pytest.raises(KeyRefused, match="differ"):
        stores.add_key(session, KeyOptions(), "")
    stores.add_key(session, KeyOptions(), "")
    assert made.key_file is not None
    made.key_file.unlink()
    Session(places, ask=lambda _: "secret").open().close()
    with pytest.raises(KeyRefused, match="does not open"):
        Session(places, ask=lambda _: "wrong").open()


def test_a_new_key_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "k").write_text("mine")
    with pytest.raises(UsageError, match="never replaces a file"):
        stores.write_key(tmp_path / "k", "HVB1", "")
    assert (tmp_path / "k").read_text() == "mine"
