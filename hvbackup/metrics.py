"""Metrics in Prometheus' text format: names, meanings, and nothing else; whoever knows the figures fills in the values.

Seconds and bytes are base units, as Prometheus wants them; `docs/metrics.md` lists all names.  Format: Prometheus exposition
format 0.0.4, https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class MachineSample:
    """One machine as it stands; what is not known is None, and is left out."""

    id: str
    name: str
    points: int = 0
    point_age_seconds: float | None = None
    rpo_target_seconds: float | None = None
    journal_lag_seconds: float | None = None  # behind the machine, now
    journal_bytes: int | None = None
    recording: bool | None = None  # under continuous protection, by a living worker
    paused: bool = False
    covered: bool | None = None  # some policy protects it
    run_seconds: float | None = None  # of its newest run
    run_status: int | None = None  # 0 ok, 1 degraded, 2 failed
    drill_age_seconds: float | None = None
    drill_rto_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class StoreSample:
    """One store."""

    name: str
    bytes: Mapping[str, int] = field(default_factory=dict)  # by kind: packs, journals, points, ...
    free_bytes: int | None = None
    check_age_seconds: float | None = None
    verify_debt_bytes: int | None = None
    damaged: int | None = None  # chunks and files that the last check found damaged or missing


@dataclass(frozen=True, slots=True)
class ServiceSample:
    """The service."""

    version: str
    jobs: Mapping[str, int] = field(default_factory=dict)  # by state
    alarms: Mapping[str, int] = field(default_factory=dict)  # raised now, by kind
    source_up: Mapping[str, bool] = field(default_factory=dict)  # by source


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    help: str
    samples: Iterable[tuple[str, float | int | bool | None]]  # labels as they are written


def exposition(service: ServiceSample, stores: Sequence[StoreSample], machines: Sequence[MachineSample]) -> str:
    """The whole answer to a scrape."""
    return "".join(line for family in _families(service, stores, machines) for line in _lines(family))


def _families(
    service: ServiceSample, stores: Sequence[StoreSample], machines: Sequence[MachineSample]
) -> Iterator[_Family]:
    labels = [_labels(machine=m.name, id=m.id) for m in machines]  # once: a thousand machines have a dozen metrics each

    def each(attribute: str) -> Iterator[tuple[str, float | None]]:
        for written, m in zip(labels, machines, strict=True):
            yield written, getattr(m, attribute)

    yield _Family("hvbackup_build_info", "The version that runs.", [(_labels(version=service.version), 1)])
    for name, attribute, text in _OF_MACHINES:
        yield _Family(name, text, each(attribute))
    for name, label, values, text in (
        ("hvbackup_jobs", "state", service.jobs, "Jobs, by state."),
        ("hvbackup_alarms", "kind", service.alarms, "Alarms that are raised now, by kind."),
        ("hvbackup_source_up", "source", service.source_up, "Whether the source answered when it was asked last."),
    ):
        yield _Family(name, text, [(_labels(**{label: key}), value) for key, value in sorted(values.items())])
    kinds = [(_labels(store=s.name, kind=k), n) for s in stores for k, n in sorted(s.bytes.items())]
    yield _Family("hvbackup_store_bytes", "Room the store takes, by kind of file.", kinds)
    for name, attribute, text in _OF_STORES:
        yield _Family(name, text, [(_labels(store=s.name), getattr(s, attribute)) for s in stores])


_OF_STORES = (
    ("hvbackup_store_free_bytes", "free_bytes", "Room that is left where the store is."),
    ("hvbackup_check_age_seconds", "check_age_seconds", "Since the store was last checked."),
    ("hvbackup_verify_debt_bytes", "verify_debt_bytes", "Stored bytes that nobody verified for too long."),
    ("hvbackup_damaged", "damaged", "Chunks and files that the last check found damaged or missing."),
)
_OF_MACHINES = (
    ("hvbackup_points", "points", "Recovery points of the machine."),
    ("hvbackup_point_age_seconds", "point_age_seconds", "Age of the newest recovery point."),
    ("hvbackup_rpo_target_seconds", "rpo_target_seconds", "The loss that the machine's policy allows."),
    ("hvbackup_journal_lag_seconds", "journal_lag_seconds", "How far the newest moment is behind the machine."),
    ("hvbackup_journal_bytes", "journal_bytes", "Room the machine's journal takes."),
    ("hvbackup_recording", "recording", "Whether a living worker records every moment of the machine."),
    ("hvbackup_paused", "paused", "Whether an administrator has paused the machine's protection."),
    ("hvbackup_covered", "covered", "Whether a policy protects the machine."),
    ("hvbackup_run_seconds", "run_seconds", "How long the machine's newest run took."),
    ("hvbackup_run_status", "run_status", "How it ended: 0 ok, 1 degraded, 2 failed."),
    ("hvbackup_drill_age_seconds", "drill_age_seconds", "Since a recovery of the machine was last rehearsed."),
    ("hvbackup_drill_rto_seconds", "drill_rto_seconds", "How long that recovery took."),
)


def names() -> list[str]:
    """Every metric there is."""
    return [family.name for family in _families(ServiceSample(""), [], [])]


def _lines(family: _Family) -> Iterator[str]:
    known = [(labels, value) for labels, value in family.samples if value is not None]
    if not known:
        return
    yield f"# HELP {family.name} {family.help}\n# TYPE {family.name} gauge\n"
    for labels, value in known:
        yield f"{family.name}{labels} {_number(value)}\n"


def _labels(**labels: str) -> str:
    return "{%s}" % ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())  # noqa: UP031


def _escaped(text: str) -> str:
    """A label's value: names come from guests and hosts."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float | int | bool) -> str:
    return str(int(value)) if isinstance(value, bool | int) else repr(round(value, 6))
