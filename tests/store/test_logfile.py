"""A file that only grows: whole blocks, the last one written again and again, past the page cache or through it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import threading
from pathlib import Path

import pytest

from hvbackup.errors import HvbackupError, SpaceExhausted
from hvbackup.files import Files, Kernel
from hvbackup.model import KiB, MiB
from hvbackup.store.journal import logfile
from hvbackup.store.journal.logfile import BLOCK_BYTES, MEMORY_BYTES, LogFile
from tests.crash import Op, Recorder, wrecks
from tests.faults import FaultyKernel, once
from tests.world import CarelessKernel


def append(log: LogFile, data: bytes) -> None:
    log.room(len(data))[:] = data
    log.take(len(data))


def content(path: Path) -> bytes:
    """What was appended, of bytes that are not zero."""
    return path.read_bytes().rstrip(b"\0")


def some(rng: random.Random, size: int) -> bytes:
    return bytes(rng.choices(range(1, 256), k=min(size, 997))) * (size // min(size, 997))


@pytest.mark.parametrize("direct", [True, False], ids=["past the cache", "through it"])
def test_everything_is_there_in_its_order_and_zeroes_behind_it(tmp_path: Path, direct: bool) -> None:
    rng = random.Random(7)
    log = LogFile(Files(tmp_path, CarelessKernel()), "a")
    log.past_cache(direct)
    whole = bytearray()
    sizes = [
        1,
        4095,
        1,
        BLOCK_BYTES,
        64,
        3 * MiB,
        900 * KiB,
        5,
        MEMORY_BYTES,
        11 * MiB,
        17,
        MEMORY_BYTES - 1,
        2,
    ]
    for number, size in enumerate(sizes):
        append(log, data := some(rng, size))
        whole += data
        assert log.size == len(whole)
        if number % 3 == 2:
            log.sync()
            assert (tmp_path / "a").read_bytes() == whole + bytes(-len(whole) % BLOCK_BYTES)
    log.close()
    assert (tmp_path / "a").read_bytes() == whole + bytes(-len(whole) % BLOCK_BYTES)


def test_it_changes_from_one_way_to_the_other_in_the_middle_of_a_block(tmp_path: Path) -> None:
    rng = random.Random(8)
    log = LogFile(Files(tmp_path), "a")
    whole = bytearray()
    for number in range(200):
        log.past_cache(number // 3 % 2 == 1)
        append(log, data := some(rng, rng.randrange(1, 9000)))
        whole += data
        if number % 2:
            log.sync()
            assert content(tmp_path / "a") == whole
    log.close()
    assert content(tmp_path / "a") == whole


def test_it_is_past_the_cache_when_it_is_told_to(tmp_path: Path) -> None:
    log = LogFile(Files(tmp_path), "a")
    (fd,) = (int(n) for n in os.listdir("/proc/self/fd") if _leads_to(int(n), tmp_path / "a"))
    said = []
    for on in (False, True, True, False):
        log.past_cache(on)
        said.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
    log.close()
    assert said == [False, True, True, False]


def _leads_to(fd: int, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    except OSError:
        return False


class Picky(Kernel):
    """A file system that says it can be written past the cache, and a disk that can't in blocks of ours."""

    refused = 0

    def write_at(self, fd: int, data: object, offset: int) -> None:
        real = os.pwrite

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                self.refused += 1
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(fd, data[: max(1, len(data) // 2)], offset)  # and half of what it is given at a time

        os.pwrite = pwrite  # type: ignore[assignment]
        try:
            super().write_at(fd, data, offset)  # type: ignore[arg-type]
        finally:
            os.pwrite = real


def test_a_disk_with_larger_blocks_is_written_through_the_cache(tmp_path: Path) -> None:
    kernel = Picky()
    log = LogFile(Files(tmp_path, kernel), "a")
    log.past_cache(True)
    append(log, b"x" * 10_000)
    log.sync()
    append(log, b"y" * 10_000)
    log.close()
    assert kernel.refused == 1
    assert content(tmp_path / "a") == b"x" * 10_000 + b"y" * 10_000


def test_a_file_system_that_only_writes_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, command, flags)

    monkeypatch.setattr("hvbackup.files.fcntl.fcntl", refuse)
    log = LogFile(Files(tmp_path), "a")
    log.past_cache(True)
    append(log, b"x" * 10_000)
    log.close()
    assert content(tmp_path / "a") == b"x" * 10_000


def test_another_mistake_is_not_taken_for_larger_blocks(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        fd = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
        try:
            Kernel().write_at(fd, b"x", -1)
        finally:
            os.close(fd)


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [(errno.ENOSPC, SpaceExhausted, "nothing that was committed is lost"), (errno.EIO, HvbackupError, "Cannot write")],
)
def test_errors_are_named_and_what_was_synced_stays(
    tmp_path: Path, error: int, expected: type[Exception], text: str
) -> None:
    kernel = FaultyKernel()
    log = LogFile(Files(tmp_path, kernel), "a")
    append(log, b"x" * 5000)
    log.sync()
    for call in ("sync", "room", "close"):
        append(log, b"y" * 100)
        kernel.arm(once(0, OSError(error, os.strerror(error)), ("write",)))
        with pytest.raises(expected, match=text):
            if call == "room":
                log.room(MEMORY_BYTES)
            else:
                getattr(log, call)()
        kernel.disarm()
        assert content(tmp_path / "a") == b"x" * 5000
    assert not any(_leads_to(int(n), tmp_path / "a") for n in os.listdir("/proc/self/fd")), "it is closed all the same"


def test_a_failed_sync_is_not_tried_again(tmp_path: Path) -> None:
    """The kernel tells of it once, and the next sync would say that all is well."""
    kernel = FaultyKernel()
    log = LogFile(Files(tmp_path, kernel), "a")
    append(log, b"x" * 9000)
    kernel.arm(once(1, OSError(errno.EIO, "Input/output error"), ("fsync",)))
    with pytest.raises(HvbackupError, match="Input/output error"):
        log.sync()
    kernel.disarm()
    for _ in range(3):
        append(log, b"y")
        with pytest.raises(HvbackupError, match="may be lost"):
            log.sync()
    log.abandon()


def test_what_was_not_filled_in_to_its_end_is_no_part_of_it(tmp_path: Path) -> None:
    log = LogFile(Files(tmp_path, CarelessKernel()), "a")
    append(log, b"x" * 5000)
    log.room(300)[:100] = b"?" * 100
    append(log, b"y" * 50)
    log.room(MEMORY_BYTES)[:100] = b"?" * 100
    log.close()
    assert content(tmp_path / "a") == b"x" * 5000 + b"y" * 50


def test_nothing_new_needs_no_sync_and_all_is_in_whole_blocks(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    log = LogFile(Files(tmp_path, recorder), "a")
    for _ in range(3):
        append(log, b"x")
        for _ in range(4):
            log.sync()
    log.close()
    assert [s.op for s in recorder.steps if s.op in (Op.WRITE, Op.FSYNC)] == [Op.WRITE, Op.FSYNC] * 3
    assert [(s.offset, len(s.data)) for s in recorder.steps if s.op is Op.WRITE] == [(0, BLOCK_BYTES)] * 3


def test_a_power_cut_takes_nothing_that_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of a block that is written again, what was durable in it is as it was."""
    monkeypatch.setattr(logfile, "MEMORY_BYTES", 2 * BLOCK_BYTES)
    rng, recorder = random.Random(9), Recorder(tmp_path)
    log = LogFile(Files(tmp_path, recorder), "a")
    whole = bytearray()
    recorder.note(b"")
    for number in range(60):
        append(log, data := some(rng, rng.choice((1, 30, 600, 2000, 4096, 9000))))
        whole += data
        if number % 4 == 3:
            log.sync()
            recorder.note(bytes(whole))
    log.close()
    looked_at = 0
    for wreck in wrecks(recorder.steps, seeds=40):
        found = wreck.tree.get("a")
        if found is not None:
            durable = wreck.notes[-1] if wreck.notes else b""
            assert found[: len(durable)] == durable
            looked_at += 1
    assert looked_at > 200


def test_memory_for_something_large_is_given_back(tmp_path: Path) -> None:
    log = LogFile(Files(tmp_path, CarelessKernel()), "a")
    append(log, b"x" * 20 * MiB)
    log.sync()
    assert _mapped(log) == MEMORY_BYTES
    append(log, b"x" * 20 * MiB)
    for _ in range(100):
        append(log, b"x" * MiB)
    assert _mapped(log) == MEMORY_BYTES
    log.close()
    assert (tmp_path / "a").stat().st_size == 140 * MiB


def _mapped(log: LogFile) -> int:
    return len(log._memory)


def test_a_reader_never_sees_less_than_was_synced(tmp_path: Path) -> None:
    """It reads through the page cache what is written past it, now and then, at the same time."""
    files = Files(tmp_path)
    log = LogFile(files, "a")
    pattern = bytes(range(1, 252)) * 4000
    synced, ended, wrong = 0, threading.Event(), []

    def expected(at: int, length: int) -> bytes:
        first = at % 251
        return pattern[first : first + length]

    def read() -> None:
        rng = random.Random(1)
        while not ended.is_set():
            before = synced
            opened = files.open_now("a")
            for _ in range(20):
                at = rng.randrange(max(1, before))
                length = min(rng.randrange(1, 70_000), before - at)
                if length > 0 and opened.read_at(at, length) != expected(at, length):
                    wrong.append((at, length, before))
            tail = opened.read_at(max(0, before - 5000), min(before, 5000))
            if tail != expected(max(0, before - 5000), min(before, 5000)):
                wrong.append((before, -1, before))

    reader = threading.Thread(target=read)
    reader.start()
    rng = random.Random(2)
    for number in itertools.count():
        log.past_cache(number // 5 % 4 != 0)
        size = rng.choice((10, 300, 4000, 20_000, 300_000))
        append(log, expected(log.size, size))
        log.sync()
        synced = log.size
        if wrong or (number > 400 and synced > 16 * MiB):
            break
    ended.set()
    reader.join()
    log.close()
    assert not wrong
