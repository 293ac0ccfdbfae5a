"""map, restore, boot, drill, discard: from points back to disks and machines."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvbackup.cli.invocation import now, session_of
from hvbackup.cli.output import Out, duration, parse_size, size, table
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.cli.progress import Progress
from hvbackup.errors import UsageError

if TYPE_CHECKING:
    from hvbackup.recover.boot import Boot
    from hvbackup.service.recovery import Mapped, RestoredPoint, Which
    from hvbackup.service.redefine import Defined

MOMENTS = """\
moments:
  latest                     the newest point or moment (the default)
  "2026-11-22 14:03[:07]"    local time; the newest point or moment at or before it
  2026-11-22T14:03:07Z       RFC 3339
  -10m, -1h30m, -2d          ago
  4f1c…                      a point's id, or its beginning
  tag:NAME, seq:4711         a moment of a machine that was under protection; `hvbackup timeline` lists them
"""


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    _add_restore(verbs)
    _add_boot(verbs)
    verb = add_verb(
        verbs,
        "drill",
        "rehearse the recovery of a machine",
        "Read every block of a machine at a moment as a restore would, to nowhere, and verify it.  Without --at, a random\n"
        "moment of the last 30 days.  What came of it is in the store's records, and on the timeline of the console.",
    )
    verb.add_argument("machine", metavar="MACHINE", help="its name or id")
    verb.add_argument("--at", default="", metavar="MOMENT", help="this one")
    verb.set_defaults(run=drill)
    verb = add_verb(verbs, "discard", "end a machine that was booted from a point, and remove what it wrote")
    verb.add_argument("name", nargs="?", default="", metavar="NAME", help="as `boot` and --list have it")
    verb.add_argument("--list", action="store_true", help="list the machines that are booted on this host")
    verb.set_defaults(run=discard)
    _add_map(verbs)


def _add_which(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("machine", metavar="MACHINE", help="its name or id")
    verb.add_argument("--at", default="latest", metavar="MOMENT", help="when (default: latest)")
    verb.add_argument("--disk", action="append", default=[], metavar="DISK", help="only this disk; may be repeated")


def _which(args: argparse.Namespace) -> Which:
    from hvbackup.service.recovery import Which

    return Which(args.machine, args.at, now(), args.disk)


# -- restore ---------------------------------------------------------------------------------------------------------------


def _add_restore(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "restore",
        "write a machine's disks to files, and define it again",
        "Write a machine's disks to files: all of them to a folder, or one with --disk DISK --to FILE.  With --to-libvirt the\n"
        "machine is defined on them, switched off.\n"
        "Every block is verified.  Nothing that exists is overwritten unless you say --replace.",
        MOMENTS,
    )
    _add_which(verb)
    verb.add_argument("--to", default="", metavar="PATH", help="a folder; a file or device for a single --disk")
    verb.add_argument("--format", default="", choices=("raw", "qcow2"), help="default: as the file is called, or raw")
    there = verb.add_mutually_exclusive_group()
    there.add_argument(
        "--resume", dest="mode", action="store_const", const="resume", help="go on with a restore that did not end"
    )
    there.add_argument("--replace", dest="mode", action="store_const", const="replace", help="overwrite what is there")
    there.add_argument(
        "--differential",
        dest="mode",
        action="store_const",
        const="differential",
        help="compare with what is there, and write only what differs",
    )
    verb.set_defaults(mode="new")
    _add_defining(verb)
    verb.set_defaults(run=restore)


def _add_defining(verb: argparse.ArgumentParser) -> None:
    """Where the machine becomes one again."""
    verb.add_argument("--to-libvirt", default="", metavar="URI", help="define it there, such as qemu:///system")
    verb.add_argument(
        "--name", default="", metavar="NAME", help="what libvirt is to call it (default: as it was called)"
    )
    verb.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="another network than it was on; may be repeated",
    )
    identity = verb.add_mutually_exclusive_group()
    identity.add_argument(
        "--new-identity", action="store_const", const=True, help="another UUID and other network addresses"
    )
    identity.add_argument(
        "--keep-identity",
        dest="new_identity",
        action="store_const",
        const=False,
        help="the same UUID and addresses (default: new ones where the machine is still there)",
    )
    verb.set_defaults(new_identity=None)


def restore(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup restore MACHINE --to PATH`."""
    from hvbackup.recover.restore import Mode
    from hvbackup.service import recovery, shapes

    if args.to_libvirt:
        return _restore_to_libvirt(args, out)
    if args.name or args.network or args.new_identity is not None:
        raise UsageError("--name, --network and the identity belong to --to-libvirt URI")
    if not args.to:
        raise UsageError("Say where to: --to FOLDER, --disk DISK --to FILE, or --to-libvirt URI")
    goal = recovery.Goal(Path(args.to), args.format, Mode(args.mode))
    with Progress(out) as progress:
        done = recovery.restore(session_of(args), _which(args), goal, lambda disk, at, all_: progress(disk, at, all_))
    verdict = recovery.verdict(done)
    shown = shapes.restored(done) | ({"error": shapes.error(verdict)} if verdict else {})
    out.answer(shown, _restored_lines(done))
    out.warn_all(done.notes)
    return out.fail(verdict) if verdict else 0


def _restore_to_libvirt(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup restore MACHINE --to-libvirt URI`."""
    from hvbackup.recover.restore import Mode
    from hvbackup.service import recovery, redefine, shapes

    pairs = [pair.partition("=") for pair in args.network]
    if any(not old or not new for old, _, new in pairs):
        raise UsageError("A network is mapped as --network OLD=NEW")
    networks = {old: new for old, _, new in pairs}
    target = redefine.Target(args.to_libvirt, args.name, networks, args.new_identity)
    to = Path(args.to) if args.to else None
    with Progress(out) as progress:
        done, made = redefine.restore_to_libvirt(
            session_of(args),
            _which(args),
            redefine.Where(to, args.format, Mode(args.mode)),
            target,
            lambda disk, at, all_: progress(disk, at, all_),
        )
    verdict = recovery.verdict(done)
    shown = shapes.restored(done) | shapes.defined(made) | ({"error": shapes.error(verdict)} if verdict else {})
    out.answer(shown, [*_restored_lines(done), *_defined_lines(made)])
    out.warn_all(done.notes)
    return out.fail(verdict) if verdict else 0


def _defined_lines(made: Defined | None) -> Iterator[str]:
    if made:
        identity = "a new identity" if made.new_identity else "its own identity"
        yield f"  {made.name} is defined, switched off, with {identity} ({made.uuid}); `virsh start {made.name}` runs it"


def _restored_lines(done: RestoredPoint) -> Iterator[str]:
    from hvbackup.moments import local

    yield f"{done.point.machine.name} as of {local(done.point.t)} (point {done.point.id})"
    for d in done.disks:
        if d.done:
            kept = f", {size(d.done.kept_bytes)} were there already" if d.done.kept_bytes else ""
            yield f"  {d.root.disk.id}: {d.path} ({d.format}, {size(d.done.size)}; {size(d.done.written_bytes)} written{kept})"
    if done.machine_file:
        yield f"  its configuration: {done.machine_file}"


# -- boot ------------------------------------------------------------------------------------------------------------------


def _add_boot(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "boot",
        "run a machine as it was, at once, without copying anything",
        "Run a machine as it was at a moment.  It starts at once: its disks are overlays over the point, which stays as\n"
        "it is.  Its network leads nowhere, because the original may still be running.  `discard` ends it.",
        MOMENTS,
    )
    _add_which(verb)
    verb.add_argument(
        "--name", default="", metavar="NAME", help="what to call it (default: the machine's and the point's)"
    )
    verb.add_argument("--generic", action="store_true", help="on a plain machine, whatever it ran on")
    verb.add_argument("--memory", default="", metavar="SIZE", help="memory of a plain machine, such as 2G")
    verb.add_argument("--cpus", type=int, default=0, metavar="N", help="processors of a plain machine")
    verb.add_argument("--new-identity", action="store_true", help="another UUID and other network addresses")
    verb.set_defaults(run=boot)


def boot(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup boot MACHINE`."""
    from hvbackup.recover.boot import Options
    from hvbackup.service import recovery, shapes

    options = Options(
        name=args.name,
        disks=args.disk,
        generic=args.generic,
        new_identity=args.new_identity,
        memory_bytes=parse_size(args.memory),
        cpus=args.cpus,
    )
    made, notes = recovery.boot(session_of(args), _which(args), options)
    out.answer({**shapes.boot(made), "notes": notes}, _boot_lines(made))
    out.warn_all(notes)
    return 0


def _boot_lines(made: Boot) -> Iterator[str]:
    yield f"{made.machine_name} runs as {made.name} after {duration(made.seconds)}, from point {made.point}"
    for end, path in made.sockets.items():
        yield f"  {end}: {path}"
    yield f"  what it writes goes to {made.folder}; `hvbackup discard {made.name}` ends it and removes that"


def drill(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup drill MACHINE`."""
    from hvbackup.moments import local
    from hvbackup.service import drill as service

    with Progress(out) as progress:
        done = service.drill(session_of(args), args.machine, args.at, now(), progress)
    took = f"{len(done.disks)} disks in {duration(done.seconds)}"
    lines = [f"{done.point.machine.name} of {local(done.point.t)} ({done.point.id}) can be recovered: {took}"]
    for disk in done.disks:
        if disk.done:
            what = f", which begins with {disk.done.holds}" if disk.done.holds else ""
            lines.append(f"  {disk.root.disk.id}: {size(disk.done.read_bytes)} read and right{what}")
    out.answer(service.shape(done), [] if done.error else lines)
    out.warn_all(done.notes)
    return out.fail(done.error) if done.error else 0


def discard(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup discard NAME`, `hvbackup discard --list`."""
    from hvbackup.service import recovery, shapes

    session, moment = session_of(args), now()
    if args.list == bool(args.name):
        raise UsageError("Say which machine to discard, or --list; see hvbackup discard --help")
    if args.list:
        found = recovery.boots(session, moment)
        rows = [boot_row(b) for b in found]
        out.answer({"boots": [shapes.boot(b) for b in found]}, boot_table(rows) if rows else ["No machine is booted"])
        return 0
    recovery.discard(session, args.name, moment)
    out.answer({"discarded": args.name}, [f"{args.name} is discarded"])
    return 0


def boot_row(b: Boot) -> tuple[str, ...]:
    """A line of a table of boots."""
    from hvbackup.moments import local

    return (b.name, b.machine_name, b.point, local(b.made), b.state)


def boot_table(rows: list[tuple[str, ...]]) -> list[str]:
    """Booted machines."""
    return table(("BOOTED AS", "MACHINE", "POINT", "SINCE", "STATE"), rows)


# -- map -------------------------------------------------------------------------------------------------------------------


def _add_map(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "map",
        "serve a machine's disks as read-only NBD exports, until ctrl-C",
        "Serve a machine's disks as read-only NBD exports, one for each disk, until ctrl-C.",
        MOMENTS,
    )
    _add_which(verb)
    where = verb.add_mutually_exclusive_group()
    where.add_argument(
        "--socket", metavar="PATH", help="listen on this unix socket (default: one in the run directory)"
    )
    where.add_argument("--listen", metavar="HOST:PORT", help="listen on TCP, without encryption or password")
    verb.set_defaults(run=map_)


def map_(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup map MACHINE`."""
    from hvbackup.service import recovery, shapes

    address = recovery.Address.parse(args.listen) if args.listen else recovery.Address(_path(args.socket))

    def report(export: str, doing: str, error: Exception) -> None:
        out.warn(f"{export or 'The server'}: {doing}: {error}")

    with recovery.mapped(session_of(args), _which(args), address, report) as found:
        out.warn_all(found.notes)
        out.answer(shapes.mapped(found), _mapped_lines(found))
        try:
            while True:
                time.sleep(3600)  # and not on a lock: signals are heard here at once
        except KeyboardInterrupt:
            out.say("")  # ctrl-C is how this ends
    return 0


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _mapped_lines(found: Mapped) -> Iterator[str]:
    from hvbackup.moments import local

    yield f"{found.point.machine.name} as of {local(found.point.t)} (point {found.point.id}), read-only, until ctrl-C"
    width = max(len(disk) for disk in found.disks)
    for disk, uri in found.disks.items():
        yield f"  {disk:{width}}  {size(found.sizes[disk]):>9}  {uri}"
