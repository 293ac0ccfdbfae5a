"""The server's pure parts: block status tables, and which commands are refused."""

from __future__ import annotations

import errno
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import ReadFailed, SpaceExhausted
from hvbackup.nbd import protocol
from hvbackup.nbd.replies import is_zero, merged_extents, refusal, wire_error

_EXTENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=30)


def _flags_of_each_byte(extents: list[tuple[int, int]]) -> list[int]:
    return [flag for length, flag in extents for _ in range(length)]


@given(_EXTENTS, st.integers(1, 60))
def test_merged_extents_say_the_same_about_each_byte(extents: list[tuple[int, int]], length: int) -> None:
    pairs = np.frombuffer(merged_extents(extents, length, one=False), ">u4").reshape(-1, 2).tolist()
    assert _flags_of_each_byte(pairs) == _flags_of_each_byte(extents)[:length]
    assert all(a[1] != b[1] for a, b in itertools.pairwise(pairs))
    assert all(size for size, _ in pairs)


@given(_EXTENTS, st.integers(1, 60))
def test_one_extent_is_the_first_of_all(extents: list[tuple[int, int]], length: int) -> None:
    one, several = merged_extents(extents, length, one=True), merged_extents(extents, length, one=False)
    assert one == several[:8]


def test_endless_extents_give_a_bounded_answer() -> None:
    alternating = ((1, index % 2) for index in itertools.count())
    assert len(merged_extents(alternating, 1 << 31, one=False)) == 8 * 8192
    equal = itertools.repeat((1, 0))
    assert np.frombuffer(merged_extents(equal, 1 << 31, one=False), ">u4").tolist() == [65536, 0]


@given(st.binary(max_size=300))
def test_is_zero(data: bytes) -> None:
    assert is_zero(data) == (not any(data))


@pytest.mark.parametrize(
    ("kind", "flags", "offset", "length", "expected"),
    [
        (protocol.READ, 0, 0, 1 << 20, 0),
        (protocol.READ, protocol.FLAG_DF, 512, 512, 0),
        (protocol.READ, 0, 1 << 20, 512, errno.EINVAL),
        (protocol.READ, 0, (1 << 64) - 512, 512, errno.EINVAL),
        (protocol.READ, 0, 1, 512, errno.EINVAL),
        (protocol.READ, 0, 0, 511, errno.EINVAL),
        (protocol.READ, protocol.FLAG_REQ_ONE, 0, 512, errno.EINVAL),
        (protocol.WRITE, protocol.FLAG_FUA, 0, 512, 0),
        (protocol.WRITE, 0, 1 << 20, 512, errno.ENOSPC),
        (protocol.TRIM, 0, 1 << 20, 512, errno.EINVAL),
        (protocol.BLOCK_STATUS, 0, 0, 0, errno.EINVAL),
        (protocol.FLUSH, 0, 0, 0, 0),
        (5, 0, 0, 512, errno.EINVAL),
        (99, 0, 0, 512, errno.EINVAL),
    ],
)
def test_refusals(kind: int, flags: int, offset: int, length: int, expected: int) -> None:
    assert refusal(kind, flags, offset, length, size=1 << 20, min_block=512, read_only=False) == expected


def test_a_read_only_export_is_not_written_to() -> None:
    for kind in (protocol.WRITE, protocol.WRITE_ZEROES, protocol.TRIM):
        assert refusal(kind, 0, 0, 512, size=1 << 20, min_block=1, read_only=True) == errno.EPERM


def test_a_read_may_not_ask_for_more_memory_than_agreed() -> None:
    length = protocol.PAYLOAD_MAX_BYTES + 1
    assert refusal(protocol.READ, 0, 0, length, size=1 << 40, min_block=1, read_only=True) == errno.EINVAL


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ReadFailed("x"), errno.EIO),
        (SpaceExhausted("x"), errno.ENOSPC),
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError(errno.EROFS, "x"), errno.EPERM),
        (PermissionError(), errno.EPERM),
        (OSError(errno.ENOENT, "x"), errno.EIO),
        (OSError("x"), errno.EIO),
    ],
)
def test_errors_on_the_wire(error: Exception, expected: int) -> None:
    assert wire_error(error) == expected
