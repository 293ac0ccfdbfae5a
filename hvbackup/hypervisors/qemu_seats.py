"""Where a machine's disks are used and what is in their nodes: what captures changes is right for as long as both stay so.

A bitmap and a mirror are of one node.  A disk that is plugged in again below the mirror's filter, a snapshot taken while it is
unplugged, another file under the same node: the guest's writes are then elsewhere, and nothing that is asked of the node says so.
Pure: made from what QEMU answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvbackup.hypervisors.qemu_graph import Drive
from hvbackup.hypervisors.qemu_names import PREFIX

Answer = Mapping[str, Any]


def seats_of(answer: Sequence[Answer]) -> dict[str, str]:
    """Device -> node from query-block, without media that come and go; export -> node from query-block-exports, without ours."""
    if answer and "inserted" not in answer[0] and "node-name" in answer[0]:
        return {str(e["id"]): str(e["node-name"]) for e in answer if not str(e["id"]).startswith(PREFIX)}
    used = [b for b in answer if b.get("inserted") and not b.get("removable")]
    return {seat_of(b): str(b["inserted"].get("node-name", "")) for b in used}


def seat_of(block: Answer) -> str:
    """What a device is called in query-block and query-blockstats."""
    return str(block.get("qdev") or block.get("device"))


def moved(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is used elsewhere than then, not any more, or is new."""
    changed = [seat for seat, node in then.items() if now.get(seat, node) != node]
    return [
        *changed,
        *(f"{seat} (unplugged)" for seat in then if seat not in now),
        *(f"{seat} (new)" for seat in now if seat not in then),
    ]


def replaced(drives: Sequence[Drive], nodes: Mapping[str, Answer]) -> list[str]:
    """Disks whose node is gone, or has another file now or another size."""
    return [d.disk.id for d in drives if (node := nodes.get(d.node)) is None or not _is_as_it_was(d, node)]


def _is_as_it_was(drive: Drive, node: Answer) -> bool:
    return bool(node["image"]["virtual-size"] == drive.disk.size and str(node["file"]) == drive.disk.path)
