"""doctor: what is wrong here, and what to do about it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvbackup.cli.invocation import now, session_of
from hvbackup.cli.machines import SOURCES
from hvbackup.cli.output import Out, count, printable
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.errors import HvbackupError

if TYPE_CHECKING:
    from hvbackup.service.doctor import Finding

DOCTOR = """\
Look at everything that protection and recovery need: programs and packages, the clock, folders and their room, the store and
its keys, what runs left behind, machines that should be recorded, certificates, and the sources that are named.  Nothing is
changed.  Each finding says what to do; a problem makes the exit code 1.
"""


def add(verbs: Verbs) -> None:
    """The verb of this module."""
    verb = add_verb(verbs, "doctor", "find what is wrong here, and say what to do about it", DOCTOR, SOURCES)
    verb.add_argument("source", nargs="*", metavar="SOURCE", help="a source that should answer; several may be named")
    verb.set_defaults(run=doctor)


def doctor(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup doctor [SOURCE…]`."""
    from hvbackup.service import doctor as service

    found = list(service.doctor(session_of(args), args.source, now()))
    shape = [{"level": f.level.name.lower(), "subject": f.subject, "what": f.what, "fix": f.fix} for f in found]
    out.answer({"findings": shape}, _lines(found))
    warnings = sum(f.level is service.Level.WARNING for f in found)
    problems = sum(f.level is service.Level.PROBLEM for f in found)
    if problems:
        return out.fail(HvbackupError(f"{count(problems, 'problem')} and {count(warnings, 'warning')} found"))
    if warnings:
        out.warn(f"{count(warnings, 'finding')} to look at")
    return 0


def _lines(found: Sequence[Finding]) -> Iterator[str]:
    """The worst last, where it stands just above the prompt."""
    signs = ("  ok ", "  ?  ", "  !! ")
    for finding in sorted(found, key=lambda f: f.level):
        yield printable(f"{signs[finding.level]} {finding.subject}: {finding.what}")
        if finding.fix:
            yield printable(f"        -> {finding.fix}")
