"""What every command costs before it does anything, and how it is spoken to."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hvbackup import errors
from hvbackup.cli.parser import EPILOG, split_off_moment
from tests.cli.rig import World

HEAVY = ("numpy", "duckdb", "cryptography", "zstandard", "blake3", "qemu", "asyncio", "argon2")


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["backup", "--help"], ["key", "add", "--help"], ["completion", "bash"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\nfrom hvbackup.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as e:\n    assert not e.code, e\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120, check=True
    )
    assert ran.stderr == "LOADED []\n"
    assert ran.stdout


def test_help_lists_every_exit_code() -> None:
    codes = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.HvbackupError)}
    listed = {int(line.split()[0]) for line in EPILOG.splitlines() if line.strip()[:1].isdigit()}
    assert listed == codes | {0}


def test_each_verb_is_found_in_its_module() -> None:
    from hvbackup.cli import command
    from hvbackup.cli.parser import new_parser

    for module, names in command.VERBS.items():
        _, verbs = new_parser()
        importlib.import_module(f"hvbackup.cli.{module}").add(verbs)
        assert list(verbs.choices) == list(names)
    with_verbs = {
        p.stem for p in Path(command.__file__).parent.glob("*.py") if "\ndef add(verbs: Verbs)" in p.read_text()
    }
    assert with_verbs == set(command.VERBS)


def test_docs_list_every_exit_code_verb_and_option() -> None:
    from hvbackup.cli.command import build

    text = (Path(__file__).resolve().parents[2] / "docs/cli.md").read_text()
    parser = build()
    known = set(re.findall(r"--[a-z-]+", text)) | {"-h", "--help"}
    assert set(parser.every_option()) - known == set()
    for code in (1, 2, 3, 4, 5, 20, 130):
        assert f"| {code} |" in text


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["bakup", "x"], "did you mean backup?"),
        (["points", "--jsno"], "did you mean --json?"),
        (["restore", "web1", "--to", "x", "--format", "qcow"], "did you mean qcow2?"),
        (["key", "ad"], "did you mean add?"),
        (["backup"], "required: SOURCE"),
        ([], "required: VERB"),
        (["discard"], "--list"),
        (["map", "web1", "--listen", "nowhere"], "HOST:PORT"),
        (["boot", "web1", "--memory", "lots"], "write 512M or 2G"),
        (["init", "/a", "--store", "/b"], "name one"),
        (["backup", "qmue:/x"], "did you mean qemu?"),
    ],
)
def test_a_slip_of_the_fingers_is_answered_with_what_was_meant(world: World, words: list[str], hint: str) -> None:
    if words[:1] == ["backup"] and len(words) > 1:
        world.done("init")
    assert hint in world.refused(2, *words)


def test_options_of_every_verb_may_stand_before_it(world: World) -> None:
    world.done("--store", world.folder / "elsewhere", "init")
    assert (world.folder / "elsewhere/HVBACKUP").exists()
    assert world.done("--store", world.folder / "elsewhere", "--json", "status").json["machines"] == []


ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The hvbackup commands in a page's blocks of code; what is left open (`…`, `STORE-ID`) stays as it is."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(sudo )?hvbackup (?!\[)", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_in_the_docs_is_one(page: Path) -> None:
    from hvbackup.cli.command import build

    for line in commands(page):
        words = shlex.split(line, comments=True)
        words = words[: words.index("|")] if "|" in words else words
        words = words[: words.index(">")] if ">" in words else words
        build().parse_args(split_off_moment(words[words.index("hvbackup") + 1 :]))


def test_the_tour_is_found() -> None:
    assert len(commands(ROOT / "README.md")) >= 10
