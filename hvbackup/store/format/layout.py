"""Byte layouts of format 1, shared by every module of the store.  `docs/format.md` says the same for strangers.

All integers are little-endian.  Magic, version and checksum come first; an unknown version is refused by its number.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from isal.isal_zlib import crc32  # twenty times as fast as zlib's

FORMAT = 1
PAGE_IDS = 256  # ids in one page of a block map: 8 KiB, the best trade for scattered writes (decision 0002)
BLOCK_SIZES = (64 * 1024, 256 * 1024)
ID_BYTES = 32

FLAG_ENCRYPTED = 1

KIND_DATA = 1  # a pack of blocks
KIND_META = 2  # a pack of map pages and copies of points
KIND_POINT = 3  # a sealed file: recovery point
KIND_RUN = 4  # a sealed file: run record
KIND_LEASE = 5  # a sealed file: lease
KIND_LOG = 6  # an open log of a journal
KIND_SEGMENT = 7  # a sealed segment of a journal
KIND_WRITER = 8  # a sealed file: who is writing chunks now
KIND_CONDEMNED = 9  # a sealed file: packs that reclaim is about to remove
KIND_TOMBSTONE = 10  # a sealed file: points that are being forgotten
KIND_HOLD = 11  # a sealed file: a point that must stay
KIND_PIN = 12  # a sealed file: a point that somebody reads
KIND_SETTINGS = 13  # a sealed file: what the store demands of who forgets
KIND_REQUEST = 14  # a sealed file: what one operator wants and another must approve
KIND_PAUSE = 20  # a sealed file: a machine that protection leaves alone for a while

# File header, of packs and sealed files alike, 64 bytes.
#   0  4  magic b"hvF1"
#   4  1  format 1
#   5  1  kind, KIND_*
#   6  1  flags: 1 encrypted
#   7  1  zero
#   8 16  store id
#  24 32  salt: the file's key is HKDF-SHA256(master key, salt, kind)
#  56  4  sealed files: length of the payload; packs: zero
#  60  4  crc32 of bytes 0 to 60
HEADER = struct.Struct("<4sBBBx16s32sI")
HEADER_BYTES = 64
HEADER_MAGIC = b"hvF1"

# Record of a pack: one compressed frame of one or more chunks.  Self-describing, so a pack can be read without its footer.
#   0  4  magic b"hvC1": resynchronise here after damage
#   4  4  ordinal in this pack, from 0: the nonce
#   8  1  codec, CODEC_*
#   9  1  what the chunks are, CHUNK_*
#  10  2  number of chunks, n >= 1
#  12  4  stored length: bytes that follow the ids, with the 16 bytes of the tag when encrypted
#  16  4  plain length: of all chunks together
#  20  4  crc32 of bytes 0 to 20, then of the n entries
#  24 36n n entries: chunk id (32), plain length (4); chunks follow each other in the plain frame
#   ..    the frame
RECORD = struct.Struct("<4sIBBHII")
RECORD_BYTES = 24
RECORD_MAGIC = b"hvC1"
ENTRY = np.dtype([("id", "V32"), ("plain", "<u4")])

CODEC_RAW = 0
CODEC_ZSTD = 1

CHUNK_BLOCK = 1
CHUNK_PAGE = 2
CHUNK_POINT = 3  # for repair only: 2 bytes length of a point's path, the path, the file; its id is BLAKE3 of all that
CHUNK_FACTS = (
    4  # of a segment: the bytes of facts, one stream cut every SEGMENT_PIECE_BYTES, in the order of the records
)
CHUNK_FACT_INDEX = 5  # of a segment: rows of FACT, whose `pos` is a place in that stream; cut likewise
SEGMENT_PIECE_BYTES = 256 * 1024  # decoded as a whole by one read: the trade between size and the cost of a random read
RECORD_PLAIN_MAX = 16 * 1024 * 1024  # nothing larger is believed when read back

# Footer of a pack: rows sorted by id, one for each chunk, then the trailer.
ROW = np.dtype(
    [
        ("id", "V32"),
        ("offset", "<u8"),  # of the record in the pack
        ("stored", "<u4"),  # length of the record in the pack, header and entries included
        ("at", "<u4"),  # where the chunk begins in the plain frame
        ("plain", "<u4"),  # length of the chunk
        ("kind", "<u4"),  # CHUNK_*
    ]
)

# Trailer, the last 64 bytes of a pack.
#   0  4  magic b"hvE1"
#   4  4  zero
#   8  8  offset of the footer
#  16  8  number of rows
#  24 32  BLAKE3 of the footer
#  56  4  zero
#  60  4  crc32 of bytes 0 to 60
TRAILER = struct.Struct("<4s4xQQ32s4x")
TRAILER_BYTES = 64
TRAILER_MAGIC = b"hvE1"


def parse_json(data: bytes) -> Any:
    """A JSON value out of bytes nobody vouches for.  Raises ValueError, whatever is wrong with them."""
    try:
        return json.loads(data)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


# Frame of a log: facts that were appended together.
#   0  4  magic b"hvL1"
#   4  4  ordinal in this file, from 0: the nonce
#   8  8  sequence number of the first fact; the others follow it
#  16  4  number of facts, n
#  20  4  stored length: of what follows this header, with the 16 bytes of the tag when encrypted
#  24  4  plain length
#  28  4  flags: 1 a barrier, the state after the last fact of this frame is a moment; 2 the state after each of its facts is
#  32  8  wall clock, nanoseconds since 1970, UTC
#  40  8  monotonic clock of the writer, nanoseconds
#  48 12  zero
#  60  4  crc32 of bytes 0 to 60, then of what follows the header
#  64 ..  n rows of FACT, then the bytes of the facts
FRAME = struct.Struct("<4sIQIIIIqq12x")
FRAME_BYTES = 64
FRAME_MAGIC = b"hvL1"
FLAG_BARRIER = 1
FLAG_EACH = 2  # always together with FLAG_BARRIER: who does not know it offers the last fact alone

# Index of a log that has ended, behind its frames: a frame of another magic, whose ordinal is how many came before, whose number
# is that of the first fact of the log; where a frame has its flags it has m.  What follows its header:
#   n rows of FACT      up to the last barrier, as in a segment
#   m rows of FRAME_ROW of the frames that hold them
#   the bytes of those facts that are FACT_META, one after the other
# The last 16 bytes of the file, which has whole blocks, say where it is.
INDEX_MAGIC = b"hvI1"
FRAME_ROW = np.dtype([("at", "<u8"), ("facts", "<u4"), ("bytes", "<u4")])  # where in the log, and what it holds
#   0  4  magic b"hvI1"
#   4  4  crc32 of the salt in the header of the file, then of the offset
#   8  8  offset of the index
LOG_END = struct.Struct("<4sIQ")

FACT = np.dtype(
    [
        ("t", "<i8"),  # when it arrived, wall clock
        ("offset", "<u8"),
        ("length", "<u8"),
        ("pos", "<u4"),  # of its bytes: in the frame's bytes (log), in the segment's plain bytes (segment)
        ("disk", "<u2"),  # number in the disk table of its file
        ("kind", "u1"),  # FACT_*
        ("flags", "u1"),
    ]
)
FACT_DATA = 1
FACT_ZERO = 2
FLAG_FACT_BARRIER = 1  # in a segment: the state after this fact is a moment
FACT_META = 3  # `length` bytes of JSON: the disk table, marks, gaps, resizes, clock steps, tokens


def bound(store: bytes, kind: int, name: str = "") -> bytes:
    """What every ciphertext of a file is bound to: its store and kind, and its name unless that follows from its content."""
    return store + bytes([kind]) + name.encode()


def with_crc(head: bytes, *more: bytes | bytearray | memoryview) -> bytes:
    """`head` with the crc32 of itself and of `more` behind it."""
    crc = crc32(head)
    for part in more:
        crc = crc32(part, crc)
    return head + crc.to_bytes(4, "little")


def crc_matches(head: bytes, crc: bytes, *more: bytes | bytearray | memoryview) -> bool:
    """Whether `crc` is what `with_crc` would put behind `head`."""
    return with_crc(head, *more)[-4:] == crc
