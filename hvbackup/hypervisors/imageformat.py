"""Which format an image has, without ever letting the guest decide.

Whoever writes to a raw disk writes its first bytes too, and can make it look like a qcow2 image whose backing file is
/etc/shadow.  So the bytes alone never decide: name and header agree, or the user says it with `?format=`, or the image
is raw because its name or its being a device says so.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from hvbackup.errors import HostUnreachable, UsageError

RAW, QCOW2 = "raw", "qcow2"
FORMATS = (RAW, QCOW2, "qed", "vmdk", "vdi", "vhdx", "vpc")  # qemu's names for what qemu-nbd reads

_SUFFIXES = {
    ".raw": RAW,
    ".dd": RAW,
    ".iso": RAW,
    ".qcow2": QCOW2,
    ".qed": "qed",
    ".vmdk": "vmdk",
    ".vdi": "vdi",
    ".vhdx": "vhdx",
    ".vhd": "vpc",
    ".vpc": "vpc",
}
_MAGICS = (
    (0, b"QFI\xfb", QCOW2),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
)
_VPC_FOOTER_BYTES = 512
_HEADER_BYTES = 128


@dataclass(frozen=True, slots=True)
class Choice:
    """The format taken, and a doubt to tell the user, if any."""

    format: str
    doubt: str = ""


def choose(path: Path, forced: str, mode: int) -> Choice:
    """The format of the image (`mode` is its st_mode).  Raises UsageError when nobody but the guest could know."""
    if forced:
        return Choice(_known(path, forced))
    return decide(path, _looks_like(path), is_device=stat.S_ISBLK(mode))


def decide(path: Path, header: str, *, is_device: bool) -> Choice:
    """What `choose` decides, from the name and what the header looks like (RAW: like nothing)."""
    named = RAW if is_device else _SUFFIXES.get(path.suffix.lower(), "")
    if named in ("", header):
        if header == RAW or named:
            return Choice(header)
        raise UsageError(
            f"{path} begins like a {header} image, and its name does not say that it is one: a guest can write such a "
            f"header on a raw disk; add ?format={header} or ?format=raw"
        )
    if named == RAW:
        what = "a device" if is_device else f"called {path.suffix}"
        return Choice(RAW, f"{path} begins like a {header} image and was read as raw, because it is {what}")
    raise UsageError(
        f"{path} is called {path.suffix} and does not begin like a {named} image; "
        f"add ?format=raw to take it as it is, or ?format={named}"
    )


def _known(path: Path, forced: str) -> str:
    if forced not in FORMATS:
        raise UsageError(f"{path}: format {forced} is unknown; it can be {', '.join(FORMATS)}")
    return forced


def _looks_like(path: Path) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            header = file.read(_HEADER_BYTES)
            end = os.lseek(file.fileno(), 0, os.SEEK_END)
            footer = os.pread(file.fileno(), _VPC_FOOTER_BYTES, max(0, end - _VPC_FOOTER_BYTES))
    except OSError as error:
        raise HostUnreachable(f"{path} can't be read: {error.strerror}") from error
    for offset, magic, format_ in _MAGICS:
        if header[offset : offset + len(magic)] == magic:
            return format_
    # A fixed VHD has no header at all, and a footer that any raw disk may end with: it counts for that name only.
    return "vpc" if _SUFFIXES.get(path.suffix.lower()) == "vpc" and footer.startswith(b"conectix") else RAW
