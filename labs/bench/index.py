"""The index at 16 TB: rebuild, memory, and lookups of a batch, warm and cold.

    python -m labs.bench.index --folder FOLDER [--chunks 250000000]

The packs are synthetic: a backend that makes footer and trailer of each out of its number, so that the disk holds only the index
(twice its size while it is rebuilt).  Everything else is the program's own code.  What reading real footers costs is
measured with some real files.  Memory is the kernel's count: RssAnon and RssFile of /proc/self/status, looked at every 50 ms.
Cold means that the pages of the cache files were dropped (POSIX_FADV_DONTNEED) before a new process mapped them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import blake3
import numpy as np

from hvbackup.files import Files
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.index.index import NOWHERE, Index

CHUNKS_PER_PACK = 1000  # 64 MiB of 64 KiB blocks that do not shrink
BATCH = 16_384
REAL_PACKS = 2_000
STORED = 40_000


def name_of(number: int) -> str:
    """What a pack is called."""
    return blake3.blake3(number.to_bytes(8, "little")).hexdigest()


def rows_of(number: int) -> np.ndarray:
    """The footer of a pack: random ids in order, made of its number."""
    rng = np.random.Generator(np.random.SFC64(number))
    words = rng.integers(0, 1 << 64, (CHUNKS_PER_PACK, 4), np.uint64)
    words[:, 0] = np.sort(words[:, 0])
    rows = np.zeros(CHUNKS_PER_PACK, f.ROW)
    rows["id"] = words.astype(">u8").view("V32").ravel()
    rows["offset"] = f.HEADER_BYTES + np.arange(CHUNKS_PER_PACK) * STORED
    rows["stored"], rows["plain"], rows["kind"] = STORED, 65536, f.CHUNK_BLOCK
    return rows


class SyntheticPacks:
    """A backend of packs that exist only as their numbers."""

    def __init__(self, count: int) -> None:
        self._folders: dict[str, list[str]] = {}
        self._numbers = {}
        for number in range(count):
            name = name_of(number)
            self._folders.setdefault(name[:2], []).append(f"{name}{packs.SUFFIX}")
            self._numbers[name[:16]] = number
        self._end = f.HEADER_BYTES + CHUNKS_PER_PACK * STORED

    def names(self, directory: str) -> list[str]:
        """As a directory would list them."""
        return sorted(self._folders) if directory == "packs" else sorted(self._folders[directory.split("/")[1]])

    def exists(self, _name: str) -> bool:
        """They all do."""
        return True

    def size(self, _name: str) -> int:
        """All packs are alike."""
        return self._end + CHUNKS_PER_PACK * f.ROW.itemsize + f.TRAILER_BYTES

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Footer and trailer."""
        tail = _tail(self._numbers[name.split("/")[2][:16]], self._end)
        return tail[offset - self._end : offset - self._end + length]


@lru_cache(1)
def _tail(number: int, end: int) -> bytes:
    footer = rows_of(number).tobytes()
    trailer = f.TRAILER.pack(f.TRAILER_MAGIC, end, CHUNKS_PER_PACK, blake3.blake3(footer).digest())
    return footer + f.with_crc(trailer)


class Memory(threading.Thread):
    """The most memory this process had, anonymous and of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous_mib = self.file_mib = 0
        self._end = threading.Event()

    def run(self) -> None:
        """Look until told to stop."""
        while not self._end.wait(0.05):
            self.look()

    def look(self) -> None:
        """Now."""
        found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.anonymous_mib = max(self.anonymous_mib, int(found["RssAnon"].split()[0]) // 1024)
        self.file_mib = max(self.file_mib, int(found["RssFile"].split()[0]) // 1024)

    def stop(self) -> None:
        """The last look."""
        self.look()
        self._end.set()


@contextmanager
def measured(what: str, **more: object) -> Iterator[dict[str, object]]:
    """Print wall and CPU seconds and memory of a block, as a line of JSON."""
    memory, wall, cpu = Memory(), time.perf_counter(), time.process_time()
    memory.start()
    found: dict[str, object] = {"what": what, **more}
    yield found
    memory.stop()
    found |= {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}
    found |= {"anonymous_mib": memory.anonymous_mib, "mapped_mib": memory.file_mib}
    print(json.dumps(found), flush=True)


def generate(chunks: int) -> None:
    """What making the synthetic footers costs by itself: to be subtracted."""
    with measured("synthetic footers alone", chunks=chunks):
        for number in range(chunks // CHUNKS_PER_PACK):
            _tail(number, 0)


def rebuild(folder: Path, chunks: int) -> None:
    """The index of all packs, from nothing."""
    count = chunks // CHUNKS_PER_PACK
    backend = SyntheticPacks(count)
    with measured("rebuild", chunks=chunks) as found:
        index = Index(backend, Files(folder), keep=True)  # type: ignore[arg-type]
        index.sync()
        found["files_gb"] = round(sum(p.stat().st_size for p in (folder / "index").iterdir()) / 1e9, 2)
        found["generations"], found["rows"] = len(list((folder / "index").iterdir())), index.chunks


def ask(folder: Path, chunks: int, kind: str) -> None:
    """One batch in a new process, cold or not, then once more."""
    count = chunks // CHUNKS_PER_PACK
    rng = np.random.Generator(np.random.PCG64(3))
    if kind == "hits":
        some = rng.choice(count, min(count, 256), replace=False)
        ids = np.concatenate([rng.choice(rows_of(int(n))["id"], BATCH // len(some), replace=False) for n in some])
    else:
        ids = np.frombuffer(rng.bytes(32 * BATCH), "V32")
    backend = SyntheticPacks(count)
    index = Index(backend, Files(folder), keep=False)  # type: ignore[arg-type]
    opened = time.perf_counter()
    index.sync()
    opened = time.perf_counter() - opened
    for turn in ("first", "again", "again"):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        with measured(f"batch of {len(ids)} {kind}, {turn}") as found:
            start = time.perf_counter()
            where = index.lookup(ids)
            found["ms"] = round(1000 * (time.perf_counter() - start), 1)
            assert ((where["pack"] != NOWHERE) == (kind == "hits")).all()
            found["major_faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
            found["open_s"] = round(opened, 2)


def drop(folder: Path) -> None:
    """No page of the cache files is in memory when this returns."""
    for path in (folder / "index").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def real(folder: Path) -> None:
    """What reading the footers of real files costs, cold."""
    files = Files(folder / "real")
    for number in range(REAL_PACKS):
        path = files.path(packs.path_of(name_of(number)))
        path.parent.mkdir(parents=True, exist_ok=True)
        end = f.HEADER_BYTES + CHUNKS_PER_PACK * STORED
        with path.open("wb") as file:
            file.seek(end)
            file.write(_tail(number, end))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with measured("footers of real files, cold", packs=REAL_PACKS):
        for name in packs.list_packs(files):
            packs.read_footer(files, name)
    shutil.rmtree(folder / "real")


def main() -> None:
    """All parts, each in a process of its own; the folder is removed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=250_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="is made, and removed")
    parser.add_argument("--part", choices=("generate", "real", "rebuild", "hits", "misses"))
    args = parser.parse_args()
    if args.part:
        parts = {"generate": lambda: generate(args.chunks), "real": lambda: real(args.folder),
                 "rebuild": lambda: rebuild(args.folder, args.chunks)}  # fmt: skip
        parts.get(args.part, lambda: ask(args.folder, args.chunks, args.part))()
        return
    args.folder.mkdir(parents=True)
    try:
        for part in ("generate", "real", "rebuild", "hits", "misses"):
            if part in ("hits", "misses"):
                drop(args.folder)
            command = [sys.executable, "-m", "labs.bench.index", "--part", part]
            subprocess.run([*command, "--chunks", str(args.chunks), "--folder", str(args.folder)], check=True)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
