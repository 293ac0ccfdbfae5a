"""Where a machine's disks are used and what is in their nodes: what captures changes is right for as long as both stay so.

A bitmap and a mirror are of one node.  A disk that is plugged in again below the mirror's filter, a snapshot taken while it is
unplugged, another file under the same node: the guest's writes are then elsewhere, and nothing that is asked of the node says so.
Pure: made from what QEMU answered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from hvbackup.hypervisors.qemu_graph import Drive
from hvbackup.hypervisors.qemu_names import PREFIX

Answer = Mapping[str, Any]


class Used(NamedTuple):
    """What a device or an export of a storage daemon uses."""

    node: str
    file: str = ""
    size: int = 0  # neither is told of exports


def seats_of(answer: Sequence[Answer], captured: Collection[str] = ()) -> dict[str, Used]:
    """By device, from query-block; by export, from query-block-exports, without ours.

    Media that come and go are left out, but for those whose nodes are `captured`.
    """
    if answer and "inserted" not in answer[0] and "node-name" in answer[0]:
        return {str(e["id"]): Used(str(e["node-name"])) for e in answer if not str(e["id"]).startswith(PREFIX)}
    found = {}
    for block in answer:
        if inserted := block.get("inserted"):
            node = str(inserted.get("node-name", ""))
            if not block.get("removable") or node in captured:
                found[seat_of(block)] = Used(node, str(inserted["file"]), int(inserted["image"]["virtual-size"]))
    return found


def seat_of(block: Answer) -> str:
    """What a device is called in query-block and query-blockstats."""
    return str(block.get("qdev") or block.get("device"))


def moved(then: Mapping[str, Used], now: Mapping[str, Used]) -> list[str]:
    """What uses another node than then."""
    return [seat for seat, was in then.items() if seat in now and now[seat].node != was.node]


def replaced(then: Mapping[str, Used], now: Mapping[str, Used]) -> list[str]:
    """What uses the same node, in which another file is."""
    same = [seat for seat, was in then.items() if seat in now and now[seat].node == was.node]
    return [seat for seat in same if now[seat].file != then[seat].file]


def unplugged(then: Mapping[str, Used], now: Mapping[str, Used]) -> list[str]:
    """What is not there any more."""
    return [f"{seat} (unplugged)" for seat in then if seat not in now]


def resized(then: Mapping[str, Used], now: Mapping[str, Used]) -> list[str]:
    """What has another size."""
    return [f"{seat} (resized)" for seat, was in then.items() if seat in now and now[seat].size != was.size]


def added(then: Mapping[str, Used], now: Mapping[str, Used]) -> list[str]:
    """What was not there then."""
    return [f"{seat} (new)" for seat in now if seat not in then]


def other_files(drives: Sequence[Drive], nodes: Mapping[str, Answer]) -> list[str]:
    """Disks in whose node another file is now."""
    return [d.disk.id for d in drives if d.node in nodes and str(nodes[d.node]["file"]) != d.disk.path]


def other_sizes(drives: Sequence[Drive], nodes: Mapping[str, Answer]) -> list[str]:
    """Disks whose node is gone, or has another size."""
    return [d.disk.id for d in drives if d.node not in nodes or nodes[d.node]["image"]["virtual-size"] != d.disk.size]
