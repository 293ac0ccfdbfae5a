"""How fast an NBD export answers: random 4 KiB reads at queue depth 16, cold and from the cache, and a sequential pass.

    /usr/bin/python3 -m labs.bench.nbd URI [--image FILE] [--reads N] [--json]

Reads only where there is data: the blocks that block status reports as neither hole nor zero, or, with `--image`, the 64 KiB
blocks of that image that are not zero, whose bytes are then compared with the replies.  The random reads are spread over all
data, each block at most once, so the first pass finds the server's cache cold; the second repeats the last reads of the
first, as many as a cache of --cache-mb holds.  The client is libnbd (Debian's python3-libnbd, hence Debian's Python); what it
can do at most is measured in the same run against `nbdkit memory`, and both are printed: a figure near the ceiling says
nothing about the server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import nbd  # type: ignore[import-not-found,unused-ignore]  # noqa: E402  (not this file: its folder has left the path)

READ = 4096
BLOCK = 65536
SEQUENTIAL = 256 * 1024
RANDOM_DEPTH = 16
SEQUENTIAL_DEPTH = 8
CEILING_BYTES = 256 << 20
STATUS_BYTES = 1 << 30
LIMITS = {"random, cold": 8000.0, "random, cached": 12000.0, "sequential": 400.0}


@dataclass(frozen=True, slots=True)
class Rate:
    """One measurement: what was read in how long, and the client's CPU meanwhile."""

    name: str
    reads: int
    read_bytes: int
    wall_seconds: float
    client_cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Reads a second."""
        return self.reads / self.wall_seconds

    @property
    def mb_per_second(self) -> float:
        """Megabytes a second."""
        return self.read_bytes / self.wall_seconds / 1e6


@dataclass(frozen=True, slots=True)
class Asked:
    """One read: where, and how long."""

    offset: int
    length: int


def connect(uri: str, *, status: bool = False) -> Any:
    """A connection to the export, with block status where it is wanted."""
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    if status:
        handle.add_meta_context("base:allocation")
    handle.connect_uri(uri)
    return handle


def data_blocks(uri: str) -> list[int]:
    """The offsets of the 64 KiB blocks that block status does not call zero."""
    handle = connect(uri, status=True)
    size = handle.get_size()
    if not handle.can_meta_context("base:allocation"):
        return list(range(0, size - BLOCK + 1, BLOCK))
    blocks: set[int] = set()
    at = 0
    while at < size:
        for length, flags in status_at(handle, at, min(size - at, STATUS_BYTES)):
            if not flags & nbd.STATE_ZERO:
                blocks.update(range(at // BLOCK * BLOCK, at + length, BLOCK))
            at += length
    handle.shutdown()
    return sorted(block for block in blocks if block + BLOCK <= size)


def status_at(handle: Any, offset: int, length: int) -> list[tuple[int, int]]:
    """The extents (length, flags) that one block status request returned."""
    found: list[tuple[int, int]] = []

    def take(context: str, _offset: int, entries: Sequence[int], _error: Any) -> int:
        if context == "base:allocation":
            found.extend(zip(entries[0::2], entries[1::2], strict=True))
        return 0

    handle.block_status(length, offset, take)
    return found


def image_blocks(image: Path) -> list[int]:
    """The offsets of the 64 KiB blocks of an image that are not zero."""
    zero, blocks = bytes(BLOCK), []
    with open(image, "rb") as file:
        for offset in range(0, image.stat().st_size - BLOCK + 1, BLOCK):
            if file.read(BLOCK) != zero:
                blocks.append(offset)
    return blocks


def drive(handle: Any, asked: Iterable[Asked], depth: int, image: int | None = None) -> tuple[int, int]:
    """Reads everything in `asked`, `depth` at a time; returns reads and bytes.  Replies are compared with `image`."""
    waiting: dict[int, tuple[Asked, Any]] = {}
    todo = iter(asked)
    spare: list[Any] = []
    reads = read_bytes = 0
    more = True
    while more or waiting:
        while more and len(waiting) < depth:
            one = next(todo, None)
            if one is None:
                more = False
                break
            buffer = spare.pop() if spare else nbd.Buffer(one.length)
            waiting[handle.aio_pread(buffer, one.offset)] = (one, buffer)
        if waiting:
            handle.poll(10_000)
        while waiting and (cookie := handle.aio_peek_command_completed()) > 0:
            handle.aio_command_completed(cookie)
            one, buffer = waiting.pop(cookie)
            if image is not None and bytes(buffer.to_bytearray()) != os.pread(image, one.length, one.offset):
                sys.exit(f"The export differs from the image in the {one.length} bytes at {one.offset}")
            spare.append(buffer)
            reads, read_bytes = reads + 1, read_bytes + one.length
    return reads, read_bytes


def timed(name: str, uri: str, asked: Iterable[Asked], depth: int) -> Rate:
    """The rate of `asked` over a connection of its own."""
    handle = connect(uri)
    cpu, wall = time.process_time(), time.perf_counter()
    reads, read_bytes = drive(handle, asked, depth)
    rate = Rate(name, reads, read_bytes, time.perf_counter() - wall, time.process_time() - cpu)
    handle.shutdown()
    return rate


def random_reads(blocks: list[int], count: int, seed: int) -> list[Asked]:
    """`count` reads of 4 KiB, each in another block as long as there are enough blocks."""
    rng = random.Random(seed)
    places = rng.sample(blocks, min(count, len(blocks)))
    places += rng.choices(blocks, k=count - len(places))
    return [Asked(place + rng.randrange(BLOCK // READ) * READ, READ) for place in places]


def sequential_reads(blocks: list[int]) -> Iterator[Asked]:
    """Reads of up to 256 KiB that cover `blocks` in order and nothing else."""
    begin = end = -1
    for block in blocks:
        if block != end or end - begin == SEQUENTIAL:
            if begin >= 0:
                yield Asked(begin, end - begin)
            begin = block
        end = block + BLOCK
    if begin >= 0:
        yield Asked(begin, end - begin)


def rates(uri: str, blocks: list[int], reads: int, cache_mb: int) -> list[Rate]:
    """The three measurements of one export."""
    cold = random_reads(blocks, reads, seed=1)
    cached = cold[-(cache_mb << 20) // (BLOCK * 2) :]  # half of what the cache holds, the most recent
    again = random.Random(2).choices(cached, k=reads)
    # Buffers are of one size, so that none is allocated while the clock runs; shorter runs at the ends of data are left out.
    whole = [one for one in sequential_reads(blocks) if one.length == SEQUENTIAL]
    return [
        timed("random, cold", uri, cold, RANDOM_DEPTH),
        timed("random, cached", uri, again, RANDOM_DEPTH),
        timed("sequential", uri, whole, SEQUENTIAL_DEPTH),
    ]


@contextmanager
def memory_export() -> Iterator[str]:
    """The URI of an `nbdkit memory` export, which ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder, "socket")
        server = subprocess.Popen(
            ["nbdkit", "-f", "-U", address, "memory", str(CEILING_BYTES)], stderr=subprocess.DEVNULL
        )
        try:
            wait_for(address)
            yield f"nbd+unix:///?socket={address}"
        finally:
            server.terminate()
            server.wait(10)


def wait_for(address: Path) -> None:
    """Something listens at the socket, within ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as trial:
                trial.connect(str(address))
            return
        except OSError:
            if time.monotonic() > deadline:
                sys.exit(f"{address}: nbdkit did not start within 10 seconds")
            time.sleep(0.02)


def ceiling(reads: int) -> list[Rate]:
    """What the client reaches against a server that only copies memory."""
    blocks = list(range(0, CEILING_BYTES, BLOCK))
    with memory_export() as uri:
        handle = connect(uri)
        for offset in range(0, CEILING_BYTES, 1 << 20):  # nbdkit answers from pages that exist
            handle.pwrite(b"\1" * (1 << 20), offset)
        handle.shutdown()
        return rates(uri, blocks, reads, cache_mb=64)


def compare(uri: str, blocks: list[int], image: Path) -> None:
    """A thousand random reads equal the image."""
    handle, descriptor = connect(uri), os.open(image, os.O_RDONLY)
    try:
        drive(handle, random_reads(blocks, 1000, seed=3), RANDOM_DEPTH, descriptor)
    finally:
        os.close(descriptor)
        handle.shutdown()


def table(measured: list[Rate], most: list[Rate]) -> Iterator[str]:
    """The measurements beside the client's ceiling and what is asked for."""
    yield "| what | reached | client's ceiling | asked for | client CPU, us a read | |"
    yield "|---|---|---|---|---|---|"
    for one, top in zip(measured, most, strict=True):
        sequential = one.name == "sequential"
        unit = "MB/s" if sequential else "reads/s"
        reached, limit = (rate.mb_per_second if sequential else rate.per_second for rate in (one, top))
        verdict = "met" if reached >= LIMITS[one.name] else "**missed**"
        cpu = one.client_cpu_seconds / one.reads * 1e6
        yield f"| {one.name}, {unit} | {reached:.0f} | {limit:.0f} | {LIMITS[one.name]:.0f} | {cpu:.0f} | {verdict} |"


def main() -> None:
    """Measure the export and the ceiling, and print both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("uri")
    parser.add_argument("--image", type=Path, help="the image behind the export: reads its data blocks, and compares")
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--cache-mb", type=int, default=32, help="size of the server's cache of decompressed chunks")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    blocks = image_blocks(options.image) if options.image else data_blocks(options.uri)
    if not blocks:
        sys.exit(f"{options.uri}: the export has no data to read")
    measured, most = rates(options.uri, blocks, options.reads, options.cache_mb), ceiling(options.reads)
    if options.image:
        compare(options.uri, blocks, options.image)
    if options.json:
        print(json.dumps({"export": [asdict(one) for one in measured], "ceiling": [asdict(one) for one in most]}))
    else:
        print("\n".join(table(measured, most)))


if __name__ == "__main__":
    main()
