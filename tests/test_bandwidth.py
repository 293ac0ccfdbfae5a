"""Bandwidth: bytes are counted over time that is injected; one number is shared by all processes of a host."""

from __future__ import annotations

import json
import multiprocessing
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from hvbackup import bandwidth
from hvbackup.bandwidth import BURST_NS, FAR_NS, MIN_BYTES, SOURCES, STORES, Book, Bucket, Rule, write_rules
from hvbackup.capture import Options, capture
from hvbackup.errors import UsageError
from hvbackup.files import exclusive
from hvbackup.fold import fold
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.hypervisors.image import ImageSource, ImageSpec
from hvbackup.model import SECOND, Instant, MiB
from hvbackup.pipeline import Pace
from hvbackup.protect.events import Rhythm
from hvbackup.protect.protection import Protection
from hvbackup.store.store import Store, init
from tests.cli.rig import World, make_disk

MONDAY_7 = int(datetime(2026, 11, 23, 7, tzinfo=UTC).timestamp()) * SECOND


class Time:
    """A clock that goes on only while somebody waits."""

    def __init__(self, wall: int = MONDAY_7) -> None:
        self.ns, self.wall_start = 10 * SECOND, wall - 10 * SECOND

    def clock(self) -> int:
        return self.ns

    def wall(self) -> int:
        return self.wall_start + self.ns

    def sleep(self, seconds: float) -> None:
        self.ns += round(seconds * SECOND)

    def book(self, run: Path) -> Book:
        return Book(run, self.clock, self.wall, self.sleep, UTC)


def test_rules_are_read_strictly() -> None:
    assert Rule.parse("50M").bytes_per_second == 50 * MiB
    assert Rule.parse("1.5GiB/s").bytes_per_second == 1536 * MiB
    assert Rule.parse("unlimited 22:00-06:00").bytes_per_second == 0
    for bad in ("", "fast", "50", "50T", "10K", "50M Mon..Fri", "50M noday 08:00-18:00", "-1M", "50M 8-18"):
        with pytest.raises(UsageError):
            Rule.parse(bad)


def test_the_first_rule_that_holds_counts() -> None:
    rules = [Rule.parse(r) for r in ("10M Mon..Fri 08:00-18:00", "unlimited 22:00-06:00", "100M")]
    berlin = ZoneInfo("Europe/Berlin")

    def at(day: int, hour: int) -> int:
        return bandwidth.rate_now(
            rules, Instant(int(datetime(2026, 11, day, hour, tzinfo=berlin).timestamp()) * SECOND), berlin
        )

    assert [at(23, h) // MiB for h in (7, 8, 17, 18, 22, 23)] == [100, 10, 10, 100, 0, 0]
    assert [at(28, h) // MiB for h in (3, 9, 23)] == [0, 100, 0]  # a Saturday
    assert bandwidth.rate_now(rules[:1], Instant(0), UTC) == 0  # outside of every window


def test_no_more_bytes_go_than_the_window_allows(tmp_path: Path) -> None:
    """From seven to nine: an hour at 8 MiB/s, then one at 2; counted in every stretch, not only in all."""
    write_rules(tmp_path, {"libvirt:a": ["2M Mon..Fri 08:00-18:00", "8M"]}, {})
    time = Time()
    bucket = Bucket(time.book(tmp_path), SOURCES, "libvirt:a")
    moved: list[tuple[int, int]] = []
    while time.wall() < MONDAY_7 + 2 * 3600 * SECOND:
        bucket.take(4 * MiB)
        moved.append((time.wall() - MONDAY_7, 4 * MiB))
    for start in range(0, 7200, 60):
        went = sum(n for t, n in moved if start * SECOND <= t < (start + 60) * SECOND)
        limit = (8 if start < 3600 else 2) * MiB
        assert limit * 60 - 8 * MiB <= went <= limit * 60 + limit * BURST_NS // SECOND + 8 * MiB, start


def test_a_limit_is_shared_and_others_are_not_touched(tmp_path: Path) -> None:
    write_rules(tmp_path, {"a": ["4M"], "b": ["4M"]}, {"/store": ["1M"]})
    time = Time()
    one, two = (Bucket(time.book(tmp_path), SOURCES, "a") for _ in range(2))  # as two processes have it
    for _ in range(40):
        one.take(MiB)
        two.take(MiB)
    assert time.ns - 10 * SECOND == pytest.approx(80 * SECOND / 4, rel=0.05)
    before = time.ns
    Bucket(time.book(tmp_path), SOURCES, "b").take(MiB)
    Bucket(time.book(tmp_path), SOURCES, "nobody").take(10**12)
    assert time.ns == before
    for _ in range(10):
        Bucket(time.book(tmp_path), STORES, "/store").take(MiB)
    assert time.ns - before == pytest.approx(9 * SECOND, rel=0.1)


def _take(run: Path, count: int) -> None:
    book = Book(run, lambda: 10 * SECOND, lambda: MONDAY_7, lambda _: None, UTC)
    bucket = Bucket(book, SOURCES, "a")
    for _ in range(count):
        bucket.take(MiB)


def test_processes_lose_no_byte_to_each_other(tmp_path: Path) -> None:
    """Time stands still, so the number in the file is exactly what all of them took."""
    write_rules(tmp_path, {"a": ["64M"]}, {})
    some = [multiprocessing.get_context("spawn").Process(target=_take, args=(tmp_path, 500)) for _ in range(3)]
    for process in some:
        process.start()
    for process in some:
        process.join()
        assert process.exitcode == 0
    said = Bucket(Book(tmp_path), SOURCES, "a").path.read_bytes()
    assert int.from_bytes(said, "little") - 10 * SECOND == 1500 * SECOND // 64


def test_new_rules_count_at_once_and_broken_ones_never(tmp_path: Path) -> None:
    write_rules(tmp_path, {"a": ["1M"]}, {})
    time = Time()
    book = time.book(tmp_path)
    assert book.rate(SOURCES, "a") == MIN_BYTES
    write_rules(tmp_path, {"a": ["2M"]}, {})
    time.ns += 3 * SECOND
    assert book.rate(SOURCES, "a") == 2 * MIN_BYTES
    for broken in ("{", "[]", json.dumps({"sources": {"a": ["later words"]}, "stores": {}})):
        (tmp_path / "bandwidth/rules.json").write_text(broken)
        time.ns += 3 * SECOND
        assert book.rate(SOURCES, "a") == 2 * MIN_BYTES


def test_trouble_with_a_limit_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rules(tmp_path, {"a": ["1M"]}, {})
    time = Time()
    bucket = Bucket(time.book(tmp_path), SOURCES, "a")
    monkeypatch.setattr(bandwidth, "LOCK_SECONDS", 0.1)
    with exclusive(bucket.path, "This limit", 0):  # somebody was stopped in the middle
        bucket.take(MiB)
    bucket.path.write_bytes((time.ns + 2 * FAR_NS).to_bytes(8, "little"))  # of a life before the host was restarted
    bucket.take(MiB)
    bucket.path.write_bytes(b"x")
    bucket.take(MiB)
    assert time.ns == 10 * SECOND


class Counted:
    """What asked, and how much."""

    def __init__(self) -> None:
        self.source = self.store = 0

    def pace(self) -> Pace:
        return Pace(
            lambda n: setattr(self, "source", self.source + n), lambda n: setattr(self, "store", self.store + n)
        )


def test_every_byte_of_a_capture_is_asked_for(tmp_path: Path) -> None:
    make_disk(tmp_path / "a.raw", 9 * MiB)
    init(tmp_path / "store", None)
    counted = Counted()
    with Store.open(tmp_path / "store", tmp_path / "state", []) as store:
        source = ImageSource([ImageSpec(tmp_path / "a.raw")], store.id.hex()[:8])
        outcome = capture(store, source, source.machines()[0], Options(pace=counted.pace()))
    assert counted.source == outcome.figures.read_bytes > 0
    assert 0 < counted.store <= outcome.figures.stored_bytes


def test_every_byte_of_a_moment_is_asked_for_and_a_fold_asks_for_none(tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    disk, counted = FakeDisk(MiB), Counted()
    with Store.open(tmp_path / "store", tmp_path / "state", []) as store:
        hypervisor = FakeHypervisor([FakeMachine("m1", {"vda": disk})])
        machine = hypervisor.machines()[0]
        protection = Protection(store, hypervisor, machine, Options(pace=counted.pace()), Rhythm(1 * SECOND))
        life = protection.begin("")
        before = counted.source, counted.store
        disk.write(0, b"x" * 4096)
        done = life.cycle()
        assert counted.source - before[0] == done.read_bytes == counted.store - before[1] > 0
        before = counted.source, counted.store
        fold(store, machine.id, done.moment, life.setting.options)
        assert (counted.source, counted.store) == before
        life.close()


def test_commands_keep_to_the_rules_of_the_run_directory(tmp_path: Path) -> None:
    """Whoever types them; seen in the numbers that are left, not by a clock."""
    world = World(tmp_path)
    world.done("init")
    make_disk(tmp_path / "a.raw", 9 * MiB)
    source = f"image:{tmp_path / 'a.raw'}"
    run = Path(world.environment["HVBACKUP_RUN"])
    write_rules(run, {source: ["1000G"]}, {world.environment["HVBACKUP_STORE"]: ["1000G"]})
    read, stored = (
        Bucket(Book(run), SOURCES, source).path,
        Bucket(Book(run), STORES, world.environment["HVBACKUP_STORE"]).path,
    )
    world.done("backup", source, "--name=a")
    assert read.stat().st_size == stored.stat().st_size == 8
    before = int.from_bytes(stored.read_bytes(), "little")
    world.done("restore", "a", "--to", str(tmp_path / "out"))
    assert int.from_bytes(stored.read_bytes(), "little") > before
