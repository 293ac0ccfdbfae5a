"""What the server answers, as bytes: pure functions."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from itertools import islice

import numpy as np

from hvbackup.errors import HvbackupError, SpaceExhausted
from hvbackup.nbd import protocol
from hvbackup.nbd.protocol import CHUNK_DONE, CHUNK_MAGIC
from hvbackup.nbd.wire import Buffer

_HOLE_BYTES = 32 * 1024  # data of at least this much are looked through for zeroes
_EXTENTS_MAX = 8192  # in one block status: 64 KiB of answer
_LOOK_UPS_MAX = 65536  # extents asked of an export for one block status, however many of them are merged
_FLAGS = {
    protocol.READ: protocol.FLAG_DF,
    protocol.WRITE_ZEROES: protocol.FLAG_NO_HOLE,
    protocol.BLOCK_STATUS: protocol.FLAG_REQ_ONE,
}


def data_reply(cookie: int, offset: int, data: Buffer, done: int, *, structured: bool) -> tuple[Buffer, ...]:
    """The bytes that were read: the last piece of a structured reply where `done` is CHUNK_DONE."""
    if not structured:
        return protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, cookie), data
    length = len(data)
    if length >= _HOLE_BYTES and is_zero(data):
        return (protocol.HOLE_CHUNK.pack(CHUNK_MAGIC, done, protocol.CHUNK_HOLE, cookie, 12, offset, length),)
    return protocol.DATA_CHUNK.pack(CHUNK_MAGIC, done, protocol.CHUNK_DATA, cookie, 8 + length, offset), data


def done_reply(cookie: int, *, structured: bool) -> bytes:
    """The command succeeded and has nothing to tell."""
    if structured:
        return protocol.CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, protocol.CHUNK_NONE, cookie, 0)
    return protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, cookie)


def error_reply(cookie: int, error: int, *, structured: bool) -> bytes:
    """The command failed."""
    if structured:
        return protocol.ERROR_CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, protocol.CHUNK_ERROR, cookie, 6, error, 0)
    return protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, error, cookie)


def status_chunk(cookie: int, context: int, extents: bytes, done: int) -> bytes:
    """The block status in one context."""
    head = protocol.CHUNK.pack(CHUNK_MAGIC, done, protocol.CHUNK_STATUS, cookie, 4 + len(extents))
    return head + protocol.NUMBER.pack(context) + extents


def merged_extents(extents: Iterable[tuple[int, int]], length: int, *, one: bool) -> bytes:
    """(length, flags) pairs for the wire: neighbours merged, bounded, cut at `length`; empty without any."""
    lengths: list[int] = []
    flags: list[int] = []
    left = length
    for size, flag in islice(extents, _LOOK_UPS_MAX):
        size = min(size, left)
        if size <= 0:
            continue
        if flags and flags[-1] == flag:
            lengths[-1] += size
        elif (one and flags) or len(flags) == _EXTENTS_MAX:
            break
        else:
            lengths.append(size)
            flags.append(flag)
        left -= size
        if not left:
            break
    return np.column_stack([lengths, flags]).astype(">u4").tobytes() if flags else b""


def is_zero(data: Buffer) -> bool:
    """Whether all bytes are zero; stops at the first that is not."""
    return not np.frombuffer(data, np.bool_).any()


def refusal(kind: int, flags: int, offset: int, length: int, *, size: int, min_block: int, read_only: bool) -> int:
    """The error for a command that no export should see, or 0."""
    if kind not in protocol.COMMAND_NAMES or flags & ~(_FLAGS.get(kind, 0) | protocol.FLAG_FUA):
        return errno.EINVAL
    writes = kind in (protocol.WRITE, protocol.WRITE_ZEROES, protocol.TRIM)
    if writes and read_only:
        return errno.EPERM
    if offset + length > size:
        return errno.ENOSPC if kind in (protocol.WRITE, protocol.WRITE_ZEROES) else errno.EINVAL
    if (offset | length) & (min_block - 1) and kind != protocol.FLUSH:
        return errno.EINVAL
    if kind == protocol.READ and length > protocol.PAYLOAD_MAX_BYTES:
        return errno.EINVAL
    return errno.EINVAL if kind == protocol.BLOCK_STATUS and not length else 0


def wire_error(error: Exception) -> int:
    """What an export's error is called on the wire."""
    if isinstance(error, SpaceExhausted):
        return errno.ENOSPC
    if isinstance(error, HvbackupError) or not isinstance(error, OSError):
        return errno.EIO
    number = errno.EPERM if error.errno in (errno.EROFS, errno.EACCES) else error.errno
    if isinstance(error, PermissionError):
        number = errno.EPERM
    return number if number in protocol.WIRE_ERRORS else errno.EIO
