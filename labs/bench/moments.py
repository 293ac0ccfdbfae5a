"""How long it takes to open a disk as it was at a random moment, and to read it, long after the last recovery point.

    python labs/bench/moments.py FOLDER [--rate 5000] [--hours 1] [--reads 1000] [--rounds 5]

Makes a store in FOLDER with one 1 TiB disk, an empty point, and a journal of random 4 KiB writes at that rate for so long,
sealed as the product seals it (60 s or 64 MiB).  The facts and their places are real and random; their bytes are few kinds of
blocks, so that tens of gigabytes need not be made first.  Then each round opens a random moment in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import blake3
import numpy as np
import zstandard

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from hvbackup.model import (
    SECOND,
    ZERO_CHUNK,
    Consistency,
    Disk,
    DiskId,
    DiskRoot,
    Instant,
    Machine,
    MachineId,
    MiB,
    RecoveryPoint,
)
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack, point
from hvbackup.store.journal.history import History
from hvbackup.store.journal.journal import SEGMENT, Name
from hvbackup.store.journal.segment import path_of
from hvbackup.store.store import Store, init

TIB = 1 << 40
WRITE = 4096
MACHINE, DISK = MachineId("bench"), DiskId("vda")
START = 1_795_000_000 * SECOND


def make(folder: Path, rate: int, hours: float) -> None:
    """The store, with every table that a worker would have made."""
    init(folder / "store", None)
    with Store.open(folder / "store", folder / "state", [], owner=True) as store:
        disk = Disk(DISK, TIB)
        machine = Machine(MACHINE, "bench", "fake", (disk,))
        base = RecoveryPoint(
            point.new_id(),
            machine,
            Instant(START),
            Consistency.CRASH,
            (DiskRoot(disk, ZERO_CHUNK, None, "full"),),
            seq=0,
        )
        store.commit(base, store.writer())
        per_segment = min(60 * rate, 64 * MiB // WRITE)
        total, seq, number = int(rate * 3600 * hours), 1, 0
        rng, began, warming = np.random.default_rng(1), time.monotonic(), 0.0
        while total > 0:
            count = min(per_segment, total)
            _segment(store, rng, seq, count, START + int(SECOND / rate) * number, int(SECOND / rate))
            seq, number, total = seq + count + 1, number + count, total - count
            if (number // per_segment) % 16 == 0:
                then = time.monotonic()
                History(store, MACHINE).warm()
                warming += time.monotonic() - then
        History(store, MACHINE).warm()
        print(f"{number} facts in {time.monotonic() - began:.0f} s, of which tables {warming:.0f} s")


def _segment(store: Store, rng: np.random.Generator, first: int, count: int, t: int, step: int) -> None:
    facts = np.zeros(count + 1, f.FACT)
    table = {"disks": [{"number": 0, "id": DISK, "size": TIB, "sector": 512}], "epoch": 1}
    text = json.dumps(table).encode()
    facts["kind"][0], facts["length"][0], facts["t"] = f.FACT_META, len(text), t
    rows = facts[1:]
    rows["t"] = t + step * np.arange(count)
    rows["offset"] = rng.integers(0, TIB // WRITE, count, dtype=np.uint64) * WRITE
    rows["length"], rows["kind"], rows["flags"] = WRITE, f.FACT_DATA, f.FLAG_FACT_BARRIER
    # The stream: the table's text, padded to a whole block, and then blocks that are all alike.
    rows["pos"] = WRITE * (1 + np.arange(count))
    block = random.Random(first).randbytes(WRITE)
    path = path_of(store.ring.machine_name(MACHINE), Name(1, first, SEGMENT))
    writer = pack.PackWriter(store.files, store.ring, f.KIND_SEGMENT, path)
    zstd = zstandard.ZstdCompressor(level=1, write_content_size=False)
    pieces = -(-(count + 1) * WRITE // f.SEGMENT_PIECE_BYTES)
    some = block * (f.SEGMENT_PIECE_BYTES // WRITE)
    head = text.ljust(WRITE, b" ") + some[WRITE:]
    made = {
        piece: (zstd.compress(piece), blake3.blake3(piece, key=store.ring.block_key).digest()) for piece in (head, some)
    }
    for i in range(pieces):
        piece = head if i == 0 else some
        frame, chunk = made[piece]
        writer.add(f.CHUNK_FACTS, f.CODEC_ZSTD, frame, [chunk], [len(piece)])
    data = facts.tobytes()
    for at in range(0, len(data), f.SEGMENT_PIECE_BYTES):
        part = data[at : at + f.SEGMENT_PIECE_BYTES]
        chunk = blake3.blake3(part, key=store.ring.block_key).digest()
        writer.add(f.CHUNK_FACT_INDEX, f.CODEC_ZSTD, zstd.compress(part), [chunk], [len(part)])
    writer.seal()


def anonymous_mib() -> float:
    """Memory of this process that is no file's."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024


def measure(folder: Path, reads: int, seed: int) -> None:
    """One round, in a process of its own."""
    rng = random.Random(seed)
    before = anonymous_mib()
    began, cpu = time.monotonic(), time.process_time()
    with Store.open(folder / "store", folder / "state", []) as store:
        opened = time.monotonic()
        history = History(store, MACHINE)
        first, last = history.first, history.last
        assert first is not None
        assert last is not None
        listed = time.monotonic()
        moment = history.at(Instant(rng.randrange(first.t, last.t)))
        view = history.view(moment, DISK)
        shown, shown_cpu = time.monotonic(), time.process_time()
        in_view = anonymous_mib()
        buffer = bytearray(WRITE)
        for _ in range(reads // 2):
            view.read_into(rng.randrange(TIB // WRITE) * WRITE, memoryview(buffer))
        far = time.monotonic()
        touched = _written(history, moment.seq, rng, reads - reads // 2)
        hot = time.monotonic()
        for offset in touched:
            view.read_into(offset, memoryview(buffer))
            assert any(buffer)
        done = time.monotonic()
        print(
            json.dumps(
                {
                    "store_s": round(opened - began, 3),
                    "history_s": round(listed - opened, 3),
                    "view_s": round(shown - listed, 3),
                    "open_s": round(shown - opened, 3),
                    "open_cpu_s": round(shown_cpu - cpu, 3),
                    "random_reads_ms": round(1000 * (far - shown) / (reads // 2), 3),
                    "written_reads_ms": round(1000 * (done - hot) / max(1, len(touched)), 3),
                    "layers": len(view._layers),
                    "facts": moment.seq,
                    "anon_before_mib": round(before),
                    "anon_view_mib": round(in_view),
                    "anon_end_mib": round(anonymous_mib()),
                }
            )
        )


def _written(history: History, seq: int, rng: random.Random, count: int) -> list[int]:
    """Offsets that were written before the moment, out of a few segments."""
    runs = [run for run in history.runs if run.summary.last_seq <= seq]
    found: list[int] = []
    for run in rng.sample(runs, min(8, len(runs))):
        start = run.summary.table(DISK).start
        found += [int(start[rng.randrange(len(start))]) for _ in range(-(-count // 8))]
    return found[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--hours", type=float, default=1)
    parser.add_argument("--reads", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.round:
        measure(args.folder, args.reads, args.round)
        return 0
    if not (args.folder / "store").exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        make(args.folder, args.rate, args.hours)
    for number in range(1, args.rounds + 1):
        words = [sys.executable, __file__, str(args.folder), "--reads", str(args.reads), "--round", str(number)]
        subprocess.run(words, check=True, env=os.environ, timeout=600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
