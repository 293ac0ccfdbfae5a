"""How a QEMU command line is written: options, and the two spellings of their fields.  Pure; knows no meanings.

    -drive file=disk.qcow2,if=virtio            fields: key=value, a comma in a value is written twice
    -blockdev {"driver": "qcow2", "file": "f"}  the same as JSON, nested

Both become one flat list of fields with dotted names (`file.filename`), and go back to the spelling they came in:
QEMU is strict about types in JSON and about strings in the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Options without a value; every other option takes the next word.
_ALONE = frozenset(
    (
        *(
            "h",
            "help",
            "version",
            "S",
            "s",
            "usb",
            "snapshot",
            "nographic",
            "daemonize",
            "nodefaults",
            "no-user-config",
        ),
        *("no-reboot", "no-shutdown", "no-acpi", "no-hpet", "no-fd-bootchk", "enable-kvm", "mem-prealloc", "preconfig"),
        *("only-migratable", "full-screen", "portrait", "singlestep", "one-insn-per-tb", "win2k-hack", "audio-help"),
        *("xen-attach", "xen-domid-restrict", "enable-sync-profile", "semihosting", "old-param", "async-teardown"),
        *("alt-grab", "ctrl-grab", "no-quit", "no-frame", "curses", "sdl", "rtc-td-hack", "short-no-acpi"),
    )
)


@dataclass(frozen=True, slots=True)
class Option:
    """One option; `name` without dashes and empty for a bare word, which is a disk image."""

    name: str
    value: str | None = None


def parse(words: Sequence[str]) -> list[Option]:
    """The options of a command line, without the program."""
    rest = iter(words)
    return [_option(word, rest) for word in rest]


def _option(word: str, rest: Iterator[str]) -> Option:
    if not word.startswith("-") or word == "-":
        return Option("", word)
    name = word.removeprefix("-").removeprefix("-")
    return Option(name, None if name in _ALONE else next(rest, ""))


def render(options: Iterable[Option]) -> list[str]:
    """The words of a command line."""
    words: list[str] = []
    for option in options:
        words += [f"-{option.name}"] if option.name else []
        words += [option.value] if option.value is not None else []
    return words


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one option, in order, under flat dotted names."""

    pairs: tuple[tuple[str, Any], ...]
    is_json: bool = False

    @classmethod
    def parse(cls, text: str, implied: str = "") -> Fields:
        """From an option's value; `implied` is what a first word without a key means."""
        if text.lstrip().startswith("{"):
            return cls(tuple(_flat(json.loads(text))), is_json=True)
        return cls(tuple(_pairs(text, implied)))

    @classmethod
    def of(cls, *pairs: tuple[str, str]) -> Fields:
        """Fields in the key=value spelling."""
        return cls(pairs)

    def get(self, key: str) -> str:
        """The last value given for a key, as text; empty when there is none."""
        found = [value for name, value in self.pairs if name == key]
        return _text(found[-1]) if found else ""

    def is_on(self, key: str) -> bool:
        """Whether a switch is on."""
        return self.get(key) in ("on", "yes", "true", "y")

    def strings(self) -> Iterator[tuple[str, str]]:
        """Every field that is text, with its key."""
        yield from ((key, value) for key, value in self.pairs if isinstance(value, str))

    def put(self, key: str, value: Any) -> Fields:
        """With this field, where it was or at the end."""
        if any(name == key for name, _ in self.pairs):
            return Fields(tuple((name, value if name == key else old) for name, old in self.pairs), self.is_json)
        return Fields((*self.pairs, (key, value)), self.is_json)

    def only(self, *keys: str) -> Fields:
        """Nothing but these fields."""
        return self.filtered(lambda name: name in keys)

    def without(self, *keys: str) -> Fields:
        """Without these fields and everything below them."""
        return self.filtered(lambda name: not any(name == key or name.startswith(f"{key}.") for key in keys))

    def filtered(self, wanted: Callable[[str], bool]) -> Fields:
        """The fields whose names are wanted."""
        return Fields(tuple(pair for pair in self.pairs if wanted(pair[0])), self.is_json)

    def render(self) -> str:
        """The option's value, in the spelling it came in."""
        if self.is_json:
            return json.dumps(_nested(self.pairs))
        return ",".join(f"{key}={quote(_text(value))}" if key else quote(_text(value)) for key, value in self.pairs)


def quote(value: str) -> str:
    """A value as it is written among key=value fields."""
    return value.replace(",", ",,")


def json_option(name: str, value: Mapping[str, Any]) -> Option:
    """An option whose value is JSON."""
    return Option(name, json.dumps(value))


def _pairs(text: str, implied: str) -> Iterator[tuple[str, Any]]:
    for at, part in enumerate(_split(text)):
        key, equals, value = part.partition("=")
        if equals:
            yield key, value
        elif at == 0 and implied:
            yield implied, part
        else:
            yield part, "on"  # a switch


def _split(text: str) -> list[str]:
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    return [part for part in parts if part]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{index}")
    elif name:
        yield name, value


def _nested(pairs: Iterable[tuple[str, Any]]) -> Any:
    tree: dict[str, Any] = {}
    for name, value in pairs:
        *path, last = name.split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return _lists(tree)


def _lists(tree: Any) -> Any:
    """Objects whose keys are 0, 1, 2 … were lists."""
    if not isinstance(tree, dict):
        return tree
    inner = {key: _lists(value) for key, value in tree.items()}
    return list(inner.values()) if inner and list(inner) == [str(n) for n in range(len(inner))] else inner


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
