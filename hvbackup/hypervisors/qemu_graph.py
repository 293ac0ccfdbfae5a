"""Which disks a QEMU has, and in which node of its block graph each one lives.  Pure: made from what QEMU answered.

A disk is what the guest sees through one device.  Its node is the format node under any filters, because bitmaps and
jobs belong there: a filter comes and goes.  A qemu-storage-daemon has no devices; there every exported or topmost node
is a disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvbackup.errors import UsageError
from hvbackup.model import Disk, DiskId

Answer = Mapping[str, Any]

# Nodes that pass everything through to one child; the disk itself is below.
_FILTERS = frozenset(
    (
        *("blkdebug", "blklogwrites", "blkreplay", "blkverify", "commit_top", "compress", "copy-before-write"),
        *("copy-on-read", "mirror_top", "preallocate", "snapshot-access", "throttle"),
    )
)
_PERIPHERAL = re.compile(r"(?:/machine/peripheral/)?([^/]+)(?:/virtio-backend)?")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One dirty bitmap of a node."""

    name: str
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool

    @classmethod
    def parse(cls, raw: Answer) -> Bitmap:
        """From query-named-block-nodes."""
        flags = (bool(raw.get(key)) for key in ("recording", "busy", "persistent", "inconsistent"))
        return cls(str(raw.get("name", "")), int(raw["granularity"]), *flags)


@dataclass(frozen=True, slots=True)
class Drive:
    """One disk of the machine and the node it lives in."""

    disk: Disk
    node: str
    driver: str
    read_only: bool
    keeps_bitmaps: bool  # its format can store bitmaps over a restart
    bitmaps: Mapping[str, Bitmap]


@dataclass(frozen=True, slots=True)
class Device:
    """Where a guest (or a client of the storage daemon) touches a node; facts for naming and skipping."""

    node: str  # topmost, as attached
    id: str  # stable between lives
    sector: int = 512
    skip: str = ""  # why it is no disk to capture


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """Nodes by name, and which node is below which."""

    nodes: Mapping[str, Answer]
    children: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)  # parent -> (role, child)
    complete: bool = True  # False: this QEMU won't say what is below what

    @classmethod
    def parse(cls, nodes: Sequence[Answer], graph: Answer | None) -> BlockGraph:
        """From query-named-block-nodes (flat) and x-debug-query-block-graph, which not every QEMU has."""
        by_name = {str(node["node-name"]): node for node in nodes}
        if graph is None:
            return cls(by_name, complete=False)
        names = {raw["id"]: str(raw["name"]) for raw in graph["nodes"] if raw["type"] == "block-driver"}
        children: dict[str, list[tuple[str, str]]] = {}
        for edge in graph["edges"]:
            if edge["parent"] in names and edge["child"] in names:
                children.setdefault(names[edge["parent"]], []).append((str(edge["name"]), names[edge["child"]]))
        return cls(by_name, children)

    def roots(self, ours: str) -> Iterator[str]:
        """Nodes that no node uses but those that begin with `ours`; none when the graph is not known."""
        used = {child for parent, below in self.children.items() for _, child in below if not parent.startswith(ours)}
        yield from (name for name in self.nodes if self.complete and name not in used)

    def format_node(self, name: str) -> str:
        """The node that holds the disk, below every filter."""
        while (driver := self.nodes[name]["drv"]) in _FILTERS:
            below = [child for role, child in self.children.get(name, ()) if role in ("file", "backing", "image")]
            if len(below) != 1:
                raise UsageError(
                    f"Node {name} is a filter ({driver}) and QEMU does not say what is below; remove it first"
                )
            name = below[0]
        return name

    def drive(self, device: Device) -> Drive:
        """The disk behind a device."""
        node = self.format_node(device.node)
        raw = self.nodes[node]
        details = raw["image"].get("format-specific", {}).get("data", {})
        bitmaps = [Bitmap.parse(b) for b in raw.get("dirty-bitmaps", ())]
        return Drive(
            disk=Disk(DiskId(device.id), int(raw["image"]["virtual-size"]), device.sector, str(raw["file"])),
            node=node,
            driver=str(raw["drv"]),
            read_only=bool(raw["ro"]),
            keeps_bitmaps=raw["drv"] == "qcow2" and details.get("compat") != "0.10" and not raw["ro"],
            bitmaps={b.name: b for b in bitmaps if b.name},
        )


def device_id(block: Answer) -> str:
    """What a device is called in every life of the machine: its qdev id, else its drive's id, else its node."""
    found = _PERIPHERAL.fullmatch(str(block.get("qdev", "")))
    if found:
        return found.group(1)
    node = str(block.get("inserted", {}).get("node-name", ""))
    return str(block.get("device") or ("" if node.startswith("#") else node) or block.get("qdev", "")).strip("/")


def qom_path(block: Answer) -> str:
    """Where the device is in QEMU's object tree; empty when nothing is attached."""
    qdev = str(block.get("qdev", ""))
    return qdev if qdev.startswith("/") or not qdev else f"/machine/peripheral/{qdev}"


def why_skipped(block: Answer, qom_type: str) -> str:
    """Why a device of query-block is not captured; empty when it is."""
    inserted = block.get("inserted")
    if qom_type.endswith("-cd") or (not qom_type and "tray_open" in block):
        return "a CD-ROM"
    if qom_type == "floppy":
        return "a floppy"
    if not inserted:
        return "empty"
    if not block.get("qdev"):
        return "attached to no device"
    return "read-only firmware" if "pflash" in qom_type and inserted["ro"] else ""


def daemon_devices(graph: BlockGraph, exports: Sequence[Answer], ours: str) -> list[Device]:
    """The disks of a storage daemon: what it exports, and nodes that nobody uses; `ours` begins what we made there."""
    exported = [str(e["node-name"]) for e in exports if not str(e["id"]).startswith(ours)]
    tops = [name for name in [*exported, *graph.roots(ours)] if name in graph.nodes and not name.startswith(ours)]
    by_node = {graph.format_node(top): top for top in reversed(tops)}
    return [Device(top, node) for node, top in sorted(by_node.items())]
