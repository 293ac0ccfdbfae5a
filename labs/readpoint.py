"""A stranger's reader: one disk of one recovery point out of a store, with nothing but docs/format.md in hand.

    readpoint.py STORE [--key-file FILE | --passphrase TEXT] list
    readpoint.py STORE [--key-file FILE | --passphrase TEXT] MACHINE_FOLDER/POINT DISK OUTPUT

Needs Python with zstandard, blake3 and cryptography, and not a line of hvbackup.  Every id and signature is verified.
"""

import argparse
import base64
import contextlib
import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from zstandard import ZstdDecompressor, ZstdError

ZERO, PAGE_IDS, POINT_MAX = bytes(32), 256, 1 << 26


def unwrap(record: dict[str, Any], key_text: str, passphrase: str) -> bytes:
    """The four secrets in a file of keys/; some error when they don't open with what was given."""
    if record["kind"] == "open":
        return bytes.fromhex(record["bundle"])
    if record["kind"] == "passphrase":
        kdf = record["kdf"]
        cost = {"iterations": kdf["iterations"], "lanes": kdf["lanes"], "memory_cost": kdf["memory_kib"]}
        key = Argon2id(salt=bytes.fromhex(kdf["salt"]), length=32, **cost).derive(passphrase.encode())
    else:
        line = [line for line in key_text.split("\n") if line.strip() and not line.startswith("#")][-1]
        key = base64.b32decode("".join(line.upper().split()).replace("-", "").removeprefix("HVB1"))[:32]
    bound = json.dumps({k: record[k] for k in ("format", "store", "id", "kind", "label")}, sort_keys=True).encode()
    return AESGCM(key).decrypt(bytes.fromhex(record["nonce"]), bytes.fromhex(record["bundle"]), bound)


class Store:
    """A store, opened for reading."""

    def __init__(self, path: Path, key_text: str, passphrase: str) -> None:
        self.path, about, secrets = path, json.loads((path / "HVBACKUP").read_bytes()), b""
        assert about["format"] == 1, f"format {about['format']} is not the one this reader knows"
        for file in (path / "keys").iterdir():
            with contextlib.suppress(ValueError, KeyError, IndexError, InvalidTag):
                secrets = unwrap(json.loads(file.read_bytes()), key_text, passphrase)
        assert secrets, "no key in keys/ opens with what was given"
        self.master, ids, _names, sign = (secrets[i : i + 32] for i in range(0, 128, 32))
        self.signer = Ed25519PrivateKey.from_private_bytes(sign).public_key()
        assert self.signer.public_bytes_raw().hex() == about["verify_key"], "HVBACKUP and the keys differ"
        self.id, self.block, self.encrypted = bytes.fromhex(about["id"]), about["block"], about["cipher"] != "none"
        self.block_key = blake3(ids, derive_key_context="hvbackup format 1 block id").digest()
        self.page_key = blake3(ids, derive_key_context="hvbackup format 1 page id").digest()
        self.places: dict[bytes, list[tuple[mmap.mmap, int, int, int, int]]] = {}

    def open(self, head: bytes, nonce: int, bound: bytes, body: bytes) -> bytes:
        """A piece of a file with this header, decrypted: `bound` is what its tag covers besides."""
        magic, version, kind, _flags, store, salt, _length = struct.unpack("<4sBBBx16s32sI", head[:60])
        assert (magic, version, store) == (b"hvF1", 1, self.id), "this is no file of this store"
        info = b"hvbackup format 1 file " + bytes([kind]) + self.id
        cipher = AESGCM(HKDF(SHA256(), 32, salt, info).derive(self.master))
        return cipher.decrypt(nonce.to_bytes(12, "little"), body, bound) if self.encrypted else body

    def point(self, name: str) -> dict[str, Any]:
        """The content of a point file, after its signature was checked."""
        bound, data = f"points/{name}".encode(), (self.path / "points" / name).read_bytes()
        head, payload, signature = data[:64], data[64:-64], data[-64:]
        self.signer.verify(signature, blake3(struct.pack("<I", len(bound)) + bound + head + payload).digest())
        plain = self.open(head, 0, head + bound, payload)
        return dict(json.loads(ZstdDecompressor().decompress(plain, max_output_size=POINT_MAX)))

    def learn(self, pack: Path) -> None:
        """Where the chunks of a pack are: (pack, offset and length of the record, begin and length in its plain bytes)."""
        with pack.open("rb") as file, contextlib.suppress(ValueError, struct.error):  # a damaged pack is left out
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            offset, count, digest = struct.unpack("<8xQQ32s8x", data[-64:])
            footer = data[offset : offset + 56 * count]
            for chunk, *place, _kind in struct.iter_unpack("<32sQIIII", footer * (blake3(footer).digest() == digest)):
                self.places.setdefault(chunk, []).append((data, *place))

    def chunk(self, chunk: bytes, key: bytes) -> bytes:
        """The chunk of this id, from the first place that has it whole."""
        for pack, offset, stored, at, length in self.places.get(chunk, []):
            with contextlib.suppress(ValueError, InvalidTag, ZstdError, struct.error):
                data = pack[offset : offset + stored]
                _magic, ordinal, codec, _what, count, _stored, size = struct.unpack("<4sIBBHII", data[:20])
                begin = 24 + 36 * count
                plain = self.open(pack[:64], ordinal, self.id + pack[5:6] + data[:begin], data[begin:])
                plain = ZstdDecompressor().decompress(plain, max_output_size=size) if codec == 1 else plain
                if blake3(plain[at : at + length], key=key).digest() == chunk:
                    return plain[at : at + length]
        raise SystemExit(f"chunk {chunk.hex()} is lost")

    def blocks(self, page: bytes, level: int, first: int = 0) -> Iterator[tuple[int, bytes]]:
        """(number, content) of every block below a page that is not zero."""
        ids = self.chunk(page, self.page_key) if page != ZERO else b""
        for i in range(len(ids) // 32):
            child, number = ids[32 * i : 32 * i + 32], first + i * PAGE_IDS**level
            if child != ZERO and level:
                yield from self.blocks(child, level - 1, number)
            elif child != ZERO:
                yield number, self.chunk(child, self.block_key)

    def write_disk(self, disk: dict[str, Any], output: Path) -> None:
        """`output` is the disk, raw and sparse."""
        size, depth = disk["disk"]["size"], 1
        while PAGE_IDS**depth * self.block < size:
            depth += 1
        for pack in self.path.glob("packs/*/*.pack"):
            self.learn(pack)
        with output.open("wb") as file:
            for number, data in self.blocks(bytes.fromhex(disk["root"]), depth - 1):
                file.seek(number * self.block)
                file.write(data[: max(0, size - number * self.block)])
            file.truncate(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--key-file", type=argparse.FileType())
    parser.add_argument("--passphrase", default="")
    parser.add_argument("what", nargs="+", metavar="list | MACHINE_FOLDER/POINT DISK OUTPUT")
    given = parser.parse_args()
    store = Store(given.store, given.key_file.read() if given.key_file else "", given.passphrase)
    if given.what != ["list"]:
        name, disk, output = given.what
        store.write_disk(next(d for d in store.point(name)["disks"] if d["disk"]["id"] == disk), Path(output))
        return
    for file in sorted(given.store.glob("points/*/*")):
        point = store.point(f"{file.parent.name}/{file.name}")
        disks = " ".join(f"{d['disk']['id']}:{d['disk']['size']}" for d in point["disks"])
        print(f"{file.parent.name}/{file.name} {point['machine']['name']} {disks}")


if __name__ == "__main__":
    main()
