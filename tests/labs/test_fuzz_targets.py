"""What the fuzzer feeds is fed here once: valid bytes are taken by every parser, and what was found stays mended."""

from __future__ import annotations

import contextlib
import random
import struct
import tempfile
from pathlib import Path

import pytest

from hvbackup.errors import PointDamaged
from labs import fuzz_targets
from labs.fuzz_targets import TARGETS

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
