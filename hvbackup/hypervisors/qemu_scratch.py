"""The scratch of a snapshot: an empty qcow2 image, written by ourselves because starting qemu-img takes longer than a cycle."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from hvbackup.hypervisors.qmp import Peer
from hvbackup.model import KiB

_CLUSTER = 64 * KiB


def write_empty_qcow2(path: Path, size: int, peer: Peer) -> None:
    """An empty image that is its peer's only."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, empty_qcow2(size), 0)
        if os.geteuid() == 0:
            os.fchown(fd, peer.uid, peer.gid)
    finally:
        os.close(fd)


def empty_qcow2(size: int) -> bytes:
    """A qcow2 image (version 3) in which nothing is allocated, as `qemu-img create` would make it."""
    l1_entries = -(-size // (_CLUSTER * (_CLUSTER // 8)))
    l1_clusters = -(-l1_entries * 8 // _CLUSTER)
    used = 3 + l1_clusters  # header, refcount table, refcount block, L1 table
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        0,
        0,
        16,
        size,
        0,
        l1_entries,
        3 * _CLUSTER,
        _CLUSTER,
        1,
        0,
        0,
        0,
        0,
        0,
        4,
        104,
    )
    image = bytearray(used * _CLUSTER)
    for at, part in ((0, header), (_CLUSTER, struct.pack(">Q", 2 * _CLUSTER)), (2 * _CLUSTER, b"\0\1" * used)):
        image[at : at + len(part)] = part
    return bytes(image)
