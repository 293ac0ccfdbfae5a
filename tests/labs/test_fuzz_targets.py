"""What the fuzzer feeds is fed here once: valid bytes are taken by every parser, and what was found stays mended."""

from __future__ import annotations

import contextlib
import random
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hvbackup.errors import ChunkDamaged, PointDamaged, ReadFailed
from hvbackup.nbd import protocol
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack
from hvbackup.store.journal import segment
from labs import fuzz_targets
from labs.fuzz_targets import MACHINE, NAME, TARGETS, Memory

CHANGES = 40


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tempfile.tempdir = str(tmp_path_factory.mktemp("f"))
    fuzz_targets.folder.cache_clear()
    found = fuzz_targets.folder()
    tempfile.tempdir = None
    return found


FIRST_ONLY = ("description", "nbd-client")  # their other seeds are for other ways through the same parser
NOT_THE_LAST_WORD = {"point": "holds the point of another place"}  # seeds have a name that can be foreseen


@pytest.mark.parametrize("name", TARGETS)
def test_valid_bytes_are_taken(name: str) -> None:
    """A fuzzer that begins with refused bytes would never come far."""
    seeds = TARGETS[name].seeds()
    for seed in seeds[:1] if name in FIRST_ONLY else seeds:
        if name in NOT_THE_LAST_WORD:
            with pytest.raises(TARGETS[name].errors, match=NOT_THE_LAST_WORD[name]):
                TARGETS[name].run(seed)
        else:
            TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_bytes_are_taken_or_refused_by_name(name: str) -> None:
    rng = random.Random(name)
    for seed in TARGETS[name].seeds():
        for _ in range(CHANGES):
            data = bytearray(seed)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(*TARGETS[name].errors):
                TARGETS[name].run(bytes(data))


@pytest.mark.parametrize("announced", [1 << 27, 1 << 40, 1 << 62])
def test_a_signed_record_that_announces_any_length_gets_no_memory(announced: int) -> None:
    with pytest.raises(PointDamaged, match="announces a record"):
        TARGETS["point"].run(b"\x01" + struct.pack("<IBQ", 0xFD2FB528, 0xE0, announced) + b"\x01\x00\x00")


def test_a_signed_record_that_is_nested_deeply() -> None:
    import zstandard

    with pytest.raises(PointDamaged, match="nested"):
        TARGETS["point"].run(b"\x01" + zstandard.ZstdCompressor().compress(b"[" * 200_000))


def test_a_record_that_would_end_far_behind_its_pack_is_none() -> None:
    body = bytes(f.HEADER_BYTES)
    for stored in (1, 1 << 20, 0xFFFFFFFF):
        head = f.RECORD.pack(f.RECORD_MAGIC, 0, f.CODEC_RAW, f.CHUNK_BLOCK, 1, stored, 64)
        body += _with_entries(head, 64)
    rows = pack.scan(Memory(body), "aa")
    assert rows["stored"].tolist() == [f.RECORD_BYTES + f.ENTRY.itemsize + 1]


def test_a_record_whose_chunks_are_longer_than_it_says_is_none() -> None:
    head = f.RECORD.pack(f.RECORD_MAGIC, 0, f.CODEC_RAW, f.CHUNK_BLOCK, 2, 0, 64)
    body = bytes(f.HEADER_BYTES) + _with_entries(head, 0xFFFFFFFF, 0xFFFFFFFF)
    assert len(pack.scan(Memory(body), "aa")) == 0


def _with_entries(head: bytes, *plain: int) -> bytes:
    entries = b"".join(bytes(32) + length.to_bytes(4, "little") for length in plain)
    return f.with_crc(head, entries) + entries


def test_a_segment_whose_footer_calls_bytes_an_index_is_damaged() -> None:
    """Only ids and layouts vouch for a segment's chunks, so a footer may call any of them anything."""
    keyring = fuzz_targets.ring(encrypted=False)
    [plain, _] = TARGETS["segment"].seeds()
    data = bytearray(plain[1:])
    at = len(data) - f.TRAILER_BYTES - 2 * f.ROW.itemsize
    rows = np.frombuffer(data, f.ROW, 2, at).copy()
    rows["kind"] = f.CHUNK_FACT_INDEX
    data[at : at + rows.nbytes] = rows.tobytes()
    with pytest.raises(ChunkDamaged, match="whole facts"):
        _ = segment.Segment(Memory(fuzz_targets._repaired_pack(bytes(data))), keyring, MACHINE, NAME).facts


@pytest.mark.parametrize("error", [1 << 31, 0xFFFFFFFF])
def test_a_server_may_answer_with_any_number_as_its_error(error: int) -> None:
    """The number is no error of this system; it was handed to strerror(3), which knows no such ones."""
    greeted = TARGETS["nbd-client"].seeds()[1].partition(protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, 1))
    with pytest.raises(ReadFailed, match="Input/output error"):
        TARGETS["nbd-client"].run(greeted[0] + protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, error, 1))
