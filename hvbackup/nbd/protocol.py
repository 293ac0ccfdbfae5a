"""The NBD protocol's numbers and layouts, as fixed newstyle with structured replies uses them.

All integers are big-endian.  Sizes of messages that the other side chooses are bounded here, beside the layouts, so
that neither the client nor the server can be made to allocate what it was not asked for.

    handshake   server: NBDMAGIC IHAVEOPT flags          client: flags
    option      client: OPTION + data                    server: OPTION_REPLY + data, last one ACK or an error
    command     client: REQUEST + payload of a write     server: SIMPLE_REPLY + data, or CHUNK + payload, ... until DONE
"""

from __future__ import annotations

import errno
import struct
from typing import Final

DEFAULT_PORT: Final = 10809

# --- handshake -------------------------------------------------------------------------------------------------------

GREETING: Final = struct.Struct(">QQH")  # magic, option magic, handshake flags
NBD_MAGIC: Final = int.from_bytes(b"NBDMAGIC")
OPTION_MAGIC: Final = int.from_bytes(b"IHAVEOPT")
CLIENT_FLAGS: Final = struct.Struct(">I")
FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2

OPTION: Final = struct.Struct(">QII")  # option magic, option, length of the data
OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, type, length of the data
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
OPTION_MAX_BYTES: Final = 64 * 1024  # names are at most 4 KiB; nothing legitimate comes near this
NAME_MAX_BYTES: Final = 4096

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERR: Final = 1 << 31  # set in every error
REP_ERR_UNSUP: Final = REP_ERR | 1
REP_ERR_POLICY: Final = REP_ERR | 2
REP_ERR_INVALID: Final = REP_ERR | 3
REP_ERR_TLS_REQD: Final = REP_ERR | 5
REP_ERR_UNKNOWN: Final = REP_ERR | 6
REP_ERR_BLOCK_SIZE_REQD: Final = REP_ERR | 8
REP_ERR_TOO_BIG: Final = REP_ERR | 9

REFUSALS: Final = {
    REP_ERR_UNSUP: "does not support it",
    REP_ERR_POLICY: "forbids it",
    REP_ERR_INVALID: "calls it invalid",
    REP_ERR_TLS_REQD: "wants TLS first; use nbds://",
    REP_ERR_UNKNOWN: "has no such export",
    REP_ERR_BLOCK_SIZE_REQD: "wants block sizes negotiated",
    REP_ERR_TOO_BIG: "calls it too big",
}

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3
EXPORT_INFO: Final = struct.Struct(">HQH")  # INFO_EXPORT, size, transmission flags
BLOCK_SIZE_INFO: Final = struct.Struct(">HIII")  # INFO_BLOCK_SIZE, minimum, preferred, maximum
OLD_EXPORT: Final = struct.Struct(">QH")  # the answer to OPT_EXPORT_NAME; 124 zeroes follow unless NO_ZEROES
NUMBER: Final = struct.Struct(">I")
SHORT: Final = struct.Struct(">H")

# --- transmission ----------------------------------------------------------------------------------------------------

HAS_FLAGS: Final = 1 << 0
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8

REQUEST: Final = struct.Struct(">IHHQQI")  # magic, command flags, command, cookie, offset, length
REQUEST_MAGIC: Final = 0x25609513

READ: Final = 0
WRITE: Final = 1
DISCONNECT: Final = 2
FLUSH: Final = 3
TRIM: Final = 4
WRITE_ZEROES: Final = 6
BLOCK_STATUS: Final = 7

FLAG_FUA: Final = 1 << 0
FLAG_NO_HOLE: Final = 1 << 1
FLAG_DF: Final = 1 << 2  # do not fragment
FLAG_REQ_ONE: Final = 1 << 3

COMMAND_NAMES: Final = {
    READ: "reading",
    WRITE: "writing",
    DISCONNECT: "disconnecting",
    FLUSH: "flushing",
    TRIM: "trimming",
    WRITE_ZEROES: "zeroing",
    BLOCK_STATUS: "asking the block status of",
}

SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, error, cookie
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length of the payload
CHUNK_MAGIC: Final = 0x668E33EF
CHUNK_DONE: Final = 1

CHUNK_NONE: Final = 0
CHUNK_DATA: Final = 1
CHUNK_HOLE: Final = 2
CHUNK_STATUS: Final = 5
CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_ERROR_BIT | 1
CHUNK_ERROR_OFFSET: Final = CHUNK_ERROR_BIT | 2

DATA_CHUNK: Final = struct.Struct(">IHHQIQ")  # CHUNK and the offset of the data that follow
HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")  # CHUNK, offset and length of the hole
ERROR_CHUNK: Final = struct.Struct(">IHHQIIH")  # CHUNK, error, length of the message that follows
OFFSET: Final = struct.Struct(">Q")
HOLE: Final = struct.Struct(">QI")
ERROR: Final = struct.Struct(">IH")

STATUS_MAX_BYTES: Final = 16 * 1024 * 1024  # nbdkit stops at a million extents, qemu at 128 thousand
ERROR_MAX_BYTES: Final = 8 * 1024
PAYLOAD_MAX_BYTES: Final = 32 * 1024 * 1024  # what a client may assume when no block size was negotiated

BASE_ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1  # base:allocation: not allocated
STATE_ZERO: Final = 2  # base:allocation: reads as zeroes
STATE_DIRTY: Final = 1  # qemu:dirty-bitmap:NAME

WIRE_ERRORS: Final = frozenset(
    {
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.EOPNOTSUPP,
        errno.ESHUTDOWN,
    }
)


class ProtocolError(Exception):
    """The other side sent what the protocol does not allow; the connection is of no further use."""


def option(number: int, data: bytes = b"") -> bytes:
    """An option as the client sends it."""
    return OPTION.pack(OPTION_MAGIC, number, len(data)) + data


def option_reply(number: int, kind: int, data: bytes = b"") -> bytes:
    """One answer to an option as the server sends it."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def counted(text: str) -> bytes:
    """A string preceded by its length in 32 bits."""
    data = text.encode()
    return NUMBER.pack(len(data)) + data


def decoded(data: bytes | bytearray) -> str:
    """A name or message from the other side: UTF-8, or the protocol is broken."""
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("a string is not UTF-8") from error
