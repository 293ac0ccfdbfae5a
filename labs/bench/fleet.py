"""A fleet of cloned machines, backed up every day for a month, beside restic and borg.

    python -m labs.bench.fleet [--machines 10] [--days 30] [--size 64] [--only restic,borg,hvbackup] [--work FOLDER]

Every machine begins as a clone of one image of real files (of this system's /usr).  Each day each machine rewrites places of its
own, in runs of 4 KiB to 256 KiB and 0.5 % of its disk in all, with other real files; once a week the same update, 2 % of the
disk, comes to all of them.  Each tool sees the same files on the same days, one run a day for the whole fleet, and compares
whole images.  At the end a machine is restored from each and compared.

Two reductions are told: against a full copy of each machine on each day, and, the harder one, against what a tool must take in
at least: each machine once, and then every byte that was written.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from labs.bench.measure import Usage, file_bytes, measured
from labs.bench.peers import BORG_VERSION, HVBACKUP, Tool, borg, environment, pip_install, restic

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
PAGE = 4096
OWN_SHARE, UPDATE_SHARE = 0.005, 0.02  # of a disk: each day by each machine; each week for all
RUNS = (1, 1, 1, 2, 4, 16, 64)  # pages written together


def real_bytes(rng: random.Random) -> Iterator[bytes]:
    """The pages of real files, as a file system would have them: in whole blocks, file after file, without end."""
    found = sorted(p for top in ("/usr/bin", "/usr/lib", "/usr/share") for p in Path(top).rglob("*"))
    rng.shuffle(found)
    for path in itertools.cycle(found):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()[: 4 * MIB]
            data += bytes(-len(data) % PAGE)
            yield from (data[i : i + PAGE] for i in range(0, len(data), PAGE))


@dataclass
class Fleet:
    """The machines' disks, as files."""

    folder: Path
    machines: int
    size: int
    rng: random.Random = field(default_factory=lambda: random.Random(20261124))
    written: int = 0  # bytes, by all of them, after the clones were made

    def __post_init__(self) -> None:
        self._pages = real_bytes(self.rng)
        self.folder.mkdir(parents=True)
        image = self._real(self.size)
        for path in self.paths:
            path.write_bytes(image)

    @property
    def paths(self) -> list[Path]:
        """One disk for each machine."""
        return [self.folder / f"m{n}.raw" for n in range(self.machines)]

    def _real(self, length: int) -> bytes:
        return b"".join(itertools.islice(self._pages, length // PAGE))

    def a_day(self, number: int) -> None:
        """Everybody writes; every seventh day the same update comes to all."""
        if number % 7 == 0:
            update = list(self._writes(UPDATE_SHARE))
            for path in self.paths:
                self._apply(path, update)
        for path in self.paths:
            self._apply(path, self._writes(OWN_SHARE))

    def _writes(self, share: float) -> Iterator[tuple[int, bytes]]:
        left = int(self.size * share)
        while left > 0:
            data = self._real(self.rng.choice(RUNS) * PAGE)
            left -= len(data)
            yield self.rng.randrange((self.size - len(data)) // PAGE) * PAGE, data

    def _apply(self, path: Path, writes: Iterator[tuple[int, bytes]] | list[tuple[int, bytes]]) -> None:
        with path.open("r+b") as file:
            for offset, data in writes:
                file.seek(offset)
                file.write(data)
                self.written += len(data)


@dataclass
class Entrant:
    """A tool that backs the fleet up, and what that cost."""

    tool: Tool
    day: Callable[[int], list[str]]
    restore: list[str]
    restored: Path
    cpu: float = 0.0
    wall: float = 0.0

    def run(self, command: list[str], work: Path) -> Usage:
        """Run one command of the tool; a failure ends the benchmark."""
        usage = measured(command, log=self.tool.folder / "run.log", env=environment(self.tool), cwd=work)
        if usage.code:
            sys.exit(f"{self.tool.name} failed with {usage.code}: {' '.join(command)}: {usage.output}")
        return usage


def entrants(work: Path, fleet: Fleet, days: int) -> dict[str, Entrant]:
    """All of them by name."""
    last, name = f"::d{days}", fleet.paths[-1].name
    r, b = restic(work), borg(work, "borg", "none")
    folder = work / "hvbackup"
    env = {f"HVBACKUP_{what.upper()}": f"{folder}/{what}" for what in ("state", "config", "run", "store")}
    h = Tool("hvbackup", folder, [HVBACKUP, "init"], {}, folder / "out/disk.raw", env)
    program = b.init[0]
    create = [program, "create", "-C", "zstd,1", "--chunker-params=fixed,4194304"]
    sources = [f"image:{path}" for path in fleet.paths]
    machine = fleet.paths[-1].stem
    back = [HVBACKUP, "restore", machine, "--disk", machine, "--to", str(h.restored)]
    return {
        "restic": Entrant(
            r,
            lambda _: ["restic", "backup", "disks"],
            ["restic", "restore", "latest", "--target", f"{r.folder}/out", "--include", f"/disks/{name}"],
            r.folder / f"out/disks/{name}",
        ),
        "borg": Entrant(
            b,
            lambda day: [*create, f"::d{day}", "disks"],
            ["sh", "-c", f"cd {b.folder}/out && exec {program} extract {last} disks/{name}"],
            b.folder / f"out/disks/{name}",
        ),
        "hvbackup": Entrant(h, lambda _: [HVBACKUP, "backup", "--quiet", *sources], back, h.restored),
    }


def play(work: Path, machines: int, days: int, size: int, only: list[str]) -> None:
    """Live for so many days, and say what came of it."""
    shutil.rmtree(work, ignore_errors=True)
    fleet = Fleet(work / "disks", machines, size)
    chosen = [e for name, e in entrants(work, fleet, days).items() if not only or name in only]
    for e in chosen:
        (e.tool.folder / "out").mkdir(parents=True)
        e.run(e.tool.init, work)
    for day in range(1, days + 1):
        if day > 1:
            fleet.a_day(day)
        for e in chosen:
            usage = e.run(e.day(day), work)
            e.cpu += usage.user_seconds + usage.system_seconds
            e.wall += usage.wall_seconds
        sizes = ", ".join(f"{e.tool.name} {file_bytes(e.tool.store) / MIB:.0f}" for e in chosen)
        print(f"day {day:2}: {sizes} MiB", flush=True)
    for e in chosen:
        e.run(e.restore, work)
        if not filecmp.cmp(e.restored, fleet.paths[-1], shallow=False):
            sys.exit(f"{e.tool.name}: the restored {e.restored} differs from {fleet.paths[-1]}")
    report(chosen, fleet, days)
    shutil.rmtree(work)


def report(chosen: list[Entrant], fleet: Fleet, days: int) -> None:
    """The table of a month."""
    copies, taken = fleet.machines * days * fleet.size, fleet.machines * fleet.size + fleet.written
    print(f"\n{fleet.machines} machines of {fleet.size // MIB} MiB, {days} days, {fleet.written / MIB:.0f} MiB written")
    print("| tool | store MiB | of full copies | of what was taken in | CPU-s | wall s |\n|---|---|---|---|---|---|")
    for e in chosen:
        print(row(e, copies, taken), flush=True)


def row(e: Entrant, copies: int, taken: int) -> str:
    """A line of the table: the reductions are what is *not* stored."""
    stored = file_bytes(e.tool.store)
    shares = f"{100 * (1 - stored / copies):.2f} % | {100 * (1 - stored / taken):.1f} %"
    return f"| {e.tool.name} | {stored / MIB:.1f} | {shares} | {e.cpu:.1f} | {e.wall:.1f} |"


def main() -> None:
    """Read the options and live."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=10)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--size", type=int, default=64, help="of each disk, MiB (default: 64)")
    parser.add_argument("--only", default="", help="these tools, with commas")
    parser.add_argument("--work", type=Path, default=Path(os.environ.get("BENCH_OUT", ROOT / ".lab/bench")) / "fleet")
    args = parser.parse_args()
    subprocess.run([ROOT / "labs/setup.sh", "bench"], check=True, timeout=1800)
    if not pip_install(args.work.parent / "cache/borg", f"borgbackup=={BORG_VERSION}", timeout_seconds=900):
        sys.exit("borg could not be installed; leave it out with --only")
    play(args.work.absolute(), args.machines, args.days, args.size * MIB, [n for n in args.only.split(",") if n])


if __name__ == "__main__":
    main()
