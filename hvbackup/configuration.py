"""The service's configuration: `config.toml` and `conf.d/*.toml`, read strictly.

Every file adds tables; the same table in two files, an unknown key, a wrong kind of value are errors, and all of them are told at
once, each with its file, its table and the nearest valid name.  Every setting has its default here and nowhere else.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hvbackup import bandwidth, schedule
from hvbackup.errors import UsageError
from hvbackup.model import Consistency

FILE, FOLDER = "config.toml", "conf.d"
AUTO = "auto"
T = TypeVar("T")


def setting(
    check: Callable[[Any], Any], default: Any = None, doc: str = "", *, many: bool = False, table: bool = False
) -> Any:
    """A field that the configuration may set; `check` returns the value or raises UsageError."""
    metadata = {"check": check, "doc": doc}
    if many or table:
        return field(default_factory=dict if table else list, metadata=metadata)
    return field(default=default, metadata=metadata)


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str) or any(ord(c) < 32 for c in value):
        raise UsageError("is a text, in quotes, on one line")
    return value


def texts(value: Any) -> list[str]:
    """A list of strings."""
    if not isinstance(value, list):
        raise UsageError('is a list of texts, such as ["web*"]')
    return [text(v) for v in value]


def yes_or_no(value: Any) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise UsageError("is true or false")
    return value


def count(value: Any) -> int:
    """A positive number."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1000:
        raise UsageError("is a number from 1 to 1000")
    return value


def stretch(value: Any) -> str:
    """A stretch of time, as it is written."""
    schedule.stretch(text(value))
    return str(value)


def when(value: Any) -> str:
    """A schedule, as it is written."""
    if text(value):
        schedule.parse(value)
    return str(value)


def rates(value: Any) -> list[str]:
    """Limits of bandwidth, as they are written; the first that holds counts."""
    for rule in texts(value):
        bandwidth.Rule.parse(rule)
    return list(value)


def whole_path(value: Any) -> str:
    """A path from the root."""
    if text(value) and not value.startswith("/"):
        raise UsageError("is a path that begins with /")
    return str(value)


def consistency(value: Any) -> str:
    """What a point must hold."""
    if value not in (AUTO, *Consistency):
        raise UsageError(f"is one of {', '.join((AUTO, *Consistency))}")
    return str(value)


KEPT = ("last", "hourly", "daily", "weekly", "monthly", "yearly", "within")


def keep(value: Any) -> dict[str, Any]:
    """Which points stay: {daily = 7, weekly = 4}."""
    if not isinstance(value, dict):
        raise UsageError("is a table such as {daily = 7, weekly = 4}")
    for rule, n in value.items():
        if rule not in KEPT:
            raise UsageError(f"{rule} is no rule{_nearest(rule, KEPT)}; there are {', '.join(KEPT)}")
        whole = isinstance(n, int) and not isinstance(n, bool) and n > 0
        if not (isinstance(n, str) if rule == "within" else whole or n == "all"):
            raise UsageError(f"{rule} is {'a stretch such as 30d' if rule == 'within' else 'a number above 0, or all'}")
    return value


def security(value: Any) -> str:
    """How a mail server is spoken to."""
    if value not in ("tls", "starttls", "none"):
        raise UsageError("is tls, starttls or none")
    return str(value)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """`[service]`."""

    listen: str = setting(text, "", "HOST:PORT of the API and console; empty: only the local socket")
    certificate: str = setting(text, "", "PEM file; empty: one is made at the first start")
    key: str = setting(text, "", "PEM file of the certificate's private key")
    prune: str = setting(when, "daily", "when policies with `keep` are applied")
    discover: str = setting(stretch, "5m", "how often sources are asked for their machines")
    jobs: int = setting(count, 4, "how many jobs run at once")
    restores: str = setting(whole_path, "", "the folder of restores that are asked for over the API")
    history: str = setting(stretch, "30d", "how long ended jobs are remembered")


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """`[provider]`: who says who somebody is, by OpenID Connect."""

    issuer: str = setting(text, "", "its address; empty: nobody, people have passwords here")
    client: str = setting(text, "", "what it calls us")
    secret_file: str = setting(whole_path, "", "what we prove that with")
    console: str = setting(text, "", "https://HOST:PORT, as browsers reach the console")
    claim: str = setting(text, "preferred_username", "what in its answer is the name of a user")
    label: str = setting(text, "single sign-on", "what it is called on the login page")
    ca: str = setting(whole_path, "", "PEM file of who vouches for its certificate; empty: this system's")


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """`[store.NAME]`."""

    path: str = setting(whole_path, "", "its directory; empty: the default store")
    jobs: int = setting(count, 2, "how many jobs write it at once")
    bandwidth: Sequence[str] = setting(
        rates, many=True, doc='how fast jobs fill it and restores read it: "50M Mon..Fri 08:00-18:00", "200M"'
    )
    check: str = setting(when, "Sun 03:00", "when it is checked; empty: never")
    reclaim: str = setting(when, "daily", "when the room of what was forgotten is freed; empty: never")
    regroup: str = setting(when, "Sat 04:00", "when what was stored over a week ago is compressed harder; empty: never")
    deep_check: str = setting(when, "", "when everything in it is read and verified")


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """`[source.NAME]`."""

    uri: str = setting(text, "", "as for `hvbackup backup`: qemu:/run/vm/qmp.sock")
    name: str = setting(text, "", "what people call its one machine")
    agent: str = setting(text, "", "where its machine's guest agent listens")
    tags: Sequence[str] = setting(texts, many=True, doc="of all its machines")
    jobs: int = setting(count, 1, "how many captures read from it at once")
    bandwidth: Sequence[str] = setting(
        rates, many=True, doc='how fast all of them read from it: "50M Mon..Fri 08:00-18:00", "200M"'
    )


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """`[policy.NAME]`."""

    machines: Sequence[str] = setting(
        texts, many=True, doc='"web1", "web*", "id:...", "tag:prod", "source:kvm1", "!no*"'
    )
    store: str = setting(text, "", "the name of a [store.NAME]; may be left out where there is one")
    protect: bool = setting(yes_or_no, False, "continuously: every moment")
    every: str = setting(stretch, "5s", "between two moments")
    fold: str = setting(stretch, "1h", "between two points of a protected machine")
    window: str = setting(stretch, "24h", "how long moments are kept")
    journal_budget: str = setting(text, "0", "room for moments, for each machine: 10G")
    schedule: str = setting(when, "", "when points are made: daily, Mon..Fri 22:00, 4h")
    rpo: str = setting(stretch, "25h", "the most that may be lost: what is older is late")
    consistency: str = setting(consistency, AUTO, "auto, crash, filesystem, application")
    drill: str = setting(when, "", "when the recovery of each of its machines is rehearsed; empty: never")
    keep: Mapping[str, Any] = setting(keep, table=True, doc="{daily = 7, weekly = 4}; nothing is pruned without")
    spread: str = setting(stretch, "0s", "machines begin within so long of the scheduled time")

    @property
    def is_continuous(self) -> bool:
        """Whether machines have a worker."""
        return self.protect


@dataclass(frozen=True, slots=True)
class MachineSettings:
    """`[machine.NAME]`, by name or id."""

    tags: Sequence[str] = setting(texts, many=True, doc="of this machine")
    unprotected: bool = setting(yes_or_no, False, "on purpose: no alarm")


@dataclass(frozen=True, slots=True)
class NotifySettings:
    """`[notify.NAME]`."""

    kind: str = setting(text, "", "mail, webhook or syslog")
    server: str = setting(text, "", "of mail: HOST:PORT")
    security: str = setting(security, "none", "of mail: tls, starttls or none")
    user: str = setting(text, "", "of mail")
    password_file: str = setting(text, "", "of mail")
    sender: str = setting(text, "", "of mail")
    to: Sequence[str] = setting(texts, many=True, doc="of mail")
    url: str = setting(text, "", "of a webhook")
    secret_file: str = setting(text, "", "of a webhook: what signs it")


@dataclass(frozen=True, slots=True)
class Configuration:
    """The whole configuration."""

    service: ServiceSettings = field(default_factory=ServiceSettings)
    provider: ProviderSettings = field(default_factory=ProviderSettings)
    stores: Mapping[str, StoreSettings] = field(default_factory=dict)
    sources: Mapping[str, SourceSettings] = field(default_factory=dict)
    policies: Mapping[str, PolicySettings] = field(default_factory=dict)
    machines: Mapping[str, MachineSettings] = field(default_factory=dict)
    notify: Mapping[str, NotifySettings] = field(default_factory=dict)

    def store_of(self, policy: PolicySettings) -> str:
        """The name of a policy's store."""
        return policy.store or next(iter(self.stores))


SINGLE: Mapping[str, type[Any]] = {"service": ServiceSettings, "provider": ProviderSettings}
NAMED: Mapping[str, type[Any]] = {
    "store": StoreSettings,
    "source": SourceSettings,
    "policy": PolicySettings,
    "machine": MachineSettings,
    "notify": NotifySettings,
}
PLURAL = {"store": "stores", "source": "sources", "policy": "policies", "machine": "machines", "notify": "notify"}


class Problems(UsageError):
    """The configuration can't be used; `found` has a line for each reason."""

    def __init__(self, found: Sequence[str]) -> None:
        self.found = list(found)
        more = f" (and {len(found) - 1} more; `hvbackup config check` lists all)" if len(found) > 1 else ""
        super().__init__(f"{found[0]}{more}")


@dataclass(slots=True)
class _Reading:
    """Tables as they are found, and what is wrong with them."""

    single: dict[str, Any] = field(default_factory=dict)
    named: dict[str, dict[str, Any]] = field(default_factory=lambda: {kind: {} for kind in NAMED})
    came_from: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def load(configuration: Path) -> Configuration:
    """The configuration in a directory; without any file, the defaults.  Raises Problems."""
    reading = _Reading()
    for path in files(configuration):
        _read(reading, path)
    tables: dict[str, Any] = {PLURAL[kind]: reading.named[kind] for kind in NAMED}
    tables["stores"] = tables["stores"] or {"main": StoreSettings()}
    settings = Configuration(**reading.single, **tables)
    if problems := reading.problems or _cross_checks(settings):  # what is left out by a mistake is no second one
        raise Problems(problems)
    return settings


def files(configuration: Path) -> list[Path]:
    """The files that make up the configuration, in their order."""
    main = [configuration / FILE] if (configuration / FILE).exists() else []
    return [*main, *sorted((configuration / FOLDER).glob("*.toml"))]


def _read(reading: _Reading, path: Path) -> None:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        reading.problems.append(f"{path}: {getattr(e, 'strerror', None) or e}")
        return
    for kind, value in found.items():
        if kind in SINGLE:
            _add(reading, path, f"[{kind}]", SINGLE[kind], value, reading.single, kind)
        elif kind in NAMED and isinstance(value, dict):
            for name, table in value.items():
                _add(reading, path, f"[{kind}.{name}]", NAMED[kind], table, reading.named[kind], name)
        else:
            hint = _nearest(kind, [*SINGLE, *NAMED])
            reading.problems.append(f"{path}: there is no table [{kind}]{hint}")


def _add(
    reading: _Reading, path: Path, where: str, shape: type[Any], table: Any, into: dict[str, Any], name: str
) -> None:
    if where in reading.came_from:
        reading.problems.append(f"{path}: {where} is in {reading.came_from[where]} already")
        return
    reading.came_from[where] = str(path)
    if not isinstance(table, dict):
        reading.problems.append(f"{path}: {where} is a table")
        return
    known = {f.name: f for f in fields(shape)}
    values = {}
    for key, value in table.items():
        try:
            if key not in known:
                raise UsageError(f"is unknown{_nearest(key, known)}; there are {', '.join(known)}")
            values[key] = known[key].metadata["check"](value)
        except UsageError as e:
            reading.problems.append(f"{path}: {where} {key}: {e}")
    into[name] = shape(**values)


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _cross_checks(s: Configuration) -> list[str]:
    found = [f"[source.{n}] has no uri" for n, source in s.sources.items() if not source.uri]
    if s.provider != ProviderSettings():
        found += [
            f"[provider] has no {what}"
            for what in ("issuer", "client", "secret_file", "console")
            if not getattr(s.provider, what)
        ]
        for what in ("issuer", "console"):
            if (value := getattr(s.provider, what)) and not value.startswith(
                ("https://", "http://localhost", "http://127.0.0.1")
            ):
                found.append(f"[provider] {what} is an address that begins with https://")
        if s.provider.console.endswith("/"):
            found.append("[provider] console ends without a slash")
    for name, policy in s.policies.items():
        where = f"[policy.{name}]"
        if not policy.machines:
            found.append(f'{where} names no machines; machines = ["*"] is all of them')
        if policy.store and policy.store not in s.stores:
            found.append(f"{where} store: there is no [store.{policy.store}]{_nearest(policy.store, s.stores)}")
        if not policy.store and len(s.stores) > 1:
            found.append(f"{where} does not say which store; there are {', '.join(s.stores)}")
        if policy.protect and policy.schedule:
            found.append(f"{where} has protect and schedule: a protected machine gets its points by fold")
        if schedule.stretch(policy.fold) < schedule.stretch(policy.every):
            found.append(f"{where} fold is shorter than every")
    for name, one in s.notify.items():
        needs = {"mail": ("server", "sender", "to"), "webhook": ("url",), "syslog": ()}
        if one.kind not in needs:
            found.append(f"[notify.{name}] kind is mail, webhook or syslog")
        found += [f"[notify.{name}] has no {key}" for key in needs.get(one.kind, ()) if not getattr(one, key)]
    if bool(s.service.certificate) != bool(s.service.key):
        found.append("[service] certificate and key belong together")
    return found


def shape(settings: Configuration) -> dict[str, Any]:
    """Everything with its defaults, as JSON."""
    found = asdict(settings)
    return {"service": found["service"], **{kind: found[PLURAL[kind]] for kind in NAMED}}


def lines(settings: Configuration, *, every: bool) -> list[str]:
    """The configuration as a file that means the same; with `every`, defaults too."""
    tables = [("[service]", settings.service)]
    for kind in NAMED:
        for name, value in getattr(settings, PLURAL[kind]).items():
            plain = name if name.replace("-", "").replace("_", "").isalnum() else _toml(name)
            tables.append((f"[{kind}.{plain}]", value))
    found: list[str] = []
    for head, value in tables:
        assert is_dataclass(value)
        default = type(value)()
        rows = [(f.name, getattr(value, f.name), getattr(default, f.name), f.metadata["doc"]) for f in fields(value)]
        shown = [f"{key} = {_toml(v)}" + (f"  # {doc}" if every else "") for key, v, d, doc in rows if every or v != d]
        found += [head, *shown, ""]
    return found


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k} = {_toml(v)}' for k, v in value.items())}}}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
