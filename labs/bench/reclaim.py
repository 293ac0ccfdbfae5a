"""Reclaim at 10 million chunks: how long choosing and marking take, what memory they need, what they find after 1 % of churn.

    python -m labs.bench.reclaim --folder FOLDER [--chunks 10000000]

The store is real but for the data: packs of blocks have a header and a footer and no records between, because a mark reads none.
Maps, pages, points, index and mark are the program's own.  One point is captured, 1 % of its blocks change at random places, a
second point is captured, a run of reclaim marks, the first point is forgotten, and then it is measured, in a process of its own:
choosing by counts, and marking.  Memory is the kernel's count, looked at every 50 ms, mapped pages apart.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blake3
import numpy as np

from hvbackup.model import Consistency, Disk, DiskId, DiskRoot, Instant, Machine, MachineId, RecoveryPoint
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format.blockmap import BlockMap, MapEditor
from hvbackup.store.format.point import new_id
from hvbackup.store.reclaim import counts
from hvbackup.store.reclaim.mark import mark
from hvbackup.store.reclaim.reclaim import choose
from hvbackup.store.store import Store, init

BLOCK = 64 * 1024
CHUNKS_PER_PACK = 1000
CHURN = 0.01
STORED = 40_000
MACHINE = Machine(MachineId("bench"), "bench", "bench")


def rows_of(number: int) -> np.ndarray:
    """The footer of a pack: random ids in order, made of its number."""
    rng = np.random.Generator(np.random.SFC64(number))
    rows = np.zeros(CHUNKS_PER_PACK, f.ROW)
    rows["id"] = rng.integers(0, 1 << 64, (CHUNKS_PER_PACK, 4), np.uint64).astype(">u8").view("V32").ravel()
    rows["offset"], rows["stored"] = f.HEADER_BYTES + np.arange(CHUNKS_PER_PACK) * STORED, STORED
    rows["plain"], rows["kind"] = BLOCK, f.CHUNK_BLOCK
    return packs.sort_rows(rows)


def write_pack(store: Store, number: int) -> np.ndarray:
    """A pack without records; the ids in it."""
    rows = rows_of(number)
    head = f.with_crc(f.HEADER.pack(f.HEADER_MAGIC, f.FORMAT, f.KIND_DATA, 0, store.id, bytes(32), 0))
    footer = rows.tobytes()
    end = f.with_crc(f.TRAILER.pack(f.TRAILER_MAGIC, len(head), len(rows), blake3.blake3(footer).digest()))
    data = head + footer + end
    path = store.files.path(packs.path_of(blake3.blake3(data).hexdigest()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return np.ascontiguousarray(rows["id"]).view(np.uint8).reshape(-1, 32)


def build(folder: Path, chunks: int) -> None:
    """The store exists when this returns."""
    init(folder / "store", None)
    changed = int(chunks * CHURN)
    with Store.open(folder / "store", folder / "state", owner=True) as store:
        count = chunks // CHUNKS_PER_PACK
        ids = np.concatenate([write_pack(store, n) for n in range(count)])
        more = np.concatenate([write_pack(store, count + n) for n in range(-(-changed // CHUNKS_PER_PACK))])[:changed]
        first = commit(store, 1, [(0, ids)], None)
        where = np.sort(np.random.default_rng(1).choice(len(ids), changed, replace=False))
        commit(store, 2, [(int(at), more[i : i + 1]) for i, at in enumerate(where)], first)
        marks = mark(store, Instant(2))
        counts.save(store, counts.Counts(Instant(2), marks.shares(), marks.points))
        store.tell("forget", Instant(3), forgotten=[store.path_of(first)])
        store.files.remove(store.path_of(first))


def commit(store: Store, t: int, blocks: list[tuple[int, np.ndarray]], base: RecoveryPoint | None) -> RecoveryPoint:
    """A point whose map has these blocks over those of another."""
    writer = store.writer()
    count = sum(len(ids) for _, ids in blocks) if base is None else base.disks[0].disk.size // BLOCK
    old = BlockMap(base.disks[0].root, count, store.chunks.page) if base else None
    editor = MapEditor(old, count, lambda page: writer.page(page) or store.chunks.page(page), writer.put_page)
    for at, ids in blocks:
        editor.put(at, ids)
    disk = Disk(DiskId("vda"), count * BLOCK)
    root = DiskRoot(disk, editor.finish())
    point = RecoveryPoint(new_id(), MACHINE, Instant(t), Consistency.CRASH, (root,))
    store.commit(point, writer)
    store.tell("capture", Instant(t), point=store.path_of(point), machine=MACHINE.id)
    return point


@contextmanager
def watched(into: dict[str, float]) -> Iterator[None]:
    """The largest RssAnon and RssFile while the context lasts, in MiB, and the time it took."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(("RssAnon", "RssFile")):
                    key = line.split(":")[0]
                    into[key] = max(into.get(key, 0.0), int(line.split()[1]) / 1024)

    thread = threading.Thread(target=look)
    thread.start()
    began, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        into["seconds"], into["cpu_seconds"] = time.monotonic() - began, time.process_time() - cpu
        ended.set()
        thread.join()


def measure(folder: Path) -> dict[str, object]:
    """What choosing and marking cost."""
    opened: dict[str, float] = {}
    marked: dict[str, float] = {}
    chosen: dict[str, float] = {}
    with watched(opened):
        store = Store.open(folder / "store", folder / "state", owner=True)
    with store:
        with watched(chosen):
            known = counts.load(store)
            guessed = counts.guess(store, known, lambda _: None) if known else None
            assert guessed, "the store must be built anew"
            found = choose(store, guessed.shares, 0.2)
        with watched(marked):
            shares = mark(store, Instant(time.time_ns())).shares()
        right = choose(store, shares, 0.2)
        live, total = sum(s.live for s in shares.values()), sum(s.total for s in shares.values())
        return {
            "rows": store.index.chunks,
            "packs": len(shares),
            "garbage_percent": round(100 * (1 - live / total), 3),
            "guessed_garbage_percent": round(100 * (1 - sum(s.live for s in guessed.shares.values()) / total), 3),
            "chosen": len(found),
            "a_mark_would_choose": len(right),
            "chosen_by_both": len(set(found) & set(right)),
            "open": {k: round(v, 2) for k, v in opened.items()},
            "mark": {k: round(v, 2) for k, v in marked.items()},
            "choose": {k: round(v, 3) for k, v in chosen.items()},
        }


def main() -> None:
    """Build the store if it is not there, in a process of its own, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=10_000_000)
    options = parser.parse_args()
    if not (options.folder / "store").exists():
        pid = os.fork()
        if pid == 0:
            build(options.folder, options.chunks)
            os._exit(0)
        os.waitpid(pid, 0)
    print(json.dumps(measure(options.folder), indent=1))


if __name__ == "__main__":
    main()
