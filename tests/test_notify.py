"""Notifications: told once, told again in time, told when over; and really sent."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvbackup.errors import HostUnreachable
from hvbackup.model import SECOND, Instant
from hvbackup.notify import Alarm, Mail, Message, Quiet, Webhook, paragraph, send_all, subject

HOUR = 3600 * SECOND
LATE = Alarm("rpo:1", "warning", "web1", "its newest point is 2 h old", "look at `hvbackup status`")
WORSE = Alarm("rpo:1", "critical", "web1", "its newest point is 9 h old")
FULL = Alarm("store-full", "critical", "store", "2 % are free")


def told(quiet: Quiet, hours: float, *alarms: Alarm) -> list[tuple[str, str]]:
    return [(m.kind, m.alarm.key) for m in quiet.decide(alarms, Instant(int(hours * HOUR)))]


def test_told_at_once_then_after_one_hour_four_and_daily() -> None:
    quiet = Quiet()
    times = [h / 4 for h in range(4 * 60) if told(quiet, h / 4, LATE)]
    assert times == [0, 1, 5, 29, 53]


def test_the_end_is_told_once() -> None:
    quiet = Quiet()
    assert told(quiet, 0, LATE, FULL) == [("raised", "rpo:1"), ("raised", "store-full")]
    assert told(quiet, 0.5, FULL) == [("ended", "rpo:1")]
    assert told(quiet, 0.6, FULL) == []


def test_what_gets_worse_is_told_at_once() -> None:
    quiet = Quiet()
    assert told(quiet, 0, LATE) == [("raised", "rpo:1")]
    assert told(quiet, 0.1, WORSE) == [("raised", "rpo:1")]
    assert told(quiet, 0.2, WORSE) == []
    assert told(quiet, 0.3, LATE) == []


def test_what_comes_back_after_it_was_forgotten_is_new() -> None:
    quiet = Quiet()
    told(quiet, 0, LATE)
    told(quiet, 1)
    assert told(quiet, 26) == []
    assert told(quiet, 26.1, LATE) == [("raised", "rpo:1")]


@given(st.lists(st.booleans(), min_size=1, max_size=600))
def test_flapping_is_quiet_and_nothing_that_lasts_is_hidden(raised: list[bool]) -> None:
    """Every minute it is there or not: people hear of it at most once an hour, and of what lasts an hour for certain."""
    quiet, heard, lasted, last_told = Quiet(), False, 0, -1000
    for minute, there in enumerate(raised):
        said = told(quiet, minute / 60, *([LATE] if there else []))
        assert len(said) <= 1
        for kind, _ in said:
            assert heard == (kind in ("still", "ended"))
            heard = kind != "ended"
            if heard:
                assert minute - last_told >= 60
                last_told = minute
        lasted = lasted + 1 if there else 0
        assert heard if lasted > 60 else True
        assert not (heard and not there)


def test_a_channel_that_fails_is_told_of_and_stops_no_other() -> None:
    told, failed = list[Message](), list[str]()

    class Deaf:
        def send(self, messages: Sequence[Message]) -> None:
            raise HostUnreachable("nobody listens")

    class Good:
        def send(self, messages: Sequence[Message]) -> None:
            told.extend(messages)

    [message] = Quiet().decide([Alarm("k", "critical", "web1", "is late")], Instant(0))
    send_all({"deaf": Deaf(), "good": Good()}, [message], lambda name, e: failed.append(f"{name}: {e}"))
    assert told == [message]
    assert failed == ["deaf: nobody listens"]


def test_one_line_for_several_with_the_worst_first() -> None:
    messages = [
        Message("ended", WORSE, Instant(0)),
        Message("raised", LATE, Instant(0)),
        Message("raised", FULL, Instant(0)),
    ]
    assert subject(messages) == "[hvbackup] alarm: store: 2 % are free (and 2 more)"
    assert "\n" not in subject([Message("raised", Alarm("k", "warning", "a\r\nBcc: x@y", "t"), Instant(0))])
    assert paragraph(messages[1]).splitlines()[1] == "What to do: look at `hvbackup status`"


# -- sending -----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Smtp(socketserver.StreamRequestHandler):
    """A mail server that takes one mail."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            word = line.split()[0].upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                text = b""
                while not text.endswith(b"\r\n.\r\n"):
                    text += self.rfile.readline()
                self.server.mails.append(text.decode())  # type: ignore[attr-defined]
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 fine\r\n")
            if word == b"QUIT":
                return


def test_mail() -> None:
    server = socketserver.TCPServer(("127.0.0.1", 0), Smtp)
    server.mails = []  # type: ignore[attr-defined]
    with serving(server) as port:
        Mail("127.0.0.1", ["a@example.org", "b@example.org"], "hvbackup@example.org", port).send(
            [Message("raised", LATE, Instant(0)), Message("ended", FULL, Instant(0))]
        )
    [mail] = server.mails  # type: ignore[attr-defined]
    assert "Subject: [hvbackup] alarm: web1: its newest point is 2 h old (and 1 more)" in mail.replace("\r\n ", " ")
    assert "To: a@example.org, b@example.org" in mail
    assert "OVER (critical) store: 2 % are free" in mail


class Hook(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((body, self.headers["X-Hub-Signature-256"]))  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_a_webhook_is_signed_and_one_that_refuses_does_not_stop_the_others() -> None:
    failures = []
    server = HTTPServer(("127.0.0.1", 0), Hook)
    server.bodies, server.status = [], 204  # type: ignore[attr-defined]
    with serving(server) as port:
        hook = Webhook(f"http://127.0.0.1:{port}/x?token=secret", "key")
        channels = {"dead": Webhook("http://127.0.0.1:1/"), "hook": hook}
        send_all(channels, [Message("raised", LATE, Instant(5))], lambda name, e: failures.append((name, str(e))))
        [(body, signature)] = server.bodies  # type: ignore[attr-defined]
        assert json.loads(body)["messages"] == [{
            "kind": "raised", "since": 5, "alarm": {"key": "rpo:1", "severity": "warning", "subject": "web1",
            "text": LATE.text, "fix": LATE.fix}}]  # fmt: skip
        assert signature == "sha256=" + hmac.new(b"key", body, hashlib.sha256).hexdigest()
        server.status = 500  # type: ignore[attr-defined]
        with pytest.raises(HostUnreachable, match="did not take a message") as refused:
            hook.send([Message("raised", LATE, Instant(5))])
        assert "secret" not in str(refused.value)
    assert [name for name, _ in failures] == ["dead"]


@pytest.mark.skipif(os.geteuid() != 0, reason="another /dev takes root")
def test_syslog(tmp_path: Path) -> None:
    """A line for each, with the priority by which a host sorts them."""
    code = (
        "from hvbackup.notify import *\n"
        f"Syslog().send([Message('raised', {LATE!r}, 0), Message('raised', {FULL!r}, 0), Message('ended', {FULL!r}, 0)])"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        log.settimeout(60)
        enter = 'mount --bind "$1" /dev; exec "$2" -c "$3"'
        command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", enter, "-", tmp_path]
        subprocess.run([*command, sys.executable, code], check=True, timeout=120)
        lines = [log.recv(2000).decode() for _ in range(3)]
    assert [line.partition(">")[0] for line in lines] == ["<28", "<26", "<28"], "a daemon's warning, alert, and its end"
    assert all(" hvbackup[" in line for line in lines)
    assert f"ALARM (warning) web1: {LATE.text} What to do: {LATE.fix}" in lines[0]
    assert "OVER (critical) store: 2 % are free" in lines[2]
