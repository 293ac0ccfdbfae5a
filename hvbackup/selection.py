"""Which policy a machine has.  Pure.

Of several policies that name a machine, the one that names it most closely counts: its own name or id before a tag or a source,
those before a pattern, any pattern before `*`.  Where two name it alike, the one with the shorter RPO protects it, and that is
said: a machine is never left alone because somebody wrote one line too many.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from hvbackup import schedule
from hvbackup.configuration import Configuration, PolicySettings

EXACT, GROUPED, PATTERN, ALL = 3, 2, 1, 0


@dataclass(frozen=True, slots=True)
class Found:
    """A machine that a source has."""

    id: str
    name: str
    source: str
    tags: Collection[str] = ()
    platform: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A machine, and the policy it has; None: nobody protects it."""

    machine: Found
    policy: str | None
    unprotected_on_purpose: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """Every machine with its policy, and what is odd about it."""

    chosen: Sequence[Chosen] = ()
    warnings: Sequence[str] = field(default_factory=list)


def closeness(policy: PolicySettings, machine: Found) -> int | None:
    """How closely a policy names a machine; None when it does not, or leaves it out."""
    best: int | None = None
    for word in policy.machines:
        if word.startswith("!"):
            if _fits(word[1:], machine) is not None:
                return None
        elif (fits := _fits(word, machine)) is not None:
            best = fits if best is None else max(best, fits)
    return best


def _fits(word: str, machine: Found) -> int | None:
    kind, colon, rest = word.partition(":")
    if colon and kind in ("id", "tag", "source"):
        known = {"id": {machine.id}, "tag": set(machine.tags), "source": {machine.source}}[kind]
        return (EXACT if kind == "id" else GROUPED) if rest in known else None
    if word == "*":
        return ALL
    if word in (machine.name, machine.id):
        return EXACT
    return PATTERN if fnmatch.fnmatchcase(machine.name, word) else None


def select(settings: Configuration, machines: Sequence[Found]) -> Selection:
    """Every machine with its policy."""
    warnings: list[str] = []
    tagged = [_tagged(settings, m) for m in machines]
    chosen = [_one(settings.policies, m, warnings, settings) for m in tagged]
    for name, policy in settings.policies.items():
        if not any(closeness(policy, m) is not None for m in tagged):
            warnings.append(f"Policy {name} matches no machine")
    ids = [m.id for m in tagged]
    for machine in tagged:
        if ids.count(machine.id) > 1 and machine.source == next(m for m in tagged if m.id == machine.id).source:
            several = ", ".join(sorted({m.source for m in tagged if m.id == machine.id}))
            warnings.append(f"Machine {machine.name} ({machine.id}) is found by more than one source: {several}")
    return Selection(chosen, list(dict.fromkeys(warnings)))


def _tagged(settings: Configuration, machine: Found) -> Found:
    """With the tags that the configuration gives it."""
    tags = {*machine.tags}
    if machine.source in settings.sources:
        tags.update(settings.sources[machine.source].tags)
    for key in (machine.name, machine.id):
        if key in settings.machines:
            tags.update(settings.machines[key].tags)
    return Found(machine.id, machine.name, machine.source, tuple(sorted(tags)), machine.platform)


def _one(policies: Mapping[str, PolicySettings], m: Found, warnings: list[str], settings: Configuration) -> Chosen:
    ranked = [(c, name) for name, policy in policies.items() if (c := closeness(policy, m)) is not None]
    on_purpose = any(settings.machines[k].unprotected for k in (m.name, m.id) if k in settings.machines)
    if not ranked:
        return Chosen(m, None, on_purpose)
    best = max(c for c, _ in ranked)
    alike = [name for c, name in ranked if c == best]
    first = min(alike, key=lambda name: schedule.stretch(policies[name].rpo))
    if len(alike) > 1:
        others = ", ".join(sorted(set(alike) - {first}))
        warnings.append(
            f"Machine {m.name} is named alike by policies {first} and {others}; {first} protects it, whose RPO is the "
            "shortest; say which is meant by the machine's own name"
        )
    return Chosen(m, first)
