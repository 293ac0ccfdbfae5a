"""Columns of a mapped file: what they say is right, or they say that they are damaged."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from hvbackup.errors import StoreDamage
from hvbackup.store.format.columns import PAGE_BYTES, Checked, Column, sums_of

HEAD, ITEMS = 8192, 40_000  # five pages


def written(path: Path, values: np.ndarray) -> int:
    body = values.tobytes()
    sums = sums_of(body).tobytes()
    path.write_bytes(bytes(HEAD) + body + sums)
    return zlib.crc32(sums)


def opened(path: Path, crc: int) -> Column:
    return Column(Checked(path, HEAD, ITEMS * 8, crc), HEAD, ITEMS, "<i8")


@pytest.fixture
def values() -> np.ndarray:
    return np.sort(np.random.default_rng(1).integers(0, 1 << 40, ITEMS))


def test_a_column_is_what_was_written(tmp_path: Path, values: np.ndarray) -> None:
    column = opened(tmp_path / "t", written(tmp_path / "t", values))
    rng = random.Random(2)
    assert len(column) == ITEMS
    for _ in range(500):
        wanted = rng.choice([rng.randrange(1 << 40), int(values[rng.randrange(ITEMS)]), 0, 1 << 41])
        for side in ("left", "right"):
            assert column.searchsorted(wanted, side=side) == int(values.searchsorted(wanted, side))
        i, j = sorted((rng.randrange(ITEMS), rng.randrange(ITEMS)))
        assert column[i] == values[i]
        assert (column[i:j] == values[i:j]).all()
    assert (column[:] == values).all()


def test_only_what_is_looked_at_is_verified(tmp_path: Path, values: np.ndarray) -> None:
    crc = written(tmp_path / "t", values)
    with (tmp_path / "t").open("r+b") as file:
        file.seek(HEAD + 3 * PAGE_BYTES + 5)
        file.write(b"x")
    column = opened(tmp_path / "t", crc)
    assert column[0] == values[0]
    with pytest.raises(StoreDamage, match="was damaged and is removed"):
        column[:]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_never_gives_a_wrong_answer(tmp_path: Path, values: np.ndarray, seed: int) -> None:
    rng, crc = random.Random(seed), written(tmp_path / "t", values)
    with (tmp_path / "t").open("r+b") as file:
        at = rng.randrange(HEAD, (tmp_path / "t").stat().st_size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << rng.randrange(8))]))
    try:
        column = opened(tmp_path / "t", crc)
        for _ in range(200):
            wanted = int(values[rng.randrange(ITEMS)]) + rng.randrange(3)
            assert column.searchsorted(wanted) == int(values.searchsorted(wanted))
        assert (column[:] == values).all()
    except StoreDamage:
        return
    pytest.fail("the whole column was read, and nobody noticed")
