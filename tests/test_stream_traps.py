"""What can go wrong with a mirror, on a storage daemon: the guest never waits long, never sees an error, and no moment lies."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvbackup.errors import Busy, HostUnreachable, JournalGap, SpaceExhausted, StreamBroken, UsageError
from hvbackup.hypervisors import qemu_stream_guard as guard
from hvbackup.hypervisors.qemu_stream_guard import HUNG_SECONDS
from hvbackup.hypervisors.qmp import CommandRefused
from hvbackup.model import SECOND, DiskId, DiskRoot, Instant, LeaseId, MiB
from hvbackup.nbd.client import NbdClient
from hvbackup.protect import streaming
from hvbackup.protect.events import Begun, Event, Folded, Trouble
from hvbackup.protect.protection import Protection
from hvbackup.protect.streaming import StreamLife
from hvbackup.store.journal.history import History
from hvbackup.store.journal.window import Limits, journal_bytes
from hvbackup.store.store import Store
from hvbackup.target import process
from tests.hypervisors.daemon import Daemon, make_image, only
from tests.scribe import Scribe
from tests.test_stream_kills import gap_of_the_last_life, last_recorded
from tests.test_stream_qemu import SIZES, begun, daemon, every_moment, images, on_disk, protection_of, rhythm, store

__all__ = ["daemon", "store"]
pytestmark = pytest.mark.real


class Running:
    """A protection on a thread of its own, until left."""

    def __init__(self, protection: Protection, events: list[Event]) -> None:
        self.protection, self.events = protection, events
        self._thread = threading.Thread(target=protection.run)

    def __enter__(self) -> Running:
        self._thread.start()
        try:
            self.wait(lambda: self.count(Begun) == 1)
        except BaseException:
            self.protection.end()  # or the tests would never end
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.protection.end()
        self._thread.join(120)
        assert not self._thread.is_alive()

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(e, kind) for e in self.events)

    def wait(self, done: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.events[-3:]
            time.sleep(0.01)


@contextlib.contextmanager
def running(store: Store, daemon: Daemon, folder: Path) -> Iterator[Running]:
    events: list[Event] = []
    with Running(protection_of(store, daemon, rhythm(folder), events), events) as made:
        yield made


def target_pid(folder: Path) -> int:
    from hvbackup.target.ring import find

    [path] = (folder / "rings").glob("*.ring")
    ring = find(path)
    assert ring is not None
    pid = ring.pid
    ring.close()
    return pid


def verify(store: Store, scribe: Scribe, folder: Path, made: Running) -> None:
    """All moments are prefixes, and the newest one is the disk."""
    history = History(store, made.protection.setting.machine.id)
    offered = every_moment(history)
    reached = [scribe.verify(images(history, m)) for m in offered[:: max(1, len(offered) // 30)]]
    assert reached == sorted(reached)
    assert images(history, offered[-1]) == on_disk(folder)


def troubles(made: Running) -> str:
    return " ".join(str(e.error) for e in made.events if isinstance(e, Trouble))


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "is killed"])
def test_a_target_that_hangs_or_is_killed_frees_the_guest(
    daemon: Daemon, store: Store, tmp_path: Path, number: int
) -> None:
    with Scribe(daemon, SIZES, 300) as scribe:
        with running(store, daemon, tmp_path) as made:
            scribe.wait(100)
            os.kill(target_pid(tmp_path), number)
            made.wait(lambda: made.count(Begun) == 2)
            scribe.wait(scribe.acked + 100)
            scribe.stop()
        scribe.assert_never_stalled(HUNG_SECONDS + 1.0 if number == signal.SIGSTOP else 1.0)
        assert "the target ended" in troubles(made) or "no sign of life" in troubles(made)
        verify(store, scribe, tmp_path, made)
    assert not daemon.leftovers()


def test_a_stream_whose_guard_was_killed_begins_anew(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """Nobody would free the guest from a target that hangs; all that came is kept, for the target lives."""
    with Scribe(daemon, SIZES, 300) as scribe:
        with running(store, daemon, tmp_path) as made:
            scribe.wait(100)
            [guard] = guards_of(daemon)
            os.kill(guard, signal.SIGKILL)
            made.wait(lambda: made.count(Begun) == 2)
            assert "its watchdog was killed" in troubles(made)
            assert guards_of(daemon)
            scribe.wait(scribe.acked + 100)
            scribe.stop()
        verify(store, scribe, tmp_path, made)
    assert not daemon.leftovers()


def guards_of(daemon: Daemon) -> list[int]:
    """The processes that look after the target of a stream of this daemon, and run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text().split("\0")
            if str(daemon.qmp_path) in words and any(word.endswith("qemu_stream_guard.py") for word in words):
                found.append(int(folder.name))
    return found


def test_another_file_in_a_node_before_its_bitmap_is_believed(daemon: Daemon, tmp_path: Path) -> None:
    """After the disks were looked at, and before there is a mirror whose disks are compared."""
    hypervisor = daemon.hypervisor()
    stream = hypervisor.stream(only(hypervisor), LeaseId("stream"))
    stream.keep([])
    make_image(tmp_path / "other.raw", SIZES["vda"], "raw")
    options = {"driver": "raw", "node-name": "vda", "file": "other", "discard": "unmap"}
    with daemon.qmp() as qmp:
        qmp.command("blockdev-add", driver="file", node_name="other", filename=str(tmp_path / "other.raw"))
        qmp.command("blockdev-reopen", options=[options])
    with pytest.raises(StreamBroken, match="another file is in the node of vda"), stream.changed({}):
        pytest.fail("the bitmap of the node would say that nothing changed")
    stream.close(healthy=False)
    assert not daemon.leftovers()


def test_a_drained_stream_closes_no_gap(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """What is written while the target is away is read from the disk, because a bitmap says so."""
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    client = daemon.guest("vda")
    client.write(0, b"a" * 4096)
    os.kill(target_pid(tmp_path), signal.SIGKILL)
    client.write(4096, b"b" * 4096)  # only the disk has it
    with pytest.raises(StreamBroken):
        for _ in range(2000):
            life.step()
            time.sleep(0.05)
    with contextlib.suppress(StreamBroken):
        life.close()
    client.write(8192, b"c" * 4096)
    again = begun(protection)
    assert again.how == "resumed"
    client.close()
    again.close()
    history = History(store, protection.setting.machine.id)
    held = images(history, every_moment(history)[-1])
    assert held == on_disk(tmp_path)
    assert held["vda"][:12288] == b"a" * 4096 + b"b" * 4096 + b"c" * 4096
    assert not daemon.leftovers()


def test_a_journal_that_can_not_keep_up_costs_a_gap_and_not_the_guest(
    daemon: Daemon, store: Store, tmp_path: Path
) -> None:
    """Nobody takes anything out of a small ring: the guest goes on all the same, and the stream is broken."""
    protection = protection_of(store, daemon, rhythm(tmp_path, ring_bytes=1 * MiB))
    life = begun(protection)
    with Scribe(daemon, SIZES, 2000) as scribe:
        assert life.target
        ring = life.target.ring
        scribe.wait(1000)  # of which the ring had room for 256, and nobody was kept waiting for the others
        heads = ring.heads
        assert "ring was full" in heads.broken
        assert heads.rows - ring.tails[0] == 256
        with pytest.raises(StreamBroken, match="ring was full"):
            life.step()
        scribe.stop()
        assert ring.heads.lost + heads.rows == scribe.acked, "nothing else was lost, and nothing kept after a loss"
        life.close()
        history = History(store, protection.setting.machine.id)
        last = every_moment(history)[-1]
        assert scribe.verify(images(history, last)) == heads.rows, "all that was kept before, a prefix"
        again = begun(protection)
        again.close()
        history = History(store, protection.setting.machine.id)
        assert images(history, every_moment(history)[-1]) == on_disk(tmp_path)
    assert not daemon.leftovers()


def test_a_write_that_was_never_answered_is_no_part_of_what_was_recorded(
    daemon: Daemon, store: Store, tmp_path: Path
) -> None:
    """QEMU dies between its disk and our target: the disk has a write that the journal lacks, and the next life finds it."""
    protection = protection_of(store, daemon, rhythm(tmp_path))
    for number in range(1, 20):
        life = begun(protection)
        client, block = daemon.guest("vda"), number * 8192
        client.write(block, b"a" * 4096)
        life.step()
        os.kill(target_pid(tmp_path), signal.SIGSTOP)
        writing = threading.Thread(target=write_unheard, args=(client, block + 4096, b"b" * 4096))
        writing.start()
        while on_disk(tmp_path)["vda"][block + 4096] != ord("b"):
            time.sleep(0.001)
        answered = not writing.is_alive()  # the watchdog was faster, and let the guest go on
        daemon.kill()
        writing.join()
        os.kill(target_pid(tmp_path), signal.SIGKILL)
        with contextlib.suppress(Exception):
            life.close()
        daemon.start()
        if not answered:
            break
    assert not answered
    again = begun(protection)
    again.close()
    history = History(store, protection.setting.machine.id)
    assert images(history, last_recorded(history))["vda"][block : block + 8192] == b"a" * 4096 + bytes(4096)
    gap = gap_of_the_last_life(history)
    with pytest.raises(JournalGap):
        history.at(Instant((gap.start + gap.end) // 2))
    held = images(history, every_moment(history)[-1])
    assert held == on_disk(tmp_path)
    assert held["vda"][block + 4096 :][:4096] == b"b" * 4096
    assert not daemon.leftovers()


def write_unheard(client: NbdClient, at: int, data: bytes) -> None:
    """A write whose guest dies before it is answered."""
    with contextlib.suppress(HostUnreachable):
        client.write(at, data)


def test_a_full_journal_disk_keeps_what_was_answered(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    client = daemon.guest("vda")
    client.write(0, b"x" * 4096)
    kernel = store.files.kernel
    write, write_at = kernel.write, kernel.write_at

    def full(fd: int, data: object, offset: int = 0) -> None:
        raise OSError(28, "No space left on device")

    kernel.write = kernel.write_at = full  # type: ignore[method-assign,assignment]
    with pytest.raises(SpaceExhausted):
        life.step()
    with contextlib.suppress(SpaceExhausted):
        life.close()
    kernel.write, kernel.write_at = write, write_at  # type: ignore[method-assign]
    client.write(4096, b"y" * 4096)
    again = begun(protection)
    history = History(store, protection.setting.machine.id)
    before = history.newest_at(history.told.gaps[-1].start)
    assert before
    view = history.view(before, DiskId("vda"))
    held = bytearray(8192)
    view.read_into(0, memoryview(held))
    assert held == b"x" * 4096 + bytes(4096), "what was answered was in the ring, and is recorded"
    client.close()
    again.close()
    history = History(store, protection.setting.machine.id)
    assert images(history, every_moment(history)[-1]) == on_disk(tmp_path)


def test_a_journal_disk_that_stands_still_is_told_of_and_not_waited_for(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alarm while it stands, not when it goes on; the guest never waits, and the ring holds what it was told."""
    monkeypatch.setattr(streaming, "STALL_SECONDS", 1.0)
    sync, answers = store.files.kernel.fsync, threading.Event()

    def standing(fd: int) -> None:
        answers.wait(120)
        sync(fd)

    with Scribe(daemon, SIZES, 300) as scribe:
        with running(store, daemon, tmp_path) as made:
            scribe.wait(scribe.acked + 50)
            store.files.kernel.fsync = standing  # type: ignore[method-assign]
            made.wait(lambda: "has not answered" in troubles(made))
            scribe.wait(scribe.acked + 200)
            answers.set()
            store.files.kernel.fsync = sync  # type: ignore[method-assign]
            scribe.stop()
            assert made.count(Begun) == 1, "the stream went on"
        history = History(store, made.protection.setting.machine.id)
        assert not history.told.gaps[1:], "only the one before it was armed"
        verify(store, scribe, tmp_path, made)
    assert not daemon.leftovers()


def test_a_journal_stays_within_its_budget_and_its_window(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """Points are made early, and what they hold goes, oldest first; what is left is offered and right."""
    limits, events = Limits(2 * SECOND, 4 * MiB), list[Event]()
    wanted = dataclasses.replace(rhythm(tmp_path), limits=limits)
    with Scribe(daemon, SIZES, 2000) as scribe:
        with Running(protection_of(store, daemon, wanted, events), events) as made:
            machine = made.protection.setting.machine.id
            made.wait(lambda: sum(e.removed_bytes > 0 for e in events if isinstance(e, Folded)) >= 2, 90)
            scribe.stop()
        assert not troubles(made)
        history = History(store, machine)
        first, last = history.first, history.last
        assert first
        assert last
        assert first.seq > 256, "the oldest moments went"
        assert journal_bytes(store, machine) <= limits.budget_bytes
        reached = [scribe.verify(images(history, m)) for m in (first, last)]
        assert reached[0] < reached[1] == scribe.acked
    assert not daemon.leftovers()


@contextlib.contextmanager
def no_room_for_points(store: Store) -> Iterator[None]:
    """The disk of the packs is full; the journal's is another one."""
    rename = store.files.kernel.rename

    def full(old: str, new: str) -> None:
        if "/packs/" in new:
            raise OSError(28, "No space left on device")
        rename(old, new)

    store.files.kernel.rename = full  # type: ignore[method-assign]
    try:
        yield
    finally:
        store.files.kernel.rename = rename  # type: ignore[method-assign]


def whole(store: Store, root: DiskRoot) -> bytearray:
    image = bytearray(root.disk.size)
    store.view(root).read_into(0, memoryview(image))
    return image


def test_what_no_point_covers_never_goes_and_a_gap_is_told_of(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """No more points can be made: what points cover goes first, then nothing more is recorded, until there is room."""
    events: list[Event] = []
    wanted = dataclasses.replace(rhythm(tmp_path), fold_every_ns=SECOND // 2, limits=Limits(0, 16 * MiB))
    with (
        Scribe(daemon, SIZES, 600, noise=True) as scribe,
        Running(protection_of(store, daemon, wanted, events), events) as made,
    ):
        machine = made.protection.setting.machine.id
        made.wait(lambda: made.count(Folded) >= 2)
        with no_room_for_points(store):
            covered = max(p.seq or 0 for p in store.points(machine))
            before = History(store, machine)
            assert before.first
            assert before.first.seq < covered, "there is something that may go"
            made.wait(lambda: "--journal-budget" in troubles(made), 240)
            assert max(p.seq or 0 for p in store.points(machine)) == covered
            history = History(store, machine)
            assert history.first
            assert history.first.seq > before.first.seq, "what points cover went"
            kept = [m for m in every_moment(history) if m.seq > covered]
            first, at_the_gap = (scribe.verify(images(history, m)) for m in (kept[0], kept[-1]))
            assert len(kept) > at_the_gap - first, "and each write that none covers is still a moment"
            alarmed, folded = scribe.acked, made.count(Folded)
            scribe.wait(alarmed + 300)
            assert made.count(Begun) == 1
            assert made.count(Folded) == folded
        made.wait(lambda: made.count(Begun) == 2)
        told = scribe.acked
        scribe.wait(told + 50)
        made.wait(lambda: journal_bytes(store, machine) <= wanted.limits.budget_bytes)
        scribe.stop()
        scribe.assert_never_stalled(1.0)
    history = History(store, machine)
    gap = gap_of_the_last_life(history)
    assert "--journal-budget" in gap.why
    with pytest.raises(JournalGap):
        history.at(Instant((gap.start + gap.end) // 2))
    made_first = [e.point for e in events if isinstance(e, Folded)][folded]
    recorded = scribe.verify({r.disk.id: whole(store, r) for r in made_first.disks})
    assert at_the_gap <= recorded <= alarmed, "all that was recorded before the gap is in the point that made room"
    verify(store, scribe, tmp_path, made)
    assert not daemon.leftovers()


def test_other_jobs_are_refused_and_refuse(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    with daemon.qmp() as qmp:
        with pytest.raises(CommandRefused, match="in use by block job: mirror"):
            qmp.command("blockdev-backup", job_id="b", device="vda", target="vdb", sync="none")
        with pytest.raises(CommandRefused, match="in use"):
            qmp.command("block_resize", node_name="vda", size=16 * MiB)
    life.close()
    null = {"driver": "null-co", "size": SIZES["vda"]}
    with daemon.qmp() as qmp:
        qmp.command("blockdev-add", node_name="elsewhere", **null)
        qmp.command("blockdev-mirror", job_id="admin", device="vda", target="elsewhere", sync="none")
    with pytest.raises(Busy, match="wait for the other"):
        begun(protection)
    with daemon.qmp() as qmp:
        qmp.command("block-job-cancel", device="admin", force=True)
        while any(job["id"] == "admin" for job in qmp.command("query-jobs")):
            time.sleep(0.01)
        qmp.command("blockdev-del", node_name="elsewhere")
    begun(protection).close()
    assert not daemon.leftovers()


def test_a_connection_that_broke_is_not_taken_up_again(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """QEMU connects again by itself; a target that let it would call a stream whole that lacks writes."""
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    assert life.target
    before = daemon.guest("vda")
    before.write(0, b"1" * 4096)
    with pytest.raises(Exception, match=r"vda|polic|refus"):  # the export is taken
        NbdClient.open(f"nbd+unix:///vda?socket={life.target.path}")
    before.close()
    life.step()
    life.close()


def test_zeroes_and_odd_writes_arrive_as_they_are(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    protection = protection_of(store, daemon, rhythm(tmp_path))
    life = begun(protection)
    client = daemon.guest("vda")
    client.write(512, b"o" * 1536)
    client.write(0, bytes(range(256)) * 8192)  # 2 MiB
    qemu_io(daemon, "vda", "write -z 1M 512k", "write -P 7 3584 512", "discard 2M 1M", "write -z -u 1536k 64k")
    life.step()
    life.close()
    client.close()
    history = History(store, protection.setting.machine.id)
    assert images(history, every_moment(history)[-1]) == on_disk(tmp_path)


def qemu_io(daemon: Daemon, disk: str, *commands: str) -> None:
    import subprocess

    image = f"driver=nbd,server.type=unix,server.path={daemon.folder / 'guest.sock'},export={disk},discard=unmap"
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, "--image-opts", image], check=True, timeout=120, capture_output=True)


def test_without_a_compiler_the_message_says_what_to_do(
    daemon: Daemon, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PROGRAM", tmp_path / "hvbackup-target")
    with pytest.raises(UsageError, match="install gcc"):
        protection_of(store, daemon, rhythm(tmp_path)).begin("a test")
    assert not daemon.leftovers()


def test_a_stream_life_has_what_every_life_has() -> None:
    assert {"step", "close", "catch_up", "name_tokens"} <= set(dir(StreamLife))


def test_a_host_that_stood_still_costs_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard may run again before the target does, and gives it the time to say that it lives."""
    second, ring, now = 1_000_000_000, tmp_path / "ring", [100 * 1_000_000_000]
    signs, looks, told = iter((100, 100, 100, 160, 160, 160)), [], list[str]()
    passed = iter((0.1, 0.1, 60, 0.1, 2, 0.1))

    def look(*_: object) -> tuple[list[int], list[int], list[int]]:
        now[0] += int(next(passed) * second)
        looks.append(now[0])
        ring.write_bytes(bytes(guard.ALIVE_AT) + (next(signs) * second).to_bytes(8, "little"))
        return [], [], []

    monkeypatch.setattr(guard, "select", SimpleNamespace(select=look))
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic_ns=lambda: now[0]))
    monkeypatch.setattr(guard, "say", told.append)
    monkeypatch.setattr(guard, "killed", lambda _: True)
    ring.write_bytes(bytes(4096))
    assert guard.watch("p", "1", str(ring))
    assert len(looks) == 6, "not at the third, after a minute in which nothing ran, but when it is silent at two"
    assert told == ["its target gave no sign of life for 1 s"]
