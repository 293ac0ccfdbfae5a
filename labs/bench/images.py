"""Build the three benchmark disk images, v1, v2 and v3, reproducibly from pinned Debian packages.

    python -m labs.bench.images [--out .lab/bench] [--verify]

v1  4 GiB, GPT and ext4, 2.7 GiB of it used by unpacked packages (packages.txt, Debian 12 amd64)
v2  v1 after a day of use: upgraded files, database pages rewritten in place, a log, deletions, an upload of 100 MB that
    does not compress
v3  v2 and one new file of 1 MB

Everything is made with mke2fs and debugfs in user space under a fixed time, fixed identifiers and a seeded generator.
Nothing is mounted, so the kernel's allocator and clock leave no trace, and every build from the same packages is the same,
bit for bit; `--verify` unpacks and builds everything a second time and compares.  Beside each image lie the extents changed
since the one before, a line `offset length` each: v2.changed in the 64 KiB grain of QEMU's default dirty bitmaps, and
v2.changed4k in 4 KiB grain.  Runs as root, because the files' owners are part of the image.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / "packages.txt"
SUMS = HERE / "images.sha256"
FAKE_TIME = 1_700_000_000
BLOCK = 4096
GRAIN = 65536
IMAGE_BYTES = 4 << 30
PART_OFFSET = 1 << 20
PART_BLOCKS = (IMAGE_BYTES - PART_OFFSET - (1 << 20)) // BLOCK  # the last MiB is left to the second partition table
# The day of use between v1 and v2.  Chosen so that 180 MB change in 4 KiB grain, as in the original measurements.
UPLOAD_BYTES = 100_000_000
UPGRADED_BYTES = 30_000_000
PAGE_WRITES = 2000  # of 16 KiB each
PAGE_FILES = 200
LONE_UPGRADES = 150  # files upgraded without their neighbours
LOG_LINES = 100_000
DELETED_FILES = 200


def say(text: str) -> None:
    """One line on standard output, at once."""
    print(text, flush=True)


def run(*command: str | Path, stdin: str | None = None, strict: bool = False) -> str:
    """The standard output of `command`, run in the C locale at the fixed time; its failure ends the build.

    debugfs reports a failed command on standard error only, after its banner: `strict` takes a second line there for a failure.
    """
    env = {
        **os.environ,
        "LC_ALL": "C",
        "E2FSPROGS_FAKE_TIME": str(FAKE_TIME),
        "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
    }
    done = subprocess.run([str(c) for c in command], input=stdin, env=env, text=True, capture_output=True, timeout=1800)
    if done.returncode or (strict and done.stderr.count("\n") > 1):
        sys.exit(f"{command[0]} failed with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def install_tools() -> None:
    """The programs needed here exist; missing ones are installed, which the set-up script says."""
    subprocess.run([HERE.parent / "setup.sh", "bench"], check=True, timeout=1800)


# Packages


def pinned() -> list[str]:
    """The `name=version` lines of packages.txt, in order."""
    lines = (line.partition("#")[0].strip() for line in PACKAGES.read_text().splitlines())
    return [line for line in lines if line]


def deb_path(debs: Path, pin: str) -> Path | None:
    """The downloaded file of `pin`, if there is one (apt writes the colon of an epoch as %3a)."""
    name, version = pin.split("=")
    return next(iter(sorted(debs.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))), None)


def fetch(debs: Path) -> tuple[list[Path], bool]:
    """Every package as a file, and whether all of them are the pinned versions."""
    debs.mkdir(parents=True, exist_ok=True)
    wanted = [pin for pin in pinned() if not deb_path(debs, pin)]
    if wanted:
        say(f"Downloading {len(wanted)} packages into {debs}")
        apt_download(debs, wanted)
    found = [(pin, deb_path(debs, pin)) for pin in pinned()]
    replaced = [pin for pin, path in found if not path]
    paths = [path or replacement(debs, pin) for pin, path in found]
    return paths, not replaced


def apt_download(debs: Path, what: list[str]) -> bool:
    """Whether apt-get put all of `what` into `debs`."""
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *what]
    return (
        subprocess.run(command, cwd=debs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=1800).returncode
        == 0
    )


def replacement(debs: Path, pin: str) -> Path:
    """The current version of a package whose pinned one has left the archive; said aloud, for the images differ then."""
    name = pin.split("=")[0]
    if not apt_download(debs, [pin]):
        apt_download(debs, [name])
    path = deb_path(debs, pin) or next(iter(sorted(debs.glob(f"{name}_*.deb"))), None)
    if path is None:
        sys.exit(
            f"{pin}: neither this version nor another can be downloaded; run apt-get update, or look at the package sources"
        )
    if path != deb_path(debs, pin):
        say(f"{pin} is no longer in the archive: {path.name} instead, so the images differ from the published ones")
    return path


def unpack(debs: Iterable[Path], tree: Path) -> None:
    """`tree` holds the files of all packages, and nothing else."""
    if (tree.parent / f"{tree.name}.done").exists():
        return
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    os.chmod(tree, 0o755)
    for deb in debs:
        run("dpkg-deb", "-x", deb, tree)
    for folder, _, _ in os.walk(tree):  # those a later package added to would carry the moment of the unpacking
        os.utime(folder, (FAKE_TIME, FAKE_TIME))
    (tree.parent / f"{tree.name}.done").touch()


# The file system, in user space


@dataclass(frozen=True, slots=True)
class Ext4:
    """The ext4 partition of an image file, edited with debugfs."""

    image: Path

    def edit(self, commands: Iterable[str]) -> str:
        """What debugfs printed for `commands`, after they were all carried out."""
        return run(
            "debugfs",
            "-w",
            "-f",
            "-",
            f"{self.image}?offset={PART_OFFSET}",
            stdin="\n".join(commands) + "\n",
            strict=True,
        )

    def used_inodes(self) -> Iterator[int]:
        """The numbers of all inodes in use that belong to files: the root and those from 11 on."""
        text = run("dumpe2fs", f"{self.image}?offset={PART_OFFSET}")
        total = int(re.search(r"Inode count:\s+(\d+)", text)[1])  # type: ignore[index]
        free = bytearray(total + 1)
        for ranges in re.findall(r"Free inodes: (.*)", text):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", ranges):
                free[int(first) : int(last or first) + 1] = b"\1" * (int(last or first) - int(first) + 1)
        yield 2
        yield from (number for number in range(11, total + 1) if not free[number])

    def extents(self, paths: list[str]) -> Iterator[list[tuple[int, int]]]:
        """For each path its runs of data as (first block, number of blocks)."""
        for part in self.edit(f"dump_extents -l {path}" for path in paths).split("debugfs: dump_extents")[1:]:
            rows = re.findall(r"^\s*\d+/\s*\d+\s+\d+/\s*\d+\s+\d+ -\s+\d+\s+(\d+) -\s+\d+\s+(\d+)", part, re.M)
            yield [(int(first), int(count)) for first, count in rows]

    def check(self) -> None:
        """e2fsck finds nothing wrong; anything else ends the build."""
        run("e2fsck", "-fn", f"{self.image}?offset={PART_OFFSET}")


def build_v1(tree: Path, image: Path) -> None:
    """`image` holds `tree`, and no trace of the moment or the machine it was built on."""
    image.unlink(missing_ok=True)
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    guids = ["-U", "11111111-1111-4111-8111-111111111111", "-u", "1:22222222-2222-4222-8222-222222222222"]
    run("sgdisk", "-q", "-n", f"1:2048:{2047 + PART_BLOCKS * 8}", "-t", "1:8300", *guids, image)
    seed = "hash_seed=44444444-4444-4444-8444-444444444444"
    options = f"{seed},offset={PART_OFFSET},lazy_itable_init=0,lazy_journal_init=0"
    volume = "33333333-3333-4333-8333-333333333333"
    run(
        "mke2fs", "-q", "-t", "ext4", "-b", str(BLOCK), "-U", volume, "-E", options, "-d", tree, image, str(PART_BLOCKS)
    )
    fix_times(Ext4(image))


def fix_times(volume: Ext4) -> None:
    """Access and change times of every file are the fixed time (mke2fs takes them from the unpacked files)."""
    stamp = f"@{FAKE_TIME}"
    volume.edit(f"sif <{inode}> {field} {stamp}" for inode in volume.used_inodes() for field in ("atime", "ctime"))
    volume.edit(f"sif <2> {field} {stamp}" for field in ("mtime", "crtime"))


# The changes


def plain_files(tree: Path) -> list[tuple[str, int]]:
    """Path and size of the files that a debugfs command can name and that have one name only, sorted."""
    found = []
    for folder, folders, files in os.walk(tree):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            status = path.lstat()
            inside = "/" + str(path.relative_to(tree))
            if (
                path.is_file()
                and not path.is_symlink()
                and status.st_nlink == 1
                and re.fullmatch(r"[\w./+:@,=-]+", inside)
            ):
                found.append((inside, status.st_size))
    return found


def build_v2(tree: Path, old: Path, image: Path, scratch: Path) -> None:
    """`image` is `old` after a day of use."""
    copy_sparse(old, image)
    rng = random.Random(42)
    files = by_folder(plain_files(tree), rng)
    volume = Ext4(image)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    deleted, rest = files[-DELETED_FILES:], files[:-DELETED_FILES]
    rewrite_pages(volume, rng, [path for path, size in rest if size > 1_000_000][:PAGE_FILES])
    volume.edit(upgrade(tree, scratch, rng, rest))
    volume.edit(f"rm {path}" for path, _ in deleted)
    volume.edit(new_files(scratch, rng))
    fix_times(volume)
    volume.check()
    shutil.rmtree(scratch)


def by_folder(files: list[tuple[str, int]], rng: random.Random) -> list[tuple[str, int]]:
    """The files with their folders shuffled, since an upgrade replaces neighbours; a few lone ones are ahead of them."""
    folders: dict[str, list[tuple[str, int]]] = {}
    for file in files:
        folders.setdefault(file[0].rpartition("/")[0], []).append(file)
    order = sorted(folders)
    rng.shuffle(order)
    lone = rng.sample(files, LONE_UPGRADES)
    lone_set = set(lone)
    return lone + [file for folder in order for file in folders[folder] if file not in lone_set]


def upgrade(tree: Path, scratch: Path, rng: random.Random, files: list[tuple[str, int]]) -> Iterator[str]:
    """Commands that replace small files the way dpkg does: new ones beside all the old ones, which then take their names."""
    done, paths = 0, []
    for number, (path, size) in enumerate(files):
        if not 0 < size < 400_000:
            continue
        content = bytearray((tree / path[1:]).read_bytes())
        at = rng.randrange(len(content))
        content[at : at + 16] = b"hvbackup-upgrade"
        source = scratch / f"new{number}"
        source.write_bytes(content)
        yield from (f"write {source} {path}.dpkg-new", f"sif {path}.dpkg-new mtime @{FAKE_TIME}")
        paths.append(path)
        done += size
        if done > UPGRADED_BYTES:
            break
    for path in paths:
        yield from (f"rm {path}", f"ln {path}.dpkg-new {path}", f"unlink {path}.dpkg-new")


def rewrite_pages(volume: Ext4, rng: random.Random, paths: list[str]) -> None:
    """PAGE_WRITES random pages of `paths` are overwritten in place, half random and half text, as a database does."""
    runs = [run for run in volume.extents(paths) if run]
    with open(volume.image, "r+b") as file:
        for _ in range(PAGE_WRITES):
            first, count = rng.choice(rng.choice(runs))
            file.seek(PART_OFFSET + (first + rng.randrange(max(1, count // 4)) * 4) * BLOCK)
            file.write((rng.randbytes(8192) + bytes(rng.choices(b"abcdefgh \n", k=8192)))[: min(count, 4) * BLOCK])


def new_files(scratch: Path, rng: random.Random) -> Iterator[str]:
    """Commands that add the upload and the log."""
    (scratch / "upload.bin").write_bytes(b"".join(rng.randbytes(1_000_000) for _ in range(UPLOAD_BYTES // 1_000_000)))
    with open(scratch / "app.log", "w", encoding="ascii") as log:
        for i in range(LOG_LINES):
            request = f"request id={rng.getrandbits(64):016x} ok status=200"
            log.write(f"2024-01-{i % 28 + 1:02d}T00:00:00 host app[{rng.randrange(9999)}]: {request}\n")
    yield from (
        "mkdir /srv",
        "mkdir /srv/data",
        f"write {scratch}/upload.bin /srv/data/upload.bin",
        f"write {scratch}/app.log /srv/data/app.log",
    )


def build_v3(old: Path, image: Path, scratch: Path) -> None:
    """`image` is `old` with one new file of 1 MB."""
    copy_sparse(old, image)
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "small.bin").write_bytes(random.Random(7).randbytes(1_000_000))
    volume = Ext4(image)
    volume.edit([f"write {scratch}/small.bin /srv/data/small.bin"])
    volume.check()
    shutil.rmtree(scratch)


def copy_sparse(old: Path, new: Path) -> None:
    """`new` is a sparse copy of `old`."""
    run("cp", "--sparse=always", old, new)


# What changed, and the whole


def changed_blocks(old: Path, new: Path) -> Iterator[int]:
    """The numbers of the 4 KiB blocks that differ."""
    with open(old, "rb") as a, open(new, "rb") as b:
        for start in range(0, IMAGE_BYTES, 1 << 20):
            left, right = a.read(1 << 20), b.read(1 << 20)
            if left != right:
                yield from (
                    (start + at) // BLOCK
                    for at in range(0, len(left), BLOCK)
                    if left[at : at + BLOCK] != right[at : at + BLOCK]
                )


def write_changed(old: Path, new: Path) -> None:
    """`new`.changed and `new`.changed4k exist: the changed extents in both grains."""
    blocks = list(changed_blocks(old, new))
    for grain, suffix in ((GRAIN, ".changed"), (BLOCK, ".changed4k")):
        lines = [f"{start} {length}" for start, length in merged(blocks, grain)]
        new.with_suffix(suffix).write_text("\n".join(lines) + "\n")
    say(f"{new.name}: {len(blocks) * BLOCK / 1e6:.1f} MB changed in 4 KiB grain, {len(lines)} extents")


def merged(blocks: list[int], grain: int) -> Iterator[tuple[int, int]]:
    """The extents (offset, length) in bytes, aligned to `grain`, that cover `blocks`."""
    begin = end = -1
    for unit in sorted({block * BLOCK // grain for block in blocks}):
        if unit != end:
            if begin >= 0:
                yield begin * grain, (end - begin) * grain
            begin = unit
        end = unit + 1
    if begin >= 0:
        yield begin * grain, (end - begin) * grain


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def build(debs: list[Path], out: Path, tree: Path) -> dict[str, str]:
    """The three images and their lists of changes exist in `out`; returns their sums by name."""
    out.mkdir(parents=True, exist_ok=True)
    unpack(debs, tree)
    v1, v2, v3 = (out / f"v{n}.raw" for n in (1, 2, 3))
    steps: list[tuple[Path, Callable[[Path], None]]] = [
        (v1, lambda new: build_v1(tree, new)),
        (v2, lambda new: build_v2(tree, v1, new, out / "new")),
        (v3, lambda new: build_v3(v2, new, out / "new")),
    ]
    for path, make in steps:
        say(f"Building {path}")
        make(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    write_changed(v1, v2)
    write_changed(v2, v3)
    return {path.name: sha256(path) for path in (v1, v2, v3)}


def compare(built: dict[str, str], *, exact: bool) -> None:
    """Says whether the images are the published ones; differing from the pinned packages is a failure."""
    published = {name: digest for digest, name in (line.split() for line in SUMS.read_text().splitlines())}
    for name, digest in built.items():
        verdict = "as published" if digest == published.get(name) else "differs from the published image"
        say(f"{digest}  {name}  {verdict}")
    if exact and built != published:
        sys.exit(
            "The packages are the pinned ones, yet the images differ: another e2fsprogs or gdisk makes other metadata"
        )


def main() -> None:
    """Build what is missing, or everything twice with --verify."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=HERE.parents[1] / ".lab/bench", help="folder for images, packages and scratch files"
    )
    parser.add_argument("--verify", action="store_true", help="unpack and build a second time and compare")
    parser.add_argument("--publish", action="store_true", help="write the sums of this build to images.sha256")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if os.geteuid():
        sys.exit("The images hold files of many owners: run this as root")
    install_tools()
    os.nice(10)
    images = out / "img"
    if all((images / f"v{n}.raw").exists() and (images / "done").exists() for n in (1, 2, 3)) and not options.verify:
        say(f"{images}: the images exist")
        return
    debs, exact = fetch(out / "cache/debs")
    built = build(debs, images, out / "cache/tree")
    if options.publish:
        SUMS.write_text("".join(f"{digest}  {name}\n" for name, digest in built.items()))
    compare(built, exact=exact)
    (images / "done").touch()
    if options.verify:
        verify(debs, built, out)


def verify(debs: list[Path], built: dict[str, str], out: Path) -> None:
    """A second build from the packages on is the same, bit for bit."""
    again = build(debs, out / "again/img", out / "again/tree")
    shutil.rmtree(out / "again")
    if again != built:
        sys.exit(f"Not reproducible: {built} and then {again}")
    say("Built twice from the packages: the same three images, bit for bit")


if __name__ == "__main__":
    main()
