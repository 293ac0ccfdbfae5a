"""Small sealed files: points and run records.  Written once, signed, and encrypted when the store is.

    0   64  header (format.HEADER), with the length of the payload
    64   n  payload: zstd of JSON; encrypted with nonce 0 and the header and the file's name as associated data
    ..  64  Ed25519 signature of BLAKE3(name, header, payload)

The name is part of what is signed, so an old file under a new name, or one moved to another machine, is refused.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

import blake3
import zstandard

from hvbackup.errors import PointDamaged, StoreDamage, StoreMissing
from hvbackup.store.format import layout as f
from hvbackup.store.format.keys import Keyring

NONCE = bytes(12)  # one message for each key: the key is made of the file's own random salt
SIGNATURE_BYTES = 64
JSON_MAX = 64 * 1024 * 1024  # nothing larger is believed when read back


def seal(ring: Keyring, kind: int, name: str, value: dict[str, Any]) -> bytes:
    """The bytes of a sealed file that will be called `name`."""
    plain = zstandard.ZstdCompressor(level=3).compress(
        json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    )
    salt = os.urandom(32)
    cipher = ring.cipher(salt, kind)
    flags = f.FLAG_ENCRYPTED if cipher else 0
    length = len(plain) + (16 if cipher else 0)
    head = f.with_crc(f.HEADER.pack(f.HEADER_MAGIC, f.FORMAT, kind, flags, ring.store, salt, length))
    payload = cipher.encrypt(NONCE, plain, head + name.encode()) if cipher else plain
    return head + payload + ring.signer.sign(_digest(name, head, payload))


def unseal(ring: Keyring, kind: int, name: str, data: bytes) -> dict[str, Any]:
    """The value in a sealed file.  Raises StoreDamage naming the file and what is wrong with it."""
    from cryptography.exceptions import InvalidSignature, InvalidTag

    head = parse_header(data[: f.HEADER_BYTES], kind, ring.store, name)
    payload = data[f.HEADER_BYTES : f.HEADER_BYTES + head.length]
    signature = data[f.HEADER_BYTES + head.length :]
    try:
        ring.verifier.verify(signature, _digest(name, data[: f.HEADER_BYTES], payload))
        cipher = ring.cipher(head.salt, kind)
        plain = cipher.decrypt(NONCE, payload, data[: f.HEADER_BYTES] + name.encode()) if cipher else payload
        # A frame may announce any length, and would be given that much memory.
        if zstandard.frame_content_size(plain) > JSON_MAX:
            raise PointDamaged(f"{name} announces a record of more than {JSON_MAX} bytes")
        text = zstandard.ZstdDecompressor().decompress(plain, max_output_size=JSON_MAX)
        value = f.parse_json(text)
    except (InvalidSignature, InvalidTag) as e:
        raise PointDamaged(f"{name} is not what was written there: its signature does not match") from e
    except (zstandard.ZstdError, ValueError) as e:
        raise PointDamaged(f"{name} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise PointDamaged(f"{name} holds no record")
    return value


def proof(name: str, data: bytes) -> tuple[str, str]:
    """(what is signed, the signature) of a sealed file, hexadecimal: who has both and the key can tell whose file it was."""
    head, payload, signature = data[: f.HEADER_BYTES], data[f.HEADER_BYTES : -SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
    return _digest(name, head, payload).hex(), signature.hex()


class Header:
    """The parsed header of a pack or sealed file."""

    __slots__ = ("flags", "length", "salt")

    def __init__(self, flags: int, salt: bytes, length: int) -> None:
        self.flags, self.salt, self.length = flags, salt, length


def parse_header(data: bytes, kind: int, store: bytes, name: str) -> Header:
    """Check a file header.  Raises StoreDamage, or StoreMissing for a version this program does not know."""
    if len(data) < f.HEADER_BYTES or data[:4] != f.HEADER_MAGIC:
        raise StoreDamage(f"{name} is cut short or is no file of this store")
    if not f.crc_matches(data[:60], data[60:64]):
        raise StoreDamage(f"{name} has a damaged header")
    _magic, version, found, flags, owner, salt, length = f.HEADER.unpack(data[:60])
    if version != f.FORMAT:
        raise StoreMissing(f"{name} has format {version}; this version reads format {f.FORMAT}: use a newer hvbackup")
    if owner != store:
        raise StoreDamage(f"{name} belongs to store {owner.hex()}, not to this one")
    if found != kind:
        raise StoreDamage(f"{name} is of kind {found} where {kind} belongs")
    return Header(flags, salt, length)


def _digest(name: str, head: bytes, payload: bytes) -> bytes:
    prefix = struct.pack("<I", len(name.encode())) + name.encode()
    return blake3.blake3(prefix + head + payload).digest()
