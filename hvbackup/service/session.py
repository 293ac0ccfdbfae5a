"""One invocation: where things are, which keys were given, and how the store is opened with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hvbackup import config
from hvbackup.config import KeyOptions, Places
from hvbackup.errors import KeyRefused, StoreMissing
from hvbackup.files import Files
from hvbackup.store.check import audit
from hvbackup.store.format.keys import Secret, list_wrappings, parse_key_text, passphrase
from hvbackup.store.store import CIPHERS, Store, describe

Ask = Callable[[str], str]  # asks a person for a secret


@dataclass(frozen=True, slots=True)
class Session:
    """What every verb is told besides its own options."""

    places: Places
    keys: KeyOptions = field(default_factory=KeyOptions)
    ask: Ask | None = None  # None: nobody is there to answer
    caller: str = ""  # who asks, where it is somebody whom the service let in

    def open(self, *, owner: bool = False) -> Store:
        """The store, open.  Raises StoreMissing, KeyRefused, Busy (when we want to own it)."""
        secrets = self.secrets()
        store = Store.open(self.places.store, self.places.state, secrets, owner=owner)
        audit.follow(store, config.heads_path(self.places.configuration, store.id.hex()))
        return store

    def secrets(self) -> list[Secret]:
        """What may open the store: what was given, or else the key kept for it, or else a passphrase that is asked for."""
        if self.places.store.exists() and not self.places.store.is_dir():
            raise StoreMissing(f"{self.places.store} is no store: a store is a directory")
        files = Files(self.places.store)
        descriptor = describe(files)
        if descriptor.cipher == CIPHERS[0]:
            return []
        if self.keys.given:
            return given(self.keys)
        kept = config.kept_keys(self.places.configuration, descriptor.id.hex())
        if kept:
            return [parse_key_text(config.read_secret(p, "Key file"), str(p)) for p in kept]
        kinds = {w.get("kind") for w in list_wrappings(files)}
        if "passphrase" in kinds and self.ask is not None:
            return [passphrase(self.ask(f"Passphrase of the store at {self.places.store}: "))]
        raise KeyRefused(
            f"The store at {self.places.store} is encrypted and its key is not here; it opens with: "
            f"{' or '.join(sorted(map(str, kinds)))}. Put the key back at "
            f"{config.key_path(self.places.configuration, descriptor.id.hex())}, "
            "or use --key-file FILE or --passphrase-file FILE"
        )


def given(options: KeyOptions) -> list[Secret]:
    """The secrets in the files that were named.  Raises KeyRefused."""
    found = []
    if options.key_file:
        text = config.read_secret(options.key_file, "Key file")
        found.append(parse_key_text(text, str(options.key_file)))
    if options.passphrase_file:
        text = config.read_secret(options.passphrase_file, "Passphrase file")
        secret = passphrase(text.removesuffix("\n").removesuffix("\r"))
        found.append(Secret(secret.kind, secret.value, f"The passphrase in {options.passphrase_file}"))
    return found
