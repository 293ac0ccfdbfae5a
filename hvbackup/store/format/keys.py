"""The secrets of a store, and how they are wrapped.

A store has one bundle of four secrets, made at `init` and never changed: changing how it is *wrapped* rewrites no data.

    master   the key of each file is HKDF-SHA256(master, salt of the file, kind)
    ids      chunk ids are BLAKE3 keyed with a key derived from it; stores of one family have the same
    names    so are the names of machines
    sign     the Ed25519 seed that signs points and runs

`keys/ID.json` (and `keys/ID.copy`, the same bytes) holds the bundle under one key-encrypting key, by AES-256-GCM.  That key
is either random and kept in a key file or on paper (the same text), or made of a passphrase by Argon2id.  In a store made
with `--no-encryption` the bundle is stored in the open: ids and signatures then find damage, not forgery.  `check`, the
BLAKE3 of all other fields, tells a whole copy from a damaged one without any key.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import blake3

from hvbackup.errors import HvbackupError, KeyRefused, StoreMissing
from hvbackup.model import MachineId
from hvbackup.store.backend import Backend
from hvbackup.store.format import layout as f

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SECRET_BYTES = 32
KEY_TEXT_PREFIX = "HVB1"
CHECK_BYTES = 3  # of the key text: 35 bytes make 56 base32 letters without padding

# Argon2id by RFC 9106, second recommendation: 64 MiB, 3 passes, 4 lanes.
KDF = {"name": "argon2id", "iterations": 3, "memory_kib": 64 * 1024, "lanes": 4}
KDF_MAX = {"iterations": 64, "memory_kib": 4 * 1024 * 1024, "lanes": 64}  # nothing larger is believed when read back


@dataclass(frozen=True)
class Keyring:
    """The unwrapped secrets of one store.  Thread safety: immutable."""

    store: bytes  # store id, 16 bytes
    encrypted: bool
    master: bytes
    ids: bytes
    names: bytes
    sign: bytes

    @classmethod
    def generate(cls, store: bytes, *, encrypted: bool, family: Keyring | None = None) -> Keyring:
        """New random secrets; the id key is that of `family` if there is one."""
        master, ids, names, sign = (os.urandom(SECRET_BYTES) for _ in range(4))
        return cls(store, encrypted, master, family.ids if family else ids, names, sign)

    @cached_property
    def block_key(self) -> bytes:
        """Key of the ids of blocks."""
        return blake3.blake3(self.ids, derive_key_context="hvbackup format 1 block id").digest()

    @cached_property
    def page_key(self) -> bytes:
        """Key of the ids of map pages: another domain, so that a block that looks like a page is no page."""
        return blake3.blake3(self.ids, derive_key_context="hvbackup format 1 page id").digest()

    def machine_name(self, machine: MachineId) -> str:
        """The name of a machine's directories in the store: 32 hexadecimal digits."""
        return blake3.blake3(machine.encode(), key=self.names).digest()[:16].hex()

    def cipher(self, salt: bytes, kind: int) -> AESGCM | None:
        """The cipher of one file, or None in a store without encryption."""
        if not self.encrypted:
            return None
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = b"hvbackup format 1 file " + bytes([kind]) + self.store
        return AESGCM(HKDF(SHA256(), SECRET_BYTES, salt, info).derive(self.master))

    @cached_property
    def signer(self) -> Ed25519PrivateKey:
        """Signs points and runs."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.sign)

    @cached_property
    def verifier(self) -> Ed25519PublicKey:
        """Checks what `signer` signed."""
        return self.signer.public_key()

    def _bundle(self) -> bytes:
        return self.master + self.ids + self.names + self.sign


@dataclass(frozen=True, slots=True)
class Secret:
    """What a person or a file gives us to open a store: a key text, or a passphrase."""

    kind: str  # "file" | "paper" | "passphrase"
    value: bytes
    origin: str  # for messages: the path, or "the passphrase"


def new_key_text() -> str:
    """A random key as text, for a file or for paper: 14 groups of 4 letters behind `HVB1`."""
    key = os.urandom(SECRET_BYTES)
    letters = base64.b32encode(key + _check(key)).decode()
    return "-".join([KEY_TEXT_PREFIX, *(letters[i : i + 4] for i in range(0, len(letters), 4))])


def parse_key_text(text: str, origin: str) -> Secret:
    """The key in a key file's text: its last line that is no comment.  Raises KeyRefused when a letter is wrong or missing."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    letters = "".join(lines[-1:]).replace("-", "").replace(" ", "").upper()
    if not letters.startswith(KEY_TEXT_PREFIX):
        raise KeyRefused(f"{origin} holds no hvbackup key (it should begin with {KEY_TEXT_PREFIX}-)")
    try:
        raw = base64.b32decode(letters[len(KEY_TEXT_PREFIX) :])
    except (binascii.Error, ValueError):
        raw = b""
    key, check = raw[:SECRET_BYTES], raw[SECRET_BYTES:]
    if len(raw) != SECRET_BYTES + CHECK_BYTES or check != _check(key):
        raise KeyRefused(f"The key in {origin} is cut short or mistyped; use another copy of it")
    return Secret("file", key, origin)


def _check(key: bytes) -> bytes:
    return blake3.blake3(key, derive_key_context="hvbackup key text check").digest()[:CHECK_BYTES]


def passphrase(text: str) -> Secret:
    """A passphrase as a secret.  Raises KeyRefused when it is empty."""
    if not text:
        raise KeyRefused("The passphrase is empty")
    return Secret("passphrase", text.encode(), "the passphrase")


def add_wrapping(backend: Backend, ring: Keyring, secret: Secret | None, label: str = "") -> str:
    """The store can be opened with `secret` (None: without any) when this returns.  Returns the id of the wrapped key."""
    kid = os.urandom(8).hex()
    head = {
        "format": 1,
        "store": ring.store.hex(),
        "id": kid,
        "kind": secret.kind if secret else "open",
        "label": label,
    }
    if secret is None:
        record = {**head, "bundle": ring._bundle().hex()}
    else:
        kdf = {**KDF, "salt": os.urandom(16).hex()} if secret.kind == "passphrase" else None
        nonce = os.urandom(12)
        sealed = _wrapper(secret, kdf).encrypt(nonce, ring._bundle(), _associated(head))
        record = {**head, "kdf": kdf, "nonce": nonce.hex(), "bundle": sealed.hex()}
    data = json.dumps({**record, "check": _digest(record)}, indent=1).encode()
    backend.write_new(f"keys/{kid}.copy", data)
    backend.write_new(f"keys/{kid}.json", data)
    return kid


def _digest(record: dict[str, Any]) -> str:
    rest = {k: v for k, v in record.items() if k != "check"}
    return blake3.blake3(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def list_wrappings(backend: Backend) -> list[dict[str, Any]]:
    """The readable wrapped keys of a store, one for each id, from whichever of the two copies can be read."""
    found: dict[str, dict[str, Any]] = {}
    for name in backend.names("keys"):
        try:
            record = read_wrapping(backend, name)
        except KeyRefused:
            continue  # `check` names it, the other copy serves
        found.setdefault(record["id"], record)
    return list(found.values())


def read_wrapping(backend: Backend, name: str) -> dict[str, Any]:
    """One file of `keys/`.  Raises KeyRefused naming it when it is not what was written there."""
    try:
        record = f.parse_json(backend.read(f"keys/{name}"))
        whole = isinstance(record, dict) and record.get("check") == _digest(record) and _sane(record)
    except (ValueError, TypeError, FileNotFoundError, HvbackupError):
        whole = False
    if not whole:
        raise KeyRefused(f"keys/{name} is damaged; put a copy of it back, or let `hvbackup check --repair` do so")
    return dict(record)


def _sane(record: dict[str, Any]) -> bool:
    """Whether a record has the fields we use, and asks for no absurd amount of work or memory."""
    texts = ["store", "id", "kind", "label", "bundle"] + (["nonce"] if record.get("kind") != "open" else [])
    if record.get("format") != 1 or not all(isinstance(record.get(k), str) for k in texts):
        return False
    kdf = record.get("kdf")
    if kdf is None or record["kind"] != "passphrase":
        return kdf is None and record["kind"] != "passphrase"
    if not isinstance(kdf, dict) or not isinstance(kdf.get("salt"), str):
        return False
    return all(isinstance(kdf.get(k), int) and 0 < kdf[k] <= most for k, most in KDF_MAX.items())


def remove_wrapping(backend: Backend, kid: str) -> None:
    """The store can't be opened by this wrapped key any more.  Raises KeyRefused when it is unknown or the last one."""
    known = [w["id"] for w in list_wrappings(backend)]
    if kid not in known:
        raise KeyRefused(f"No key {kid} in this store; it has {', '.join(known)}")
    if len(known) == 1:
        raise KeyRefused(f"{kid} is the only key of this store; add another one first, or nobody can read it again")
    backend.remove(f"keys/{kid}.json")
    backend.remove(f"keys/{kid}.copy")


def unlock(backend: Backend, store: bytes, secrets: list[Secret], *, encrypted: bool) -> Keyring:
    """The secrets of a store, opened by any of `secrets`.  Raises KeyRefused, StoreMissing."""
    wrappings = list_wrappings(backend)
    if not wrappings:
        raise StoreMissing(f"Store {store.hex()} has no readable file in keys/; put a copy of one back")
    wrappings = [w for w in wrappings if w["store"] == store.hex()]
    if not wrappings:
        raise StoreMissing(
            f"HVBACKUP says that this is store {store.hex()}, and keys/ has the keys of another one; "
            "put the HVBACKUP or the keys back that were made with the store"
        )
    # A store that says it is open, with keys that say it is not (or the other way round), was tampered with: a capture
    # into it would write plain text, or encrypt for somebody else.
    wrappings = [w for w in wrappings if (w["kind"] == "open") != encrypted]
    if not wrappings:
        raise StoreMissing(
            f"HVBACKUP says that store {store.hex()} is {'' if encrypted else 'not '}encrypted, and its keys say "
            "otherwise: it was changed; put the HVBACKUP back that was made with the store"
        )
    for record in wrappings:
        bundle = _open(record, secrets)
        if bundle is not None:
            parts = [bundle[i : i + SECRET_BYTES] for i in range(0, 4 * SECRET_BYTES, SECRET_BYTES)]
            return Keyring(store, encrypted, *parts)
    if not secrets:
        kinds = " or ".join(sorted({w["kind"] for w in wrappings}))
        raise KeyRefused(
            f"Store {store.hex()} is encrypted and no key was given (it opens with: {kinds}); "
            "use --key-file FILE or --passphrase-file FILE"
        )
    raise KeyRefused(
        f"{' and '.join(s.origin for s in secrets)} does not open store {store.hex()}; nothing was written"
    )


def opened_with(backend: Backend, secrets: list[Secret]) -> str:
    """The id of the wrapped key that these secrets open; empty in a store that is open to all.  For who asks who is there."""
    wrappings = [w for w in list_wrappings(backend) if w["kind"] != "open"]
    return next((str(w["id"]) for w in wrappings if _open(w, secrets) is not None), "")


def _open(record: dict[str, Any], secrets: list[Secret]) -> bytes | None:
    from cryptography.exceptions import InvalidTag

    if record["kind"] == "open":
        return bytes.fromhex(record["bundle"])
    head = {k: record[k] for k in ("format", "store", "id", "kind", "label")}
    for secret in secrets:
        if (secret.kind == "passphrase") != (record["kind"] == "passphrase"):
            continue
        try:
            cipher = _wrapper(secret, record["kdf"])
            return cipher.decrypt(bytes.fromhex(record["nonce"]), bytes.fromhex(record["bundle"]), _associated(head))
        except (InvalidTag, ValueError):
            continue
    return None


def _wrapper(secret: Secret, kdf: dict[str, Any] | None) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if kdf is None:
        return AESGCM(secret.value)
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    derive = Argon2id(
        salt=bytes.fromhex(kdf["salt"]),
        length=SECRET_BYTES,
        iterations=kdf["iterations"],
        lanes=kdf["lanes"],
        memory_cost=kdf["memory_kib"],
    )
    return AESGCM(derive.derive(secret.value))


def _associated(head: dict[str, Any]) -> bytes:
    return json.dumps(head, sort_keys=True).encode()
