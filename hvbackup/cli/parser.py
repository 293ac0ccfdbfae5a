"""The parser: options that every verb has, and unknown words answered with their nearest neighbour.

Errors of the parser are UsageErrors like any other: one line, exit code 2, with `--json` an object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from hvbackup import __version__
from hvbackup.errors import UsageError

PROGRAM = "hvbackup"
DESCRIPTION = "Continuous backup of virtual machines, and any moment of them back."

EPILOG = """\
exit codes:
  0    done; a capture that had to be made otherwise than planned is done, with a warning
  1    failed
  2    what was asked for makes no sense or does not exist; nothing was touched
  3    partly done; with --strict also: done, with a warning
  4    a hypervisor, disk server or host does not answer
  5    busy: somebody else holds the store, the machine or the disk
  20   the store is damaged
  130  interrupted; nothing that was committed is lost

environment:
  HVBACKUP_STORE, HVBACKUP_STATE, HVBACKUP_CONFIG, HVBACKUP_RUN    where things are
  HVBACKUP_KEY_FILE, HVBACKUP_PASSPHRASE_FILE                      what opens the store
"""

VALUED = ("--store", "--key-file", "--passphrase-file")  # options before a verb that take the next word

Verbs = Any  # argparse's own class for this is private


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, and knows what was probably meant."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """One line that says what is wrong and where to read on."""
        line = message[:1].upper() + message[1:]
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized") and unknown:
            line = f"Unknown: {' '.join(unknown)}{nearest(unknown[0], self.every_option())}"
        raise UsageError(f"{line}; see {self.prog} --help")

    def every_option(self) -> list[str]:
        """All options of this parser and of its verbs."""
        found = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action.choices, dict):
                found += [o for v in action.choices.values() if isinstance(v, Parser) for o in v.every_option()]
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(c) for c in action.choices]
            what = (action.metavar or action.dest).lower() if isinstance(action.metavar, str | None) else action.dest
            raise UsageError(
                f"Unknown {what} {value}{nearest(str(value), known)}; there are {', '.join(known)}; see {self.prog} --help"
            )


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what was probably meant, or nothing."""
    import difflib  # only a slip of the fingers needs it

    near = difflib.get_close_matches(word, sorted(set(known)), 1, 0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def new_parser() -> tuple[Parser, Verbs]:
    """The parser of the program without any verb, and what verbs are added to."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"hvbackup {__version__}")
    add_shared(parser, first=True)
    return parser, parser.add_subparsers(metavar="VERB", dest="verb", required=True, parser_class=Parser)


def add_shared(parser: argparse.ArgumentParser, *, first: bool = False) -> None:
    """The options that every verb has; they may also stand before the verb, where their defaults are set."""

    def option(name: str, default: object, text: str, **more: Any) -> None:
        group.add_argument(name, default=default if first else argparse.SUPPRESS, help=text, **more)

    group = parser.add_argument_group("options of every verb")
    option("--store", "", "the store (default: HVBACKUP_STORE, or the system's place)", metavar="DIR")
    option("--key-file", None, "a key that opens the store", metavar="FILE")
    option("--passphrase-file", None, "a file with the passphrase that opens the store", metavar="FILE")
    option("--json", False, "one JSON object for each answer; sizes in bytes, times in UTC", action="store_true")
    option("--quiet", False, "no progress, and no answer but errors and warnings", action="store_true")
    option("--strict", False, "done with a warning is exit code 3", action="store_true")


def add_verb(verbs: Verbs, name: str, help_: str, description: str = "", epilog: str = "") -> argparse.ArgumentParser:
    """A verb with the options that all have."""
    text = description or help_[:1].upper() + help_[1:] + "."
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=help_, description=text, epilog=epilog)
    add_shared(verb)
    return verb


def verb_in(words: Sequence[str]) -> str:
    """The verb among the words of a command, or nothing: the first that is neither an option nor what belongs to one."""
    before = ""
    for word in words:
        if not word.startswith("-") and before not in VALUED:
            return word
        before = word
    return ""


def split_off_moment(words: Sequence[str]) -> list[str]:
    """`--at -10m` as `--at=-10m`: argparse would take the moment for an option."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == "--at" and word.startswith("-"):
            found[-1] = f"--at={word}"
        else:
            found.append(word)
    return found


def interactive() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin is not None and sys.stdin.isatty()
