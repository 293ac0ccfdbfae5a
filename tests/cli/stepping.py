"""Runs one command of hvbackup many times, each in a fork, and sends it a signal at a chosen step of its main thread.

    python -m tests.cli.stepping --steps N --seed S [--only CODE] -- backup --json image:/disk.raw

A step is what Python calls a trace event: a call, a line, a return, in our code and in the libraries'.  The signal's own handler
is called in that very place, which a signal from outside hits once in a hundred thousand times.  One line of JSON for each
run: where it was hit, the exit code, what was printed, how long it took after that.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import hvbackup.cli
from hvbackup.cli import command, interrupt  # noqa: F401 - loaded here, once for all forks

HANG_SECONDS = 100


class Stepper:
    """Counts the steps of the main thread, and signals at one of them."""

    def __init__(self, at: int, only: str) -> None:
        self.at, self.only, self.count, self.where, self.when = at, only, 0, "", 0.0

    def trace(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if self.only and not frame.f_code.co_filename.endswith(self.only):
            return self.trace
        self.count += 1
        if self.count == self.at:
            sys.settrace(None)
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
            self.when = time.monotonic()
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler)
            handler(signal.SIGTERM, frame)
        return self.trace


def forked(words: list[str], stepper: Stepper) -> dict[str, Any]:
    """How the command went in a process of its own."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as told:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            play(words, stepper, told.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended = time.monotonic()
        out.seek(0)
        told.seek(0)
        shape = json.loads(told.read().splitlines()[-1])
        seconds = ended - shape["when"] if shape["when"] else 0.0
        return {**shape, "code": status, "out": out.read().decode(), "seconds": round(seconds, 3)}


def play(words: list[str], stepper: Stepper, told: int) -> None:
    """In the fork: the command, as `hvbackup` runs it; never returns."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    install, end = interrupt.install, os._exit

    def install_and_trace(*, as_json: bool) -> None:
        install(as_json=as_json)
        sys.settrace(stepper.trace)

    def tell_and_end(code: int) -> None:
        sys.settrace(None)
        os.write(told, json.dumps({"where": stepper.where, "when": stepper.when, "steps": stepper.count}).encode())
        end(code)

    interrupt.install, os._exit = install_and_trace, tell_and_end  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["hvbackup", *words]
    code = 99
    try:
        code = hvbackup.cli.main()
        sys.stdout.flush()
    finally:
        os._exit(code)


def steps(words: list[str], count: int, seed: int, only: str) -> Iterator[dict[str, Any]]:
    """The command undisturbed, and then signalled at `count` random steps."""
    whole = forked(words, Stepper(0, only))
    yield whole
    rng = random.Random(seed)
    for _ in range(count):
        yield forked(words, Stepper(rng.randint(1, whole["steps"]), only))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--only", default="", help="steps in files that end so, and no others")
    parser.add_argument("words", nargs="+")
    args = parser.parse_args()
    for shape in steps(args.words, args.steps, args.seed, args.only):
        print(json.dumps(shape), flush=True)


if __name__ == "__main__":
    main()
