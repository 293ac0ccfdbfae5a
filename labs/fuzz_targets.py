"""What `labs/fuzz.py` feeds: each parser of bytes that others wrote, with valid bytes to begin with.

A target takes any bytes and either returns or raises one of the errors it names; everything else is a finding, and so are more
than a few seconds or a gigabyte.  Most layouts carry checksums or signatures, behind which a fuzzer would never come, so the
first byte says whether they are made right first: what a damaged disk does, and what somebody does who knows the format.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import blake3
import numpy as np
import zstandard
from isal.isal_zlib import crc32

from hvbackup import moments
from hvbackup.errors import HostUnreachable, KeyRefused, StoreDamage, StoreMissing, UsageError
from hvbackup.files import Files
from hvbackup.hypervisors import changedlist, qemu_config
from hvbackup.model import ChunkId, Consistency, Disk, DiskId, DiskRoot, Instant, KiB, Machine, MachineId, MiB
from hvbackup.model import RecoveryPoint as Point
from hvbackup.nbd import protocol
from hvbackup.nbd.client import NbdClient, Settings, list_exports
from hvbackup.nbd.export import Export
from hvbackup.nbd.server import NbdServer
from hvbackup.nbd.uri import NbdUri
from hvbackup.store.format import keys, pack, point, sealed
from hvbackup.store.format import layout as f
from hvbackup.store.index import generation, generations
from hvbackup.store.index.generation import NOWHERE, Generation
from hvbackup.store.index.index import Index
from hvbackup.store.journal import journal, segment
from hvbackup.store.journal.tables import summary_of
from hvbackup.store.store import Descriptor, describe

MACHINE, POINT = "00" * 16, "points/00/0"
NAME = journal.Name(1, 1, journal.LOG)
SECONDS = 5.0  # nothing here may wait longer for anybody


@dataclass(frozen=True, slots=True)
class Target:
    """One parser."""

    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], Sequence[bytes]]


def ring(*, encrypted: bool) -> keys.Keyring:
    """Always the same keys, so that what was found once is found again."""
    secrets = [bytes([n]) * keys.SECRET_BYTES for n in range(1, 5)]
    return keys.Keyring(bytes(range(16)), encrypted, *secrets)


@cache
def folder() -> Path:
    """A folder for the parsers that want files; removed by whoever started us."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


class Memory(Files):
    """A store of one file, which is in memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__(folder())
        self.data = data

    def size(self, name: str) -> int:
        return len(self.data)

    def read(self, name: str) -> bytes:
        return self.data

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length] if offset >= 0 and length >= 0 else b""


def _crc(data: bytes, at: int, length: int = 60, *more: bytes) -> bytes:
    """The same with the right checksum behind `length` bytes."""
    head = f.with_crc(data[at : at + length], *more)
    return data[:at] + head + data[at + length + 4 :] if len(data) >= at + length + 4 else data


# --- packs -----------------------------------------------------------------------------------------------------------


def read_pack(data: bytes) -> None:
    """Footer, records, and every chunk that either of them promises."""
    keyring = ring(encrypted=bool(data[:1] and data[0] & 2))
    backend = Memory(_repaired_pack(data[1:]) if data[:1] and data[0] & 1 else data[1:])
    rows = [pack.scan(backend, "aa")]
    with contextlib.suppress(StoreDamage):
        rows.append(pack.read_footer(backend, "aa"))
    for found in rows:
        with contextlib.suppress(StoreDamage):
            generations.small({"aa": bytes(8)}, generation.rows_of(found, 0))
    cipher, bind = pack.cipher_of(backend, keyring, "aa")
    zstd = zstandard.ZstdDecompressor()
    for found in rows:
        for offset, stored in list(pack.records(found))[:50]:
            with contextlib.suppress(StoreDamage):
                pack.decode(backend.read_at("", offset, stored), cipher, bind, zstd, "here")


def _repaired_pack(data: bytes) -> bytes:
    """Checksums of the header, of every record, of the footer and of the trailer."""
    data, at = _crc(data, 0), data.find(f.RECORD_MAGIC)
    while 0 <= at <= len(data) - f.RECORD_BYTES:
        count = int.from_bytes(data[at + 10 : at + 12], "little")
        entries = data[at + 24 : at + 24 + count * f.ENTRY.itemsize]
        data = _crc(data, at, 20, entries)
        at = data.find(f.RECORD_MAGIC, at + 4)
    begin = len(data) - f.TRAILER_BYTES
    if begin < 0:
        return data
    offset, count = struct.unpack_from("<QQ", data, begin + 8)
    footer = data[offset : offset + count * f.ROW.itemsize] if offset + count * f.ROW.itemsize <= begin else b""
    data = data[: begin + 24] + blake3.blake3(footer).digest() + data[begin + 56 :]
    return _crc(data, begin)


def packs() -> Sequence[bytes]:
    return [bytes([1 | 2 * encrypted]) + _a_pack(ring(encrypted=encrypted)) for encrypted in (False, True)]


def _a_pack(keyring: keys.Keyring) -> bytes:
    with tempfile.TemporaryDirectory() as path:
        files = Files(path)
        writer = pack.PackWriter(files, keyring, f.KIND_DATA)
        for number in range(3):
            plain = bytes([number]) * 400
            chunks = [blake3.blake3(plain[i : i + 200], key=keyring.block_key).digest() for i in (0, 200)]
            codec = f.CODEC_ZSTD if number else f.CODEC_RAW
            frame = zstandard.ZstdCompressor(write_content_size=False).compress(plain) if number else plain
            writer.add(f.CHUNK_BLOCK, codec, frame, chunks, [200, 200])
        return files.read(pack.path_of(writer.seal()[0]))


# --- sealed files and points -----------------------------------------------------------------------------------------


def read_point(data: bytes) -> None:
    """A point file; repaired, it is one that somebody with the key made."""
    keyring = ring(encrypted=bool(data[:1] and data[0] & 2))
    body = data[1:]
    if data[:1] and data[0] & 1:
        head = f.HEADER.pack(f.HEADER_MAGIC, f.FORMAT, f.KIND_POINT, 0, keyring.store, bytes(32), len(body))
        head = f.with_crc(head)
        digest = sealed._digest(POINT, head, body)
        keyring, body = ring(encrypted=False), head + body + ring(encrypted=False).signer.sign(digest)
    point.load(keyring, POINT, body)


def points() -> Sequence[bytes]:
    disk = Disk(DiskId("vda"), 65536)
    whole = Point(
        point.new_id(), Machine(MachineId("m"), "m", "fake", (disk,)), Instant(5), Consistency.CRASH,
        (DiskRoot(disk, ChunkId(bytes(32))),),
    )  # fmt: skip
    found = []
    for encrypted in (False, True):
        keyring = ring(encrypted=encrypted)
        path = point.path_of(keyring, whole)
        value = sealed.unseal(keyring, f.KIND_POINT, path, point.dump(keyring, whole))
        data = sealed.seal(keyring, f.KIND_POINT, POINT, value)
        found.append(bytes([2 * encrypted]) + data)
        if not encrypted:
            found.append(b"\x01" + data[f.HEADER_BYTES : -sealed.SIGNATURE_BYTES])
    return found


# --- journals --------------------------------------------------------------------------------------------------------


def read_log(data: bytes) -> None:
    """A journal's log up to its last barrier, its index, and its notes."""
    keyring = ring(encrypted=bool(data[:1] and data[0] & 2))
    body = _repaired_log(data[1:]) if data[:1] and data[0] & 1 else data[1:]
    log = journal.LogReader(Memory(body), keyring, MACHINE, NAME)
    log.mark()
    if index := log.index():
        summary_of(NAME.first, index.facts, [])
        for i, at in enumerate(index.frames["at"][:20].tolist()):
            with contextlib.suppress(StoreDamage):
                log.frame(at, i, NAME.first)
    frames = journal.up_to_last_barrier(log.frames())
    joining = journal.Joining()
    stream = b"".join(joining.add(frame) for frame in frames)
    for _, note in journal.meta_of(1, joining.facts, lambda pos, length: stream[pos : pos + length]):
        with contextlib.suppress(ValueError):
            f.parse_json(note)


def _repaired_log(data: bytes) -> bytes:
    data, at = _crc(data, 0), f.HEADER_BYTES
    while data[at : at + 4] == f.FRAME_MAGIC and at + f.FRAME_BYTES <= len(data):
        stored = int.from_bytes(data[at + 20 : at + 24], "little")
        data = _crc(data, at, 60, data[at + 64 : at + 64 + stored])
        at += f.FRAME_BYTES + stored
    if data[at : at + 4] == f.INDEX_MAGIC:
        stored = int.from_bytes(data[at + 20 : at + 24], "little")
        data = _crc(data, at, 60, data[at + 64 : at + 64 + stored])
        data = data[:-16] + f.LOG_END.pack(
            f.INDEX_MAGIC, crc32(data[24:56] + data[-8:]), int.from_bytes(data[-8:], "little")
        )
    return data


def logs() -> Sequence[bytes]:
    return [bytes([1 | 2 * encrypted]) + _a_log(ring(encrypted=encrypted))[0] for encrypted in (False, True)]


def _a_log(keyring: keys.Keyring) -> tuple[bytes, bytes]:
    """A log, and the segment it is sealed as."""
    with tempfile.TemporaryDirectory() as path:
        files = Files(path)
        writer = journal.LogWriter(files, keyring, MACHINE, NAME.epoch, NAME.first)
        facts = np.zeros(2, f.FACT)
        facts["kind"], facts["length"], facts["pos"] = f.FACT_DATA, 300, [0, 300]
        writer.note(Instant(1), {"disks": []}, barrier=False)
        writer.append(facts, bytes(600), Instant(2), barrier=True)
        writer.sync()
        writer.close()
        frames = list(journal.LogReader(files, keyring, MACHINE, NAME).frames())
        segment.write_segment(files, keyring, MACHINE, NAME, frames)
        return files.read(f"{journal.FOLDER}/{MACHINE}/{NAME}"), files.read(segment.path_of(MACHINE, NAME))


def read_segment(data: bytes) -> None:
    """All facts of a segment, their bytes and its notes."""
    keyring = ring(encrypted=bool(data[:1] and data[0] & 2))
    body = _repaired_pack(data[1:]) if data[:1] and data[0] & 1 else data[1:]
    found = segment.Segment(Memory(body), keyring, MACHINE, NAME)
    for row in found.facts[:20]:
        with contextlib.suppress(StoreDamage):
            found.read(int(row["pos"]), min(int(row["length"]), 4 * MiB))
    list(found.meta())


def segments() -> Sequence[bytes]:
    return [bytes([1 | 2 * encrypted]) + _a_log(ring(encrypted=encrypted))[1] for encrypted in (False, True)]


# --- descriptions, keys, caches, lists -------------------------------------------------------------------------------


def read_description(data: bytes) -> None:
    """The descriptor of a store, and its wrapped keys; repaired, the keys carry the right checksum."""
    with contextlib.suppress(StoreMissing):
        describe(Memory(data[1:]))
    text = data[1:]
    if data[:1] and data[0] & 1:
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            record = json.loads(text)
            if isinstance(record, dict):
                text = json.dumps({**record, "check": keys._digest(record)}).encode()
    keys.read_wrapping(Memory(text), "x.json")


def descriptions() -> Sequence[bytes]:
    keyring = ring(encrypted=True)
    with tempfile.TemporaryDirectory() as path:
        files = Files(path)
        secret = keys.parse_key_text(keys.new_key_text(), "the seed")
        keys.add_wrapping(files, keyring, secret)
        wrapping = files.read(f"keys/{files.names('keys')[0]}")
    descriptor = Descriptor(keyring.store, 65536, "aes-256-gcm", keyring.verifier.public_bytes_raw().hex())
    return [b"\x01" + wrapping, b"\x00" + descriptor.dump()]


def read_key(data: bytes) -> None:
    """The text of a key file, or what was typed from paper."""
    keys.parse_key_text(data.decode("latin-1"), "a file")


def read_generation(data: bytes) -> None:
    """A cache file of the index."""
    state = Files(folder() / "state")
    (folder() / "state" / "index").mkdir(parents=True, exist_ok=True)
    (folder() / "state" / "index" / "a.idx").write_bytes(data)
    found = Generation.open_at(str(folder() / "state" / "index" / "a.idx"))
    index = Index(Memory(b""), state, keep=False)
    ids = np.frombuffer(bytes(range(64)), "V32")
    index._load_generations({"aa"})
    index.lookup(ids)
    index.everywhere(bytes(32))
    if found is not None:
        found.ordinals = np.array([0] * len(found.packs) + [NOWHERE], np.uint32)
        with contextlib.suppress(generations.Unsorted):
            for _ in generations.merged([found])[2]:
                pass


def index_files() -> Sequence[bytes]:
    rows = np.zeros(4, f.ROW)
    rows["id"] = np.frombuffer(bytes(range(128)), "V32")
    return [bytes(generations.small({"aa": bytes(8)}, generation.rows_of(rows, 0)).content)]


def read_lists(data: bytes) -> None:
    """What people hand in: a list of changed extents, a machine's command line, a URI, a moment."""
    path = folder() / "list"
    path.write_bytes(data)
    text = data.decode("latin-1")
    for parse in (
        lambda: changedlist.read(path, 1 << 40),
        lambda: qemu_config.of_file(path),
        lambda: NbdUri.parse(text),
        lambda: moments.parse(text, Instant(1 << 60)),
    ):
        with contextlib.suppress(UsageError):
            parse()


def lists() -> Sequence[bytes]:
    return [
        b"0 65536\n0x10000 512 # more\n",
        b'[{"offset": 0, "length": 512, "type": 1}]',
        b"qemu-system-x86_64 -name x \\\n -drive 'file=a b'",
        b"nbd+unix:///vda?socket=/run/x.sock",
        b"nbds://[::1]:10809/a%20b",
        b"2026-11-22 14:03:07",
        b"2026-11-22T14:03:07.25+01:00",
        b"-1h30m",
    ]


# --- NBD -------------------------------------------------------------------------------------------------------------


class _Disk(Export):
    """Some bytes that can be written, with a context of its own."""

    size = 1 * MiB
    read_only = False
    contexts = (protocol.BASE_ALLOCATION, "x:dirty")

    def __init__(self) -> None:
        self._data = bytearray(self.size)

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self._data[offset : offset + len(target)]

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self._data[offset : offset + len(data)] = data

    def context_extents(self, context: str, offset: int, length: int) -> Sequence[tuple[int, int]]:
        return [(4096, 1), (length, 0)]


@cache
def _server() -> Path:
    """A server of ours that runs until we end; an exception in one of its threads ends us at once."""
    threading.excepthook = _finding
    server = NbdServer({"vda": _Disk()})
    path = folder() / "server.sock"
    server.listen_unix(path)
    return path


def _finding(found: threading.ExceptHookArgs) -> None:
    import traceback

    traceback.print_exception(found.exc_type, found.exc_value, found.exc_traceback)
    print("== a thread of the server raised this", flush=True)
    os._exit(77)


def speak_to_server(data: bytes) -> None:
    """A whole connection: whatever the client says, the server answers or hangs up, in time."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(_server()))
        thread = threading.Thread(target=_send_all, args=(client, data))
        thread.start()
        try:
            while client.recv(1 << 20):
                pass
        except ConnectionError:
            pass
        finally:
            thread.join(SECONDS)


def _send_all(client: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)


def clients() -> Sequence[bytes]:
    flags = protocol.CLIENT_FLAGS.pack(3)
    name = struct.pack(">I", 3) + b"vda"
    contexts = name + struct.pack(">I", 1) + struct.pack(">I", 15) + b"base:allocation"
    begin = flags + protocol.option(protocol.OPT_STRUCTURED_REPLY)
    begin += protocol.option(protocol.OPT_SET_META_CONTEXT, contexts)
    go = begin + protocol.option(protocol.OPT_GO, name + b"\0\0")
    kinds = (protocol.READ, protocol.WRITE_ZEROES, protocol.TRIM, protocol.BLOCK_STATUS, protocol.FLUSH)
    ask = b"".join(protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, kind, kind, 0, 4096) for kind in kinds)
    write = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, protocol.WRITE, 9, 512, 64) + bytes(64)
    listed = flags + protocol.option(protocol.OPT_LIST) + protocol.option(protocol.OPT_INFO, name + b"\0\1\0\3")
    old = flags + protocol.option(protocol.OPT_EXPORT_NAME, b"vda") + ask
    return [go + ask + write, listed, old]


@cache
def _hostile() -> tuple[socket.socket, Path]:
    path = folder() / "hostile.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(8)
    return listener, path


def speak_to_client(data: bytes) -> None:
    """Whatever a server says, our client reads it or gives it up with its named error, in time."""
    listener, path = _hostile()

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(SECONDS)
            _send_all(peer, data[1:])
            with contextlib.suppress(OSError):
                while peer.recv(1 << 20):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        _be_client(NbdUri(socket=str(path), export="vda"), listing=bool(data[:1] and data[0] & 1))
    finally:
        thread.join(2 * SECONDS)


def _be_client(uri: NbdUri, *, listing: bool) -> None:
    settings = Settings(connect_seconds=SECONDS, reply_seconds=SECONDS)
    if listing:
        list_exports(uri, settings=settings)
        return
    with NbdClient.open(uri, contexts=[protocol.BASE_ALLOCATION], settings=settings) as client:
        length = min(client.size, 8 * KiB) // 512 * 512
        client.read_into(0, memoryview(bytearray(length)))
        client.block_status(0, length)
        client.write(0, bytes(length))


def servers() -> Sequence[bytes]:
    greeting = protocol.GREETING.pack(protocol.NBD_MAGIC, protocol.OPTION_MAGIC, 3)
    reply = protocol.option_reply
    ack = protocol.REP_ACK
    structured = reply(protocol.OPT_STRUCTURED_REPLY, ack)
    context = reply(protocol.OPT_SET_META_CONTEXT, protocol.REP_META_CONTEXT, struct.pack(">I", 1) + b"base:allocation")
    context += reply(protocol.OPT_SET_META_CONTEXT, ack)
    info = reply(protocol.OPT_GO, protocol.REP_INFO, protocol.EXPORT_INFO.pack(protocol.INFO_EXPORT, 8192, 0x1ED))
    info += reply(protocol.OPT_GO, ack)
    chunk = protocol.CHUNK.pack
    data = struct.pack(">Q", 0) + bytes(8192)
    status = struct.pack(">III", 1, 8192, 0)
    replies = chunk(protocol.CHUNK_MAGIC, 1, protocol.CHUNK_DATA, 1, len(data)) + data
    replies += chunk(protocol.CHUNK_MAGIC, 1, protocol.CHUNK_STATUS, 2, len(status)) + status
    replies += chunk(protocol.CHUNK_MAGIC, 1, protocol.CHUNK_NONE, 3, 0)
    begin = greeting + structured + context + info
    simple = greeting + reply(protocol.OPT_STRUCTURED_REPLY, protocol.REP_ERR_UNSUP) + info
    simple += protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, 1) + bytes(8192)
    listed = greeting + reply(protocol.OPT_LIST, protocol.REP_SERVER, struct.pack(">I", 3) + b"vda")
    listed += reply(protocol.OPT_LIST, ack)
    return [b"\0" + begin + replies, b"\0" + simple, b"\1" + listed]


STORE = (StoreDamage, StoreMissing)
TARGETS = {
    "pack": Target(read_pack, STORE, packs),
    "point": Target(read_point, STORE, points),
    "log": Target(read_log, STORE, logs),
    "segment": Target(read_segment, STORE, segments),
    "description": Target(read_description, (KeyRefused, StoreMissing), descriptions),
    "key": Target(read_key, (KeyRefused,), lambda: [keys.new_key_text().encode()]),
    "generation": Target(read_generation, (), index_files),
    "lists": Target(read_lists, (), lists),
    "nbd-server": Target(speak_to_server, (), clients),
    "nbd-client": Target(speak_to_client, (HostUnreachable,), servers),
}
