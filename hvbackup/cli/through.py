"""Commands that the service of this host does for us, where it knows what they are about: it keeps its limits, and the console
shows them.  Everything else, and everything where no service runs, is done here.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hvbackup import config
from hvbackup.cli import local
from hvbackup.cli.output import Out, size
from hvbackup.cli.progress import Progress
from hvbackup.config import Places
from hvbackup.errors import HvbackupError

ALONE = "HVBACKUP_ALONE"  # set in processes of the service, which would else ask it to do what it has asked them to do
LOOK_SECONDS = 0.3
COUNTED = ("last", "hourly", "daily", "weekly", "monthly", "yearly")  # rules of `prune` that are numbers
PLAIN = ("source", "only", "full", "consistency", "name")  # of `backup`: what the service can be told


def summary(args: argparse.Namespace) -> dict[str, Any] | None:
    """How the service says that machines stand, or None where none runs for this store."""
    places = config.places(args.store)
    found = _ask(places, "GET", "/api/v1/status")
    return found if found is not None and _store(places) is not None else None


def backup(args: argparse.Namespace, out: Out) -> int | None:
    """The exit code of a backup that the service has made, or None: it is not for the service."""
    if len(args.source) != 1 or args.dry_run or _odd(args):
        return None
    places = config.places(args.store)
    if _store(places) is None:
        return None
    sources = (_ask(places, "GET", "/api/v1/configuration") or {}).get("source", {})
    names = [n for n, s in sources.items() if s["uri"] == args.source[0] and args.name in ("", s["name"])]
    listed = (_ask(places, "GET", "/api/v1/machines?count=1000") or {}).get("machines", [])
    chosen = [m for m in listed if m["source"] in names and (not args.only or {m["id"], m["name"]} & set(args.only))]
    if not chosen or len(chosen) < len(args.only):
        return None
    order = {"full": args.full, "consistency": args.consistency}
    made = [local.ask(places, "POST", f"/api/v1/machines/{m['key']}/backup", order) for m in chosen]
    done = _followed(places, [job["id"] for job in made], out)
    runs = [run for job in done for run in (job["answer"] or {}).get("runs", [])]
    worst = max((r["status"] for r in runs), key=("ok", "degraded", "failed").index, default="failed")
    wrong = next((job["answer"]["error"] for job in done if (job["answer"] or {}).get("error")), None)
    shown = {"status": worst, "runs": runs, "jobs": [job["id"] for job in done]} | ({"error": wrong} if wrong else {})
    out.answer(shown, _lines(runs))
    return _ended(done, out)


def prune(args: argparse.Namespace, out: Out) -> tuple[dict[str, Any], int] | None:
    """What a prune by the service came to, and its exit code; None: it is not for the service.

    Whoever approves must be somebody else than who asked, so a service of another user does not ask for us.
    """
    places = config.places(args.store)
    if args.dry_run or args.key_file or args.passphrase_file or not local.is_ours(places):
        return None
    store = _store(places)
    if store is None:
        return None
    keep = {n: "all" if v < 0 else v for n in COUNTED if (v := getattr(args, f"keep_{n}"))}
    order = {
        "machines": args.machine, "keep": keep, "within": args.keep_within, "tags": args.keep_tag, "zone": args.zone,
        "count": args.count, "group_by": args.group_by, "wait_seconds": args.wait,
    }  # fmt: skip
    made = local.ask(places, "POST", f"/api/v1/stores/{quote(store, safe='')}/prune", order)
    done = _followed(places, [made["id"]], out)
    answer = done[0]["answer"] if isinstance(done[0]["answer"], dict) else {}
    return {**answer, "jobs": [made["id"]]}, _ended(done, out)


def _odd(args: argparse.Namespace) -> bool:
    """Whether something was asked for that only we can do."""
    shared = {"store", "json", "quiet", "strict", "key_file", "passphrase_file", "verb", "run", "build", "dry_run"}
    plain = {"hook_timeout": 60.0}
    rest = {k: v for k, v in vars(args).items() if k not in shared and k not in PLAIN and plain.get(k) != v}
    return any(rest.values()) or bool(args.key_file or args.passphrase_file)


def _store(places: Places) -> str | None:
    """What the service of this host calls this store, or None: it does not keep it."""
    found = _ask(places, "GET", "/api/v1/stores") or {"stores": []}
    return next((s["name"] for s in found["stores"] if Path(s["path"]) == places.store and not s["error"]), None)


def _ask(places: Places, method: str, path: str) -> Any:
    """What the service says; None where none runs, or it does not answer: then we do without it."""
    if os.environ.get(ALONE):
        return None
    try:
        return local.ask(places, method, path)
    except (HvbackupError, OSError):
        return None


def _followed(places: Places, ids: Sequence[str], out: Out) -> list[dict[str, Any]]:
    """The jobs, once all of them have ended; they end with us when we are interrupted."""
    ended: dict[str, dict[str, Any]] = {}
    try:
        with Progress(out) as progress:
            while len(ended) < len(ids):
                for id_ in ids:
                    job = local.ask(places, "GET", f"/api/v1/jobs/{id_}") if id_ not in ended else None
                    if job is None:
                        continue
                    if job["ended"]:
                        ended[id_] = job
                    elif job["progress"]:
                        p = job["progress"]
                        progress(str(p.get("what", job["kind"])), p["done_bytes"], p["total_bytes"])
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        for id_ in ids:
            if id_ not in ended:
                _ask(places, "DELETE", f"/api/v1/jobs/{id_}")
        raise
    return [ended[id_] for id_ in ids]


def _lines(runs: Iterable[dict[str, Any]]) -> Iterable[str]:
    for run in runs:
        if point := run.get("point"):
            name, figures = run["machine"]["name"], run["figures"]
            yield f"{name}: point {point['id']} of {point['time'][:19]}Z, {point['consistency']}-consistent, by the service"
            yield f"  read {size(figures['read_bytes'])}, new {size(figures['new_bytes'])}"


def _ended(jobs: Sequence[dict[str, Any]], out: Out) -> int:
    for job in jobs:
        for run in (job["answer"] or {}).get("runs", []):
            out.warn_all(run.get("notes") or [])
        if job["error"]:
            out.error(HvbackupError(job["error"]))
    return max(job["exit_code"] if job["exit_code"] is not None else 1 for job in jobs)
