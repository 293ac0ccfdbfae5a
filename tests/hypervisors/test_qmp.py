"""A monitor that is absent, refuses, is silent, talks nonsense, hangs or dies: one clear error each, and never a hang."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from hvbackup.errors import HostUnreachable
from hvbackup.hypervisors.qmp import CommandRefused, Qmp

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}

Script = Callable[[socket.socket], None]


class Monitor:
    """A server that treats each client as a script says."""

    def __init__(self, path: Path, script: Script) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._script = script
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        with client:
            client.settimeout(120)
            self._script(client)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(120)


@pytest.fixture
def path() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        yield Path(folder) / "qmp.sock"


@pytest.fixture
def monitor(path: Path) -> Generator[Callable[[Script], Path]]:
    running: list[Monitor] = []

    def serve(script: Script) -> Path:
        running.append(Monitor(path, script))
        return path

    yield serve
    for each in running:
        each.close()


def say(client: socket.socket, message: object) -> None:
    client.sendall(json.dumps(message).encode() + b"\r\n")


def hear(client: socket.socket) -> dict[str, object]:
    """The next command; a client need not end it with a newline."""
    data = b""
    while more := client.recv(65536):
        data += more
        with contextlib.suppress(ValueError):
            return dict(json.loads(data))
    return {}


def greet(client: socket.socket) -> None:
    say(client, GREETING)
    assert hear(client)["execute"] == "qmp_capabilities"
    say(client, {"return": {}})


def until_hangup(client: socket.socket) -> None:
    while client.recv(65536):
        pass


def test_absent(path: Path) -> None:
    with pytest.raises(HostUnreachable, match=f"{path}: Cannot connect, there is no such socket"):
        Qmp(path)


def test_refused(path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with pytest.raises(HostUnreachable, match=f"{path}: Cannot connect, nobody listens"):
        Qmp(path)


def test_a_path_no_socket_can_have(path: Path) -> None:
    with pytest.raises(HostUnreachable, match="too long"):
        Qmp(path.with_name("x" * 200))


def test_silent(monitor: Callable[[Script], Path]) -> None:
    path = monitor(until_hangup)
    with pytest.raises(HostUnreachable, match=f"{path}: No answer within 0.3 s .* another program holds this socket"):
        Qmp(path, timeout_seconds=0.3)


@pytest.mark.parametrize(
    "nonsense", [b"SSH-2.0-OpenSSH\r\n", b"{}\r\n", b"[1]\r\n", b"\xff\xfe\r\n", b"", b"{" * 100 + b"\n"]
)
def test_not_a_monitor(monitor: Callable[[Script], Path], nonsense: bytes) -> None:
    path = monitor(lambda client: client.sendall(nonsense))
    with pytest.raises(HostUnreachable, match=str(path)):
        Qmp(path, timeout_seconds=60)


def test_dying_during_a_command(monitor: Callable[[Script], Path]) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        hear(client)

    with Qmp(monitor(script), timeout_seconds=60) as qmp:
        for _ in range(2):
            with pytest.raises(HostUnreachable, match=r"broke off \(waiting for query-status\)"):
                qmp.command("query-status")


def test_hanging_in_a_command(monitor: Callable[[Script], Path]) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        until_hangup(client)

    # A monitor that did not answer is not asked again: nobody would live to see an hour pass here.
    with Qmp(monitor(script), timeout_seconds=3600) as qmp:
        with pytest.raises(HostUnreachable, match=r"No answer within 0.2 s \(waiting for query-status\)"):
            qmp.command("query-status", timeout_seconds=0.2)
        with pytest.raises(HostUnreachable, match="No answer"):
            qmp.command("query-status")


def test_a_refusal_has_the_words_of_qemu(monitor: Callable[[Script], Path]) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        asked = hear(client)
        assert asked["arguments"] == {"node-name": "x"}
        say(client, {"error": {"class": "CommandNotFound", "desc": "No such thing."}, "id": asked["id"]})
        say(client, {"return": 1, "id": hear(client)["id"]})

    with Qmp(monitor(script), timeout_seconds=60) as qmp:
        with pytest.raises(CommandRefused, match=r"refused blockdev-del: No such thing$") as refused:
            qmp.command("blockdev-del", node_name="x")
        assert refused.value.unknown
        assert qmp.command("next") == 1


def test_events_are_waited_for_with_a_timeout(monitor: Callable[[Script], Path]) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        asked = hear(client)
        say(client, {"event": "OTHER", "data": {}, "timestamp": {}})
        say(client, {"event": "STOP", "data": {"n": 1}, "timestamp": {}})
        say(client, {"return": {}, "id": asked["id"]})
        say(client, {"return": 2, "id": hear(client)["id"]})

    with Qmp(monitor(script), timeout_seconds=60) as qmp, qmp.events("STOP") as events:
        qmp.command("stop")
        assert events.next(60)["data"] == {"n": 1}
        with pytest.raises(HostUnreachable, match="waiting for STOP"):
            events.next(0.1)
        assert qmp.command("next") == 2


def test_closing_leaves_no_thread(monitor: Callable[[Script], Path]) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        until_hangup(client)

    qmp = Qmp(path := monitor(script), timeout_seconds=60)
    assert f"qmp {path}" in [t.name for t in threading.enumerate()]
    qmp.close()
    qmp.close()
    assert f"qmp {path}" not in [t.name for t in threading.enumerate()]
    with pytest.raises(HostUnreachable, match="closed"):
        qmp.command("query-status")
