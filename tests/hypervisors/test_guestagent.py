"""The guest agent's protocol against agents of every temper; none of these needs a guest."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvbackup.errors import Busy, HostUnreachable
from hvbackup.hypervisors import agent_guard, guestagent
from hvbackup.hypervisors.guestagent import (
    DEFAULT_HOOK,
    AgentRefused,
    Freezer,
    GuestAgent,
    hook_in_configuration,
    hook_in_words,
    why_not_application,
)
from hvbackup.hypervisors.qemu_freeze import _CHARDEV

PATIENCE_SECONDS = 60.0  # with an agent that answers
HASTY_SECONDS = 3.0  # with one that says nothing: each test of it takes so long

FREEZE, THAW, STATUS = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"
Answer = (
    Any  # what the agent returns; an Exception is refused; bytes are sent as they are; None: silence; callable: called
)


class Agent:
    """An agent played by a thread; `answers` says what it returns, `asked` what it was asked for."""

    def __init__(self, path: Path, **answers: Answer) -> None:
        self.path, self.asked, self.connections = path, [], 0
        self.frozen = 0
        self.stale = b""  # sent as soon as somebody connects: answers to somebody else's questions
        self.answers: dict[str, Answer] = {
            "guest-info": {"supported_commands": [{"name": n, "enabled": True} for n in (FREEZE, THAW, STATUS)]},
            STATUS: lambda _: "frozen" if self.frozen else "thawed",
            FREEZE: lambda _: self._set(2),
            THAW: lambda _: self._set(0),
            **{name.replace("_", "-"): answer for name, answer in answers.items()},
        }
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(1)
        self._line = socket.socket()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(120)

    def _set(self, count: int) -> int:
        before, self.frozen = self.frozen, count
        return count or before

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._server.accept()
            except OSError:
                return
            self.connections, self._line = self.connections + 1, line
            with line, contextlib.suppress(OSError):
                self._talk(line)

    def _talk(self, line: socket.socket) -> None:
        line.sendall(self.stale)
        for said in line.makefile("rb"):
            request = json.loads(said.lstrip(b"\xff"))
            name, arguments = request["execute"], request.get("arguments", {})
            self.asked.append(name)
            answer = self.answers.get(name, RuntimeError(f"The command {name} has not been found"))
            if name == "guest-sync-delimited" and name not in self.answers:
                # As the real one does: the byte before the command is an error of its own.
                line.sendall(b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n')
                line.sendall(b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n")
                continue
            answer = answer(arguments) if callable(answer) and answer is not ConnectionError else answer
            if answer is ConnectionError:
                return
            if isinstance(answer, Exception):
                answer = {"error": {"class": "GenericError", "desc": str(answer)}}
            elif answer is not None and not isinstance(answer, bytes):
                answer = {"return": answer}
            if answer is not None:
                line.sendall(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")


@pytest.fixture
def start(tmp_path: Path) -> Generator[Callable[..., Agent]]:
    begun: list[Agent] = []

    def started(**answers: Answer) -> Agent:
        begun.append(Agent(tmp_path / f"agent{len(begun)}", **answers))
        return begun[-1]

    yield started
    for agent in begun:
        agent.close()


# --- the line ------------------------------------------------------------------------------------------------------------


def test_answers_to_other_questions_are_thrown_away(start: Callable[..., Agent]) -> None:
    agent = start(guest_get_osinfo={"id": "debian"})
    agent.stale = b'{"return": 17}\n{"return": "frozen"}\n\xff{"return": 5}\nrubbish \xff{"return": {}}\n'
    with GuestAgent(agent.path, PATIENCE_SECONDS) as found:
        assert found.system() == "debian"
        assert not found.frozen()
    assert agent.asked[0] == "guest-sync-delimited"


@settings(max_examples=40, deadline=None)
@given(stale=st.binary(max_size=300))
def test_no_rubbish_on_the_line_is_taken_for_an_answer(tmp_path_factory: pytest.TempPathFactory, stale: bytes) -> None:
    agent = Agent(tmp_path_factory.mktemp("a") / "s")
    agent.stale = stale
    try:
        with GuestAgent(agent.path, PATIENCE_SECONDS) as found:
            assert found.frozen() is False
    finally:
        agent.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "no answer in time"),
        (b"certainly\n", "not JSON"),
        (b'{"certainly": 1}\n', "neither a result nor an error"),
        (b"[]\n", "neither a result nor an error"),
        (b"x" * (5 << 20), "without an end"),
        (ConnectionError, "closed the connection"),
        (RuntimeError("Command guest-fsfreeze-status has been disabled"), "has been disabled"),
    ],
    ids=["silence", "no-json", "no-result", "no-object", "endless", "hangs-up", "refuses"],
)
def test_what_an_agent_may_do_wrong(start: Callable[..., Agent], answer: Answer, message: str) -> None:
    agent = start(guest_fsfreeze_status=answer)
    with GuestAgent(agent.path, HASTY_SECONDS) as found, pytest.raises(HostUnreachable, match=message) as caught:
        found.frozen()
    assert str(agent.path) in str(caught.value)


@pytest.mark.walk
@pytest.mark.parametrize("answer", [None, ConnectionError, b"\xff", b'\xff{"return": 1}\n'])
def test_an_agent_that_does_not_even_synchronise(start: Callable[..., Agent], answer: Answer) -> None:
    agent = start(guest_sync_delimited=answer)
    with pytest.raises(HostUnreachable, match=f"{agent.path}.*(in time|closed)"):
        GuestAgent(agent.path, HASTY_SECONDS)


@pytest.mark.parametrize("answer", [7, [], {"supported_commands": 1}, {"supported_commands": [1, {"name": 3}]}])
def test_an_agent_that_says_strange_things_of_itself_offers_nothing(
    start: Callable[..., Agent], answer: Answer
) -> None:
    agent = start(guest_info=answer, guest_get_fsinfo=answer, guest_get_osinfo=answer)
    with GuestAgent(agent.path, PATIENCE_SECONDS) as found:
        assert FREEZE not in found.commands
        assert not any(fs.mountpoint for fs in found.filesystems())
        assert found.system() == ""


def test_sockets_nobody_listens_at(tmp_path: Path) -> None:
    with pytest.raises(HostUnreachable, match="no such socket"):
        GuestAgent(tmp_path / "absent")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(HostUnreachable, match="nobody listens"):
        GuestAgent(tmp_path / "dead")


@pytest.mark.walk
def test_somebody_else_has_the_agent(start: Callable[..., Agent]) -> None:
    agent = start()
    with (
        GuestAgent(agent.path, PATIENCE_SECONDS),
        pytest.raises(HostUnreachable, match="another program holds its socket"),
    ):
        GuestAgent(agent.path, HASTY_SECONDS)


# --- freezing, by the guard ----------------------------------------------------------------------------------------------


def freeze(agent: Agent, tmp_path: Path, limit_seconds: float = 120) -> Freezer:
    """A freezer whose guest stands still."""
    freezer = Freezer(agent.path, tmp_path / "marker", limit_seconds)
    freezer.ready()
    assert freezer.freeze() == 2
    assert (tmp_path / "marker").exists()
    return freezer


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_freeze_and_its_thaw(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent, begun = start(), time.monotonic()
    with freeze(agent, tmp_path) as freezer:
        assert agent.frozen == 2
        stood = freezer.thaw()
    assert (agent.frozen, stood.filesystems, stood.doubt, stood.remark) == (0, 2, "", "")
    assert 0 < stood.frozen_seconds < time.monotonic() - begun
    assert not (tmp_path / "marker").exists()
    assert agent.connections == 1


def test_forgetting_the_freezer_thaws(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()
    freeze(agent, tmp_path).close()
    until(lambda: agent.frozen == 0)


@pytest.mark.walk
def test_the_limit_thaws_and_is_told_of(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()
    with freeze(agent, tmp_path, 10) as freezer:
        until(lambda: agent.frozen == 0)
        assert "let go after 10 s" in freezer.thaw().doubt


def test_a_thaw_that_is_lost_is_tried_again(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()
    tries = []

    def at_last(_: Any) -> Any:
        tries.append(1)
        return [ConnectionError, b"what?\n", RuntimeError("not now"), 0][len(tries) - 1] if len(tries) < 4 else thaw()

    def thaw() -> int:
        agent.frozen = 0
        return 2

    agent.answers[THAW] = at_last
    with freeze(agent, tmp_path) as freezer:
        stood = freezer.thaw()
    assert (len(tries), agent.frozen, stood.doubt) == (4, 0, "")


def test_a_hook_that_fails_at_the_thaw(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()

    def thaw(_: Any) -> Exception:
        agent.frozen = 0
        return RuntimeError("fsfreeze hook has failed with status 1")

    agent.answers[THAW] = thaw
    with freeze(agent, tmp_path) as freezer:
        stood = freezer.thaw()
    assert "hook has failed" in stood.doubt  # nobody counted what was thawed
    assert "hook has failed" in stood.remark


def test_fewer_were_frozen_at_the_end(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()
    with freeze(agent, tmp_path) as freezer:
        agent.frozen = 1
        assert "only 1 still were" in freezer.thaw().doubt


def test_a_refused_freeze_is_followed_by_a_thaw(start: Callable[..., Agent], tmp_path: Path) -> None:
    """A hook in the guest that failed half-way may have quiesced something: the thaw tells it to let go."""
    agent = start(guest_fsfreeze_freeze=RuntimeError("fsfreeze hook has failed with status 1"))
    with Freezer(agent.path, tmp_path / "marker", 60) as freezer:
        freezer.ready()
        with pytest.raises(HostUnreachable, match="hook has failed"):
            freezer.freeze()
    until(lambda: THAW in agent.asked)
    until(lambda: not (tmp_path / "marker").exists())


@pytest.mark.walk
def test_a_late_answer_to_the_freeze_is_not_taken_for_one_to_the_thaw(
    start: Callable[..., Agent], tmp_path: Path
) -> None:
    agent = start()

    def slow(_: Any) -> int:
        time.sleep(1.0)
        agent.frozen = 2
        return 2

    def also_slow(_: Any) -> int:
        time.sleep(0.5)
        agent.frozen = 0
        return 2

    agent.answers.update({FREEZE: slow, THAW: also_slow})
    with Freezer(agent.path, tmp_path / "marker", 0.2) as freezer:
        freezer.ready()
        with pytest.raises(HostUnreachable, match=r"did not freeze within 0\.2 s"):
            freezer.freeze()
    until(lambda: not (tmp_path / "marker").exists())
    assert agent.frozen == 0, "the marker says that nothing is frozen"
    assert THAW in agent.asked


def test_what_others_froze_is_not_touched(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()
    agent.frozen = 1
    with Freezer(agent.path, tmp_path / "marker", 60) as freezer, pytest.raises(Busy, match="frozen already"):
        freezer.ready()
    assert agent.frozen == 1
    assert THAW not in agent.asked


def test_qemu_dies_while_the_guest_is_frozen(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()
    agent.answers[THAW] = ConnectionError
    freezer = freeze(agent, tmp_path)
    agent.close()
    os.unlink(agent.path)
    with freezer:
        assert "QEMU is gone" in freezer.thaw().doubt


# --- is it an application's moment? --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hook"),
    [
        (["qemu-ga", "-F/etc/hook", "-v"], "/etc/hook"),
        (["qemu-ga", "-F"], DEFAULT_HOOK),
        (["qemu-ga", "--fsfreeze-hook"], DEFAULT_HOOK),
        (["qemu-ga", "--fsfreeze-hook=/x"], "/x"),
        (["qemu-ga", "-m", "virtio-serial"], ""),
        ([], ""),
    ],
)
def test_hooks_on_command_lines(words: list[str], hook: str) -> None:
    assert hook_in_words(words) == hook


def test_hooks_in_configurations() -> None:
    assert hook_in_configuration("[general]\nmethod=virtio-serial\nfsfreeze-hook = /etc/hook\n") == "/etc/hook"
    assert hook_in_configuration("[general]\n# fsfreeze-hook=/etc/hook\n") == ""


def files(contents: dict[str, bytes]) -> dict[str, Answer]:
    """What an agent answers whose guest has these files."""
    names = list(contents)

    def opened(arguments: Any) -> Any:
        known = arguments["path"] in contents
        return names.index(arguments["path"]) if known else RuntimeError("No such file or directory")

    def read(arguments: Any) -> Any:
        return {"buf-b64": base64.b64encode(contents[names[arguments["handle"]]]).decode(), "eof": True}

    return {"guest_file_open": opened, "guest_file_read": read, "guest_file_close": {}}


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"guest_get_osinfo": {"id": "mswindows"}}, ""),
        ({}, "does not let us see"),
        (files({"/proc/self/cmdline": b"qemu-ga\0-v\0"}), "runs no hook"),
        (files({"/proc/self/cmdline": b"qemu-ga\0-F/h\0"}), "does not show us its hook"),
        (files({"/proc/self/cmdline": b"qemu-ga\0-F/h\0", "/h": b"for f in fsfreeze-hook.d/*; do"}), "forgets whether"),
        (files({"/proc/self/cmdline": b"qemu-ga\0-F/h\0", "/h": b"#!/bin/sh\nexec pg-freeze"}), ""),
        (
            files(
                {"/proc/self/cmdline": b"qemu-ga\0", "/etc/qemu/qemu-ga.conf": b"fsfreeze-hook=/h\n", "/h": b"\x7fELF"}
            ),
            "",
        ),
    ],
)
def test_what_proves_an_application_consistent_freeze(
    start: Callable[..., Agent], answers: dict[str, Answer], reason: str
) -> None:
    with GuestAgent(start(**answers).path) as agent:
        found = why_not_application(agent)
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_file_that_is_none(start: Callable[..., Agent]) -> None:
    agent = start(guest_file_open=1, guest_file_read={"buf-b64": 3}, guest_file_close={})
    with GuestAgent(agent.path, PATIENCE_SECONDS) as found, pytest.raises(HostUnreachable, match="what is no file"):
        found.read_file("/x")
    assert agent.asked[-1] == "guest-file-close"


def test_a_refusal_is_known_as_one(start: Callable[..., Agent]) -> None:
    with GuestAgent(start().path) as agent, pytest.raises(AgentRefused, match="has not been found"):
        agent.ask("guest-shutdown")


@pytest.mark.parametrize(
    ("filename", "found"),
    [
        ("disconnected:unix:/run/a.sock,server=on", ("disconnected:", "/run/a.sock")),
        ("unix:/run/a.sock,server=on", (None, "/run/a.sock")),
        ("disconnected:unix:/run/a,b.sock,server", ("disconnected:", "/run/a,b.sock")),
        ("unix:/run/a.sock", None),  # QEMU is the client
        ("pty:/dev/pts/3", None),
        ("spicevmc", None),
    ],
)
def test_character_devices(filename: str, found: tuple[str | None, str] | None) -> None:
    match = _CHARDEV.match(filename)
    assert (match and (match[1], match[2])) == found


def test_the_guard_needs_nothing_but_the_standard_library() -> None:
    source = Path(agent_guard.__file__).read_text()
    assert "hvbackup" not in source.replace("hvbackup.hypervisors", "")
    assert Path(agent_guard.__file__) == guestagent._PROGRAM
