"""Stores and their keys: init, key list, key add, key remove, key paper.

`init` makes the key before the store, so that no store is ever without one:

    killed after                     left behind                            mended by
    1 key in a file of its own name  a key that opens nothing               the next `init` or a person; it does no harm
    2 store made                     a key whose file is not named for it   `config.kept_keys` finds it
    3 key under the store's name     the same key twice                     nothing: both open the store
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hvbackup import config
from hvbackup.config import KeyOptions, Places
from hvbackup.errors import HvbackupError, KeyRefused, UsageError
from hvbackup.files import Files
from hvbackup.model import Instant
from hvbackup.service import lonefile
from hvbackup.service.session import Session, given
from hvbackup.store import store
from hvbackup.store.format import keys
from hvbackup.store.format import parity as store_parity
from hvbackup.store.format.layout import BLOCK_SIZES
from hvbackup.store.reclaim import reserve
from hvbackup.store.store import Store, describe


@dataclass(frozen=True, slots=True)
class Made:
    """A new store."""

    id: str
    path: Path
    block: int
    encrypted: bool
    key_file: Path | None = None  # made by us
    opens_with: str = ""  # for people


@dataclass(frozen=True, slots=True)
class Wrapping:
    """One way to open a store."""

    id: str
    kind: str
    label: str


def init(
    session: Session,
    *,
    block: int,
    encrypted: bool = True,
    parity: bool = False,
    family_of: Session | None = None,
    min_age_ns: int = 0,
) -> Made:
    """A new, empty store exists when this returns, and its key is where the result says.

    It is of one family with the store of `family_of`.  `min_age_ns`: no point of it is forgotten before it is so old.
    Raises UsageError when something is there already, KeyRefused when a key file can't be used.
    """
    if parity:
        store_parity.require()
    made = _init(session, block=block, encrypted=encrypted, family_of=family_of)
    if parity:
        store_parity.want(Files(made.path))
    reserve.keep(Files(made.path))
    if min_age_ns:
        from hvbackup.service import retention

        retention.change_settings(session, {"min_age_ns": min_age_ns}, Instant(time.time_ns()))
    return made


def _init(session: Session, *, block: int, encrypted: bool, family_of: Session | None) -> Made:
    path, family = session.places.store, None
    if family_of:
        with family_of.open() as other:
            if block and block != other.block:
                raise UsageError(
                    f"Stores of one family have equal blocks: {other.block // 1024}K here; leave --block out"
                )
            family, block = other.ring, other.block
    block = block or BLOCK_SIZES[0]
    if not encrypted:
        if session.keys.given:
            raise UsageError("A store without encryption has no key; leave out either --no-encryption or the key")
        return Made(store.init(path, None, block, family=family), path, block, encrypted=False)
    if session.keys.passphrase_file or (session.keys.key_file and session.keys.key_file.exists()):
        if session.keys.key_file:
            refuse_cache(session.places, session.keys.key_file)
        secret = _one(session.keys)
        return Made(
            store.init(path, secret, block, family=family), path, block, encrypted=True, opens_with=secret.origin
        )
    if session.keys.key_file:
        return _init_with_new_key(session, block, session.keys.key_file, family)
    return _init_with_kept_key(session, block, family)


def _one(options: KeyOptions) -> keys.Secret:
    found = given(options)
    if len(found) > 1:
        raise UsageError("A new store begins with one key; add others with `hvbackup key add`")
    return found[0]


def _init_with_new_key(session: Session, block: int, path: Path, family: keys.Keyring | None) -> Made:
    """A store whose key goes to a file that somebody chose and that does not exist yet."""
    refuse_cache(session.places, path)
    text = keys.new_key_text()
    write_key(path, text, "")
    try:
        made = store.init(session.places.store, keys.parse_key_text(text, str(path)), block, family=family)
    except HvbackupError:
        path.unlink(missing_ok=True)
        raise
    return Made(made, session.places.store, block, encrypted=True, key_file=path)


def _init_with_kept_key(session: Session, block: int, family: keys.Keyring | None) -> Made:
    """A store whose key is kept in the configuration directory."""
    places = session.places
    text, folder = keys.new_key_text(), places.configuration / config.KEYS
    first = folder / f"{config.UNFINISHED_KEY}{secrets.token_hex(4)}.key"
    refuse_cache(places, first)
    write_key(first, text, "")
    try:
        made = store.init(places.store, keys.parse_key_text(text, str(first)), block, family=family)
    except HvbackupError:
        first.unlink(missing_ok=True)
        raise
    kept = config.key_path(places.configuration, made)
    write_key(kept, text, f"of store {made} at {places.store}")
    first.unlink(missing_ok=True)
    return Made(made, places.store, block, encrypted=True, key_file=kept)


def refuse_cache(places: Places, key_file: Path) -> None:
    """Raises UsageError when a key would lie in the state directory or in the store itself."""
    whole = key_file.absolute()
    for where, why in ((places.state, "may be removed at any time"), (places.store, "is what the key protects")):
        if whole.is_relative_to(where):
            raise UsageError(f"A key can't be kept at {key_file}: {where} {why}; choose another place")


def write_key(path: Path, text: str, whose: str) -> None:
    """A new key file, 0600, is durable when this returns.  Raises UsageError when there is something already."""
    if path.exists():
        raise UsageError(f"{path} exists; a new key never replaces a file, choose another name")
    made = datetime.now(UTC).strftime("%Y-%m-%d")
    lines = [
        f"# hvbackup key {whose}".rstrip() + f", made {made}",
        "# Whoever has this line and the store can read every machine in it; without it nobody can.",
        "# Keep a copy away from this machine: `hvbackup key paper` prints one.",
        text,
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise HvbackupError(f"Cannot make the folder {path.parent} for a key: {e.strerror}") from e
    lonefile.write(path, ("\n".join(lines) + "\n").encode())


# -- wrapped keys ----------------------------------------------------------------------------------------------------------


def list_keys(session: Session) -> list[Wrapping]:
    """Every way to open the store; needs no key itself.  Raises StoreMissing."""
    files = Files(session.places.store)
    describe(files)
    return [Wrapping(str(w["id"]), str(w["kind"]), str(w.get("label", ""))) for w in keys.list_wrappings(files)]


def add_key(session: Session, new: KeyOptions, label: str) -> Wrapping:
    """The store opens with one more key.  A key file that does not exist is made.  Raises KeyRefused, UsageError."""
    with _encrypted(session) as opened:
        path = new.key_file
        if path and not path.exists():
            refuse_cache(session.places, path)
            write_key(path, keys.new_key_text(), f"of store {opened.id.hex()} at {session.places.store}")
        secret = _one(new) if new.given else _asked(session)
        return Wrapping(keys.add_wrapping(opened.files, opened.ring, secret, label), secret.kind, label)


def _asked(session: Session) -> keys.Secret:
    if session.ask is None:
        raise UsageError("Nobody is there to type a passphrase; use --new-key-file FILE or --new-passphrase-file FILE")
    first = session.ask("New passphrase: ")
    if first != session.ask("The same once more: "):
        raise KeyRefused("The two passphrases differ; nothing was changed")
    return keys.passphrase(first)


def paper_key(session: Session, label: str) -> tuple[Wrapping, str]:
    """The store opens with one more key, whose text is kept nowhere: it is for paper.  Raises KeyRefused."""
    with _encrypted(session) as opened:
        text = keys.new_key_text()
        secret = keys.Secret("paper", keys.parse_key_text(text, "the new key").value, "the paper key")
        return Wrapping(keys.add_wrapping(opened.files, opened.ring, secret, label), "paper", label), text


def remove_key(session: Session, kid: str) -> list[str]:
    """The store does not open with this key any more.  Returns notes.  Raises KeyRefused when it is unknown or the last."""
    with _encrypted(session) as opened:
        keys.remove_wrapping(opened.files, kid)
        try:
            keys.unlock(opened.files, opened.id, session.secrets(), encrypted=True)
        except KeyRefused:
            return [
                "The key that was used just now does not open the store any more; give the next command another one"
            ]
    return []


def _encrypted(session: Session) -> Store:
    """The open store.  Raises KeyRefused when it is not encrypted."""
    opened = session.open()
    if not opened.ring.encrypted:
        opened.close()
        raise KeyRefused(f"The store at {session.places.store} is not encrypted: it has no keys to add or remove")
    return opened
