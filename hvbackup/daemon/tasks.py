"""What is due, as tasks for jobs: captures by their policies, and the upkeep of stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo

from hvbackup import schedule
from hvbackup.configuration import PolicySettings, SourceSettings, StoreSettings
from hvbackup.daemon.rows import Row
from hvbackup.jobs import Jobs, State, Task
from hvbackup.model import Instant
from hvbackup.notify import Alarm
from hvbackup.schedule import Past
from hvbackup.service.estate import Known

GOOD = (State.DONE, State.DEGRADED)


@dataclass(frozen=True, slots=True)
class History:
    """What jobs say of one task's past."""

    past: Past
    open: str = ""  # the job that waits or runs
    failure: str = ""  # why the newest one failed
    last_run_ns: int = 0  # how long the newest good one took
    state: State | None = None  # of the newest that came to an end by itself


def past_of(jobs: Jobs, subject: str, kind: str) -> History:
    """The jobs of one machine (or store) and kind, summed up."""
    mine = [j for j in jobs.of(subject) if j.task.kind == kind]  # newest first
    open_ = next((j.id for j in mine if j.state.is_open), "")
    ended = [j for j in mine if not j.state.is_open and j.state is not State.CANCELLED]
    good = next((j for j in ended if j.state in GOOD), None)
    failures = ended[: ended.index(good)] if good else ended
    newest = ended[0] if ended else None
    past = Past(
        began=newest.began if newest else 0,
        ended=newest.ended if newest else 0,
        succeeded=good.began if good else 0,
        failures=len(failures),
    )
    run = good.ended - good.began if good else 0
    return History(past, open_, failures[0].error if failures else "", run, newest.state if newest else None)


def next_backup(
    policy: PolicySettings, machine: str, history: History, known: Known | None, now: Instant, zone: tzinfo
) -> int:
    """When the machine is to be captured next.  A point that somebody made by hand counts."""
    when = (
        schedule.parse(policy.schedule)
        if policy.schedule
        else schedule.interval_for(schedule.stretch(policy.rpo), history.last_run_ns)
    )
    past, newest = history.past, int(known.times[-1]) if known else 0
    if newest > past.succeeded:
        past = Past(max(past.began, newest), past.ended, newest, 0 if newest > past.ended else past.failures)
    return schedule.due(when, past, now, zone, schedule.stretch(policy.spread), machine)


def only(source: SourceSettings, machine: str) -> list[str]:
    """The options that choose one machine of a source."""
    return [f"--only={machine}", *([f"--name={source.name}"] if source.name else [])]


def rhythm(policy: PolicySettings) -> list[str]:
    """The options of `protect`."""
    return [f"--every={policy.every}", f"--fold={policy.fold}", f"--window={policy.window}",
            f"--journal-budget={policy.journal_budget}"]  # fmt: skip


def backup(r: Row, policy: PolicySettings, source: SourceSettings, store_words: Sequence[str]) -> Task:
    """A capture of one machine."""
    words = ["backup", source.uri, *only(source, r.id), f"--consistency={policy.consistency}", *store_words]
    words += [f"--agent={source.agent}"] if source.agent else []
    return Task("backup", words, r.store, r.source, r.id, r.name, r.policy)


def upkeep(
    jobs: Jobs, name: str, store: StoreSettings, store_words: Sequence[str], now: Instant, zone: tzinfo
) -> list[Task]:
    """What a store needs now."""
    found = []
    for kind, when, words in (
        ("check", store.check, ["check"]),
        ("deep check", store.deep_check, ["check", "--deep"]),
        ("reclaim", store.reclaim, ["reclaim"]),
        ("regroup", store.regroup, ["regroup"]),
    ):
        history = past_of(jobs, name, kind)
        if when and not history.open and _is_due(when, history.past, now, zone, name):
            found.append(Task(kind, [*words, *store_words], name))
    return found


def prune(policy_name: str, policy: PolicySettings, machines: Sequence[str], store: str, words: Sequence[str]) -> Task:
    """Forget what the rules of a policy do not keep, of all its machines."""
    rules = [f"--keep-{rule}={n}" for rule, n in policy.keep.items()]
    return Task("prune", ["prune", *rules, *words, "--", *machines], store, policy=policy_name)


def drill(r: Row, words: Sequence[str]) -> Task:
    """Rehearse the recovery of one machine."""
    return Task("drill", ["drill", *words, "--", r.id], r.store, machine=r.id, name=r.name)


def drill_alarm(jobs: Jobs, r: Row) -> Alarm | None:
    """A recovery that was rehearsed in vain."""
    history = past_of(jobs, r.id, "drill")
    text = f"its recovery could not be rehearsed: {history.failure}"
    return Alarm(f"drill:{r.id}", "critical", r.name, text, "hvbackup check --deep") if history.past.failures else None


def is_due(jobs: Jobs, subject: str, kind: str, when: str, now: Instant, zone: tzinfo) -> bool:
    """Whether a task of no single machine is to begin now."""
    history = past_of(jobs, subject, kind)
    return bool(when) and not history.open and _is_due(when, history.past, now, zone, subject)


def _is_due(when: str, past: Past, now: Instant, zone: tzinfo, key: str) -> bool:
    """What never ran is made up for when it was planned within the last day: a weekly task does not begin with the service."""
    if not past.began:
        day = schedule.stretch("1d")
        return schedule.parse(when).after(Instant(now - day), zone) <= now if when else False
    return schedule.due(schedule.parse(when), past, now, zone, 0, key) <= now


def upkeep_alarms(jobs: Jobs, stores: Mapping[str, StoreSettings]) -> list[Alarm]:
    """Checks that found damage, or could not be made."""
    found = []
    for name in stores:
        for kind in ("check", "deep check", "reclaim", "regroup"):
            history = past_of(jobs, name, kind)
            if history.past.failures:
                text = f"its {kind} failed: {history.failure}"
                found.append(Alarm(f"{kind}:{name}", "critical", f"store {name}", text, "hvbackup check"))
    return found
