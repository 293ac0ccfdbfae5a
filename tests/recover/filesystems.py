"""Real file systems, made by their own programs, with a known tree of files in them."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from hvbackup.model import MiB


def run(*words: str | Path, cwd: Path | None = None) -> None:
    """A program that must succeed."""
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK": "1"}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, (words, done.stdout, done.stderr)


def make_tree(folder: Path) -> Path:
    """Small and large files, a sparse one, many in a folder, a link to a folder, long and odd names."""
    rng = random.Random(7)
    for name in ("etc", "usr/bin", "many/deep"):
        (folder / name).mkdir(parents=True)
    (folder / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (folder / "etc/shadow").write_text("root:*\n")
    (folder / "etc/shadow").chmod(0o4600)
    (folder / "large.bin").write_bytes(rng.randbytes(3 * MiB + 17))
    (folder / "empty").write_bytes(b"")
    (folder / "tiny").write_bytes(rng.randbytes(100))
    (folder / "usr/bin/prog").write_bytes(rng.randbytes(70_000))
    for i in range(150):
        (folder / f"many/deep/a rather long name of file {i:03}").write_bytes(rng.randbytes(i * 7))
    with (folder / "sparse").open("wb") as f:
        f.write(b"begin")
        f.seek(2 * MiB)
        f.write(b"end")
        f.truncate(5 * MiB + 1)  # and a hole at the end
    return folder


def files_of(folder: Path) -> Mapping[str, bytes]:
    """Every regular file below a folder, by its path from there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def _blank(path: Path, size: int) -> None:
    with path.open("wb") as f:
        f.truncate(size)


def ext(kind: str, *options: str) -> Callable[[Path, Path], None]:
    """ext2, ext3 or ext4."""

    def make(tree: Path, image: Path) -> None:
        _blank(image, 24 * MiB)
        run("mke2fs", "-q", "-t", kind, *options, "-d", tree, image)

    return make


def fat(bits: int, size: int, gaps: int = 20) -> Callable[[Path, Path], None]:
    """FAT, fragmented: a file was removed before the others came."""

    def make(tree: Path, image: Path) -> None:
        _blank(image, size)
        run("mkfs.vfat", "-F", str(bits), "-s", "1", image)
        gap = image.with_suffix(".gap")
        gap.write_bytes(bytes(70_000))
        plain = sorted(p for p in tree.iterdir() if not p.is_symlink())
        for n in range(gaps):
            run("mcopy", "-i", image, gap, f"::/gap{n}")
        for n in range(0, gaps, 2):
            run("mdel", "-i", image, f"::/gap{n}")
        run("mcopy", "-s", "-i", image, *plain, "::/")
        for n in range(1, gaps, 2):
            run("mdel", "-i", image, f"::/gap{n}")

    return make


def ntfs(tree: Path, image: Path) -> None:
    """NTFS; ntfscp puts files into the topmost folder only."""
    _blank(image, 24 * MiB)
    run("mkntfs", "-q", "-F", "-s", "512", image)
    for path in sorted(tree.iterdir()):
        if path.is_file() and not path.is_symlink():
            run("ntfscp", "-q", "-f", image, path, path.name)


def xfs(tree: Path, image: Path) -> None:
    """XFS, filled by a description of the tree."""
    _blank(image, 320 * MiB)
    lines = ["/", "0 0", "d--755 0 0", *_described(tree), "$"]
    description = image.with_suffix(".proto")
    description.write_text("\n".join(lines) + "\n")
    run("mkfs.xfs", "-q", "-f", "-p", description, image)


def _described(folder: Path) -> list[str]:
    lines: list[str] = []
    for path in sorted(folder.iterdir()):
        if " " in path.name:
            continue  # which a description can't have
        if path.is_symlink():
            lines.append(f"{path.name} l--777 0 0 {os.readlink(path)}")
        elif path.is_dir():
            lines += [f"{path.name} d--755 0 0", *_described(path), "$"]
        else:
            lines.append(f"{path.name} ---644 0 0 {path}")
    return lines


def btrfs(tree: Path, image: Path) -> None:
    """btrfs."""
    _blank(image, 128 * MiB)
    run("mkfs.btrfs", "-q", "-r", tree, image)


MAKERS: Mapping[str, Callable[[Path, Path], None]] = {
    "ext2": ext("ext2", "-b", "1024"),
    "ext3": ext("ext3", "-b", "4096"),
    "ext4": ext("ext4"),
    "fat12": fat(12, 2_000_000, 10),
    "fat16": fat(16, 12 * MiB),
    "fat32": fat(32, 40 * MiB),
    "ntfs": ntfs,
    "xfs": xfs,
    "btrfs": btrfs,
}
