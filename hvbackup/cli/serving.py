"""serve, config, jobs, watch: the service of this host."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from hvbackup import config
from hvbackup.cli.output import Out, count, table
from hvbackup.cli.parser import Verbs, add_shared, add_verb
from hvbackup.errors import UsageError

SERVE = """\
Keep machines protected by itself, as the configuration says: find machines, keep their workers, make points when they are due,
check stores, and say what is wrong.  SIGHUP reloads the configuration.  Workers and jobs go on when the service ends.
"""


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    verb = add_verb(verbs, "serve", "keep machines protected, as the configuration says", SERVE)
    verb.add_argument("--end-workers", action="store_true", help="end the workers and jobs of a service that has ended")
    verb.set_defaults(run=serve)
    verb = add_verb(verbs, "config", "check or show the configuration of the service", epilog="See docs/service.md.")
    actions = verb.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=type(verb))
    for name, help_, run in (("check", "every mistake in the configuration", check), ("show", "what it says", show)):
        action = actions.add_parser(name, help=help_, description=f"{help_.capitalize()}.")
        add_shared(action)
        action.set_defaults(run=run)
    action.add_argument("--all", action="store_true", help="with every default, and what it means")
    _add_jobs(verbs)
    verb = add_verb(verbs, "watch", "what happens to the machines of a source, as it happens")
    verb.add_argument("source", metavar="SOURCE", help="a host that tells of it: libvirt:qemu:///system")
    verb.set_defaults(run=watch)


def watch(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup watch SOURCE`."""
    from hvbackup.cli.invocation import session_of
    from hvbackup.service.watch import watch as run

    def report(kind: str, machine: str, name: str) -> None:
        out.answer({"event": kind, "id": machine, "name": name}, [f"{name or args.source}: {kind}"])

    run(session_of(args), args.source, report)
    return 0


def serve(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup serve`."""
    places, keys = config.places(args.store), config.key_options(args.key_file, args.passphrase_file)
    if args.end_workers:
        return _end_workers(places, out)
    from hvbackup.daemon.serve import serve as run

    try:
        from hvbackup.api.server import answering
    except ImportError as e:
        raise UsageError(f"The service needs {e.name}; pip install 'hvbackup[service]' installs all it needs") from e
    run(places, keys, answering)
    return 0


def _end_workers(places: config.Places, out: Out) -> int:
    from hvbackup.files import Files
    from hvbackup.processes import Process, started_with_folder

    with Files(config.private(places.run)).owner("service.lock", "The service of this host"):
        found: list[Process] = started_with_folder(places.state / "workers", places.state / "jobs")
        for process in found:
            process.stop(60.0)
    shown = {"ended": [p.pid for p in found]}
    out.answer(shown, [f"{count(len(found), 'process')} ended" if found else "Nothing of the service was running"])
    return 0


def check(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup config check`."""
    from hvbackup import configuration

    folder = config.places(args.store).configuration
    try:
        found = configuration.load(folder)
    except configuration.Problems as e:
        out.answer({"ok": False, "problems": e.found}, e.found)
        return out.fail(e)
    names = [str(f) for f in configuration.files(folder)]
    figures = f"{count(len(found.sources), 'source')}, {count(len(found.policies), 'policy', 'policies')}"
    out.answer(
        {"ok": True, "problems": [], "files": names}, [f"{', '.join(names) or 'No file'}: {figures}, no mistakes"]
    )
    if not names:
        out.warn(f"There is no {folder / configuration.FILE}, so nothing is protected")
    return 0


def show(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup config show`."""
    from hvbackup import configuration

    found = configuration.load(config.places(args.store).configuration)
    out.answer(configuration.shape(found), _shown(configuration.lines(found, every=args.all)))
    return 0


def _shown(lines: list[str]) -> Iterator[str]:
    while lines and not lines[-1]:
        lines.pop()
    yield from lines


# -- jobs --------------------------------------------------------------------------------------------------------------------


def _add_jobs(verbs: Verbs) -> None:
    verb = add_verb(verbs, "jobs", "what the service does, and what became of it")
    verb.add_argument("job", nargs="?", default="", metavar="JOB", help="this one, with its log")
    verb.add_argument("--cancel", action="store_true", help="end it; what it committed stays")
    verb.add_argument("--all", action="store_true", help="ended ones too, not only the newest")
    verb.set_defaults(run=jobs)


def jobs(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup jobs [JOB]`: asks the service, or looks where it keeps them when none runs."""
    from hvbackup.cli import local

    if args.cancel and not args.job:
        raise UsageError("Say which job to cancel")
    places = config.places(args.store)
    if args.cancel:
        found = local.ask(places, "DELETE", f"/api/v1/jobs/{args.job}")
        if found is None:
            raise UsageError("No service runs here, so there is nobody to end a job; stop its process")
        out.answer(found, [f"Job {args.job} ends"])
        return 0
    if args.job:
        one = local.job(places, args.job)
        out.answer(one, [*_job_lines(one), *one.get("log", "").splitlines()])
        return 0
    listed = local.jobs(places, 10_000 if args.all else 30)
    rows = [_job_row(j) for j in listed]
    out.answer({"jobs": listed}, table(("JOB", "STATE", "WHAT", "OF", "BEGAN", ""), rows))
    return 0


def _job_row(j: dict[str, Any]) -> tuple[str, ...]:
    of = j["machine"]["name"] if j["machine"] else j["policy"] or j["store"] or ""
    return j["id"], j["state"], j["kind"], of, (j["began"] or "")[:19], _far(j)


def _far(j: dict[str, Any]) -> str:
    progress = j["progress"] or {}
    total = progress.get("total_bytes") or 0
    return f"{100 * progress['done_bytes'] // total} %" if total else j["error"] or ""


def _job_lines(j: dict[str, Any]) -> Iterator[str]:
    yield f"{j['id']} {j['kind']}: {j['state']} {_far(j)}".rstrip()
    yield f"  {j['command']}"
