"""Every parser of stored bytes against random and mutated ones: only the named errors, no hang, no flood of memory."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import blake3
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import HvbackupError, KeyRefused, StoreDamage, StoreMissing
from hvbackup.files import Files
from hvbackup.model import ChunkId, Consistency, Disk, DiskId, DiskRoot, Instant, Machine, MachineId, RecoveryPoint
from hvbackup.store.format import keys, pack, point, sealed
from hvbackup.store.format import layout as f
from hvbackup.store.format.runs import Runs
from hvbackup.store.index.generation import Generation
from hvbackup.store.index.index import Index
from hvbackup.store.store import describe
from tests.world import KEY, CarelessKernel

NAME = "points/00/0"
RINGS = [keys.Keyring.generate(bytes(range(16)), encrypted=e) for e in (False, True)]
MEMORY_BYTES = 512 << 20
rings = st.sampled_from(RINGS)


# What is drawn does not depend on the bytes, which are others each time: salts are random.
changes = st.lists(
    st.tuples(
        st.sampled_from(["bit", "word", "cut", "repeat", "insert", "zero"]),
        st.integers(0, (1 << 16) - 1),
        st.sampled_from([0, 1, 2, 7, 100, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]),
        st.binary(max_size=40),
    ),
    min_size=1,
    max_size=4,
)


def changed(valid: bytes, several: list[tuple[str, int, int, bytes]]) -> bytes:
    """Valid bytes with a few changes: bits, words, cuts, repetitions, insertions."""
    data = bytearray(valid)
    for kind, place, number, more in several:
        at = place * (len(data) + 1) >> 16
        if kind == "bit" and at < len(data):
            data[at] ^= 1 << number % 8
        elif kind == "word":
            data[at : at + 4] = struct.pack("<I", number)
        elif kind == "cut":
            del data[at : at + number]
        elif kind == "repeat":
            data[at:at] = data[at : at + 100]
        elif kind == "insert":
            data[at:at] = more
        else:
            data[at : at + 16] = bytes(len(data[at : at + 16]))
    return bytes(data)


def bytes_like(valid: bytes) -> st.SearchStrategy[bytes]:
    return (
        changes.map(lambda several: changed(valid, several))
        | st.binary(max_size=300)
        | st.binary(max_size=100).map(lambda tail: valid[:64] + tail)
    )


@pytest.fixture(autouse=True)
def bounded_memory() -> object:
    """A parser that believes a length of gigabytes fails here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refuses(parse: Callable[[], object], *errors: type[HvbackupError]) -> None:
    """It works, or fails with one of these."""
    try:
        parse()
    except errors as e:
        assert str(e)  # noqa: PT017


# --- sealed files -----------------------------------------------------------------------------------------------------


@given(rings, st.data())
def test_unseal(ring: keys.Keyring, data: st.DataObject) -> None:
    valid = sealed.seal(ring, f.KIND_POINT, NAME, {"a": [1, "x" * 200]})
    found = data.draw(bytes_like(valid))
    if found == valid:
        return
    with pytest.raises((StoreDamage, StoreMissing)):
        sealed.unseal(ring, f.KIND_POINT, NAME, found)


@given(
    rings,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ),
)
def test_a_signed_point_of_any_shape(ring: keys.Keyring, value: object) -> None:
    data = sealed.seal(ring, f.KIND_POINT, NAME, value)  # type: ignore[arg-type]
    with pytest.raises(StoreDamage):
        point.load(ring, NAME, data)


@given(rings, st.data())
def test_a_signed_point_with_one_field_of_another_shape(ring: keys.Keyring, data: st.DataObject) -> None:
    disk = Disk(DiskId("vda"), 65536)
    whole = RecoveryPoint(
        point.new_id(), Machine(MachineId("m"), "m", "fake", (disk,)), Instant(5), Consistency.CRASH,
        (DiskRoot(disk, ChunkId(bytes(32))),),
    )  # fmt: skip
    path = point.path_of(ring, whole)
    value = sealed.unseal(ring, f.KIND_POINT, path, point.dump(ring, whole))
    target = value
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [
            v for v in (target.values() if isinstance(target, dict) else target) if isinstance(v, dict | list) and v
        ]
        target = data.draw(st.sampled_from(inner)) if inner else target
    key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else list(range(len(target)))))
    target[key] = data.draw(st.none() | st.integers() | st.text(max_size=5) | st.just([]) | st.just({}) | st.just("zz"))
    refuses(lambda: point.load(ring, path, sealed.seal(ring, f.KIND_POINT, path, value)), StoreDamage)


# --- packs ------------------------------------------------------------------------------------------------------------


def a_pack(ring: keys.Keyring, where: Path) -> tuple[Files, str, bytes]:
    files = Files(where, CarelessKernel())
    writer = pack.PackWriter(files, ring, f.KIND_DATA)
    for number in range(5):
        plain = bytes([number]) * 1000
        frame = zstandard.ZstdCompressor(write_content_size=False).compress(plain)
        chunks = [blake3.blake3(plain[i : i + 500], key=ring.block_key).digest() for i in (0, 500)]
        writer.add(f.CHUNK_BLOCK, f.CODEC_ZSTD, frame, chunks, [500, 500])
    name, _ = writer.seal()
    return files, name, files.read(pack.path_of(name))


@given(rings, st.data())
def test_reading_a_pack(ring: keys.Keyring, data: st.DataObject) -> None:
    with TemporaryDirectory() as path:
        files, name, valid = a_pack(ring, Path(path))
        files.path(pack.path_of(name)).write_bytes(data.draw(bytes_like(valid)))
        refuses(lambda: pack.read_footer(files, name), StoreDamage)
        refuses(lambda: pack.cipher_of(files, ring, name), StoreDamage, StoreMissing)
        rows = pack.scan(files, name)
        size = files.size(pack.path_of(name))
        assert all(row["offset"] < size for row in rows)
        index = Index(files, Files(Path(path) / "state", CarelessKernel()), keep=True)
        index.sync()


@given(rings, st.data())
def test_decoding_a_record(ring: keys.Keyring, data: st.DataObject) -> None:
    with TemporaryDirectory() as path:
        files, name, valid = a_pack(ring, Path(path))
        offset, stored = next(pack.records(pack.read_footer(files, name)))
        cipher, bind = pack.cipher_of(files, ring, name)
        record = valid[offset : offset + stored]
        zstd = zstandard.ZstdDecompressor()
        assert len(pack.decode(record, cipher, bind, zstd, "here")) == 1000
        refuses(lambda: pack.decode(data.draw(bytes_like(record)), cipher, bind, zstd, "here"), StoreDamage)


@pytest.mark.parametrize("announced", [10, 1 << 31, 1 << 62])
def test_a_frame_that_announces_any_length_gets_no_memory(announced: int) -> None:
    frame = struct.pack("<IBQ", 0xFD2FB528, 0xE0, announced) + b"\x01\x00\x00"
    head = f.RECORD.pack(f.RECORD_MAGIC, 0, f.CODEC_ZSTD, f.CHUNK_BLOCK, 1, len(frame), 65536)
    record = f.with_crc(head, bytes(36)) + bytes(36) + frame
    with pytest.raises(StoreDamage):
        pack.decode(record, None, b"", zstandard.ZstdDecompressor(), "here")


# --- keys and descriptions --------------------------------------------------------------------------------------------


@given(
    st.text()
    | st.binary().map(lambda b: b.decode("latin-1"))
    | st.just(keys.new_key_text()).flatmap(lambda t: changes.map(lambda c: changed(t.encode(), c).decode("latin-1")))
)
def test_any_text_as_a_key_file(text: str) -> None:
    refuses(lambda: keys.parse_key_text(text, "a file"), KeyRefused)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)


@given(rings, st.data())
def test_any_file_among_the_keys(ring: keys.Keyring, data: st.DataObject) -> None:
    with TemporaryDirectory() as path:
        files = Files(path, CarelessKernel())
        keys.add_wrapping(files, ring, KEY if ring.encrypted else None)
        name = files.names("keys")[0]
        valid = files.read(f"keys/{name}")
        record = json.loads(valid)
        record[data.draw(st.sampled_from(sorted(record)))] = data.draw(json_values)
        signed = {**record, "check": keys._digest(record)}
        hostile = data.draw(
            bytes_like(valid)
            | st.sampled_from([json.dumps(record).encode(), json.dumps(signed).encode(), b"[" * 200_000])
        )
        for one in files.names("keys"):
            files.path(f"keys/{one}").write_bytes(hostile)
        keys.list_wrappings(files)
        for secrets in ([], [KEY], [keys.passphrase("x")]):
            refuses(
                lambda s=secrets: keys.unlock(files, ring.store, s, encrypted=ring.encrypted), KeyRefused, StoreMissing
            )


@given(st.data())
def test_any_description(data: st.DataObject) -> None:
    value = {"format": 1, "id": "00" * 16, "block": 65536, "page": 256, "cipher": "none", "verify_key": "00" * 32}
    valid = json.dumps(value).encode()
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(json_values)  # type: ignore[assignment]
    hostile = data.draw(bytes_like(valid) | st.sampled_from([json.dumps(value).encode(), b"[" * 200_000]))
    with TemporaryDirectory() as path:
        (Path(path) / "HVBACKUP").write_bytes(hostile)
        refuses(lambda: describe(Files(path)), StoreMissing)


# --- STATE and runs ---------------------------------------------------------------------------------------------------


@given(st.data())
def test_any_index_file_can_be_asked(data: st.DataObject) -> None:
    with TemporaryDirectory() as path:
        files, name, _ = a_pack(RINGS[0], Path(path))
        state = Files(Path(path) / "state", CarelessKernel())
        Index(files, state, keep=True).sync()
        cache = state.path(f"index/{state.names('index')[0]}")
        cache.write_bytes(data.draw(bytes_like(cache.read_bytes())))
        Generation.open_at(str(cache))
        index = Index(files, state, keep=True)
        index.sync()
        ids = pack.read_footer(files, name)["id"]
        index.lookup(ids)
        for chunk in ids.tolist():
            index.everywhere(chunk)
        index.reread()
        assert (index.lookup(ids)["pack"] == 0).all()
        assert index.chunks == len(ids) == 10


@given(rings, st.data())
def test_any_run_record_and_head(ring: keys.Keyring, data: st.DataObject) -> None:
    with TemporaryDirectory() as path:
        files, state = (Files(Path(path) / n, CarelessKernel()) for n in ("store", "state"))
        runs = Runs(files, ring, state)
        runs.settle()
        for number in range(2):
            runs.append({"kind": "capture", "t": number})
        victim = data.draw(st.sampled_from([files.path(f"runs/{runs.writer}/{1:010d}"), state.path("head.json")]))
        before = victim.read_bytes()
        victim.write_bytes(data.draw(bytes_like(before)))
        again = Runs(files, ring, state)
        problems = again.problems()
        assert problems or victim.read_bytes() == before or victim.name == "head.json"
        again.recent(5)
        again.append({"kind": "capture", "t": 3})
