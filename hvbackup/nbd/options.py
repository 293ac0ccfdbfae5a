"""The server's side of the handshake: answers options until the client opens an export or leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hvbackup.nbd import protocol
from hvbackup.nbd.export import Export
from hvbackup.nbd.protocol import NUMBER, SHORT, ProtocolError, counted, decoded, option_reply
from hvbackup.nbd.wire import Deadline, Wire

_OPTIONS_MAX = 1000  # by one client; nobody needs more than one for each export and context
_INFO_TAIL_BYTES = 124  # zeroes behind the old answer to OPT_EXPORT_NAME


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a client opened, and how it wants to talk."""

    name: str
    export: Export
    structured: bool
    contexts: Mapping[int, str]  # number on the wire -> name


class OptionError(Exception):
    """One option is refused; the handshake goes on."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def find_export(exports: Mapping[str, Export], name: str) -> tuple[str, Export]:
    """The export of that name, with its name; the empty name means the only one there is."""
    if name in exports:
        return name, exports[name]
    if not name and len(exports) == 1:
        return next(iter(exports.items()))
    raise OptionError(protocol.REP_ERR_UNKNOWN, f"No export named {name!r}")


def transmission_flags(export: Export, *, structured: bool) -> int:
    """What the client may do with the export."""
    flags = protocol.HAS_FLAGS
    if structured:
        flags |= protocol.SEND_DF
    if export.multi_conn:
        flags |= protocol.CAN_MULTI_CONN
    if export.read_only:
        return flags | protocol.READ_ONLY
    return flags | protocol.SEND_FLUSH | protocol.SEND_FUA | protocol.SEND_TRIM | protocol.SEND_WRITE_ZEROES


class Handshake:
    """One client's handshake, bounded in time and in the number of options."""

    def __init__(self, wire: Wire, exports: Mapping[str, Export], seconds: float) -> None:
        self._wire = wire
        self._exports = exports
        self._limit = Deadline(wire, seconds)
        self._structured = False
        self._contexts: tuple[Export | None, dict[int, str]] = (None, {})
        self._answers: dict[int, Callable[[int, bytes], None]] = {
            protocol.OPT_LIST: self._list,
            protocol.OPT_INFO: self._info,
            protocol.OPT_STRUCTURED_REPLY: self._structured_reply,
            protocol.OPT_LIST_META_CONTEXT: self._meta_context,
            protocol.OPT_SET_META_CONTEXT: self._meta_context,
            protocol.OPT_STARTTLS: self._start_tls,
        }

    def run(self) -> Chosen | None:
        """What the client opened, or None when it said goodbye."""
        style = protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES
        self._wire.send([protocol.GREETING.pack(protocol.NBD_MAGIC, protocol.OPTION_MAGIC, style)])
        (flags,) = self._limit.unpack(protocol.CLIENT_FLAGS)
        if flags & ~style:
            raise ProtocolError(f"unknown client flags {flags:#x}")
        for _ in range(_OPTIONS_MAX):
            option, data = self._next_option()
            if option == protocol.OPT_ABORT:
                self._reply(option, protocol.REP_ACK)
                return None
            if option == protocol.OPT_EXPORT_NAME:
                return self._export_name(data, no_zeroes=bool(flags & protocol.NO_ZEROES))
            chosen = self._answer(option, data)
            if chosen is not None:
                return chosen
        raise ProtocolError("too many options")

    def _next_option(self) -> tuple[int, bytes]:
        magic, option, length = self._limit.unpack(protocol.OPTION)
        if magic != protocol.OPTION_MAGIC:
            raise ProtocolError("not an NBD client")
        if length > protocol.OPTION_MAX_BYTES:
            raise ProtocolError(f"an option of {length} bytes")
        return option, bytes(self._limit.receive(length))

    def _answer(self, option: int, data: bytes) -> Chosen | None:
        try:
            if option == protocol.OPT_GO:
                return self._go(data)
            answer = self._answers.get(option)
            if answer is None:
                raise OptionError(protocol.REP_ERR_UNSUP, "Unknown option")
            answer(option, data)
        except OptionError as error:
            self._reply(option, error.kind, str(error).encode())
        return None

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._wire.send([option_reply(option, kind, data)])

    def _go(self, data: bytes) -> Chosen:
        self._info(protocol.OPT_GO, data)
        name = _parse_info(data)[0]
        return self._chosen(*find_export(self._exports, name))

    def _chosen(self, name: str, export: Export) -> Chosen:
        # Contexts count only for the export that they were negotiated for.
        contexts = self._contexts[1] if self._contexts[0] is export else {}
        return Chosen(name, export, self._structured, contexts)

    def _export_name(self, data: bytes, *, no_zeroes: bool) -> Chosen:
        """The option without an answer: an unknown name can only be refused by closing."""
        try:
            name, export = find_export(self._exports, decoded(data))
        except OptionError as error:
            raise ProtocolError(str(error)) from error
        flags = transmission_flags(export, structured=self._structured)
        self._wire.send([protocol.OLD_EXPORT.pack(export.size, flags) + bytes(0 if no_zeroes else _INFO_TAIL_BYTES)])
        return self._chosen(name, export)

    def _list(self, option: int, data: bytes) -> None:
        if data:
            raise OptionError(protocol.REP_ERR_INVALID, "This option has no data")
        for name, export in list(self._exports.items()):
            self._reply(option, protocol.REP_SERVER, counted(name) + export.description.encode())
        self._reply(option, protocol.REP_ACK)

    def _info(self, option: int, data: bytes) -> None:
        name, wanted = _parse_info(data)
        name, export = find_export(self._exports, name)
        flags = transmission_flags(export, structured=self._structured)
        infos = [
            protocol.EXPORT_INFO.pack(protocol.INFO_EXPORT, export.size, flags),
            protocol.BLOCK_SIZE_INFO.pack(
                protocol.INFO_BLOCK_SIZE, export.min_block, export.preferred_block, protocol.PAYLOAD_MAX_BYTES
            ),
        ]
        if protocol.INFO_NAME in wanted:
            infos.append(SHORT.pack(protocol.INFO_NAME) + name.encode())
        if protocol.INFO_DESCRIPTION in wanted and export.description:
            infos.append(SHORT.pack(protocol.INFO_DESCRIPTION) + export.description.encode())
        for info in infos:
            self._reply(option, protocol.REP_INFO, info)
        self._reply(option, protocol.REP_ACK)

    def _structured_reply(self, option: int, data: bytes) -> None:
        if data:
            raise OptionError(protocol.REP_ERR_INVALID, "This option has no data")
        self._structured = True
        self._reply(option, protocol.REP_ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        name, queries = _parse_contexts(data)
        choose = option == protocol.OPT_SET_META_CONTEXT
        if choose:
            self._contexts = (None, {})
            if not self._structured:
                raise OptionError(protocol.REP_ERR_INVALID, "Structured replies come first")
        _, export = find_export(self._exports, name)
        offered = enumerate(export.contexts, 1)
        found = {number: context for number, context in offered if _asked(context, queries, choose=choose)}
        for number, context in found.items():
            self._reply(option, protocol.REP_META_CONTEXT, NUMBER.pack(number if choose else 0) + context.encode())
        self._reply(option, protocol.REP_ACK)
        if choose:
            self._contexts = (export, found)

    def _start_tls(self, option: int, data: bytes) -> None:
        if data:
            raise OptionError(protocol.REP_ERR_INVALID, "This option has no data")
        raise OptionError(protocol.REP_ERR_POLICY, "TLS is not offered here; use a unix socket, or a tunnel")


def _asked(context: str, queries: Sequence[str], *, choose: bool) -> bool:
    """Whether a query names this context; when only listing, a namespace ("qemu:") or nothing at all asks for more."""
    if choose:
        return context in queries
    return not queries or any(context == q or (q.endswith(":") and context.startswith(q)) for q in queries)


class _Fields:
    """Takes one field after the other from an option's data; what is missing makes the option invalid."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def take(self, length: int) -> bytes:
        if length > len(self._data):
            raise OptionError(protocol.REP_ERR_INVALID, "The option is cut short")
        taken, self._data = self._data[:length], self._data[length:]
        return taken

    def number(self) -> int:
        return int.from_bytes(self.take(4))

    def short(self) -> int:
        return int.from_bytes(self.take(2))

    def string(self) -> str:
        try:
            return self.take(self.number()).decode()
        except UnicodeDecodeError as error:
            raise OptionError(protocol.REP_ERR_INVALID, "A string is not UTF-8") from error

    def end(self) -> None:
        if self._data:
            raise OptionError(protocol.REP_ERR_INVALID, "The option is too long")


def _parse_info(data: bytes) -> tuple[str, list[int]]:
    fields = _Fields(data)
    name = fields.string()
    wanted = [fields.short() for _ in range(fields.short())]
    fields.end()
    return name, wanted


def _parse_contexts(data: bytes) -> tuple[str, list[str]]:
    fields = _Fields(data)
    name = fields.string()
    queries = [fields.string() for _ in range(fields.number())]
    fields.end()
    return name, queries
