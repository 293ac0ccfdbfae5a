"""init, key, status, check, sql: the store itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvbackup.cli.invocation import now, other_session, session_of
from hvbackup.cli.output import Out, count, duration, parse_part, parse_size, printable, size, table
from hvbackup.cli.parser import Verbs, add_shared, add_verb
from hvbackup.cli.progress import Progress
from hvbackup.cli.recovery import boot_row, boot_table
from hvbackup.errors import StoreDamage, UsageError
from hvbackup.model import Instant

if TYPE_CHECKING:
    from hvbackup.service.benchmark import Speeds
    from hvbackup.service.inventory import History
    from hvbackup.service.look import Leftover, Overview
    from hvbackup.service.stores import Made
    from hvbackup.service.upkeep import Checked, CheckOrder

BLOCKS = {"64K": 64 * 1024, "256K": 256 * 1024}


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    _add_init(verbs)
    add_verb(verbs, "status", "each machine's newest point, and how the store is").set_defaults(run=status)
    _add_key(verbs)
    _add_check(verbs)
    _add_sql(verbs)
    verb = add_verb(
        verbs,
        "benchmark",
        "what this machine can do, and what the pipeline reaches",
        "Measure what this machine can do at most (hash, compress, encrypt, write, read), and next to it what a whole backup\n"
        "and restore reach.  Needs no store; writes below a folder, and removes what it wrote.",
    )
    verb.add_argument("--in", dest="folder", default="", metavar="FOLDER", help="where (default: beside the store)")
    verb.add_argument("--size", default="256M", metavar="SIZE", help="how much is backed up (default: 256M)")
    verb.set_defaults(run=benchmark)


# -- init ------------------------------------------------------------------------------------------------------------------


def _add_init(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "init",
        "make a store",
        "Make a new, empty store.  It is encrypted: unless a key or passphrase is given, a key file is made in the\n"
        "configuration directory, and the answer says where it is and what to do with it.",
    )
    verb.add_argument("where", nargs="?", default="", metavar="STORE", help="the directory; the same as --store")
    verb.add_argument("--block", default="", choices=BLOCKS, help="the unit of deduplication (default: 64K)")
    verb.add_argument("--no-encryption", action="store_true", help="whoever can read the store reads every machine")
    verb.add_argument("--parity", action="store_true", help="keep a tenth more, to mend damaged packs with")
    verb.add_argument(
        "--family-of",
        default="",
        metavar="OTHER",
        help="share the key of chunk ids with this store, so that copies between the two need not read what is there already",
    )
    verb.add_argument("--family-key-file", metavar="FILE", help="a key that opens the other store")
    verb.add_argument("--family-passphrase-file", metavar="FILE", help="a file with the passphrase that opens it")
    verb.add_argument("--min-age", default="", metavar="TIME", help="no point is forgotten before it is so old")
    verb.set_defaults(run=init)


def init(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup init [STORE]`."""
    from hvbackup.cli.retention import span_ns
    from hvbackup.service import stores

    if args.where and args.store and args.where != args.store:
        raise UsageError(f"Two stores are named, {args.where} and {args.store}; name one")
    args.store = args.where or args.store
    family = None
    if args.family_of:
        family = other_session(args, args.family_of, args.family_key_file, args.family_passphrase_file)
    elif args.family_key_file or args.family_passphrase_file:
        raise UsageError(
            "--family-key-file and --family-passphrase-file open the store of --family-of, and none is named"
        )
    block = BLOCKS.get(args.block, 0)
    made = stores.init(
        session_of(args),
        block=block,
        encrypted=not args.no_encryption,
        parity=args.parity,
        family_of=family,
        min_age_ns=span_ns(args.min_age) if args.min_age else 0,
    )
    out.answer(_made(made), _made_lines(made))
    if not made.encrypted:
        out.warn(f"The store at {made.path} is NOT encrypted: whoever can read it reads every machine in it")
    return 0


def _made(made: Made) -> dict[str, Any]:
    return {
        "store": {"path": str(made.path), "id": made.id, "block_bytes": made.block, "encrypted": made.encrypted},
        "key_file": str(made.key_file) if made.key_file else None,
    }


def _made_lines(made: Made) -> Iterator[str]:
    yield f"Made store {made.id} at {made.path}, {'encrypted' if made.encrypted else 'NOT ENCRYPTED'}"
    if made.key_file:
        yield f"Its key is in {made.key_file}"
        yield "Copy that file to a safe place that is neither this machine nor the store: without it nobody can read the"
        yield "store, and whoever has both reads everything.  `hvbackup key paper` prints a second key to lock away"
    elif made.encrypted:
        yield f"It opens with {made.opens_with[:1].lower()}{made.opens_with[1:]}; without it nobody can read the store"


# -- keys ------------------------------------------------------------------------------------------------------------------


def _add_key(verbs: Verbs) -> None:
    verb = add_verb(verbs, "key", "list, add and remove the keys of a store", epilog="See docs/keys.md.")
    actions = verb.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=type(verb))

    def action(name: str, help_: str, run: Any) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=help_, description=f"{help_.capitalize()}.")
        add_shared(made)
        made.set_defaults(run=run)
        return made

    action("list", "every key that opens the store", key_list)
    new = action("add", "open the store with one more key file or passphrase", key_add)
    new.add_argument("--new-key-file", metavar="FILE", help="this key; made when the file does not exist")
    new.add_argument("--new-passphrase-file", metavar="FILE", help="the passphrase in this file")
    new.add_argument("--label", default="", metavar="TEXT", help="what the list calls it")
    old = action("remove", "let a key open the store no more", key_remove)
    old.add_argument("key", metavar="KEY", help="its id in the list")
    paper = action("paper", "make one more key and print it, for a safe", key_paper)
    paper.add_argument("--label", default="paper", metavar="TEXT", help="what the list calls it")


def key_list(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup key list`."""
    from hvbackup.service import stores

    found = stores.list_keys(session_of(args))
    shown = [{"id": w.id, "kind": w.kind, "label": w.label} for w in found]
    out.answer({"keys": shown}, table(("KEY", "KIND", "LABEL"), [(w.id, w.kind, w.label) for w in found]))
    return 0


def key_add(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup key add`."""
    from hvbackup import config
    from hvbackup.service import stores

    new = config.KeyOptions(
        Path(args.new_key_file) if args.new_key_file else None,
        Path(args.new_passphrase_file) if args.new_passphrase_file else None,
    )
    made = stores.add_key(session_of(args), new, args.label)
    shown = {"key": {"id": made.id, "kind": made.kind, "label": made.label}}
    out.answer(shown, [f"The store opens with one more key, {made.id} ({made.kind})"])
    return 0


def key_remove(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup key remove KEY`."""
    from hvbackup.service import stores

    notes = stores.remove_key(session_of(args), args.key)
    out.answer({"removed": args.key, "notes": notes}, [f"Key {args.key} does not open the store any more"])
    out.warn_all(notes)
    return 0


def key_paper(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup key paper`."""
    from hvbackup.service import stores

    made, text = stores.paper_key(session_of(args), args.label)
    shown = {"key": {"id": made.id, "kind": made.kind, "label": made.label}, "text": text}
    if args.quiet and not args.json:
        print(text)
        return 0
    lines = [
        f"Key {made.id} of the store, for paper.  It is kept nowhere and shown once: print it, lock it away.",
        "To use it, type it into a file and give that with --key-file; case and dashes do not matter.",
        "",
        f"    {text}",
        "",
    ]
    out.answer(shown, lines)
    return 0


# -- status ----------------------------------------------------------------------------------------------------------------


def status(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup status`."""
    from hvbackup.cli import through
    from hvbackup.service import look, shapes

    moment = now()
    found, served = look.status(session_of(args), moment), through.summary(args)
    shown = {**shapes.overview(found, moment), "service": served}
    out.answer(shown, [*_overview_lines(found, moment), *_service_lines(served)])
    out.warn_all(found.notes)
    return 0


def _overview_lines(found: Overview, moment: Instant) -> Iterator[str]:
    s = found.store
    sealed = "not encrypted" if s.cipher == "none" else s.cipher
    yield f"Store {s.path} ({s.id}), {sealed}, blocks of {size(s.block)}"
    yield f"  {size(s.used_bytes)} in {count(s.packs, 'pack')}; {size(s.free_bytes)} free"
    if s.debt_bytes:
        yield f"  {size(s.debt_bytes)} not verified in the last 30 days; `hvbackup check --sample 1%` each day keeps up"
    if not found.machines:
        yield "  No machine is protected yet; `hvbackup backup SOURCE` begins"
        return
    yield ""
    head = ("MACHINE", "NEWEST POINT", "TIME", "AGE", "CONSISTENCY", "POINTS", "DISKS", "SIZE")
    yield from table(head, [_machine_row(h, moment) for h in found.machines], (3, 5, 6, 7))
    if found.protected:
        yield ""
        yield from table(
            ("MACHINE", "NEWEST MOMENT", "TIME", "LAG", "PROTECTED BY"), list(_protected_rows(found)), (3,)
        )
    if found.boots:
        yield ""
        yield from boot_table([boot_row(b) for b in found.boots])
    if found.leftovers:
        yield ""
        yield from table(("RUN", "MACHINE", "SOURCE", "STATE"), [_leftover_row(v) for v in found.leftovers])


def _service_lines(served: dict[str, Any] | None) -> Iterator[str]:
    if served is None:
        return
    states = ", ".join(f"{n} {state}" for state, n in served["machines"].items() if n)
    yield ""
    yield f"The service keeps this store: {states or 'no machine yet'}; {count(served['open_jobs'], 'open job')}"
    for alarm in served["alarms"]:
        yield f"  {alarm['severity'].upper()} {alarm['subject']}: {alarm['text']}"


def _machine_row(h: History, moment: Instant) -> Sequence[str]:
    from hvbackup.moments import local

    newest = h.points[-1]
    age = duration(round(newest.age_seconds(moment)))
    total = size(sum(d.disk.size for d in newest.disks))
    return (h.machine.name, newest.id, local(newest.t), age, str(newest.consistency), str(h.count),
            str(len(newest.disks)), total)  # fmt: skip


def _protected_rows(found: Overview) -> Iterator[Sequence[str]]:
    from hvbackup.moments import local

    for h in found.machines:
        if p := found.protected.get(h.machine.id):
            worker = f"process {p.worker}" if p.worker else "nobody here"
            worker = f"PAUSED ({p.pause.why})" if p.pause else worker
            yield h.machine.name, f"seq:{p.newest.seq}", local(p.newest.t), duration(p.lag_seconds), worker


def _leftover_row(v: Leftover) -> Sequence[str]:
    return (v.lease.id, v.machine, v.lease.source, "did not end" if v.expired else "under way, or just killed")


# -- check -----------------------------------------------------------------------------------------------------------------


def _add_check(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "check",
        "look for damage, and name what needs it",
        "Look for damage in the store and name every point that needs what is damaged.  Without options: whether everything\n"
        "is there.  What was verified when is remembered, so that a check that was interrupted can go on, and a sample takes\n"
        "what was not verified for the longest time.",
    )
    level = verb.add_mutually_exclusive_group()
    level.add_argument("--authenticate", action="store_true", help="read everything that is stored, and test its tags")
    level.add_argument("--deep", action="store_true", help="read, decrypt and hash everything that is stored")
    verb.add_argument(
        "--sample", metavar="PART", default="", help="only a part, such as 1%%: for every day (implies --deep)"
    )
    verb.add_argument("--machine", metavar="MACHINE", default="", help="only what this machine's points need")
    verb.add_argument("--point", metavar="POINT", default="", help="only what this point needs")
    verb.add_argument("--bandwidth", metavar="SIZE", default="", help="read at most so much a second, such as 50M")
    verb.add_argument(
        "--files", action="store_true", help="name the files inside the machines that lie on what is lost"
    )
    verb.add_argument("--resume", action="store_true", help="go on with the check that was interrupted")
    verb.add_argument("--repair", action="store_true", help="put back what there is another good copy of")
    verb.add_argument("--from", dest="source", metavar="STORE", default="", help="take lost blocks from this store")
    verb.add_argument("--from-key-file", metavar="FILE", help="what opens that store")
    verb.set_defaults(run=check)


def check(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup check`."""
    from hvbackup.service import upkeep

    with Progress(out) as progress:
        found = upkeep.check(session_of(args), _check_order(args), lambda done, total: progress("check", done, total))
    out.answer(upkeep.shape(found), _report_lines(found))
    out.warn_all(found.notes)
    if found.report.problems:
        return out.fail(StoreDamage(upkeep.sentence(found)))
    return 0


def _check_order(args: argparse.Namespace) -> CheckOrder:
    from hvbackup.service.upkeep import CheckOrder, Level

    deep = args.deep or (args.sample and not args.authenticate)
    level = Level.DEEP if deep else Level.AUTHENTICATE if args.authenticate else Level.QUICK
    rate = parse_size(args.bandwidth)
    sample = parse_part(args.sample) if args.sample else 1.0
    source = other_session(args, args.source, args.from_key_file) if args.source else None
    return CheckOrder(
        level,
        now(),
        sample,
        rate,
        args.resume,
        args.machine,
        args.point,
        repair=args.repair,
        source=source,
        files=args.files,
    )


def _report_lines(found: Checked) -> Iterator[str]:
    r = found.report
    yield from (f"repaired: {line}" for line in found.repaired)
    for problem in r.problems:
        yield f"{'LOST' if problem.lost else 'damaged'}: {problem.what}"
    yield from _file_lines(found)
    how = f"{size(r.read_bytes)} read and verified" if r.read_bytes else "contents not read, `--deep` does that"
    counts = [(r.points, "point"), (r.disks, "disk"), (r.packs, "pack"), (r.chunks, "chunk")]
    counts += [(r.segments, "segment")] if r.segments else []
    yield f"Checked {', '.join(count(n, noun) for n, noun in counts)}; {how}"
    if r.debt_bytes:
        yield f"{size(r.debt_bytes)} of {size(r.total_bytes)} were not verified in the last 30 days"


def _file_lines(found: Checked) -> Iterator[str]:
    for disk in found.files:
        yield f"Files of {disk.machine}, disk {disk.disk}, at point {disk.point}, that can't be read whole:"
        yield from (f"  {printable(path)}" for path in disk.files)
        if disk.more:
            yield f"  and {disk.more} more"
        yield from (f"  ({printable(remark)})" for remark in disk.remarks)
    if not found.files and any(p.kind == "disk" for p in found.report.problems):
        yield "`hvbackup check --files` names the files inside the machines that lie on what is lost"


# -- sql -------------------------------------------------------------------------------------------------------------------


def _add_sql(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "sql",
        "ask the index of the store",
        'Ask the index of the store, in DuckDB\'s SQL.  It can only read; `hvbackup sql "show tables"` lists what is there.',
    )
    verb.add_argument("query", metavar="QUERY", help='such as "select * from points"')
    verb.set_defaults(run=sql)


def sql(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup sql QUERY`."""
    from hvbackup.service import look

    found = look.sql(session_of(args), args.query)
    cells = [["" if cell is None else str(cell) for cell in row] for row in found.rows]
    out.answer({"columns": found.columns, "rows": found.rows, "notes": list(found.notes)}, table(found.columns, cells))
    out.warn_all(found.notes)
    return 0


# -- benchmark -------------------------------------------------------------------------------------------------------------


def benchmark(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup benchmark`."""
    from hvbackup.service import benchmark as service

    folder = Path(args.folder) if args.folder else session_of(args).places.store.parent
    wanted = parse_size(args.size)
    found = service.benchmark(folder, wanted)
    shown = asdict(found) | {"folder": str(folder), "size_bytes": wanted}
    out.answer(shown, _speed_lines(found))
    return 0


def _speed_lines(found: Speeds) -> Iterator[str]:
    yield f"{found.folder}, {count(found.cores, 'core')}; the sample compresses to {100 * found.compressed_share:.0f} %"
    head = ("", "", "PER SECOND", "CPU PER GiB")
    for title, speeds in (("one core, or the disk, at most:", found.ceilings), ("the whole pipeline:", found.pipeline)):
        yield ""
        yield title
        rows = [
            (f"  {s.name}", s.what, f"{size(s.bytes_per_second)}/s", f"{s.cpu_seconds_per_gib:.2f} s") for s in speeds
        ]
        yield from table(head, rows, (2, 3))
