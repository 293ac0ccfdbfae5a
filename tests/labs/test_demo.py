"""The demonstration, which must be able to say that something is not proved."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from labs.demo import __main__ as demo
from labs.demo.points import Backup, check_point
from labs.demo.stage import Failed, Hvbackup, Show
from labs.guest import GuestError, build, make_disk

WRITES = 400
IMAGES = ("vda.raw", "vdb.raw")


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two disks, after 400 writes and after 500 of the same run."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    folder = tmp_path_factory.mktemp("moments")
    for count in (WRITES, WRITES + 100):
        parts = [folder / f"{count}-{disk}" for disk in "ab"]
        for part in parts:
            part.mkdir()
        words = [build() / "writer", "sequence", "-i", "7", "-n", count, *(part / "records" for part in parts)]
        subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, timeout=60)
        (folder / str(count)).mkdir()
        for part, image in zip(parts, IMAGES, strict=True):
            make_disk(folder / str(count) / image, 16 << 20, "raw", content=part)
    return folder


def check(moments: Path, tmp_path: Path, spoil: Callable[[Path], object], acked: int = WRITES) -> Show:
    """`check_point` on disks a restore gave back, after `spoil` did something to them."""

    def restore(*words: str) -> dict[str, object]:
        shutil.copytree(moments / str(WRITES), words[-1])
        spoil(Path(words[-1]))
        return {}

    show = Show()
    backup = Backup("full", "p", acked, acked, {}, 0.1)
    reference = [moments / str(WRITES) / image for image in IMAGES]
    check_point(cast("Hvbackup", restore), "shop", backup, tmp_path, show, reference if acked == WRITES else None)
    return show


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.real
def test_what_came_back_whole_is_proved(moments: Path, tmp_path: Path) -> None:
    assert check(moments, tmp_path, lambda folder: None).proofs == 2


@pytest.mark.real
def test_one_flipped_bit_is_not_proved(moments: Path, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="differ"):
        check(moments, tmp_path, lambda folder: flip(folder / "vdb.raw", (16 << 20) - 1))


@pytest.mark.real
def test_a_lost_write_is_not_proved(moments: Path, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="has 400 records; 401 were acknowledged"):
        check(moments, tmp_path, lambda folder: None, acked=WRITES + 1)


@pytest.mark.real
def test_disks_of_different_moments_are_not_proved(moments: Path, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="broken"):
        check(
            moments,
            tmp_path,
            lambda folder: shutil.copy(moments / str(WRITES + 100) / "vdb.raw", folder / "vdb.raw"),
            acked=WRITES + 1,
        )


@pytest.mark.real
def test_a_damaged_file_system_is_not_proved(moments: Path, tmp_path: Path) -> None:
    with pytest.raises((Failed, GuestError)):
        check(moments, tmp_path, lambda folder: flip(folder / "vda.raw", 4096 + 20), acked=WRITES + 1)


@pytest.mark.guest
@pytest.mark.timeout(600)
def test_the_whole_demonstration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("labs.demo.points.PAUSE_SECONDS", 0.5)
    short = tempfile.mkdtemp(prefix="hvd-", dir="/tmp")  # of its own, and of few letters: there are sockets in it
    monkeypatch.setattr("tempfile.tempdir", short)
    status = demo.main([])
    said = capsys.readouterr().out
    assert status == 0, said
    assert said.count("[proved]") == 10
    assert list(Path(short).glob("hvbackup-demo-*")) == []
    shutil.rmtree(short)
