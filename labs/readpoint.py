"""A stranger's reader: one disk of one recovery point out of a store, with nothing but docs/format.md in hand.

    readpoint.py STORE [--key-file FILE | --passphrase TEXT] list
    readpoint.py STORE [--key-file FILE | --passphrase TEXT] MACHINE_FOLDER/POINT DISK OUTPUT

Needs Python with zstandard, blake3 and cryptography, and not a line of hvbackup.  Every id and signature is verified.
"""

from __future__ import annotations

import argparse
import base64
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

ZERO, PAGE_IDS, KIND_POINT = bytes(32), 256, 3
Place = tuple[Path, int, int, int, int]  # pack, offset and length of the record; begin and length of the chunk in it


def need(true: object, otherwise: str) -> None:
    """Raises ValueError."""
    if not true:
        raise ValueError(otherwise)


class Store:
    """A store, opened for reading."""

    def __init__(self, path: Path, key_text: str | None, passphrase: str | None) -> None:
        self.path, about = path, json.loads((path / "HVBACKUP").read_bytes())
        need(about["format"] == 1, f"format {about['format']} is not the one this reader knows")
        self.id, self.block = bytes.fromhex(about["id"]), about["block"]
        self.encrypted = about["cipher"] != "none"
        bundles = (unwrap(file, key_text, passphrase) for file in sorted((path / "keys").iterdir()))
        bundle = next(filter(None, bundles), b"")
        need(bundle, "no key in keys/ opens with what was given")
        self.master, ids, _names, sign = (bundle[i : i + 32] for i in range(0, 128, 32))
        self.signer = Ed25519PrivateKey.from_private_bytes(sign).public_key()
        need(self.signer.public_bytes_raw().hex() == about["verify_key"], "HVBACKUP and the keys differ")
        self.block_key, self.page_key = (
            blake3(ids, derive_key_context=f"hvbackup format 1 {what} id").digest() for what in ("block", "page")
        )
        self.places: dict[bytes, list[Place]] = {}

    def header(self, data: bytes, what: object) -> tuple[int, AESGCM | None, int]:
        """Kind, cipher and payload length of a file, out of its first 64 bytes."""
        magic, version, kind, _flags, store, salt, length = struct.unpack("<4sBBBx16s32sI", data[:60])
        need((magic, store) == (b"hvF1", self.id), f"{what} is no file of this store")
        need(zlib.crc32(data[:60]).to_bytes(4, "little") == data[60:64], f"{what} has a damaged header")
        need(version == 1, f"{what} has format {version}")
        info = b"hvbackup format 1 file " + bytes([kind]) + self.id
        return kind, AESGCM(HKDF(SHA256(), 32, salt, info).derive(self.master)) if self.encrypted else None, length

    def point(self, name: str) -> dict[str, Any]:
        """The content of a point file, after its signature was checked."""
        full, data = f"points/{name}", (self.path / "points" / name).read_bytes()
        kind, cipher, length = self.header(data, full)
        head, payload, signature = data[:64], data[64 : 64 + length], data[64 + length :]
        need(kind == KIND_POINT, f"{full} is no point")
        signed = struct.pack("<I", len(full.encode())) + full.encode() + head + payload
        self.signer.verify(signature, blake3(signed).digest())
        plain = cipher.decrypt(bytes(12), payload, head + full.encode()) if cipher else payload
        return dict(json.loads(zstandard.ZstdDecompressor().decompress(plain, max_output_size=1 << 26)))

    def read_footers(self) -> None:
        """Learn where every chunk is."""
        for pack in self.path.glob("packs/*/*.pack"):
            footer = read_footer(pack)
            if footer is None:
                print(f"{pack} has a damaged footer and is left out", file=sys.stderr)
                continue
            for chunk, offset, stored, at, length, _kind in struct.iter_unpack("<32sQIIII", footer):
                self.places.setdefault(chunk, []).append((pack, offset, stored, at, length))

    def chunk(self, chunk: bytes, key: bytes) -> bytes:
        """The chunk of this id, from the first place that has it whole."""
        for pack, offset, stored, at, length in self.places.get(chunk, []):
            try:
                plain = self.record(pack, offset, stored)[at : at + length]
            except (ValueError, InvalidTag, zstandard.ZstdError, struct.error):
                continue
            if blake3(plain, key=key).digest() == chunk:
                return plain
        raise SystemExit(f"chunk {chunk.hex()} is lost")

    def record(self, pack: Path, offset: int, stored: int) -> bytes:
        """The plain bytes of one record of a pack."""
        with pack.open("rb") as file:
            kind, cipher, _ = self.header(file.read(64), pack)
            file.seek(offset)
            data = file.read(stored)
        magic, ordinal, codec, _what, count, length, plain = struct.unpack("<4sIBBHII", data[:20])
        begin = 24 + 36 * count
        need((magic, len(data)) == (b"hvC1", begin + length), f"{pack} is damaged at {offset}")
        bound = self.id + bytes([kind]) + data[:begin]
        body = cipher.decrypt(ordinal.to_bytes(12, "little"), data[begin:], bound) if cipher else data[begin:]
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=plain) if codec == 1 else body

    def blocks(self, page: bytes, level: int, first: int = 0) -> Iterator[tuple[int, bytes]]:
        """(number, content) of every block below a page that is not zero."""
        ids = self.chunk(page, self.page_key) if page != ZERO else b""
        for i in range(len(ids) // 32):
            child, number = ids[32 * i : 32 * i + 32], first + i * PAGE_IDS**level
            if child != ZERO and level:
                yield from self.blocks(child, level - 1, number)
            elif child != ZERO:
                yield number, self.chunk(child, self.block_key)


def read_footer(pack: Path) -> bytes | None:
    """The rows of a pack, or None when they are damaged."""
    with pack.open("rb") as file:
        file.seek(-min(64, pack.stat().st_size), 2)
        trailer = file.read()
        if trailer[:4] != b"hvE1" or zlib.crc32(trailer[:60]).to_bytes(4, "little") != trailer[60:]:
            return None
        _magic, offset, count, digest = struct.unpack("<4s4xQQ32s4x", trailer[:60])
        file.seek(offset)
        footer = file.read(56 * count)
    return footer if blake3(footer).digest() == digest else None


def unwrap(file: Path, key_text: str | None, passphrase: str | None) -> bytes | None:
    """The four secrets in a file of keys/, or None when they don't open with what was given."""
    try:
        record = json.loads(file.read_bytes())
        if record["kind"] == "open":
            return bytes.fromhex(record["bundle"])
        if record["kind"] == "passphrase" and passphrase is not None:
            kdf = record["kdf"]
            rounds = {"iterations": kdf["iterations"], "lanes": kdf["lanes"], "memory_cost": kdf["memory_kib"]}
            key = Argon2id(salt=bytes.fromhex(kdf["salt"]), length=32, **rounds).derive(passphrase.encode())
        elif record["kind"] != "passphrase" and key_text is not None:
            line = [t for t in key_text.splitlines() if t.strip() and not t.startswith("#")][-1]
            key = base64.b32decode(line.strip().replace("-", "").replace(" ", "").upper().removeprefix("HVB1"))[:32]
        else:
            return None
        bound = json.dumps({k: record[k] for k in ("format", "store", "id", "kind", "label")}, sort_keys=True).encode()
        return AESGCM(key).decrypt(bytes.fromhex(record["nonce"]), bytes.fromhex(record["bundle"]), bound)
    except (ValueError, KeyError, InvalidTag):
        return None


def write_disk(store: Store, point: dict[str, Any], disk: str, output: Path) -> None:
    """`output` is the disk, raw and sparse."""
    root = next(d for d in point["disks"] if d["disk"]["id"] == disk)
    size, depth = root["disk"]["size"], 1
    while PAGE_IDS**depth * store.block < size:
        depth += 1
    store.read_footers()
    with output.open("wb") as file:
        for number, data in store.blocks(bytes.fromhex(root["root"]), depth - 1):
            file.seek(number * store.block)
            file.write(data[: max(0, size - number * store.block)])
        file.truncate(size)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--key-file", type=Path)
    parser.add_argument("--passphrase")
    parser.add_argument("point", metavar="list | MACHINE_FOLDER/POINT")
    parser.add_argument("disk", nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    given = parser.parse_args()
    store = Store(given.store, given.key_file.read_text() if given.key_file else None, given.passphrase)
    if given.point != "list":
        write_disk(store, store.point(given.point), given.disk, given.output)
        return
    for file in sorted(given.store.glob("points/*/*")):
        point = store.point(f"{file.parent.name}/{file.name}")
        disks = " ".join(f"{d['disk']['id']}:{d['disk']['size']}" for d in point["disks"])
        print(f"{file.parent.name}/{file.name} {point['machine']['name']} {disks}")


if __name__ == "__main__":
    main()
