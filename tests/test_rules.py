"""The habits of the source tree that no linter knows: sizes, homes of dangerous calls, what may be imported."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "hvbackup").rglob("*.py"))
FILE_MAX_LINES = 500
FUNCTION_MEDIAN_LINES = 8
FUNCTION_P90_LINES = 30
BANNED_NAMES = {"utils", "helpers", "common", "manager", "base"}
DURABLE_CALLS = {
    "os.fsync",
    "os.fdatasync",
    "os.sync",
    "os.rename",
    "os.replace",
    "os.link",
    "fcntl.flock",
    "fcntl.lockf",
}
GPL2_ONLY = ("qemu.qmp.legacy", "qemu.qmp.qmp_shell", "qemu.qmp.qmp_tui", "qemu.qmp.util")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_module_is_small_documented_and_aptly_named(module: Path) -> None:
    text = module.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= FILE_MAX_LINES
    assert module.stem not in BANNED_NAMES


def test_functions_are_short() -> None:
    sizes = sorted(size for module in MODULES for size in function_sizes(module))
    assert statistics.median(sizes or [0]) <= FUNCTION_MEDIAN_LINES
    assert sizes[len(sizes) * 9 // 10 :][:1] <= [FUNCTION_P90_LINES]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_files_makes_bytes_durable(module: Path) -> None:
    if module != ROOT / "hvbackup" / "files.py":
        assert not DURABLE_CALLS & set(calls(module))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_gpl2_only_parts_of_qemu_qmp_are_left_alone(module: Path) -> None:
    assert [name for name in imports(module) if name.startswith(GPL2_ONLY)] == []


def function_sizes(module: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            yield node.end_lineno - node.lineno + 1


def calls(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def imports(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
