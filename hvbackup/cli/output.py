"""Answers: text for people, JSON for programs; warnings and errors on stderr; exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hvbackup.endings import let_finish
from hvbackup.errors import HvbackupError, PartlyFailed, UsageError

PROGRAM = "hvbackup"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@dataclass(slots=True)
class Out:
    """Where the answer of one command goes."""

    json: bool = False
    quiet: bool = False
    strict: bool = False
    warned: bool = False
    answered: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Out:
        """As the options say."""
        return cls(args.json, args.quiet, args.strict)

    def answer(self, value: Any, lines: Iterable[str]) -> None:
        """The answer: `value` as one line of JSON, or `lines` as they are."""
        if self.json:
            self._answer(json.dumps(value, ensure_ascii=False))
        elif not self.quiet:
            self._print(lines)

    @let_finish  # else somebody adds a second document, that we were interrupted, to one that is out
    def _answer(self, line: str) -> None:
        self._print([line])
        self.answered = True

    def say(self, line: str) -> None:
        """Something for people only."""
        if not self.json and not self.quiet:
            self._print([line])

    def _print(self, lines: Iterable[str]) -> None:
        """An answer that finds no reader, as in `hvbackup points | head -1`, does not turn what was done into a failure."""
        if sys.stdout is None:
            return  # closed by whoever started us
        try:
            for line in lines:
                print(line)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
        except OSError as e:
            _discard_output()
            raise HvbackupError(f"Cannot write the answer: {e.strerror}") from e

    def warn(self, note: str) -> None:
        """The command does what it should, but not as planned."""
        self.warned = True
        _complain(f"warning: {note}")

    def warn_all(self, notes: Iterable[str]) -> None:
        """Several warnings."""
        for note in notes:
            self.warn(note)

    def error(self, e: HvbackupError) -> None:
        """One line on stderr."""
        _complain(f"error: {e}")

    def fail(self, e: HvbackupError) -> int:
        """The command ends with this error; returns its exit code."""
        self.error(e)
        if self.json and not self.answered:
            shape = {"kind": type(e).__name__, "message": str(e), "exit_code": e.exit_code}
            self._print([json.dumps({"error": shape}, ensure_ascii=False)])
        return e.exit_code

    def finish(self, code: int) -> int:
        """The exit code of a command that ended by itself."""
        return PartlyFailed.exit_code if code == 0 and self.strict and self.warned else code


def _complain(text: str) -> None:
    """One line on stderr, whatever is in the text; where nobody reads it, the exit code has to do."""
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {printable(' '.join(text.split()))}", file=sys.stderr, flush=True)


def _discard_output() -> None:
    """What Python still holds for stdout goes nowhere, so that it does not fail again at our end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """The text without anything that a terminal obeys: names come from guests and hosts."""
    return "".join(c if c.isprintable() else "?" for c in text)


def size(count: int | float) -> str:
    """Bytes for people: 1.5 GiB."""
    value, unit = float(count), 0
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def parse_size(text: str) -> int:
    """A size with K, M, G or T behind it; megabytes without, and nothing is 0.  Raises UsageError."""
    if not text:
        return 0
    found = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"{text} is no size; write 512M or 2G")
    return int(found[1]) << {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[found[2].upper()]


def parse_part(text: str) -> float:
    """A part of everything, written 1% or 0.5%.  Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    part = float(found[1]) / 100 if found else 0.0
    if not 0 < part <= 1:
        raise UsageError(f"{text} is no part; write 1% or 0.5%")
    return part


def duration(seconds: float) -> str:
    """A stretch of time for people, in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next(i for i, (n, _) in enumerate(parts) if n)
    return " ".join(f"{n} {unit}" for n, unit in parts[first : first + 2] if n)


def count(n: int, noun: str, several: str = "") -> str:
    """`1 disk`, `2 disks`."""
    return f"{n} {noun}" if n == 1 else f"{n} {several or noun + 's'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Columns under a head; those in `right` are aligned to the right."""
    all_ = [[printable(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in all_) for i in range(len(head))]
    aligned = set(right)

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if i in aligned else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return [line(row) for row in all_]
