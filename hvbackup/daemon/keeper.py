"""The keeper: the loop that finds machines, keeps workers, begins what is due and says what is wrong.

It decides from what it can see (configuration, sources, stores, jobs, workers' notes) and keeps nothing of its own that matters:
killed at any moment and started again, it goes on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import tzinfo
from pathlib import Path

from hvbackup import bandwidth, configuration, schedule, selection
from hvbackup.config import KeyOptions, Places, private
from hvbackup.configuration import Configuration
from hvbackup.daemon import channels, rows, tasks
from hvbackup.daemon.discovery import Discovery
from hvbackup.daemon.questions import Questions
from hvbackup.daemon.rows import Row
from hvbackup.daemon.workers import Wanted, Workers
from hvbackup.errors import HvbackupError
from hvbackup.jobs import Jobs, Limits, State, Task
from hvbackup.model import SECOND, Instant, MachineId
from hvbackup.notify import Alarm, Message, Quiet, send_all
from hvbackup.selection import Chosen
from hvbackup.service.estate import Estate
from hvbackup.service.session import Session
from hvbackup.zone import local_zone

WORKERS_SECONDS = 2.0  # between two looks at the workers
ESTATE_SECONDS = 5.0  # and at the stores
ALARM_SECONDS = 10.0
DRILLS_SECONDS = 20.0
FORGET_SECONDS = 3600.0
OPEN_AGAIN_SECONDS = 30.0  # a store that could not be opened
LOW_SPACE_SHARE = 0.05
log = logging.getLogger("hvbackup")


def wall_clock() -> Instant:
    """Time comes in here and nowhere below."""
    return Instant(time.time_ns())


@dataclass(slots=True)
class Opened:
    """A store of the configuration."""

    session: Session
    estate: Estate | None = None
    error: str = ""
    tried: float = -1e9


class Keeper:
    """Keeps every machine protected.  Thread safety: `step`, `reload` and `close` on one thread, the rest from any."""

    def __init__(
        self, places: Places, keys: KeyOptions, clock: Callable[[], Instant] = wall_clock, zone: tzinfo | None = None
    ) -> None:
        self.places, self.keys, self.clock, self.zone = places, keys, clock, zone or local_zone()
        self.settings: Configuration = configuration.load(places.configuration)
        self.reload_error = ""
        self.environment = _environment(places)
        self.jobs = Jobs(places.state / "jobs", clock, self.environment)
        self.workers = Workers(places, self.environment)
        self.questions = Questions(self.environment)
        self.stores = self._sessions()
        first = self.store_words(next(iter(self.settings.stores)))
        self.discovery = Discovery(first, self.environment, kept=places.state / "machines.json")
        self.selection = selection.select(self.settings, self.discovery.machines)
        self.alarms: Sequence[Alarm] = ()
        self._rows: Sequence[Row] = ()
        self._keys: dict[tuple[str, str], str] = {}  # of each store's machines, by their ids
        self._quiet = Quiet()
        self._notify_errors: dict[str, str] = {}
        self._first_seen: dict[str, int] = {}
        self._next: dict[str, float] = {}
        self._sending: threading.Thread | None = None
        self._tell_limits()

    def _tell_limits(self) -> None:
        """Every process of ours, old or new, keeps to the configured bandwidth soon after this returns."""
        s = self.settings
        stores = {str(Path(v.path) if v.path else self.places.store): v.bandwidth for v in s.stores.values()}
        private(self.places.run)
        bandwidth.write_rules(self.places.run, {v.uri: v.bandwidth for v in s.sources.values()}, stores)

    def _sessions(self) -> dict[str, Opened]:
        return {
            name: Opened(Session(replace(self.places, store=Path(s.path) if s.path else self.places.store), self.keys))
            for name, s in self.settings.stores.items()
        }

    def store_words(self, store: str) -> list[str]:
        """How a command is told which store."""
        words = [f"--store={self.stores[store].session.places.store}"] if store in self.stores else []
        words += [f"--key-file={self.keys.key_file}"] if self.keys.key_file else []
        return words + ([f"--passphrase-file={self.keys.passphrase_file}"] if self.keys.passphrase_file else [])

    # -- the loop ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Everything that is due has begun when this returns; it waits for nobody."""
        s = self.settings
        if self._is_due("estate", ESTATE_SECONDS):
            self.refresh()
        found = self.discovery.step(s.sources, schedule.stretch(s.service.discover) / SECOND)
        if found or not self.selection.chosen:
            self.selection = selection.select(s, self.discovery.machines)
            self.refresh()
        if self._is_due("workers", WORKERS_SECONDS):
            self.workers.step(self._wanted())
        self._begin_what_is_due()
        if self._is_due("drills", DRILLS_SECONDS):
            self._begin_drills()
        for job in self.jobs.step(self._limits()):
            self._log_job(job.id)
            self.refresh()
        if self._is_due("forget", FORGET_SECONDS):
            self.jobs.forget(schedule.stretch(s.service.history))
        if self._is_due("alarms", ALARM_SECONDS):
            self._alarm()

    def _is_due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._next.get(what, 0.0):
            return False
        self._next[what] = now + seconds
        return True

    def reload(self) -> bool:
        """The new configuration holds when this returns; a broken one changes nothing, and is an alarm."""
        try:
            new = configuration.load(self.places.configuration)
        except HvbackupError as e:
            self.reload_error = str(e)
            log.error("The configuration was not reloaded, the old one stays: %s", e)
            return False
        self.settings, self.reload_error = new, ""
        self._tell_limits()
        for opened in self.stores.values():
            if opened.estate:
                opened.estate.store.close()
        self.stores = self._sessions()
        self.discovery.store_words = self.store_words(next(iter(new.stores)))
        self.discovery.ask_all()
        self.selection = selection.select(new, self.discovery.machines)
        self.refresh()
        log.info("The configuration was reloaded")
        return True

    def close(self) -> None:
        """Workers and jobs go on; nothing else of us is left."""
        self.questions.close()
        self.discovery.close()
        for opened in self.stores.values():
            if opened.estate:
                opened.estate.store.close()

    # -- what there is -------------------------------------------------------------------------------------------------

    def rows(self) -> Sequence[Row]:
        """Every machine, as of the newest look."""
        return self._rows

    def estate(self, store: str) -> Estate:
        """The machines of a store.  Raises HvbackupError when it can't be opened."""
        opened = self.stores[store]
        if opened.estate is None:
            raise HvbackupError(opened.error or f"Store {store} is not open yet")
        return opened.estate

    def look_again(self, store: str) -> None:
        """A store that could not be opened is tried again at the next look."""
        self.stores[store].tried = -1e9

    def refresh(self) -> None:
        """Rows are up to date when this returns."""
        for name, opened in self.stores.items():
            self._open(name, opened)
            if opened.estate:
                try:
                    opened.estate.refresh()
                except (HvbackupError, OSError) as e:
                    opened.estate, opened.error = None, str(e)
        self._rows = self._made_rows()

    def _open(self, name: str, opened: Opened) -> None:
        if opened.estate or time.monotonic() - opened.tried < OPEN_AGAIN_SECONDS:
            return
        opened.tried = time.monotonic()
        try:
            opened.estate, opened.error = Estate(opened.session.open()), ""
        except HvbackupError as e:
            opened.error = f"Store {name}: {e}"

    def _made_rows(self) -> list[Row]:
        now = self.clock()
        made = [r for c in self.selection.chosen if (r := self._row(c, now))]
        present = {(r.store, r.key) for r in made}
        for store, opened in self.stores.items():
            known = opened.estate.all() if opened.estate else []
            heard = self.discovery.watchers.heard
            made += [rows.gone(k, store, now, heard.get(k.id)) for k in known if (store, k.key) not in present]
        return sorted(made, key=lambda r: (r.name, r.id))

    def _row(self, chosen: Chosen, now: Instant) -> Row | None:
        policy = self.settings.policies.get(chosen.policy or "")
        store = self.settings.store_of(policy) if policy else next(iter(self.stores))
        estate = self.stores[store].estate if store in self.stores else None
        if estate is None:
            return None
        m = chosen.machine
        key = self._keys[store, m.id] = estate.store.ring.machine_name(MachineId(m.id))
        known, note = estate.of(m.id), self.workers.note(key)
        past = tasks.past_of(self.jobs, m.id, "backup")
        seen = self._first_seen.setdefault(m.id, now)
        due = tasks.next_backup(policy, m.id, past, known, now, self.zone) if policy and not policy.protect else 0
        return rows.row(
            chosen,
            policy,
            store,
            key,
            known,
            note,
            past.failure if past.past.failures else "",
            seen,
            now,
            due,
            past.open,
            self.discovery.watchers.heard.get(m.id),
        )

    def _wanted(self) -> dict[str, Wanted]:
        """Who is to have a worker, also where the store can't be looked at now."""
        s, found = self.settings, {}
        for c in self.selection.chosen:
            policy, source = s.policies.get(c.policy or ""), s.sources.get(c.machine.source)
            if policy and policy.protect and source:
                store = s.store_of(policy)
                if key := self._keys.get((store, c.machine.id)):
                    words = [source.uri, *tasks.only(source, c.machine.id), *tasks.rhythm(policy)]
                    found[key] = Wanted(key, ["protect", *words, *self.store_words(store)])
        return found

    # -- what is due ---------------------------------------------------------------------------------------------------

    def _limits(self) -> Limits:
        s = self.settings
        stores, sources = {n: v.jobs for n, v in s.stores.items()}, {n: v.jobs for n, v in s.sources.items()}
        return Limits(s.service.jobs, stores, sources)

    def _begin_what_is_due(self) -> None:
        now = self.clock()
        begun = False
        for r in self._rows:
            policy, source = self.settings.policies.get(r.policy), self.settings.sources.get(r.source)
            if policy and source and r.next_due and r.next_due <= now and not r.open_job:
                self.jobs.submit(tasks.backup(r, policy, source, self.store_words(r.store)))
                begun = True
        for store, s in self.settings.stores.items():
            if self.stores[store].estate:
                for task in self._prunes(store, now):
                    self.jobs.submit(task)
                for task in tasks.upkeep(self.jobs, store, s, self.store_words(store), now, self.zone):
                    self.jobs.submit(task)
        if begun:
            self._rows = self._made_rows()

    def _begin_drills(self) -> None:
        now = self.clock()
        for r in self._rows:
            when = self.settings.policies[r.policy].drill if r.policy in self.settings.policies else ""
            if when and r.known and tasks.is_due(self.jobs, r.id, "drill", when, now, self.zone):
                self.jobs.submit(tasks.drill(r, self.store_words(r.store)))

    def _prunes(self, store: str, now: Instant) -> list[Task]:
        """Policies whose rules are to be applied now."""
        found = []
        for name, policy in self.settings.policies.items():
            mine = [r.id for r in self._rows if r.policy == name and r.known]
            due = policy.keep and mine and self.settings.store_of(policy) == store
            if due and tasks.is_due(self.jobs, name, "prune", self.settings.service.prune, now, self.zone):
                found.append(tasks.prune(name, policy, mine, store, self.store_words(store)))
        return found

    def _log_job(self, job_id: str) -> None:
        job = self.jobs.get(job_id)
        what = f"{job.task.kind} {job.task.name or job.task.store} is {job.state}"
        level = logging.WARNING if job.state is State.FAILED else logging.INFO
        more = {"machine": job.task.machine, "run": job.id}
        log.log(level, "Job %s: %s%s", job.id, what, f": {job.error}" if job.error else "", extra=more)

    # -- what is wrong -------------------------------------------------------------------------------------------------

    def current_alarms(self) -> list[Alarm]:
        """Everything that somebody should look at."""
        found = [_machine_alarm(r) for r in self._rows if r.standing.is_alarm]
        drilled = {name for name, p in self.settings.policies.items() if p.drill}
        found += [a for r in self._rows if r.policy in drilled and (a := tasks.drill_alarm(self.jobs, r))]
        found += [Alarm(f"store:{n}", "critical", f"store {n}", o.error) for n, o in self.stores.items() if o.error]
        found += [
            Alarm(f"source:{n}", "critical", f"source {n}", a.error, "hvbackup doctor")
            for n, a in self.discovery.sources.items() if a.error
        ]  # fmt: skip
        if self.discovery.complete:
            found += [Alarm(f"policy:{w}", "warning", "policies", w) for w in self.selection.warnings]
        if self.reload_error:
            text = f"not reloaded, the old one holds: {self.reload_error}"
            found.append(Alarm("configuration", "warning", "configuration", text, "hvbackup config check"))
        found += [Alarm(f"notify:{n}", "warning", f"notify {n}", e) for n, e in self._notify_errors.items() if e]
        return found + tasks.upkeep_alarms(self.jobs, self.settings.stores) + self._space_alarms()

    def _space_alarms(self) -> list[Alarm]:
        found = []
        for name, opened in self.stores.items():
            if opened.estate and (free := free_share(opened.session.places.store)) < LOW_SPACE_SHARE:
                text = f"{100 * free:.1f} % of its file system are free"
                found.append(Alarm(f"space:{name}", "critical", f"store {name}", text, "make room, or keep less"))
        return found

    def _alarm(self) -> None:
        if self._sending and self._sending.is_alive():
            return
        self.alarms = self.current_alarms()
        if messages := self._quiet.decide(self.alarms, self.clock()):
            for m in messages:
                log.warning("%s: %s: %s", m.kind, m.alarm.subject, m.alarm.text)
            self._sending = threading.Thread(target=self._send, args=(messages,), name="hvbackup-notify", daemon=True)
            self._sending.start()

    def _send(self, messages: Sequence[Message]) -> None:
        self._notify_errors = {}
        made, self._notify_errors = channels.channels(self.settings.notify)
        send_all(made, messages, lambda name, e: self._notify_errors.update({name: str(e)}))


def _machine_alarm(r: Row) -> Alarm:
    severity = "critical" if r.standing is rows.Standing.LATE else "warning"
    fix = "name it in a policy" if r.standing is rows.Standing.UNPROTECTED else "hvbackup jobs; hvbackup doctor"
    return Alarm(f"machine:{r.id}", severity, r.name, f"{r.standing}: {r.why}", fix)


def free_share(folder: Path) -> float:
    """The part of a file system that is free."""
    found = os.statvfs(folder)
    return found.f_bavail / max(1, found.f_blocks)


def _environment(places: Places) -> Mapping[str, str]:
    """What processes of ours are told: the same places as we have."""
    return {
        **{k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")},
        "HVBACKUP_ALONE": "1",  # they do what they are told, and ask nobody to
        "HVBACKUP_STORE": str(places.store),
        "HVBACKUP_STATE": str(places.state),
        "HVBACKUP_CONFIG": str(places.configuration),
        "HVBACKUP_RUN": str(places.run),
    }
