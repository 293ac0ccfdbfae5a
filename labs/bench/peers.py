"""hvbackup beside restic, borg and qemu-img on the benchmark images, phase by phase and interleaved.

    python -m labs.bench.peers [--out .lab/bench] [--rounds N] [--only restic,borg,...] [--results FILE]

Every tool takes v1, v2 and v3 under one and the same path and restores the last; each phase runs for all tools in turn before
the next phase begins, so that what disturbs the machine disturbs all of them alike, and ratios are taken within a round.
CPU is user and system time of everything the tool started.  Before every run dirty pages are written out, the image and the
tool's own store are read into the page cache, and the stores of the others dropped from it: a kernel that must first reclaim
their pages charges that to whoever allocates.  Each restored image is compared with its source.  None of this counts.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from labs.bench import export
from labs.bench.measure import Usage, file_bytes, files, measured

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BORG_VERSION = "1.4.5"
BENJI_VERSION = "0.17.0"
PHASES = ("backup v1", "backup v2", "backup v3", "restore", "list")
GIB = 1 << 30

# How hvbackup is called: words in braces are filled in.
HVBACKUP = str(Path(sys.executable).with_name("hvbackup"))
HVBACKUP_INIT = (HVBACKUP, "init", "{store}")
HVBACKUP_BACKUP = (HVBACKUP, "backup", "--store", "{store}", "--name", "bench", "image:{source}")
HVBACKUP_CHANGED = ("--changed", "{changed}")
HVBACKUP_RESTORE = (HVBACKUP, "restore", "--store", "{store}", "bench", "--disk", "disk", "--to", "{restored}")
HVBACKUP_LIST = (HVBACKUP, "points", "--store", "{store}")
HVBACKUP_MAP = (HVBACKUP, "map", "--store", "{store}", "bench", "--socket", "{socket}")
HVBACKUP_EXPORT = "nbd+unix:///disk?socket={socket}"


@dataclass(frozen=True, slots=True)
class Tool:
    """One way of keeping the images: its commands by phase, where it stores, and where its restore puts the image."""

    name: str
    folder: Path
    init: list[str]
    phases: dict[str, list[str]]
    restored: Path
    env: dict[str, str] = field(default_factory=dict)
    last: str = "v3"

    @property
    def store(self) -> Path:
        """What is counted as stored."""
        return self.folder / "store"


@dataclass(frozen=True, slots=True)
class Result:
    """One phase of one tool in one round."""

    tool: str
    phase: str
    round: int
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    rss_bytes: int
    store_bytes: int

    @property
    def cpu_seconds(self) -> float:
        """User and system time."""
        return self.user_seconds + self.system_seconds


# The tools


def restic(work: Path) -> Tool:
    """restic of the distribution, as it comes: encrypted, its own compression, chunks by content."""
    folder = work / "restic"
    back_up = ["restic", "backup", "cur/disk.raw"]
    return Tool(
        name="restic",
        folder=folder,
        init=["restic", "init"],
        phases={
            **{f"backup v{n}": back_up for n in (1, 2, 3)},
            "restore": ["restic", "restore", "latest", "--target", f"{folder}/out"],
            "list": ["restic", "snapshots"],
        },
        restored=folder / "out/cur/disk.raw",
        env={"RESTIC_PASSWORD": "x", "RESTIC_REPOSITORY": f"{folder}/store", "XDG_CACHE_HOME": f"{folder}/cache"},
    )


def borg(work: Path, name: str, encryption: str) -> Tool:
    """borg with fixed chunks of 4 MiB and zstd,1."""
    folder, program = work / name, str(work.parent / "cache/borg/bin/borg")
    create = [program, "create", "-C", "zstd,1", "--chunker-params=fixed,4194304"]
    return Tool(
        name=name,
        folder=folder,
        init=[program, "init", "-e", encryption],
        phases={
            **{f"backup v{n}": [*create, f"::v{n}", "cur/disk.raw"] for n in (1, 2, 3)},
            "restore": ["sh", "-c", f"cd {folder}/out && exec {program} extract --sparse ::v3"],
            "list": [program, "list"],
        },
        restored=folder / "out/cur/disk.raw",
        env={
            "BORG_REPO": f"{folder}/store",
            "BORG_BASE_DIR": str(folder),
            "BORG_PASSPHRASE": "x",
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        },
    )


def qemu_img(work: Path) -> Tool:
    """qemu-img to a zstd-compressed qcow2 file: a full copy, the only kind it knows."""
    folder, options = work / "qemu-img", ["-m", "8", "-W"]
    packed, plain = f"{folder}/store/v1.qcow2", f"{folder}/out/disk.raw"
    compress = ["-c", "-o", "compression_type=zstd"]
    return Tool(
        name="qemu-img",
        folder=folder,
        init=["mkdir", "-p", f"{folder}/store"],
        phases={
            "backup v1": [
                "qemu-img",
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                *compress,
                *options,
                "cur/disk.raw",
                packed,
            ],
            "restore": ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", *options, packed, plain],
        },
        restored=Path(plain),
        last="v1",
    )


def hvbackup(work: Path, images: Path, name: str, *, hints: bool) -> Tool:
    """hvbackup, told with `hints` what changed since the last image."""
    folder, source = work / name, work / "cur/disk.raw"

    def filled(words: tuple[str, ...], changed: str = "") -> list[str]:
        places = {
            "store": folder / "store",
            "source": source,
            "restored": folder / "out/disk.raw",
        }
        return [word.format(changed=changed, **places) for word in words]

    def back_up(version: int) -> list[str]:
        extra = HVBACKUP_CHANGED if hints and version > 1 else ()
        return filled((*HVBACKUP_BACKUP, *extra), f"{images}/v{version}.changed")

    return Tool(
        name=name,
        folder=folder,
        init=filled(HVBACKUP_INIT),
        phases={
            **{f"backup v{n}": back_up(n) for n in (1, 2, 3)},
            "restore": filled(HVBACKUP_RESTORE),
            "list": filled(HVBACKUP_LIST),
        },
        restored=folder / "out/disk.raw",
        env={f"HVBACKUP_{what.upper()}": f"{folder}/{what}" for what in ("state", "config", "run")},
    )


def tools(work: Path, images: Path) -> dict[str, Callable[[], Tool]]:
    """Every tool by name, in the order of a round."""
    return {
        "restic": lambda: restic(work),
        "borg": lambda: borg(work, "borg", "none"),
        "borg-enc": lambda: borg(work, "borg-enc", "repokey-blake2"),
        "qemu-img": lambda: qemu_img(work),
        "hvbackup": lambda: hvbackup(work, images, "hvbackup", hints=False),
        "hvbackup-changed": lambda: hvbackup(work, images, "hvbackup-changed", hints=True),
    }


def install(cache: Path) -> None:
    """The peers are there: Debian's by the set-up script, borg from PyPI in an environment of its own."""
    subprocess.run([HERE.parent / "setup.sh", "bench"], check=True, timeout=1800)
    if not pip_install(cache / "borg", f"borgbackup=={BORG_VERSION}", timeout_seconds=900):
        sys.exit(f"borg {BORG_VERSION} could not be installed into {cache / 'borg'}; leave it out with --only")
    if not pip_install(cache / "benji", f"benji[compression]=={BENJI_VERSION}", timeout_seconds=120):
        print(f"benji {BENJI_VERSION} does not install here within two minutes and is left out", flush=True)


def pip_install(venv: Path, what: str, *, timeout_seconds: float) -> bool:
    """Whether the virtual environment `venv` holds `what`; the answer is kept, good or bad."""
    answer = venv.with_suffix(".installed")
    if not answer.exists():
        print(f"Installing {what} into {venv}", flush=True)
        pip = [f"{venv}/bin/pip", "install", "-q", "--disable-pip-version-check", what]
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True, timeout=120)
            done = subprocess.run(pip, timeout=timeout_seconds, stderr=subprocess.DEVNULL).returncode == 0
        except subprocess.TimeoutExpired:
            done = False
        answer.write_text("yes" if done else "no")
    return answer.read_text() == "yes"


# A round


def environment(tool: Tool) -> dict[str, str]:
    """The environment a tool runs in: ours, without what would lead it to other stores, and with its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RESTIC_", "BORG_", "HVBACKUP_"))}
    return {**kept, "HOME": str(tool.folder), **tool.env}


def start(tool: Tool, work: Path) -> None:
    """The tool has an empty store."""
    shutil.rmtree(tool.folder, ignore_errors=True)
    (tool.folder / "out").mkdir(parents=True)
    usage = measured(tool.init, log=tool.folder / "init.log", env=environment(tool), cwd=work)
    if usage.code:
        sys.exit(f"{tool.name}: init failed with {usage.code}: {usage.output}")


def put_current(work: Path, image: Path) -> None:
    """work/cur/disk.raw is `image`, by a hard link."""
    current = work / "cur/disk.raw"
    current.parent.mkdir(parents=True, exist_ok=True)
    if current.exists():
        drop(current)
        current.unlink()
    current.hardlink_to(image)


def settle(tool: Tool, chosen: list[Tool], work: Path) -> None:
    """Nothing waits to be written, and the page cache holds what this tool reads and nothing of the others."""
    os.sync()
    for other in chosen:
        for path in files(other.store):
            (warm if other is tool else drop)(path)
    warm(work / "cur/disk.raw")


def warm(path: Path) -> None:
    """The file is in the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(4 << 20):
            pass


def drop(path: Path) -> None:
    """The file is not in the page cache."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def play(tool: Tool, phase: str, number: int, work: Path, images: Path) -> Result:
    """One phase of one tool, measured; a failure or a wrong image ends the benchmark."""
    usage = measured(tool.phases[phase], log=tool.folder / "run.log", env=environment(tool), cwd=work)
    if usage.code:
        sys.exit(f"{tool.name}: {phase} failed with {usage.code}: {usage.output}")
    if phase == "restore":
        compare(tool, images / f"{tool.last}.raw")
    result = as_result(tool, phase, number, usage)
    report(result)
    return result


def compare(tool: Tool, image: Path) -> None:
    """The restored image equals its source; it is gone afterwards."""
    if not filecmp.cmp(tool.restored, image, shallow=False):
        sys.exit(f"{tool.name}: the restored {tool.restored} differs from {image}")
    tool.restored.unlink()


def as_result(tool: Tool, phase: str, number: int, usage: Usage) -> Result:
    """What is kept of one measured phase."""
    return Result(
        tool=tool.name,
        phase=phase,
        round=number,
        wall_seconds=usage.wall_seconds,
        user_seconds=usage.user_seconds,
        system_seconds=usage.system_seconds,
        rss_bytes=usage.rss_bytes,
        store_bytes=file_bytes(tool.store),
    )


def report(result: Result) -> None:
    """One line at once, so that a long benchmark shows how far it is."""
    print(
        f"{result.tool:17s} {result.phase:10s} wall {result.wall_seconds:6.2f} s  "
        f"cpu {result.cpu_seconds:6.2f} s ({result.user_seconds:.2f} + {result.system_seconds:.2f})  "
        f"rss {result.rss_bytes / 1e6:4.0f} MB  store {result.store_bytes / 1e6:5.0f} MB",
        flush=True,
    )


def play_round(chosen: list[Tool], number: int, work: Path, images: Path) -> Iterator[Result]:
    """All phases of all tools, phase by phase; each time in another order, for what ran before leaves the machine warm or not."""
    order = random.Random(number)
    for tool in chosen:
        start(tool, work)
    for phase in PHASES:
        if phase.startswith("backup"):
            put_current(work, images / f"{phase.split()[1]}.raw")
        for tool in order.sample(chosen, len(chosen)):
            if phase not in tool.phases:
                continue
            settle(tool, chosen, work)
            yield play(tool, phase, number, work, images)


# The tables


@dataclass(frozen=True, slots=True)
class Figures:
    """All results, asked by tool and phase; several rounds give the median."""

    results: list[Result]
    images: Path

    def median(self, tool: str, phase: str, what: str) -> float | None:
        """The median of one figure over the rounds, if it was measured."""
        found = [float(getattr(one, what)) for one in self.results if (one.tool, one.phase) == (tool, phase)]
        return statistics.median(found) if found else None

    def ratio(self, tool: str, peer: str, phase: str, what: str) -> float | None:
        """The median of the ratios of one figure within each round."""
        pairs: dict[int, dict[str, float]] = {}
        for one in self.results:
            if one.phase == phase:
                pairs.setdefault(one.round, {})[one.tool] = float(getattr(one, what))
        ratios = [pair[tool] / pair[peer] for pair in pairs.values() if {tool, peer} <= pair.keys() and pair[peer]]
        return statistics.median(ratios) if ratios else None

    def changed_mb(self, version: int) -> float:
        """How much changed, in 4 KiB grain."""
        lines = (self.images / f"v{version}.changed4k").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines) / 1e6


def all_phases(figures: Figures) -> Iterator[str]:
    """The table of everything that was measured."""
    yield "| phase | tool | wall s | CPU-s | peak RSS MB | store MB | CPU / restic | CPU / borg |"
    yield "|---|---|---|---|---|---|---|---|"
    names = list(dict.fromkeys(one.tool for one in figures.results))
    for phase in PHASES:
        for name in names:
            if figures.median(name, phase, "wall_seconds") is not None:
                yield phase_row(figures, phase, name)


def phase_row(figures: Figures, phase: str, name: str) -> str:
    """One row of the table of phases."""

    def value(what: str, unit: float, digits: int) -> str:
        return f"{(figures.median(name, phase, what) or 0) / unit:.{digits}f}"

    against = [figures.ratio(name, peer, phase, "cpu_seconds") for peer in ("restic", "borg")]
    ratios = [f"{one:.2f}" if one is not None else "-" for one in against]
    cells = [value("wall_seconds", 1, 2), value("cpu_seconds", 1, 2), value("rss_bytes", 1e6, 0)]
    return f"| {' | '.join([phase, name, *cells, value('store_bytes', 1e6, 0), *ratios])} |"


@dataclass(frozen=True, slots=True)
class Limit:
    """One promise: what was reached, and what it may be at most."""

    text: str
    reached: float | None
    at_most: float | None

    def row(self) -> str:
        """One row of the table of limits."""
        if self.reached is None or self.at_most is None:
            return f"| {self.text} | - | - | not measured |"
        verdict = "met" if self.reached <= self.at_most else "**missed**"
        return f"| {self.text} | {self.reached:.3g} | {self.at_most:.3g} | {verdict} |"


def limits(figures: Figures) -> Iterator[Limit]:
    """Every promise about speed, size and memory that these images can check."""
    plain, hinted = "hvbackup", "hvbackup-changed"
    first, second, third, restore = "backup v1", "backup v2", "backup v3", "restore"
    cpu, wall, store = "cpu_seconds", "wall_seconds", "store_bytes"
    yield Limit("first: CPU / restic", figures.ratio(plain, "restic", first, cpu), 0.33)
    yield Limit("first: CPU / borg", figures.ratio(plain, "borg", first, cpu), 1.1)
    yield Limit("first: wall / restic", figures.ratio(plain, "restic", first, wall), 1.0)
    yield Limit("first: wall / borg", figures.ratio(plain, "borg", first, wall), 1.0)
    yield Limit("first: store / restic", figures.ratio(plain, "restic", first, store), 1.15)
    hinted_limit = 0.003 * figures.changed_mb(2) + 0.5
    yield Limit("second, changed extents given: CPU-s", figures.median(hinted, second, cpu), hinted_limit)
    yield Limit("second, compared whole: CPU-s", figures.median(plain, second, cpu), 0.6 * 4)
    for name in (hinted, plain):
        yield Limit(f"second ({name}): store / restic", figures.ratio(name, "restic", second, store), 1.0)
        yield Limit(f"second ({name}): store / borg", figures.ratio(name, "borg", second, store), 0.75)
    yield Limit("third, changed extents given: wall s", figures.median(hinted, third, wall), 0.5)
    yield Limit("third, changed extents given: CPU-s", figures.median(hinted, third, cpu), 0.5)
    yield Limit("restore: CPU-s per GiB of disk", per_gib(figures.median(plain, restore, cpu)), 1.8)
    yield Limit("restore: wall / restic", figures.ratio(plain, "restic", restore, wall), 1.0)
    yield Limit("a short command (points): wall s", figures.median(plain, "list", wall), 0.3)
    yield peak_memory(figures, (plain, hinted))


def per_gib(seconds: float | None) -> float | None:
    """A figure of a whole image as one of each GiB of it."""
    return None if seconds is None else seconds / 4


def peak_memory(figures: Figures, names: tuple[str, ...]) -> Limit:
    """The promise about memory; one chunk for each 64 KiB block with data bounds the index from below."""
    peaks = [one.rss_bytes / 1e6 for one in figures.results if one.tool in names]
    chunks = 46_000
    return Limit("peak RSS MB, all phases", max(peaks, default=None), 150 + 16 * chunks / 1e6)


def print_tables(figures: Figures) -> None:
    """Both tables, in Markdown."""
    print("\n".join(["", *all_phases(figures), "", "| promise | reached | at most | |", "|---|---|---|---|"]))
    print("\n".join(limit.row() for limit in limits(figures)))


def print_export(chosen: list[Tool], work: Path, images: Path) -> None:
    """How fast the last image is served out of hvbackup's store, if there is one: settled like any run, then off the disk."""
    for tool in (tool for tool in chosen if tool.name == "hvbackup"):
        address = tool.folder / "socket"
        words = [word.format(store=tool.store, socket=address) for word in HVBACKUP_MAP]
        for where in ("in the page cache, as before every run", "on the disk"):
            settle(tool, chosen, work)
            if where == "on the disk":
                for path in files(tool.store):
                    drop(path)
            print(f"\nThe export, with the store {where}:", flush=True)
            export.measure(words, address, HVBACKUP_EXPORT.format(socket=address), images / "v3.raw", environment(tool))


def run(out: Path, rounds: int, only: list[str] | None, results: Path) -> None:
    """Measures `rounds` rounds, prints the tables and writes every single figure to `results`."""
    images, work = out / "img", out / "work"
    work.mkdir(parents=True, exist_ok=True)
    install(out / "cache")
    makers = tools(work, images)
    if only is None and not Path(HVBACKUP).exists():
        sys.exit(f"{HVBACKUP} is missing; `make setup` makes it, or name the peers alone with --only")
    chosen = [make() for name, make in makers.items() if only is None or name in only]
    found: list[Result] = []
    for number in range(1, rounds + 1):
        found.extend(play_round(chosen, number, work, images))
    print_export(chosen, work, images)
    names = [tool.name for tool in chosen]  # the tables have them in this order, whatever that of the rounds
    found.sort(key=lambda one: (PHASES.index(one.phase), names.index(one.tool)))
    results.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print_tables(Figures(found, images))
    shutil.rmtree(work)
    print(f"\nEvery figure: {results}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".lab/bench", help="folder with the images")
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS", "1")))
    parser.add_argument("--only", help="names of tools, separated by commas")
    parser.add_argument("--results", type=Path, help="JSON file for every figure (default: OUT/results.json)")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    only = options.only.split(",") if options.only else None
    run(out, options.rounds, only, options.results or out / "results.json")


if __name__ == "__main__":
    main()
