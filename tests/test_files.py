"""The module that makes bytes durable: what it promises, in which order it calls, and how it fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from hvbackup import files as files_module
from hvbackup.errors import Busy, HvbackupError, SpaceExhausted
from hvbackup.files import Files
from tests.crash import Fate, Op, Recorder, wrecks
from tests.faults import FaultyKernel, once
from tests.world import tree


def trace(recorder: Recorder) -> list[str]:
    return [s.op.value for s in recorder.steps]


def test_a_file_is_synced_named_and_its_directory_synced_in_this_order(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    Files(tmp_path, recorder).write_new("a", b"content")
    assert trace(recorder)[-5:] == ["create", "write", "fsync", "rename", "sync_dir"]
    assert recorder.steps[-1].path == ""


def test_a_power_cut_after_a_call_returned_takes_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    files = Files(tmp_path, recorder)
    done: list[tuple[str, bytes | None]] = []
    for name, data in (("a/b/c", b"one"), ("a/d", b"two"), ("a/b/c", b"three"), ("e", b"four")):
        files.replace(name, data)
        done.append((name, data))
        recorder.note(list(done))
    files.remove("e")
    recorder.note([*done, ("e", None)])
    for wreck in wrecks(recorder.steps, seeds=20):
        said = dict(wreck.notes[-1]) if wreck.notes else {}
        possible = {name: {data for n, data in done if n == name} | {None} for name, _ in done}
        for name, data in said.items():
            found = wreck.tree.get(name)
            # Between two notes a file may have its next content already, and never anything else.
            assert found == data or found in possible[name] - {None} or name == "e"
        for name, found in wreck.tree.items():
            assert found is None or name.startswith("tmp/") or found in possible[name]


def test_the_recorder_can_lose_what_was_not_synced(tmp_path: Path) -> None:
    """The model bites: without the syncs, things vanish."""
    recorder = Recorder(tmp_path)
    Files(tmp_path, recorder).write_new("a", b"content")
    careless = [s for s in recorder.steps if s.op not in (Op.SYNC_DIR, Op.FSYNC)]
    last = [w.tree.get("a") for w in wrecks(careless, seeds=5) if w.step == len(careless) - 1]
    assert b"content" in last or any(w.tree.get("a") == b"content" for w in wrecks(careless, seeds=5))
    assert any(w.tree.get("a") == b"" for w in wrecks(careless, seeds=0) if Fate.BYTES_LOST.value in w.how)
    assert any("a" not in w.tree for w in wrecks(careless, seeds=0) if w.how.endswith(Fate.LOST.value))


def test_the_same_content_again_is_nothing_new_and_another_one_is_refused(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write_new("a/b", b"content")
    files.write_new("a/b", b"content")
    with pytest.raises(HvbackupError, match="a/b exists already"):
        files.write_new("a/b", b"other")
    assert files.read("a/b") == b"content"


def test_a_replaced_or_removed_file_is_seen_at_once(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.replace("a", b"one")
    assert files.read_at("a", 1, 5) == b"ne"
    files.replace("a", b"two")
    assert files.read_at("a", 0, 5) == b"two"
    assert files.size("a") == 3
    files.remove("a")
    files.remove("a")
    assert not files.exists("a")
    with pytest.raises(FileNotFoundError):
        files.read_at("a", 0, 1)
    with pytest.raises(FileNotFoundError):
        files.read("a")
    with pytest.raises(FileNotFoundError):
        files.size("a")


def test_an_unfinished_file_vanishes_with_its_context_or_at_the_next_sweep(tmp_path: Path) -> None:
    files = Files(tmp_path)
    with files.new() as unfinished:
        unfinished.write(b"abc")
        assert unfinished.size == 3
    assert files.names("tmp") == []
    abandoned = files.new()
    abandoned.write(b"abc")
    (tmp_path / "tmp" / "other").write_bytes(b"of a dead writer")
    assert files.sweep() == 1, "one is still being written"
    os.close(abandoned._fd)
    assert files.sweep() == 1
    assert tree(tmp_path) == {}
    abandoned._open, abandoned._named = False, True


def test_files_are_private_and_so_are_directories(tmp_path: Path) -> None:
    Files(tmp_path / "root").write_new("a/b", b"x")
    assert (tmp_path / "root" / "a" / "b").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "root" / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o700


def test_names_of_what_is_not_there(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write_new("b", b"")
    files.write_new("a", b"")
    assert files.names("") == ["a", "b", "tmp"]
    assert files.names("none") == []
    assert files.names("a") == []
    assert files.path("") == tmp_path


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [(errno.ENOSPC, SpaceExhausted, "No room left"), (errno.EDQUOT, SpaceExhausted, "No room left"),
     (errno.EIO, HvbackupError, "Input/output error"), (errno.EROFS, HvbackupError, "Read-only")],
)  # fmt: skip
def test_errors_of_the_system_are_named(tmp_path: Path, error: int, expected: type[Exception], text: str) -> None:
    kernel = FaultyKernel()
    files = Files(tmp_path, kernel)
    files.write_new("warm up", b"")
    for nth in range(5):
        kernel.arm(once(nth, OSError(error, os.strerror(error))))
        with pytest.raises(expected, match=text) as e:
            files.replace("a", b"x")
        assert str(tmp_path) in str(e.value)
        kernel.disarm()
        assert files.names("tmp") == []
    kernel.arm(once(0, OSError(error, os.strerror(error))))
    with pytest.raises(expected):
        files.remove("a")
    kernel.arm(once(0, OSError(error, os.strerror(error))))
    with pytest.raises(expected):
        files.make_dir("new")


def test_a_directory_that_somebody_else_makes_meanwhile_is_fine(tmp_path: Path) -> None:
    class Racing(FaultyKernel):
        def mkdir(self, path: str, mode: int) -> None:
            super().mkdir(path, mode)
            super().mkdir(path, mode)

    Files(tmp_path, Racing()).make_dir("a")
    assert (tmp_path / "a").is_dir()


def test_reading_a_directory_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(HvbackupError, match="Cannot read"):
        Files(tmp_path).read("a")
    with pytest.raises(HvbackupError, match="Cannot read"):
        Files(tmp_path).read_at("a", 0, 1)


def open_below(folder: Path) -> int:
    """How many descriptors lead to what lies there; others come and go with what collects garbage."""
    return sum(str(fd.resolve()).startswith(f"{folder}/") for fd in Path("/proc/self/fd").iterdir())


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "OPEN_FILES_MAX", 4)
    files = Files(tmp_path)
    for number in range(20):
        files.write_new(f"f{number}", b"%d" % number)
    before = open_below(tmp_path)
    for _ in range(2):
        for number in range(20):
            assert files.read_at(f"f{number}", 0, 9) == b"%d" % number
    assert before < open_below(tmp_path) <= before + 4
    files.close()
    assert open_below(tmp_path) <= before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_whoever_makes_durable_what_he_has_read_is_told_when_it_fails(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where nothing can be written, nothing waits to be."""

    def fails(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_bytes(b"content")
    opened = Files(tmp_path).open_now("a")
    monkeypatch.setattr(os, "fsync", fails)
    with nullcontext() if number == errno.EROFS else pytest.raises(HvbackupError, match=r"/a: Input/output error"):
        opened.sync()


def test_a_handle_lives_as_long_as_a_thread_reads_with_it(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write_new("a", b"x" * 100_000)
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(3000):
                assert files.read_at("a", 0, 100_000) == b"x" * 100_000
        except BaseException as e:  # noqa: BLE001
            failures.append(e)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        files.forget("a")
        files.close()
    for thread in threads:
        thread.join(120)
    assert failures == []


def test_one_owner_at_a_time_even_in_one_process(tmp_path: Path) -> None:
    files = Files(tmp_path)
    with (
        files.owner("state/lock", "The store"),
        pytest.raises(Busy, match=f"The store is in use by process {os.getpid()}"),
        files.owner("state/lock", "The store"),
    ):
        pass
    with files.owner("state/lock", "The store"):
        pass


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom hvbackup.files import Files\n"
        "with Files(sys.argv[1]).owner('lock', 'x'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Busy, match=f"process {other.pid}"), Files(tmp_path).owner("lock", "The store"):
            pass
        other.kill()
        other.wait(120)
    with Files(tmp_path).owner("lock", "The store"):
        pass


def test_settle_makes_every_visible_name_certain(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    files = Files(tmp_path / "root", recorder)
    files.write_new("a/b", b"x")
    recorder.steps.clear()
    files.settle()
    synced = {s.path for s in recorder.steps if s.op is Op.SYNC_DIR}
    assert synced == {"", "root", "root/a", "root/tmp"}
