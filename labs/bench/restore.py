"""What a restore costs beside a plain copy of the same bytes and beside restic, in one run.

    python -m labs.bench.restore [--size 1024] [--rounds 3] [--work FOLDER]

The disk is made of real files (of this system's /usr), with a quarter of it empty, and was captured eight times while places of
it changed, so that it lies scattered over the packs.  In each round every way goes once, one after the other; all of them end
with what they wrote on the disk (fsync), and what they wrote is compared.  The stores are in the page cache.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from labs.bench.fleet import PAGE, real_bytes
from labs.bench.measure import files, measured
from labs.bench.peers import HVBACKUP, drop, environment, restic, warm
from labs.bench.peers import hvbackup as hvbackup_tool

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
CAPTURES = 8
CHANGED_SHARE = 0.01  # of the disk, from one capture to the next


def write_disk(path: Path, size: int, rng: random.Random) -> Iterator[bytes]:
    """The disk is there; what is yielded goes on with real bytes."""
    pages = real_bytes(rng)
    with path.open("wb") as file:
        for start in range(0, size, 64 * MIB):
            length = min(64 * MIB, size - start)
            file.seek(start)
            for page in itertools.islice(pages, length * 3 // 4 // PAGE):
                file.write(page)
        file.truncate(size)
    return pages


def change(path: Path, pages: Iterator[bytes], rng: random.Random) -> None:
    """A part of the disk, in runs of 64 KiB, holds something else."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(int(size * CHANGED_SHARE) // (16 * PAGE)):
            file.seek(rng.randrange(size // PAGE - 16) * PAGE)
            file.write(b"".join(itertools.islice(pages, 16)))


def ways(work: Path) -> dict[str, list[str]]:
    """Every way by name; each makes OUT out of what it has."""
    disk, out, older = work / "cur/disk.raw", work / "out.raw", work / "older.raw"
    store = work / "hvbackup/store"
    back = [HVBACKUP, "restore", "--quiet", "--store", str(store), "bench", "--disk", "disk", "--to"]
    differential = f"mv {older} {out} && {' '.join([*back, str(out)])} --differential"
    theirs = f"restic restore latest --target {work}/restic/out && sync {work}/restic/out/cur/disk.raw"
    return {
        "cp, then sync": ["sh", "-c", f"cp --sparse=always {disk} {out} && sync {out}"],
        "hvbackup, raw": [*back, str(out)],
        "hvbackup, qcow2": [*back, f"{out}.qcow2"],
        "hvbackup, --differential, 1 % differs": ["sh", "-c", differential],
        "hvbackup, --differential, nothing differs": [*back, str(out), "--differential"],
        "restic, then sync": ["sh", "-c", theirs],
    }


def play(work: Path, size: int, rounds: int) -> None:
    """Make the stores, then let every way go in each round."""
    rng = random.Random(7)
    shutil.rmtree(work, ignore_errors=True)
    (work / "cur").mkdir(parents=True)
    disk = work / "cur/disk.raw"
    tools = {t.name: t for t in (restic(work), hvbackup_tool(work, work, "hvbackup", hints=False))}
    pages = write_disk(disk, size, rng)
    for tool in tools.values():
        (tool.folder / "out").mkdir(parents=True)
        must(tool.init, work, environment(tool))
    for n in range(CAPTURES):
        if n == CAPTURES - 1:
            shutil.copy(disk, work / "one-before.raw")
        if n:
            change(disk, pages, rng)
        for tool in tools.values():
            must(tool.phases["backup v1"], work, environment(tool))
    figures: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        for name, command in ways(work).items():
            tool = tools["restic" if name.startswith("restic") else "hvbackup"]
            figures.setdefault(name, []).append(one(work, name, command, environment(tool)))
            print(
                f"round {number + 1}: {name}: {figures[name][-1][0]:.2f} s, {figures[name][-1][1]:.2f} CPU-s",
                flush=True,
            )
    report(figures, disk)
    shutil.rmtree(work)


def must(command: list[str], work: Path, env: dict[str, str]) -> None:
    """A command that does not count."""
    subprocess.run(command, cwd=work, env=env, check=True, stdout=subprocess.DEVNULL, timeout=600)


def one(work: Path, name: str, command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(wall, CPU) of one way; what it made is right."""
    out, disk = work / "out.raw", work / "cur/disk.raw"
    if "nothing differs" not in name:
        for path in (out, work / "out.raw.qcow2", work / "restic/out/cur/disk.raw"):
            path.unlink(missing_ok=True)
    if "1 % differs" in name:
        shutil.copy(work / "one-before.raw", work / "older.raw")
    os.sync()
    for path in files(work / ("restic/store" if name.startswith("restic") else "hvbackup/store")):
        warm(path)
    warm(disk) if name.startswith("cp") else drop(disk)
    usage = measured(command, log=work / "run.log", env=env, cwd=work)
    if usage.code:
        sys.exit(f"{name} failed with {usage.code}: {usage.output}")
    check(work, name, disk)
    return usage.wall_seconds, usage.user_seconds + usage.system_seconds


def check(work: Path, name: str, disk: Path) -> None:
    """What was made equals the disk."""
    if "qcow2" in name:
        command = ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(disk), f"{work}/out.raw.qcow2"]
        subprocess.run(command, check=True, timeout=300)
    elif not filecmp.cmp(work / ("restic/out/cur/disk.raw" if "restic" in name else "out.raw"), disk, shallow=False):
        sys.exit(f"{name}: what was restored differs")


def report(figures: dict[str, list[tuple[float, float]]], disk: Path) -> None:
    """Medians, and how they compare with the plain copy."""
    data = disk.stat().st_size * 3 // 4 / MIB
    base = statistics.median(wall for wall, _ in next(iter(figures.values())))
    rounds = len(next(iter(figures.values())))
    print(f"\n{disk.stat().st_size // MIB} MiB, of which {data:.0f} hold data; medians of {rounds} rounds")
    print("| way | wall s | x cp | MiB of data a second | CPU-s |\n|---|---|---|---|---|")
    for name, pairs in figures.items():
        wall, cpu = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| {name} | {wall:.2f} | {wall / base:.2f} | {data / wall:.0f} | {cpu:.2f} |")


def main() -> None:
    """Read the options and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="of the disk, MiB (default: 1024)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(os.environ.get("BENCH_OUT", ROOT / ".lab/bench")) / "restore")
    args = parser.parse_args()
    subprocess.run([ROOT / "labs/setup.sh", "bench"], check=True, timeout=1800)
    play(args.work.absolute(), args.size * MIB, args.rounds)


if __name__ == "__main__":
    main()
