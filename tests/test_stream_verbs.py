"""Every verb at single writes: tag, backup, restore, timeline, status; folding while the stream goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from hvbackup.moments import rfc3339
from hvbackup.store.journal.history import History
from hvbackup.store.store import Store, init
from tests.hypervisors.daemon import Daemon
from tests.scribe import Scribe
from tests.test_stream_kills import StreamWorker
from tests.test_stream_qemu import SIZES, daemon, every_moment, images, remarks

__all__ = ["daemon"]
pytestmark = pytest.mark.real


def restored(worker: StreamWorker, folder: Path, at: str) -> dict[str, bytes]:
    done = worker.run("restore", "m1", "--at", at, "--to", str(folder))
    assert done.returncode == 0, done.stderr
    return {disk: (folder / f"{disk}.raw").read_bytes() for disk in SIZES}


def neighbours(folder: Path, after: int) -> int:
    """A moment that is a write, and follows one that is offered too: now and then a barrier or the head of a log is between."""
    with Store.open(folder / "store", folder / "state2", []) as store:
        history = History(store, next(iter(store.points())).machine.id)
        seqs, told = {m.seq for m in every_moment(history)}, remarks(history)
        return next(seq for seq in sorted(seqs - told) if seq > after + 1 and seq - 1 in seqs)


@pytest.mark.timeout(600)
def test_every_verb_works_at_single_writes(daemon: Daemon, tmp_path: Path) -> None:
    init(tmp_path / "store", None)
    source = f"qemu:{daemon.qmp_path}"
    with Scribe(daemon, SIZES, 500) as scribe:
        worker = StreamWorker(tmp_path, source, "--fold", "4s")
        worker.wait_for("begun")
        before = scribe.acked
        tagged = json.loads(worker.run("tag", "m1", "before upgrade", "--json").stdout)
        after = scribe.acked
        worker.wait_for("moment", 3)
        made = worker.run("backup", source, "--json")
        assert made.returncode == 0, made.stderr
        for n, at in enumerate(("tag:before upgrade", f"seq:{tagged['seq']}", rfc3339_of(tmp_path, tagged["seq"]))):
            assert before <= scribe.verify(restored(worker, tmp_path / f"r{n}", at)) <= after + 1
        last = neighbours(tmp_path, tagged["seq"])
        one, two = (restored(worker, tmp_path / f"s{seq}", f"seq:{seq}") for seq in (last - 1, last))
        assert scribe.verify(two) == scribe.verify(one) + 1, "the write before"
        worker.wait_for("folded", 3)
        status = json.loads(worker.run("status", "--json").stdout)
        assert status["machines"][0]["protection"]["lag_seconds"] < 120, "two milliseconds, on a machine that has time"
        told = json.loads(worker.run("timeline", "m1", "--json").stdout)
        assert told["stretches"][-1]["median_seconds"] < 1, "the writes', 2 ms; the folds' would be four seconds"
        assert sum(s["moments"] for s in told["stretches"]) > 500
        assert "before upgrade" in json.dumps(told["marks"])
        assert not worker.of("trouble")
        assert worker.end(signal.SIGINT) == 0
        scribe.stop()
    with Store.open(tmp_path / "store", tmp_path / "state2", []) as store:
        history = History(store, next(iter(store.points())).machine.id)
        offered = every_moment(history)
        reached = [scribe.verify(images(history, m)) for m in offered[:: max(1, len(offered) // 20)]]
        assert reached == sorted(reached)
    assert not daemon.leftovers()


def rfc3339_of(folder: Path, seq: int) -> str:
    """The time of a moment, as a user copies it."""
    with Store.open(folder / "store", folder / "state2", []) as store:
        history = History(store, next(iter(store.points())).machine.id)
        return rfc3339(history.by_seq(seq).t)


def test_what_makes_no_sense_with_a_stream_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    worker = StreamWorker(tmp_path, f"qemu:{daemon.qmp_path}", "--every", "1s")
    assert worker.end(signal.SIGCONT) == 2
    for words in (["--fsync", "100ms"], ["--stream", "--fsync", "1ms"], ["--stream", "--freeze-every", "1h"]):
        assert worker.run("protect", "qemu:/nowhere", *words).returncode == 2
    image = tmp_path / "vda.raw"
    refused = worker.run("protect", f"image:{image}", "--stream")
    assert refused.returncode == 2
