#!/usr/bin/env python3
"""Coverage-guided fuzzing of every parser of bytes that others wrote: files of a store, lists of people, NBD in both directions.

    .venv/bin/python labs/fuzz.py [--seconds N] [TARGET ...]     all targets share the time, 10 minutes unless told otherwise
    .venv/bin/python labs/fuzz.py --replay FILE TARGET           one finding again

Atheris (libFuzzer for Python) is fetched into `.lab/fuzz` the first time; nothing else needs it.  What the fuzzer learnt is kept
in `.lab/fuzz/corpus`, so that each run begins where the last one ended; findings are kept in `.lab/fuzz/findings`.
The targets, and what counts as a finding, are in `fuzz_targets.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: `labs` is in the folder above
    sys.path.insert(0, str(ROOT))

HOME = ROOT / ".lab" / "fuzz"
ATHERIS = "atheris==3.0.0"
SECONDS = 600
ONE_SECONDS = 20  # for a single input: longer is a hang
MEMORY_MIB = 1024
LENGTH_MAX_BYTES = 16384


@dataclass(frozen=True, slots=True)
class Result:
    """How one target fared."""

    target: str
    runs: int
    seconds: float
    edges: int
    finding: str = ""


def install() -> None:
    """Atheris is in `.lab/fuzz/packages` when this returns."""
    packages = HOME / "packages"
    if not packages.is_dir():
        print(f"Fetching {ATHERIS} into {packages}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), ATHERIS]
        if subprocess.run(command, check=False, timeout=600).returncode:
            sys.exit(f"{ATHERIS} can't be installed here; it needs Linux, a network, and a Python it has a wheel for")


def fuzz_all(names: Sequence[str], seconds: int) -> list[Result]:
    """Every target for its share of the time, one after the other."""
    results = []
    for name in names:
        results.append(fuzz(name, max(1, seconds // len(names))))
        r = results[-1]
        print(
            f"{r.target:<12} {r.runs:>9,} inputs in {r.seconds:4.0f} s, {r.edges:>5,} edges  {r.finding or 'no finding'}",
            flush=True,
        )
    return results


def fuzz(name: str, seconds: int) -> Result:
    """One target, in a process of its own."""
    corpus, findings = HOME / "corpus" / name, HOME / "findings"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    work = HOME / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    limits = [f"-max_total_time={seconds}", f"-timeout={ONE_SECONDS}", f"-rss_limit_mb={MEMORY_MIB}"]
    options = [f"-artifact_prefix={findings}/{name}-", f"-max_len={LENGTH_MAX_BYTES}", "-print_final_stats=1"]
    command = [sys.executable, __file__, "--inside", name, *limits, *options, str(corpus)]
    begun = time.monotonic()
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(work)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds * 2 + 300,
        check=False,
    )
    said = done.stdout + done.stderr
    (HOME / f"{name}.log").write_text(said)
    finding = "" if done.returncode == 0 else _finding(said, name)
    return Result(name, _last(r"^#(\d+)", said), time.monotonic() - begun, _last(r"cov: (\d+)", said), finding)


def _last(pattern: str, said: str) -> int:
    found = re.findall(pattern, said, re.MULTILINE)
    return int(found[-1]) if found else 0


def _finding(said: str, name: str) -> str:
    wrote = re.findall(r"Test unit written to (\S+)", said)
    what = re.findall(r"^(\w[\w.]*(?:Error|Exception|Exit)[^\n]*|==\d+== ERROR[^\n]*|ALARM[^\n]*)", said, re.MULTILINE)
    return f"FOUND {what[0] if what else ''} {wrote[-1] if wrote else f'see {HOME / name}.log'}"


def inside(name: str, options: Sequence[str]) -> None:
    """The process that fuzzes; ends by itself."""
    sys.path.insert(0, str(HOME / "packages"))
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["hvbackup"]):
        targets = importlib.import_module("labs.fuzz_targets")
    target = targets.TARGETS[name]
    corpus = Path(options[-1])
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def feed(data: bytes) -> None:
        with contextlib.suppress(*target.errors):
            target.run(data)

    atheris.Setup([name, *options], feed)
    atheris.Fuzz()


def replay(file: Path, name: str) -> None:
    """The finding again, as a plain exception."""
    from labs.fuzz_targets import TARGETS

    with contextlib.suppress(*TARGETS[name].errors):
        TARGETS[name].run(file.read_bytes())
    print(f"{name} takes {file.name} as it should")


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--inside"]:
        inside(argv[1], argv[2:])
        return 0
    parser = argparse.ArgumentParser(description="Fuzz every parser of bytes that others wrote")
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("target", nargs="*")
    args = parser.parse_args(argv)
    if args.replay:
        replay(args.replay, args.target[0])
        return 0
    install()
    from labs.fuzz_targets import TARGETS

    os.nice(19)
    begun = time.monotonic()
    results = fuzz_all(args.target or list(TARGETS), args.seconds)
    total = sum(r.runs for r in results)
    print(
        f"{total:,} inputs in {time.monotonic() - begun:.0f} seconds, {sum(bool(r.finding) for r in results)} findings"
    )
    return 1 if any(r.finding for r in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
