"""What codec, level and grouping cost and save on the benchmark images: the table in docs/performance.md.

    python -m labs.bench.trade [--out .lab/bench] [--share N]

Describes the images first (zero, equal and changed blocks), then compresses the unique blocks of v1 alone and in groups at
several levels, and measures CPU and size on one thread.  With `--share N` one region of 4 MiB in every N is taken, for a
quicker and rougher answer.  "One frame" is what a random read pays: its whole group is decompressed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from blake3 import blake3
from zstandard import ZstdCompressor, ZstdDecompressor

BLOCK = 65536
REGION = 4 << 20
ZERO = bytes(BLOCK)
LEVELS = (-5, -1, 1, 2, 3, 5)
GROUPS = (1, 2, 4)  # blocks a frame
Code = Callable[[bytes], bytes]


def regions(image: Path, share: int = 1) -> Iterator[bytes]:
    """Every `share`th region of the image."""
    with open(image, "rb") as file:
        for start in range(0, image.stat().st_size, REGION * share):
            file.seek(start)
            yield file.read(REGION)


def unique_blocks(image: Path, share: int, seen: set[bytes]) -> Iterator[bytes]:
    """The blocks that are neither zero nor in `seen`, which then knows them."""
    for region in regions(image, share):
        for at in range(0, len(region), BLOCK):
            block = region[at : at + BLOCK]
            if block == ZERO:
                continue
            digest = blake3(block).digest()
            if digest not in seen:
                seen.add(digest)
                yield block


def describe(image: Path, before: Path | None) -> None:
    """Prints the figures of one image, and of what changed since `before`."""
    grains = (4096, 65536, 131072, 262144, 1 << 20, 4 << 20)
    zero, changed = dict.fromkeys(grains, 0), dict.fromkeys(grains, 0)
    pairs = zip(regions(image), regions(before or image), strict=True)
    for new, old in ((np.frombuffer(a, np.uint64), np.frombuffer(b, np.uint64)) for a, b in pairs):
        for grain in grains:
            zero[grain] += int((~new.reshape(-1, grain // 8).any(1)).sum())
            changed[grain] += int((new != old).reshape(-1, grain // 8).any(1).sum())
    seen: set[bytes] = set()
    unique = sum(1 for _ in unique_blocks(image, 1, seen))
    total = image.stat().st_size
    print(
        f"{image.name}: {total / 2**30:.0f} GiB, allocated {image.stat().st_blocks * 512 / 1e6:.0f} MB, "
        f"unique 64 KiB blocks {unique}"
    )
    for grain in grains:
        data = total - zero[grain] * grain
        print(
            f"  {grain // 1024:4d} KiB: zero {zero[grain] * grain / total:6.1%}, data {data / 1e6:7.1f} MB, "
            f"changed {changed[grain]} = {changed[grain] * grain / 1e6:.1f} MB"
        )


@dataclass(slots=True)
class Cost:
    """What one way of compressing cost."""

    plain_bytes: int = 0
    stored_bytes: int = 0
    compress_seconds: float = 0
    decompress_seconds: float = 0
    frames: int = 0

    def add(self, data: bytes, compress: Code, decompress: Code) -> None:
        """Counts one frame; a frame that does not shrink is stored as it is."""
        start = time.thread_time()
        packed = compress(data)
        middle = time.thread_time()
        if len(packed) < len(data):
            decompress(packed)
            self.decompress_seconds += time.thread_time() - middle
        self.compress_seconds += middle - start
        self.plain_bytes += len(data)
        self.stored_bytes += min(len(packed), len(data))
        self.frames += 1


def codecs() -> dict[str, tuple[Code, Code]]:
    """The codecs by name; lz4 is measured where the package is there."""
    unpack = cast(Code, ZstdDecompressor().decompress)
    found = {f"zstd {level}": (cast(Code, ZstdCompressor(level=level).compress), unpack) for level in LEVELS}
    try:
        import lz4.block  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return found
    return {"lz4": (lz4.block.compress, lz4.block.decompress), **found}


def trade(image: Path, share: int) -> None:
    """Prints the table of codec, level and group for the unique blocks of `image`."""
    known = codecs()
    costs = {(name, group): Cost() for name in known for group in GROUPS}
    waiting: list[bytes] = []
    for block in unique_blocks(image, share, set()):
        waiting.append(block)
        if len(waiting) == max(GROUPS):
            measure(waiting, known, costs)
            waiting.clear()
    measure(waiting, known, costs)
    print(
        "| codec | group KiB | stored MB | ratio | compress CPU-s | MB per CPU-s "
        "| decompress CPU-s | MB per CPU-s | one frame, us |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, group), cost in costs.items():
        print(row(name, group, cost))


def measure(blocks: list[bytes], known: dict[str, tuple[Code, Code]], costs: dict[tuple[str, int], Cost]) -> None:
    """Adds `blocks` to every way of compressing them."""
    for group in GROUPS:
        frames = [b"".join(blocks[at : at + group]) for at in range(0, len(blocks), group)]
        for name, (compress, decompress) in known.items():
            for frame in frames:
                costs[name, group].add(frame, compress, decompress)


def row(name: str, group: int, cost: Cost) -> str:
    """One row of the table."""
    plain = cost.plain_bytes / 1e6
    one_frame = cost.decompress_seconds / cost.frames * 1e6
    return (
        f"| {name} | {group * BLOCK // 1024} | {cost.stored_bytes / 1e6:.0f} | {cost.plain_bytes / cost.stored_bytes:.2f} "
        f"| {cost.compress_seconds:.1f} | {plain / cost.compress_seconds:.0f} "
        f"| {cost.decompress_seconds:.2f} | {plain / cost.decompress_seconds:.0f} | {one_frame:.0f} |"
    )


def main() -> None:
    """Describe the images, then measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / ".lab/bench")
    parser.add_argument("--share", type=int, default=1, help="take one region of 4 MiB in N")
    parser.add_argument("--no-description", action="store_true")
    options = parser.parse_args()
    v1, v2, v3 = (options.out / f"img/v{n}.raw" for n in (1, 2, 3))
    if not options.no_description:
        for image, before in ((v1, None), (v2, v1), (v3, v2)):
            describe(image, before)
    trade(v1, options.share)


if __name__ == "__main__":
    main()
