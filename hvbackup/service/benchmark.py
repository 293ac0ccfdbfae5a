"""benchmark: what this machine can do at most, step by step, next to what a whole backup and restore reach on it."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blake3
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hvbackup.capture import THREADS, Options, capture
from hvbackup.files import Kernel
from hvbackup.hypervisors.source import SourceOptions, open_source
from hvbackup.model import KiB, MiB
from hvbackup.recover.restore import Mode, to_file
from hvbackup.store import store
from hvbackup.store.chunks.writer import LEVEL, compressor
from hvbackup.store.format import keys
from hvbackup.store.store import Store

BLOCK_BYTES = 64 * KiB
SAMPLE_BYTES = 32 * MiB  # held in memory, and worked on again and again
STEP_SECONDS = 1.0
_WORDS = 120  # that text is made of


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one step is."""

    name: str
    what: str
    bytes_per_second: float
    cpu_seconds_per_gib: float


@dataclass(frozen=True, slots=True)
class Speeds:
    """Everything that was measured."""

    folder: Path
    cores: int
    compressed_share: float  # of the sample, after compression
    ceilings: tuple[Speed, ...]  # of one core, or of the disk
    pipeline: tuple[Speed, ...]


def benchmark(folder: Path, size: int) -> Speeds:
    """Measure in a directory that is made below `folder` and removed; `size` bytes are backed up and restored."""
    with _scratch(folder) as scratch:
        sample = sample_bytes(SAMPLE_BYTES)
        blocks = [sample[i : i + BLOCK_BYTES] for i in range(0, len(sample), BLOCK_BYTES)]
        squeezer = compressor(BLOCK_BYTES)
        packed = [squeezer.compress(b) for b in blocks]
        ceilings = (*_memory(blocks, packed), *_disk(scratch, sample, size))
        share = sum(map(len, packed)) / len(sample)
        return Speeds(folder, os.cpu_count() or 1, round(share, 3), ceilings, tuple(_pipeline(scratch, size)))


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="hvbackup-benchmark-", dir=folder))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sample_bytes(size: int, seed: int = 1) -> memoryview:
    """Bytes that compress as disks do, to less than half: of each 24 KiB, 4 are noise and 20 words in random order."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(3, 12)) for _ in range(_WORDS)]
    out = bytearray()
    while len(out) < size:
        out += rng.randbytes(4096)
        out += b"".join(rng.choices(words, k=4000))[: 20 * KiB]
    return memoryview(out)[:size]


def _memory(blocks: list[memoryview], packed: list[bytes]) -> Iterator[Speed]:
    """Steps that need no disk, on one core."""
    key, nonce, cipher = bytes(32), bytes(12), AESGCM(bytes(32))
    squeezer, opener = compressor(BLOCK_BYTES), zstandard.ZstdDecompressor()
    plain = sum(map(len, blocks))
    yield _timed("hash", "keyed BLAKE3", plain, lambda: [blake3.blake3(b, key=key).digest() for b in blocks])
    yield _timed("compress", f"zstd level {LEVEL}", plain, lambda: [squeezer.compress(b) for b in blocks])
    yield _timed("encrypt", "AES-256-GCM", plain, lambda: [cipher.encrypt(nonce, b, None) for b in blocks])
    yield _timed(
        "decompress",
        "zstd, counted in plain bytes",
        plain,
        lambda: [opener.decompress(p, max_output_size=BLOCK_BYTES) for p in packed],
    )


def _timed(name: str, what: str, size: int, work: Callable[[], object]) -> Speed:
    """Repeat until it took long enough to mean something."""
    began, cpu, rounds = time.monotonic(), time.process_time(), 0
    while time.monotonic() - began < STEP_SECONDS:
        work()
        rounds += 1
    return _speed(name, what, size * rounds, began, cpu)


def _speed(name: str, what: str, size: int, began: float, cpu: float) -> Speed:
    wall, used = max(time.monotonic() - began, 1e-9), time.process_time() - cpu
    return Speed(name, what, round(size / wall), round(used / (size / 1024**3), 3))


def _disk(scratch: Path, sample: memoryview, size: int) -> Iterator[Speed]:
    """Writing durably, and reading what the page cache was told to forget."""
    kernel, path = Kernel(), scratch / "disk"
    began, cpu = time.monotonic(), time.process_time()
    fd = kernel.create(str(path), 0o600)
    for offset in range(0, size, len(sample)):
        kernel.write(fd, sample[: size - offset])
    kernel.fsync(fd)
    yield _speed("write", "one file, fsync at its end", size, began, cpu)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    kernel.close(fd)
    began, cpu = time.monotonic(), time.process_time()
    buffer = bytearray(4 * MiB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    yield _speed("read", "one file, not from memory where the system allows it", size, began, cpu)


def _pipeline(scratch: Path, size: int) -> Iterator[Speed]:
    """A first backup, one without changes, and a verified restore, of a raw image with `size` different bytes."""
    image = scratch / "disk"
    with image.open("wb") as file:
        for n in range(0, size, SAMPLE_BYTES):
            file.write(sample_bytes(min(SAMPLE_BYTES, size - n), seed=n + 2))
    secret = keys.parse_key_text(keys.new_key_text(), "the key of the benchmark")
    store.init(scratch / "store", secret)
    with Store.open(scratch / "store", scratch / "state", [secret], owner=True) as opened:
        options = SourceOptions(store_id=opened.id.hex()[:8], scratch=scratch, runtime=scratch / "run")
        source = open_source(f"image:{image}", options)
        [machine] = source.machines()
        for name, what in (
            ("backup", "the first: everything is new"),
            ("again", "nothing changed, and nobody says so"),
        ):
            began, cpu = time.monotonic(), time.process_time()
            outcome = capture(opened, source, machine, Options())
            yield _speed(name, what, size, began, cpu)
        assert outcome.point is not None
        began, cpu = time.monotonic(), time.process_time()
        view = opened.view(outcome.point.disks[0])
        to_file(view, scratch / "restored", opened.ring.block_key, lambda _done, _total: None, Mode.NEW)
        yield _speed("restore", f"every block verified, {THREADS} threads", size, began, cpu)
