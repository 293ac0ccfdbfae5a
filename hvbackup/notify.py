"""Notifications: who is told of an alarm, when, and how often.

Deciding is pure: `Quiet` takes the alarms that are raised now and says what is to be told.  A new alarm is told at once, one that
stays is told again after an hour, then four, then once a day, and the end of one is told once.  What flaps is told no more often
than that.  Sending is small: mail (SMTP), a webhook (JSON over HTTP) and syslog; each has a timeout, and none can stop another.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import smtplib
import socket
import ssl
import syslog
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Protocol

from hvbackup.errors import HostUnreachable
from hvbackup.model import SECOND, Instant

REPEAT_NS = (3600 * SECOND, 4 * 3600 * SECOND, 24 * 3600 * SECOND)  # the last one again and again
FORGET_NS = 24 * 3600 * SECOND  # how long an ended alarm is remembered: one that comes back sooner is the same
SEND_SECONDS = 20.0
SUBJECT_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that is wrong; equal `key`s are the same trouble."""

    key: str  # "rpo:<machine id>", "store-full", ...
    severity: str  # "warning" or "critical"
    subject: str  # what it is about: a machine's name, the store, a source
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """What is told."""

    kind: str  # "raised", "still", "ended"
    alarm: Alarm
    since: Instant


@dataclass(slots=True)
class _Told:
    alarm: Alarm
    since: Instant
    told: Instant
    times: int = 0
    heard: bool = False  # the last that people heard is that it is raised
    ended: Instant | None = None


class Quiet:
    """What has been told of which alarm.  Thread safety: one thread."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def decide(self, alarms: Iterable[Alarm], now: Instant) -> list[Message]:
        """What is to be told now, with these alarms raised."""
        raised = {alarm.key: alarm for alarm in alarms}
        messages = [m for alarm in raised.values() if (m := self._raised(alarm, now))]
        return messages + [m for key in self._told.keys() - raised.keys() if (m := self._over(key, now))]

    def _raised(self, alarm: Alarm, now: Instant) -> Message | None:
        known = self._told.get(alarm.key)
        told = known or self._told.setdefault(alarm.key, _Told(alarm, now, now))
        worse = alarm.severity == "critical" != told.alarm.severity
        told.alarm, told.ended = alarm, None
        quiet = REPEAT_NS[min(told.times, len(REPEAT_NS)) - 1] if told.heard else REPEAT_NS[0]
        if known and not worse and now - told.told < quiet:
            return None
        kind = "still" if told.heard and not worse else "raised"
        told.told, told.times, told.heard = now, told.times + 1, True
        return Message(kind, alarm, told.since)

    def _over(self, key: str, now: Instant) -> Message | None:
        told = self._told[key]
        if told.ended is None:
            told.ended = now
        elif now - told.ended > FORGET_NS:
            del self._told[key]
        if not told.heard:
            return None
        told.heard = False
        return Message("ended", told.alarm, told.since)


# -- channels ----------------------------------------------------------------------------------------------------------


class Channel(Protocol):
    """One way to tell people."""

    def send(self, messages: Sequence[Message]) -> None:
        """They have been handed over when this returns.  Raises HostUnreachable."""


def send_all(
    channels: Mapping[str, Channel], messages: Sequence[Message], failed: Callable[[str, HostUnreachable], None]
) -> None:
    """Every channel has been tried; `failed` gets those that could not be used."""
    for name, channel in channels.items() if messages else ():
        try:
            channel.send(messages)
        except HostUnreachable as e:
            failed(name, e)


@dataclass(frozen=True, slots=True)
class Mail:
    """Mail through an SMTP server; `security` is "tls", "starttls" or "none"."""

    host: str
    to: Sequence[str]
    sender: str
    port: int = 25
    security: str = "none"
    user: str = ""
    password: str = field(default="", repr=False)

    def send(self, messages: Sequence[Message]) -> None:
        """One mail for all of them."""
        try:
            with self._connected() as server:
                if self.user:
                    server.login(self.user, self.password)
                server.send_message(self._mail(messages))
        except (OSError, smtplib.SMTPException) as e:
            raise HostUnreachable(f"Mail server {self.host}:{self.port} did not take a mail: {e}") from e

    def _connected(self) -> smtplib.SMTP:
        context = ssl.create_default_context()
        if self.security == "tls":
            return smtplib.SMTP_SSL(self.host, self.port, timeout=SEND_SECONDS, context=context)
        server = smtplib.SMTP(self.host, self.port, timeout=SEND_SECONDS)
        if self.security == "starttls":
            server.starttls(context=context)
        return server

    def _mail(self, messages: Sequence[Message]) -> EmailMessage:
        mail = EmailMessage()
        mail["From"], mail["To"] = self.sender, ", ".join(self.to)
        mail["Date"], mail["Message-ID"] = formatdate(), make_msgid(domain=socket.gethostname())
        mail["Subject"] = subject(messages)
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content("\n\n".join(paragraph(m) for m in messages) + f"\n\n-- \nhvbackup on {socket.gethostname()}\n")
        return mail


@dataclass(frozen=True, slots=True)
class Webhook:
    """A JSON object by HTTP POST; with a secret it is signed, as GitHub signs its own (`X-Hub-Signature-256`)."""

    url: str
    secret: str = field(default="", repr=False)

    def send(self, messages: Sequence[Message]) -> None:
        """One request for all of them; any answer below 300 is one that took it."""
        body = json.dumps({"host": socket.gethostname(), "messages": [asdict(m) for m in messages]}).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "hvbackup"}
        if self.secret:
            digest = hmac.new(self.secret.encode(), body, hashlib.sha256).hexdigest()
            headers["X-Hub-Signature-256"] = f"sha256={digest}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=SEND_SECONDS):
                pass
        except (OSError, ValueError, urllib.error.URLError) as e:
            raise HostUnreachable(f"Webhook {self.url.split('?')[0]} did not take a message: {e}") from e


@dataclass(frozen=True, slots=True)
class Syslog:
    """A line for each to this host's syslog."""

    def send(self, messages: Sequence[Message]) -> None:
        """The lines are logged."""
        syslog.openlog("hvbackup", syslog.LOG_PID, syslog.LOG_DAEMON)
        for message in messages:
            urgent = message.kind != "ended" and message.alarm.severity == "critical"
            syslog.syslog(syslog.LOG_CRIT if urgent else syslog.LOG_WARNING, " ".join(paragraph(message).split()))


def subject(messages: Sequence[Message]) -> str:
    """One line for all of them, the worst first."""
    first = min(messages, key=lambda m: (m.kind == "ended", m.alarm.severity != "critical"))
    more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
    line = f"[hvbackup] {_WORDS[first.kind]}: {first.alarm.subject}: {first.alarm.text}"
    return "".join(c if c.isprintable() else " " for c in line)[:SUBJECT_CHARACTERS] + more


def paragraph(message: Message) -> str:
    """What is told of one alarm."""
    alarm = message.alarm
    lines = [f"{_WORDS[message.kind].upper()} ({alarm.severity}) {alarm.subject}: {alarm.text}"]
    return "\n".join([*lines, *([f"What to do: {alarm.fix}"] if alarm.fix and message.kind != "ended" else [])])


_WORDS = {"raised": "alarm", "still": "still", "ended": "over"}
