"""What regrouping saves and costs: two images backed up beside restic, then cold packs joined in several sizes.

    python -m labs.bench.cold --images .lab/bench/img [--work FOLDER]

Store sizes are the sums of the lengths of all files.  The old packs are removed as reclaim would, to see what is left.  Random
reads are 4 KiB of 4,000 blocks with data, each another block, through a view in this process with cold caches of ours: CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvbackup.model import SECOND, Instant, KiB, MiB
from hvbackup.store.chunks.condemned import CONDEMNED
from hvbackup.store.format import pack as packs
from hvbackup.store.reclaim.cold import regroup_cold
from hvbackup.store.store import Store

READS = 4000
HVBACKUP = str(Path(sys.executable).with_name("hvbackup"))


def size_mb(folder: Path) -> float:
    """All files below a folder."""
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6, 1)


def tell(what: str, **figures: object) -> None:
    """One line."""
    print(json.dumps({"what": what, **figures}), flush=True)


def run(*words: str | Path, cwd: Path, env: dict[str, str]) -> float:
    """CPU seconds of a program."""
    before = os.times()
    subprocess.run([str(w) for w in words], cwd=cwd, env=env, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return round(after.children_user + after.children_system - before.children_user - before.children_system, 2)


def back_up(work: Path, images: Sequence[Path], *, restic: bool) -> None:
    """Each image in turn, with both programs, under one path."""
    env = {**os.environ, "RESTIC_PASSWORD": "x", "RESTIC_REPOSITORY": str(work / "restic"),
           "HVBACKUP_STORE": str(work / "store"), "HVBACKUP_STATE": str(work / "state"),
           "HVBACKUP_CONFIG": str(work / "config"), "HVBACKUP_RUN": str(work / "run")}  # fmt: skip
    run(HVBACKUP, "init", "--no-encryption", cwd=work, env=env)
    if restic:
        run("restic", "init", cwd=work, env=env)
    current = work / "disk.raw"
    for image in images:
        current.unlink(missing_ok=True)
        current.hardlink_to(image) if image.stat().st_dev == work.stat().st_dev else current.symlink_to(image)
        if restic:
            cpu = run("restic", "backup", "disk.raw", cwd=work, env=env)
            tell(f"restic, {image.name}", cpu_s=cpu, store_mb=size_mb(work / "restic"))
        cpu = run(HVBACKUP, "backup", "--quiet", f"image:{current}", cwd=work, env=env)
        tell(f"hvbackup, {image.name}", cpu_s=cpu, store_mb=size_mb(work / "store"))


def opened(work: Path, *, owner: bool = False) -> Store:
    """The store of hvbackup, without its caches."""
    return Store.open(work / "store", work / "state", owner=owner)


def random_reads(work: Path) -> float:
    """Microseconds of CPU for 4 KiB of a block with data."""
    with opened(work) as store:
        root = list(store.points())[-1].disks[0]
        view = store.view(root)
        blocks = [first + int(i) for first, ids in view.leaves() for i in np.flatnonzero(ids.any(axis=1))]
        random.Random(5).shuffle(blocks)
        buffer = memoryview(bytearray(4096))
        view.read_into(blocks[-1] * store.block, buffer)
        began = time.process_time()
        for block in blocks[:READS]:
            view.read_into(block * store.block, buffer)
        return round((time.process_time() - began) / READS * 1e6, 1)


def in_sequence(work: Path) -> float:
    """MB of disk for one second of CPU."""
    with opened(work) as store:
        root = list(store.points())[-1].disks[0]
        began, done = time.process_time(), 0
        for first, ids in store.view(root).leaves():
            done += sum(len(data) for _, data in store.view(root).contents(first, ids))
        return round(done / 1e6 / (time.process_time() - began), 1)


def regrouped(work: Path, group: int) -> None:
    """A copy of the store, regrouped, and what it is like then."""
    copy = work / f"copy{group}"
    copy.mkdir()
    shutil.copytree(work / "store", copy / "store")
    began = time.process_time()
    with opened(copy, owner=True) as store:
        done = regroup_cold(store, Instant(time.time_ns() + 30 * 86400 * SECOND), group_bytes=group)
        cpu = round(time.process_time() - began, 2)
        for one in list(CONDEMNED.all(store.files, store.ring)):
            for path in [path for name in one.packs for path in packs.files_of(name)]:
                store.files.remove(path)
            CONDEMNED.remove(store.files, one.id)
    reads = {"random_read_us": random_reads(copy), "sequence_mb_per_cpu_s": in_sequence(copy)}
    rate = round(done.old_bytes / 1e6 / cpu, 1)
    tell(f"groups of {group // KiB} KiB", cpu_s=cpu, mb_per_cpu_s=rate, store_mb=size_mb(copy / "store"), **reads)
    shutil.rmtree(copy)


def main() -> None:
    """Everything, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--without-restic", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work or args.images) as folder:
        work = Path(folder)
        images = [(args.images / name).resolve() for name in ("v1.raw", "v2.raw")]
        back_up(work, images, restic=not args.without_restic)
        tell("single blocks", random_read_us=random_reads(work), sequence_mb_per_cpu_s=in_sequence(work))
        for group in (256 * KiB, 512 * KiB, MiB):
            regrouped(work, group)


if __name__ == "__main__":
    main()
