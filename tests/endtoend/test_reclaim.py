"""Pruning and reclaiming by the installed program: on disks that are really full, and killed again and again."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvbackup.model import KiB, MiB
from tests.cli.rig import make_disk
from tests.endtoend.mounts import needs_mount, small_disk
from tests.endtoend.rig import Installed, files_below, short_folder

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
FIGURES = Path(__file__).parents[2] / ".lab" / "figures"
NOW = ("--empty-trash", "--grace", "0", "--garbage", "1")


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as found:
        yield found


def backed_up(world: Installed, seeds: list[int], size: int) -> dict[str, bytes]:
    """A point of each content, and what it must hold."""
    found = {}
    for seed in seeds:
        path = world.folder / "disk.raw"
        content = make_disk(path, size, seed=seed)
        run = world.done("backup", f"image:{path}", "--name", "vm", "--json").json["runs"][0]
        found[run["point"]["id"]] = content
    return found


def prove(world: Installed, points: dict[str, bytes]) -> None:
    """These points are there, and no others, and hold what they should."""
    assert {p["id"] for p in world.done("points", "--json").json["points"]} == set(points)
    for point, content in points.items():
        to = world.folder / "proof.raw"
        world.done("restore", "vm", "--disk", "disk", "--at", point, "--to", to)
        assert to.read_bytes() == content
        to.unlink()


@needs_mount
@pytest.mark.parametrize("left", [0, 64 * KiB])
def test_a_full_store_is_pruned_and_reclaimed(folder: Path, left: int) -> None:
    world = Installed(folder)
    with small_disk(folder, "s", 96 * MiB) as disk:
        world.environment["HVBACKUP_STORE"] = str(disk.path / "store")
        world.environment["HVBACKUP_STATE"] = str(disk.path / "state")  # which is full as well
        world.store = disk.path / "store"
        world.done("init")
        assert (world.store / "reserve").exists()
        points = backed_up(world, [1, 2, 3, 4], 8 * MiB)
        disk.fill(left)
        make_disk(world.folder / "disk.raw", 8 * MiB, seed=5)
        world.refused(1, "backup", f"image:{world.folder / 'disk.raw'}")
        done = world.run("prune", "--keep-last", "1", "--json")
        assert done.code == 0, done
        forgotten = json.loads(done.out)["forgotten"]["points"]
        assert len(forgotten) == 3
        freed = world.run("reclaim", *NOW, "--json")
        assert freed.code == 0, freed
        assert json.loads(freed.out)["removed_bytes"] > 12 * MiB
        disk.empty()
        assert world.done("check", "--deep", "--json").json["ok"]
        kept = {p: c for p, c in points.items() if p not in forgotten}
        prove(world, kept)
        world.done("backup", f"image:{world.folder / 'disk.raw'}")
        world.done("reclaim")
        assert (world.store / "reserve").exists(), "there is room for the next time"


@needs_mount
def test_a_disk_that_fills_up_while_sparse_packs_are_copied(folder: Path) -> None:
    world = Installed(folder)
    with small_disk(folder, "s", 64 * MiB) as disk:
        world.environment["HVBACKUP_STORE"] = str(disk.path / "store")
        world.store = disk.path / "store"
        world.done("init")
        points = backed_up(world, [1], 12 * MiB)
        path = world.folder / "disk.raw"
        content = bytearray(path.read_bytes())
        for at in range(0, len(content), 2 * 64 * KiB):  # every second block is another
            content[at : at + 1000] = random.Random(at).randbytes(1000)
        path.write_bytes(content)
        run = world.done("backup", f"image:{path}", "--json").json["runs"][0]
        world.done("prune", "--keep-last", "1")
        disk.fill(0)
        ran = world.run("reclaim", *NOW, "--json")
        assert ran.code in (0, 1), ran
        disk.empty()
        assert world.done("check", "--deep", "--json").json["ok"]
        kept = {run["point"]["id"]: bytes(content)}
        prove(world, kept)
        freed = world.done("reclaim", *NOW, "--json").json
        assert ran.code == 1 or freed["removed_packs"] + json.loads(ran.out)["removed_packs"] > 0
        prove(world, kept)
        assert not points.keys() & kept.keys()


def backed_up_again(world: Installed, rng: random.Random) -> dict[str, bytes]:
    """A point of the same disk with every third block rewritten, so that packs are neither dead nor wholly needed."""
    path = world.folder / "disk.raw"
    content = bytearray(path.read_bytes())
    for at in rng.sample(range(0, len(content), 64 * KiB), len(content) // (64 * KiB) // 3):
        content[at : at + 64 * KiB] = rng.randbytes(64 * KiB)
    path.write_bytes(content)
    run = world.done("backup", f"image:{path}", "--json").json["runs"][0]
    return {run["point"]["id"]: bytes(content)}


def began(world: Installed, process: subprocess.Popen[str]) -> bool:
    """Whether a run holds its lock, when this returns; it has ended otherwise."""
    [state] = world.state.glob("*/")
    lock = state / "reclaim.lock"
    while process.poll() is None:
        if lock.exists() and f":{lock.stat().st_ino} " in Path("/proc/locks").read_text():
            return True
    return False


def torture(world: Installed, kills: int, seed: int) -> Counter[str]:
    """So many kills of a `reclaim` that has begun, each followed by every proof; what it was at."""
    rng, hits, span = random.Random(seed), Counter[str](), 0.5
    points = backed_up(world, [seed], 6 * MiB)
    for _ in range(3 * kills):
        if hits.total() == kills:
            break
        points |= backed_up_again(world, rng)
        while len(points) > 2:
            gone = rng.choice(list(points)[:-1])
            world.done("forget", gone)
            del points[gone]
        process = world.start("reclaim", *NOW, *rng.choice([(), ("--exact",)]), "--rate", "8M")
        if began(world, process):
            time.sleep(rng.uniform(0, span))
            process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), (out, err)
        if process.returncode == 0:
            span *= 0.8  # it took less
        else:
            hits["copying or removing" if files_below(world.store / "condemned") else "looking"] += 1
        prove(world, points)
        assert world.done("check", "--json").json["ok"]
    world.done("reclaim", *NOW, "--exact")
    sizes = world.done("reclaim", "--dry-run", "--json").json
    assert (sizes["dead_packs"], sizes["live"]) == (0, sizes["total"])
    assert not files_below(world.store / "tmp", world.store / "condemned", world.store / "writers")
    assert world.done("check", "--deep", "--json").json["ok"]
    prove(world, points)
    return hits


def test_reclaim_is_killed_again_and_again(folder: Path) -> None:
    world = Installed(folder)
    world.done("init")
    assert torture(world, 10, seed=100).total() == 10


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_reclaim_is_killed_fifty_times(folder: Path) -> None:
    world = Installed(folder)
    world.done("init")
    hits = torture(world, 50, seed=500)
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / "kills-reclaim.txt").write_text(f"{dict(hits)}\n")
    assert hits.total() == 50
