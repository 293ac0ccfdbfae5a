"""Completions and manual pages, as the shells and man(1) see them; progress and figures, as people see them."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest

from hvbackup.cli.output import Out, duration, size, table
from hvbackup.cli.progress import Progress
from tests.cli.rig import World


def completed(folder: Path, text: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    (folder / "completion").write_text(text)
    line = " ".join(f"'{w}'" for w in ("hvbackup", *words))
    program = (
        f'. {folder}/completion; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _hvbackup; echo "${{COMPREPLY[@]}}"'
    )
    ran = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stderr == ""
    return ran.stdout.split()


def test_bash_completes_verbs_actions_options_and_values(world: World) -> None:
    text = world.done("completion", "bash").out
    assert {"backup", "restore", "--store"} <= set(completed(world.folder, text, ""))
    assert completed(world.folder, text, "key", "a") == ["add"]
    assert completed(world.folder, text, "--store", "/x", "key", "add", "--new-k") == ["--new-key-file"]
    assert completed(world.folder, text, "restore", "web1", "--format", "") == ["raw", "qcow2"]
    assert completed(world.folder, text, "completion", "")[-3:] == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_can_read_its_completions(world: World, shell: str) -> None:
    text = world.done("completion", shell).out
    for word in ("backup", "discard", "new-key-file", "application"):
        assert word in text
    if shutil.which(shell):
        (world.folder / "completion").write_text(text)
        subprocess.run([shell, "-n", world.folder / "completion"], timeout=120, check=True)


def test_every_verb_has_a_manual_page_that_man_accepts(world: World) -> None:
    pages = [Path(p) for p in world.done("man", "--to", world.folder / "man", "--json").json["pages"]]
    assert {p.name for p in pages} >= {"hvbackup.1", "hvbackup-backup.1", "hvbackup-key-add.1"}
    for page in pages:
        text = page.read_text()
        assert text.startswith(".TH")
        assert "130" in text, "every page lists the exit codes"
        if shutil.which("groff"):
            ran = subprocess.run(
                ["groff", "-man", "-ww", "-Tutf8", page], capture_output=True, text=True, timeout=120, check=True
            )
            assert ran.stderr == "", page
            assert len(ran.stdout) > 500


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1024**2 - 1, "1.0 MiB"), (5 * 1024**3 // 2, "2.5 GiB")],
)
def test_sizes_for_people(n: int, text: str) -> None:
    assert size(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59, "59 s"), (61, "1 min 1 s"), (7200, "2 h"), (90061, "1 d 1 h")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_table_aligns_its_columns() -> None:
    assert table(("A", "N"), [("x", "1"), ("yy", "10")], (1,)) == ["A    N", "x    1", "yy  10"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(stream: io.StringIO, out: Out | None = None, *, step: float = 1.0) -> str:
    """What is written while ten steps of a disk are done."""
    clock = Clock()
    with Progress(out or Out(), stream, clock) as progress:
        for n in range(11):
            progress("web1 vda", n << 20, 10 << 20)
            clock.now += step
    return stream.getvalue()


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end() -> None:
    text = shown(Terminal())
    assert "web1 vda:  50 %, 5.0 MiB of 10.0 MiB, 1.0 MiB/s, 5.0 s left" in text
    assert "[####" in text
    assert text.endswith("\r\x1b[K")
    assert "\n" not in text


def test_elsewhere_there_is_a_line_now_and_then() -> None:
    lines = shown(io.StringIO(), step=5.0).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("hvbackup: web1 vda:  20 %, ")
    assert shown(io.StringIO(), step=0.5) == "", "a short job says nothing"


@pytest.mark.parametrize("out", [Out(json=True), Out(quiet=True)])
def test_programs_and_the_quiet_get_nothing(out: Out) -> None:
    assert shown(Terminal(), out) == ""
