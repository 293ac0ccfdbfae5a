"""completion, man: made out of the parser, so that they can't be wrong."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvbackup import __version__
from hvbackup.cli.output import Out
from hvbackup.cli.parser import DESCRIPTION, EPILOG, PROGRAM, Parser, Verbs, add_verb

SHELLS = ("bash", "zsh", "fish")


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    verb = add_verb(
        verbs,
        "completion",
        "print completions for a shell",
        "Print completions for a shell.",
        f"""\
where they go:
  bash   {PROGRAM} completion bash > /etc/bash_completion.d/{PROGRAM}
  zsh    {PROGRAM} completion zsh > "${{fpath[1]}}/_{PROGRAM}"
  fish   {PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish
""",
    )
    verb.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    verb.set_defaults(run=completion)
    verb = add_verb(verbs, "man", "write the manual pages to a folder")
    verb.add_argument("--to", required=True, metavar="FOLDER", help="such as /usr/local/share/man/man1")
    verb.set_defaults(run=man)


@dataclass(frozen=True, slots=True)
class Page:
    """One verb (or the program itself, or an action of a verb) as the parser has it."""

    words: tuple[str, ...]  # ("key", "add"); () is the program
    help: str
    parser: Parser

    @property
    def options(self) -> list[argparse.Action]:
        """Everything that begins with a dash."""
        return [a for a in self.parser._actions if a.option_strings and a.help != argparse.SUPPRESS]

    @property
    def places(self) -> list[argparse.Action]:
        """Everything else."""
        return [a for a in self.parser._actions if not a.option_strings]

    @property
    def verbs(self) -> list[Page]:
        """What may come next."""
        found = []
        for action in self.places:
            if isinstance(action, argparse._SubParsersAction):
                texts = {str(c.metavar or c.dest): str(c.help) for c in action._get_subactions()}
                found += [Page((*self.words, name), texts[name], parser) for name, parser in action.choices.items()]
        return found

    def all(self) -> Iterator[Page]:
        """This page and everything below."""
        yield self
        for verb in self.verbs:
            yield from verb.all()


def _program(args: argparse.Namespace) -> Page:
    """The whole program; the parser of every verb comes with the words it parsed."""
    parser: Parser = args.build()
    return Page((), DESCRIPTION, parser)


def _takes_value(option: argparse.Action) -> bool:
    return option.nargs != 0


def _values(option: argparse.Action) -> list[str]:
    return [str(c) for c in option.choices] if option.choices and not isinstance(option.choices, dict) else []


# -- completion ------------------------------------------------------------------------------------------------------------


def completion(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup completion SHELL`."""
    text = {"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](_program(args))
    out.answer({"shell": args.shell, "completion": text}, [text])
    return 0


def _bash(program: Page) -> str:
    """A function that looks at the verb on the line, and offers its options, the values of one, or files."""
    cases, values = [], {}
    for page in program.all():
        words = [name for option in page.options for name in option.option_strings]
        words += [verb.words[-1] for verb in page.verbs] + [v for place in page.places for v in _values(place)]
        cases.append(f'        "{" ".join(page.words)}") words="{" ".join(words)}" ;;')
        values.update({o.option_strings[-1]: _values(o) for o in page.options if _values(o)})
    known = "|".join(f'"{" ".join(p.words)}"' for p in program.all() if p.words)
    chosen = "\n".join(f'        {option}) words="{" ".join(v)}" ;;' for option, v in values.items())
    return f"""\
# bash completion of {PROGRAM} {__version__}; made by `{PROGRAM} completion bash`
_{PROGRAM}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" path="" word words=""
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "${{path:+$path }}$word" in
        {known}) path="${{path:+$path }}$word" ;;
        esac
    done
    case "$previous" in
{chosen}
        *) case "$path" in
{chr(10).join("    " + c for c in cases)}
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _{PROGRAM} {PROGRAM}"""


def _zsh(program: Page) -> str:
    """One `_arguments` for each verb."""
    lines = [f"#compdef {PROGRAM}", f"# made by `{PROGRAM} completion zsh`, {__version__}", ""]
    for page in program.all():
        lines += [f"{_function(page)}() {{", *_zsh_body(page), "}", ""]
    return "\n".join([*lines, f'_{PROGRAM} "$@"'])


def _function(page: Page) -> str:
    return "_" + "_".join((PROGRAM, *page.words))


def _zsh_body(page: Page) -> Iterator[str]:
    specs = [spec for option in page.options for spec in _zsh_option(option)]
    if page.verbs:
        yield "    local line state"
        yield "    _arguments -C \\"
        yield from (f"        {spec} \\" for spec in specs)
        yield "        '1: :->verb' '*:: :->rest'"
        yield "    case $state in"
        names = " ".join(_quoted(f"{v.words[-1]}:{v.help}") for v in page.verbs)
        yield f"    verb) local -a verbs=({names}); _describe verb verbs ;;"
        yield "    rest) case $line[1] in"
        yield from (f"        {v.words[-1]}) {_function(v)} ;;" for v in page.verbs)
        yield "        esac ;;"
        yield "    esac"
        return
    yield "    _arguments \\"
    yield from (f"        {spec} \\" for spec in specs)
    yield f"        {_quoted('*: :' + _zsh_place(page))}"


def _zsh_place(page: Page) -> str:
    values = [v for place in page.places for v in _values(place)]
    return f"({' '.join(values)})" if values else "_files"


def _zsh_option(option: argparse.Action) -> Iterator[str]:
    text = (option.help or "").replace("[", "(").replace("]", ")").replace(":", ";")
    values = _values(option)
    what = f"({' '.join(values)})" if values else "_files"
    value = f":{option.metavar or option.dest}:{what}" if _takes_value(option) else ""
    many = "*" if isinstance(option, argparse._AppendAction) else ""
    for name in option.option_strings:
        yield _quoted(f"{many}{name}{'=' if value and name.startswith('--') else ''}[{text}]{value}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish(program: Page) -> str:
    """One `complete` for each word there is."""
    lines = [f"# fish completion of {PROGRAM} {__version__}; made by `{PROGRAM} completion fish`"]
    for page in program.all():
        when = _fish_condition(page)
        for verb in page.verbs:
            lines.append(f"complete -c {PROGRAM} -f {when} -a {verb.words[-1]} -d {_fish_quoted(verb.help)}")
        for place in page.places:
            if _values(place):
                lines.append(f"complete -c {PROGRAM} -f {when} -a {_fish_quoted(' '.join(_values(place)))}")
        lines += [f"complete -c {PROGRAM} {when} {_fish_option(option)}" for option in page.options]
    return "\n".join(lines)


def _fish_condition(page: Page) -> str:
    if not page.words:
        return "-n __fish_use_subcommand"
    seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in page.words)
    further = f"; and not __fish_seen_subcommand_from {' '.join(v.words[-1] for v in page.verbs)}" if page.verbs else ""
    return f"-n {_fish_quoted(seen + further)}"


def _fish_option(option: argparse.Action) -> str:
    names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.option_strings)
    values = (
        f" -x -a {_fish_quoted(' '.join(_values(option)))}"
        if _values(option)
        else " -r"
        if _takes_value(option)
        else ""
    )
    return f"{names}{values} -d {_fish_quoted(option.help or '')}"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# -- manual pages ----------------------------------------------------------------------------------------------------------


def man(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup man --to FOLDER`."""
    folder = Path(args.to)
    folder.mkdir(parents=True, exist_ok=True)
    program = _program(args)
    written = []
    for page in program.all():
        path = folder / f"{_page_name(page)}.1"
        path.write_text(_roff(page, program))
        written.append(str(path))
    out.answer({"pages": written}, [f"{len(written)} manual pages written to {folder}"])
    return 0


def _page_name(page: Page) -> str:
    return "-".join((PROGRAM, *page.words))


def _roff(page: Page, program: Page) -> str:
    """One page.  What the parser calls a section of its epilog (a line that ends in a colon) is one here."""
    name = _page_name(page)
    summary = page.help.rstrip(".")
    lines = [
        f'.TH "{name.upper()}" "1" "" "{PROGRAM} {__version__}" "{PROGRAM}"',
        ".SH NAME",
        f"{_esc(name)} \\- {_esc(summary)}",
    ]
    lines += [".SH SYNOPSIS", f".B {_esc(' '.join((PROGRAM, *page.words)))}", *_synopsis(page)]
    lines += [".SH DESCRIPTION", *map(_esc, (page.parser.description or summary).splitlines())]
    if page.verbs:
        lines += [".SH VERBS" if not page.words else ".SH ACTIONS"]
        for verb in page.verbs:
            lines += [".TP", f".B {_esc(verb.words[-1])}", _esc(verb.help)]
    lines += [".SH ARGUMENTS"] if page.places and not page.verbs else []
    for place in page.places if not page.verbs else ():
        lines += [".TP", f".I {_esc(str(place.metavar or place.dest))}", _esc(place.help or "")]
    lines += [".SH OPTIONS"]
    for option in page.options:
        lines += [".TP", f".B {_esc(', '.join(option.option_strings))}{_value_name(option)}", _esc(_help_of(option))]
    lines += _sections(page.parser.epilog or "")
    lines += _sections(EPILOG) if page.words else []
    return "\n".join([*lines, ".SH SEE ALSO", *_see_also(page, program)]) + "\n"


def _synopsis(page: Page) -> list[str]:
    words = ["[\\fIOPTION\\fR]..."]
    for place in page.places:
        name = f"\\fI{_esc(str(place.metavar or place.dest))}\\fR"
        words.append({"?": f"[{name}]", "+": f"{name}...", "*": f"[{name}...]"}.get(str(place.nargs), name))
    return [" ".join(words)]


def _value_name(option: argparse.Action) -> str:
    if not _takes_value(option):
        return ""
    return f" \\fI{_esc(str(option.metavar or '|'.join(_values(option)) or option.dest.upper()))}\\fR"


def _help_of(option: argparse.Action) -> str:
    return (option.help or "").replace("%%", "%") or "-"


def _sections(text: str) -> list[str]:
    """Blocks of an epilog: a title, and indented lines that are kept as they are."""
    lines: list[str] = []
    for block in filter(None, text.strip().split("\n\n")):
        head, _, body = block.partition("\n")
        lines += [f".SH {_esc(head.rstrip(':').upper())}"] if head.endswith(":") else [_esc(head)]
        lines += [".nf", *map(_esc, body.splitlines()), ".fi"] if body else []
    return lines


def _see_also(page: Page, program: Page) -> list[str]:
    names = [_page_name(other) for other in program.all() if other.words[:-1] == page.words[:-1] and other != page]
    names = [_page_name(v) for v in program.verbs] if not page.words else [PROGRAM, *[n for n in names if n != PROGRAM]]
    return [", ".join(f"\\fB{_esc(name)}\\fR(1)" for name in dict.fromkeys(names))]


def _esc(text: str) -> str:
    ascii_ = text.replace("\\", "\\e").replace("-", "\\-")
    safe = "".join(c if ord(c) < 128 else f"\\[u{ord(c):04X}]" for c in ascii_)
    return f"\\&{safe}" if safe[:1] in (".", "'") else safe
