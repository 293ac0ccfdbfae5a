"""files: files inside the disks of a machine."""

from __future__ import annotations

import argparse
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvbackup.cli.invocation import now, session_of
from hvbackup.cli.output import Out, count, printable, size, table
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.cli.progress import Progress
from hvbackup.cli.recovery import MOMENTS
from hvbackup.errors import UsageError

if TYPE_CHECKING:
    from hvbackup.recover.browse import Entry
    from hvbackup.service.guestfiles import CopiedOut, Listed
    from hvbackup.service.recovery import Which

PATHS = """\
paths:
  /                          the partitions of every disk (the default)
  /1/etc                     a folder, file or link on partition 1
  /0/etc                     on a disk that has no partitions
"""
LETTERS = {"folder": stat.S_IFDIR, "link": stat.S_IFLNK, "file": stat.S_IFREG, "other": 0}


def add(verbs: Verbs) -> None:
    """The verb of this module."""
    verb = add_verb(
        verbs,
        "files",
        "list the files inside a machine's disks, or copy them out",
        "List a folder inside a disk of a machine at a moment; with --to, copy a file or a whole folder out.  ext2, ext3, ext4,\n"
        "NTFS, FAT, XFS and btrfs are read, without mounting anything and without root.\n"
        "Nothing that exists is overwritten unless you say --force.",
        f"{PATHS}\n{MOMENTS}",
    )
    verb.add_argument("machine", metavar="MACHINE", help="its name or id")
    verb.add_argument("path", nargs="?", default="/", metavar="PATH", help="partition and path, such as /1/etc/hosts")
    verb.add_argument("--at", default="latest", metavar="MOMENT", help="when (default: latest)")
    verb.add_argument("--disk", action="append", default=[], metavar="DISK", help="the disk that the path is on")
    verb.add_argument("--to", default="", metavar="FOLDER", help="copy it into this folder")
    verb.add_argument("--force", action="store_true", help="overwrite files that are there")
    verb.set_defaults(run=files)


def files(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup files MACHINE [PATH]`."""
    from hvbackup.service import guestfiles
    from hvbackup.service.recovery import Which

    which = Which(args.machine, args.at, now(), args.disk)
    if args.to:
        return _copy(args, which, out)
    if args.force:
        raise UsageError("--force belongs to --to FOLDER")
    found = guestfiles.listed(session_of(args), which, args.path)
    out.answer(guestfiles.shape_listed(found), _listed_lines(found))
    out.warn_all(found.notes)
    return 0


def _copy(args: argparse.Namespace, which: Which, out: Out) -> int:
    from hvbackup.service import guestfiles

    with Progress(out) as progress:
        found = guestfiles.copied(
            session_of(args), which, args.path, Path(args.to), lambda n: progress("files", n, n), force=args.force
        )
    verdict = found.done.verdict()
    out.answer(guestfiles.shape_copied(found), _copied_lines(found))
    out.warn_all(found.notes)
    return out.fail(verdict) if verdict else 0


def _copied_lines(found: CopiedOut) -> Iterator[str]:
    from hvbackup.moments import local

    d = found.done
    counts = f"{count(d.files, 'file')}, {count(d.folders, 'folder')}, {count(d.links, 'link')}; {size(d.bytes)}"
    yield f"{printable(found.path)} of {found.point.machine.name} as of {local(found.point.t)} is in {found.to} ({counts})"
    if d.left_out:
        yield f"  {count(d.left_out, 'device, socket or pipe')} left out"
    for path, error in d.failed:
        yield f"  NOT COPIED: {printable(path)}: {printable(str(error))}"
    if d.failures > len(d.failed):
        yield f"  and {d.failures - len(d.failed)} more"


def _listed_lines(found: Listed) -> Iterator[str]:
    from hvbackup.moments import local

    yield f"{found.point.machine.name} as of {local(found.point.t)} (point {found.point.id})"
    if found.path.strip("/") == "":
        rows = [(str(r.disk.id), e.path, size(e.size), e.note) for r, e in found.entries]
        yield from table(("DISK", "PATH", "SIZE", "WHAT IS ON IT"), rows, right=(2,))
        return
    rows = [_row(e) for _, e in found.entries]
    yield from table(("MODE", "SIZE", "MODIFIED", "NAME"), rows, right=(1,)) if rows else ["The folder is empty"]


def _row(e: Entry) -> tuple[str, str, str, str]:
    from hvbackup.moments import local

    letters = stat.filemode(LETTERS[e.kind] | (e.mode or 0))
    mode = letters if e.mode is not None else letters[0] + "?" * 9
    target = f" -> {e.target}" if e.target else ""
    return mode, str(e.size), local(e.mtime) if e.mtime is not None else "-", e.name + target
