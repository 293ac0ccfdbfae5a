"""The client's side of the handshake: from a connected socket to an export that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hvbackup.nbd import protocol
from hvbackup.nbd.protocol import NUMBER, SHORT, ProtocolError, counted, decoded
from hvbackup.nbd.wire import Deadline, Wire

_REPLIES_MAX = 100_000  # answers to one option: exports or contexts of a server
_EXPORTS_MAX_BYTES = 64 * 1024 * 1024
_BLOCK_MAX_BYTES = 64 * 1024  # the largest minimum block size that the protocol allows


class Refused(Exception):
    """The server answered an option with an error; the message says which and why."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a server said about one export; a block size of 0 means that it said nothing."""

    size: int = 0
    flags: int = 0
    min_block: int = 0
    preferred_block: int = 0
    max_block: int = 0
    structured: bool = False
    contexts: dict[int, str] = field(default_factory=dict)  # the server's number of each negotiated context -> its name


@dataclass(frozen=True, slots=True)
class ExportName:
    """One line of a server's list of exports."""

    name: str
    description: str = ""


class Haggler:
    """Asks one server for options, one at a time, within one time limit."""

    def __init__(self, wire: Wire, seconds: float) -> None:
        self._wire = wire
        self.switch_wire(wire, seconds)

    def switch_wire(self, wire: Wire, seconds: float) -> None:
        """Go on over this wire (after STARTTLS), with a fresh limit."""
        self._wire = wire
        self._limit = Deadline(wire, seconds)

    def greet(self) -> None:
        """The server speaks fixed newstyle, and knows that we do."""
        magic, style, flags = self._limit.unpack(protocol.GREETING)
        if magic != protocol.NBD_MAGIC:
            raise ProtocolError("this is not an NBD server")
        if style != protocol.OPTION_MAGIC or not flags & protocol.FIXED_NEWSTYLE:
            raise ProtocolError("the server is too old (no fixed newstyle handshake)")
        self._no_zeroes = bool(flags & protocol.NO_ZEROES)
        wanted = protocol.FIXED_NEWSTYLE | (protocol.NO_ZEROES if self._no_zeroes else 0)
        self._wire.send([protocol.CLIENT_FLAGS.pack(wanted)])

    def ask(self, option: int, data: bytes = b"") -> list[tuple[int, bytearray]]:
        """All answers to one option up to its ACK; Refused when the last one is an error."""
        self._wire.send([protocol.option(option, data)])
        answers: list[tuple[int, bytearray]] = []
        total = 0
        while True:
            kind, payload = self._answer(option)
            if kind == protocol.REP_ACK:
                return answers
            if kind & protocol.REP_ERR:
                raise Refused(_refusal(kind, payload))
            answers.append((kind, payload))
            total += len(payload)
            if len(answers) > _REPLIES_MAX or total > _EXPORTS_MAX_BYTES:
                raise ProtocolError("the server's answer does not end")

    def _answer(self, option: int) -> tuple[int, bytearray]:
        magic, to, kind, length = self._limit.unpack(protocol.OPTION_REPLY)
        if magic != protocol.OPTION_REPLY_MAGIC or to != option:
            raise ProtocolError("the server answered something that was not asked")
        if length > protocol.OPTION_MAX_BYTES:
            raise ProtocolError(f"the server's answer is {length} bytes long")
        return kind, self._limit.receive(length)

    def supports(self, option: int) -> bool:
        """Ask for an option that needs no answer but yes or no."""
        try:
            self.ask(option)
        except Refused:
            return False
        return True

    def start_tls(self) -> None:
        """The server is waiting for the TLS handshake."""
        self.ask(protocol.OPT_STARTTLS)

    def exports(self) -> list[ExportName]:
        """What the server offers."""
        return [_export_name(data) for kind, data in self.ask(protocol.OPT_LIST) if kind == protocol.REP_SERVER]

    def contexts(self, export: str, queries: Sequence[str], *, choose: bool) -> dict[int, str]:
        """The contexts among `queries` that the export has; with `choose` they are negotiated, else only listed."""
        option = protocol.OPT_SET_META_CONTEXT if choose else protocol.OPT_LIST_META_CONTEXT
        data = counted(export) + NUMBER.pack(len(queries)) + b"".join(map(counted, queries))
        found = [_context(payload) for kind, payload in self.ask(option, data) if kind == protocol.REP_META_CONTEXT]
        return dict(found)

    def go(self, export: str, queries: Sequence[str]) -> ExportInfo:
        """The export is open: the next byte on the wire is a command."""
        structured = self.supports(protocol.OPT_STRUCTURED_REPLY)
        contexts: dict[int, str] = {}
        if structured and queries:
            try:
                contexts = self.contexts(export, queries, choose=True)
            except Refused:
                contexts = {}  # an export without any context; whoever needs one looks at what was negotiated
        name = export.encode()
        data = NUMBER.pack(len(name)) + name + SHORT.pack(1) + SHORT.pack(protocol.INFO_BLOCK_SIZE)
        info = _export_info([payload for kind, payload in self.ask(protocol.OPT_GO, data) if kind == protocol.REP_INFO])
        return replace(info, structured=structured, contexts=contexts)

    def abort(self) -> None:
        """Say goodbye in the middle of the handshake; the answer is of no interest."""
        self._wire.send([protocol.option(protocol.OPT_ABORT)])


def _refusal(kind: int, payload: bytearray) -> str:
    reason = protocol.REFUSALS.get(kind, f"refuses it with error {kind & ~protocol.REP_ERR}")
    detail = payload[:400].decode(errors="replace").strip()
    return f"the server {reason}" + (f" ({detail})" if detail else "")


def _export_name(data: bytearray) -> ExportName:
    length = _number(data)
    if len(data) < 4 + length:
        raise ProtocolError("an export's name is cut short")
    return ExportName(decoded(data[4 : 4 + length]), decoded(data[4 + length :]))


def _context(data: bytearray) -> tuple[int, str]:
    return _number(data), decoded(data[4:])


def _number(data: bytearray) -> int:
    if len(data) < NUMBER.size:
        raise ProtocolError("an answer is cut short")
    number: int = NUMBER.unpack_from(data)[0]
    return number


def _export_info(answers: Sequence[bytearray]) -> ExportInfo:
    info: ExportInfo | None = None
    blocks = (0, 0, 0)
    for data in answers:
        kind = SHORT.unpack_from(data)[0] if len(data) >= SHORT.size else -1
        if kind == protocol.INFO_EXPORT and len(data) == protocol.EXPORT_INFO.size:
            _, size, flags = protocol.EXPORT_INFO.unpack(data)
            info = ExportInfo(size=size, flags=flags)
        elif kind == protocol.INFO_BLOCK_SIZE and len(data) == protocol.BLOCK_SIZE_INFO.size:
            blocks = protocol.BLOCK_SIZE_INFO.unpack(data)[1:]
    if info is None or not info.flags & protocol.HAS_FLAGS:
        raise ProtocolError("the server opened the export without telling its size")
    if info.size >= 1 << 63:
        raise ProtocolError(f"an export of {info.size} bytes is not possible")
    minimum, preferred, maximum = blocks
    if minimum and (minimum & (minimum - 1) or minimum > _BLOCK_MAX_BYTES or maximum < minimum):
        raise ProtocolError(f"block sizes {minimum}, {preferred} and {maximum} are not possible")
    return replace(info, min_block=minimum, preferred_block=preferred, max_block=maximum)
