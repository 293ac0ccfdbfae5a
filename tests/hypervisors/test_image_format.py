"""The format of an image is never decided by what a guest can write."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hvbackup.errors import NotFound, UsageError
from hvbackup.hypervisors import imageformat
from hvbackup.hypervisors.imagedisk import ImageSpec, look
from hvbackup.model import DiskId

QCOW2_HEADER = b"QFI\xfb" + bytes(508)


def made(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def chosen(path: Path, forced: str = "") -> imageformat.Choice:
    return imageformat.choose(path, forced, path.stat().st_mode)


@pytest.mark.parametrize("name", ["vm.raw", "vm.img", "vm", "vm.2026", "vm.iso"])
def test_what_looks_like_nothing_is_raw(tmp_path: Path, name: str) -> None:
    assert chosen(made(tmp_path, name, bytes(512))) == imageformat.Choice("raw")


@pytest.mark.real
@pytest.mark.parametrize("format_", [f for f in imageformat.FORMATS if f != "raw"])
def test_name_and_header_together_decide(tmp_path: Path, format_: str) -> None:
    suffix = {"vpc": "vhd"}.get(format_, format_)
    path = tmp_path / f"vm.{suffix}"
    subprocess.run(["qemu-img", "create", "-q", "-f", format_, str(path), "4M"], check=True, timeout=120)
    assert chosen(path) == imageformat.Choice(format_)
    path.rename(tmp_path / "vm.img")
    with pytest.raises(UsageError, match=rf"\?format={format_} or \?format=raw"):
        chosen(tmp_path / "vm.img")


@pytest.mark.real
def test_a_fixed_vhd_is_known_by_its_footer_and_name(tmp_path: Path) -> None:
    path = tmp_path / "vm.vhd"
    options = ["-o", "subformat=fixed"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "vpc", *options, str(path), "4M"], check=True, timeout=120)
    assert chosen(path).format == "vpc"
    path.rename(tmp_path / "vm.img")
    assert chosen(tmp_path / "vm.img").format == "raw"


def test_a_guest_cannot_turn_its_raw_disk_into_qcow2(tmp_path: Path) -> None:
    choice = chosen(made(tmp_path, "vm.raw", QCOW2_HEADER))
    assert choice.format == "raw"
    assert "begins like a qcow2 image and was read as raw" in choice.doubt
    with pytest.raises(UsageError, match="a guest can write such a header"):
        chosen(made(tmp_path, "vm", QCOW2_HEADER))


def test_a_device_is_raw_whatever_is_on_it() -> None:
    choice = imageformat.decide(Path("/dev/vg/vm"), "qcow2", is_device=True)
    assert choice.format == "raw"
    assert "a device" in choice.doubt
    assert imageformat.decide(Path("/dev/vg/vm.qcow2"), "raw", is_device=True) == imageformat.Choice("raw")


def test_a_name_without_its_header_is_asked_about(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not begin like a qcow2 image"):
        chosen(made(tmp_path, "vm.qcow2", bytes(512)))


def test_what_the_user_says_counts(tmp_path: Path) -> None:
    path = made(tmp_path, "vm.img", QCOW2_HEADER)
    assert chosen(path, "raw") == imageformat.Choice("raw")
    assert chosen(path, "qcow2") == imageformat.Choice("qcow2")
    with pytest.raises(UsageError, match="format ext4 is unknown; it can be raw, qcow2"):
        chosen(path, "ext4")


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(UsageError, match="neither a file nor a block device"):
            look(ImageSpec(path), DiskId("d"))
    for path in (tmp_path / "gone.raw", made(tmp_path, "f", b"") / "below"):
        with pytest.raises(NotFound, match="There is no disk at"):
            look(ImageSpec(path), DiskId("d"))
