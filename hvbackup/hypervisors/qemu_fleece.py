"""Making the frozen view of all disks of a QEMU, and taking it down again.

    killed after                       left behind                      cleaned by
    1 folder and scratch files         files                            `sweep`, by the lease's name
    2 scratch nodes                    nodes, files                     `sweep`
    3 the transaction                  jobs, bitmaps, nodes, files      `sweep`; the old checkpoint recorded all along
    4 NBD server and exports           all of that                      `sweep`
    5 part of `sweep`                  the rest                         `sweep` again: it looks for names, not for a plan

The transaction adds the next checkpoint, copies the last one into a bitmap that does not record, and starts copying before
writes: for every disk at the same moment, or not at all.  Nothing that records is ever stopped, so no merging back.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvbackup.errors import Busy, HostUnreachable, SpaceExhausted
from hvbackup.hypervisors import qemu_server
from hvbackup.hypervisors.qemu_graph import Bitmap, Drive
from hvbackup.hypervisors.qemu_names import LeaseNames, StoreNames
from hvbackup.hypervisors.qemu_scratch import write_empty_qcow2
from hvbackup.hypervisors.qmp import CommandRefused, Qmp
from hvbackup.model import DiskId, KiB

GRAIN_BYTES = 64 * KiB  # of a checkpoint for backups: the block of a store, so a finer one would read nothing less
FINE_BYTES = 4 * KiB  # for cycles and streams, which read what has changed and no more
_POLL_SECONDS = 0.01

Action = Mapping[str, Any]


def refuse_leftovers(qmp: Qmp, names: StoreNames) -> None:
    """Raises Busy when another lease of our store still has something open in this QEMU."""
    for job in qmp.command("query-jobs"):
        if str(job["id"]).startswith(names.prefix):
            raise Busy(f"QEMU at {qmp.path} still has job {job['id']} of another run; wait for it or release its lease")


def add_scratch(qmp: Qmp, names: LeaseNames, folder: Path, index: int, drive: Drive) -> None:
    """A node that reads as the disk, and keeps in a sparse file of its own what is copied into it.

    QEMU is not asked to format it (`blockdev-create`): 7.2 fails an assertion, which is the end of the guest, when anybody
    lists its block nodes meanwhile.
    """
    path = folder / f"scratch{index}.qcow2"
    write_empty_qcow2(path, drive.disk.size, qmp.peer)
    # Losing the scratch with the host loses nothing, so it is never flushed.
    cache = {"no-flush": True}
    qmp.command("blockdev-add", driver="file", node_name=names.file(index), filename=str(path), cache=cache)
    qmp.command(
        "blockdev-add",
        driver="qcow2",
        node_name=names.fleece(index),
        file=names.file(index),
        backing=drive.node,
        cache=cache,
        discard="unmap",
    )


def freeze(
    qmp: Qmp,
    names: LeaseNames,
    drives: Sequence[Drive],
    since: Mapping[DiskId, Bitmap],
    checkpoint: str,
    seconds: float,
    grain: int = GRAIN_BYTES,
) -> Sequence[str]:
    """The moment, from which `checkpoint` records, in grains of so many bytes.  Returns notes.

    Raises Busy when another job holds a disk.
    """
    persistent = {drive.disk.id for drive in drives if drive.keeps_bitmaps}
    try:
        actions = _actions(names, drives, since, checkpoint, grain, persistent)
        qmp.command("transaction", seconds, actions=actions)
    except CommandRefused as refused:
        if "persistent" not in refused.reason:
            raise _explained(refused, qmp) from refused
        qmp.command("transaction", seconds, actions=_actions(names, drives, since, checkpoint, grain, set()))
        return [f"Checkpoints of this run won't survive a stop of the machine: {refused.reason}"]
    return []


def _actions(
    names: LeaseNames,
    drives: Sequence[Drive],
    since: Mapping[DiskId, Bitmap],
    checkpoint: str,
    grain: int,
    persistent: Collection[DiskId],
) -> Sequence[Action]:
    actions: list[Action] = []
    for index, drive in enumerate(drives):
        node = drive.node
        stays = drive.disk.id in persistent
        actions.append(_add(node, checkpoint, grain, persistent=stays))
        if (old := since.get(drive.disk.id)) is not None:
            actions.append(_add(node, names.merged, old.granularity, disabled=True))
            merge = {"node": node, "target": names.merged, "bitmaps": [old.name]}
            actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
        backup = {"job-id": names.job(index), "device": node, "target": names.fleece(index), "sync": "none"}
        # A job that broke off stays to be seen: `auto-dismiss` would let it vanish like one that never was.
        actions.append({"type": "blockdev-backup", "data": {**backup, "auto-dismiss": False}})
    return actions


def recording(drives: Sequence[Drive], checkpoint: str) -> Sequence[Action]:
    """A fine checkpoint of these disks, and nothing else."""
    return [_add(drive.node, checkpoint, FINE_BYTES, persistent=drive.keeps_bitmaps) for drive in drives]


def _add(node: str, name: str, granularity: int, **flags: bool) -> Action:
    return {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": name, "granularity": granularity, **flags}}


def export(qmp: Qmp, names: LeaseNames, index: int, drive: Drive, merged: str) -> str:
    """The export's name, once QEMU serves the frozen view of one disk, with the bitmap `merged` unless that is empty."""
    name = f"{names.prefix}{drive.disk.id}"
    extra: dict[str, Any] = {"bitmaps": [merged]} if merged else {}
    qmp.command(
        "block-export-add",
        type="nbd",
        id=names.export(index),
        node_name=names.fleece(index),
        name=name,
        **extra,
    )
    return name


def broken_jobs(qmp: Qmp, names: LeaseNames, count: int) -> str:
    """Why the frozen view can't be trusted any more; empty while every disk is still copied before it is written."""
    jobs = {job["id"]: job for job in qmp.command("query-jobs")}
    for index in range(count):
        job = jobs.get(names.job(index))
        if job is None:
            return f"job {names.job(index)} is gone"
        if job["status"] not in ("running", "ready", "paused", "standby") or job.get("error"):
            return f"job {names.job(index)} is {job['status']} ({job.get('error', 'cancelled')})"
    return ""


def sweep(qmp: Qmp, prefix: str, timeout_seconds: float) -> None:
    """Nothing that begins with `prefix` is left: no export, job or node.  Idempotent.

    A machine that stopped because its old blocks found no room in the scratch goes on.
    """
    held = bool(_ours(qmp, "query-jobs", "id", prefix))
    for export_ in _ours(qmp, "query-block-exports", "id", prefix):
        with contextlib.suppress(CommandRefused):
            qmp.command("block-export-del", id=export_, mode="hard")
    _until(lambda: not _ours(qmp, "query-block-exports", "id", prefix), f"exports {prefix}*", qmp, timeout_seconds)
    _until(lambda: _jobs_ended(qmp, prefix), f"jobs {prefix}*", qmp, timeout_seconds)
    if held:
        _resume(qmp)
    _until(lambda: _nodes_removed(qmp, prefix), f"nodes {prefix}*", qmp, timeout_seconds)


def _resume(qmp: Qmp) -> None:
    """Let a machine go on that an I/O error stopped; one that its own disk stopped stops again at once."""
    with contextlib.suppress(CommandRefused):  # a storage daemon has no such thing
        if qmp.command("query-status")["status"] == "io-error":
            qmp.command("cont")


def remove_bitmaps(qmp: Qmp, drives: Sequence[Drive], unwanted: Callable[[str], bool]) -> None:
    """No drive has a bitmap whose name is unwanted."""
    for drive in drives:
        for name in filter(unwanted, drive.bitmaps):
            qmp.command("block-dirty-bitmap-remove", node=drive.node, name=name)


def remove_folders(qmp: Qmp, folders: Sequence[Path]) -> None:
    """The folders of leases and the NBD server that listens in one of them are gone, unless others still use it."""
    for folder in folders:
        if qemu_server.stop(qmp, folder):
            qemu_server.remove_folder(folder)


def free_bytes(folder: Path) -> int:
    """Room left where the scratch files are."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def refuse_full(folder: Path, reserve_bytes: int) -> None:
    """Raises SpaceExhausted when there is no room for what the guest may overwrite."""
    if free_bytes(folder) <= reserve_bytes:
        raise SpaceExhausted(
            f"Scratch directory {folder} has less than {reserve_bytes} bytes free; make room or choose another one"
        )


def _ours(qmp: Qmp, query: str, key: str, prefix: str) -> list[str]:
    return [found[key] for found in qmp.command(query) if str(found[key]).startswith(prefix)]


def _jobs_ended(qmp: Qmp, prefix: str) -> bool:
    jobs = [job for job in qmp.command("query-jobs") if str(job["id"]).startswith(prefix)]
    for job in jobs:
        command = "job-dismiss" if job["status"] == "concluded" else "job-cancel"
        with contextlib.suppress(CommandRefused):  # between two states, or gone by itself
            qmp.command(command, id=job["id"])
    return not jobs


def _nodes_removed(qmp: Qmp, prefix: str) -> bool:
    """Try to remove every node; fleecing nodes (…f0) sort before the files (…p0) under them."""
    nodes = sorted(_ours(qmp, "query-named-block-nodes", "node-name", prefix))
    for node in nodes:
        with contextlib.suppress(CommandRefused):  # still in use by an export or a job that is ending
            qmp.command("blockdev-del", node_name=node)
    return not nodes


def _until(done: Callable[[], bool], what: str, qmp: Qmp, timeout_seconds: float) -> None:
    end = time.monotonic() + timeout_seconds
    while not done():
        if time.monotonic() > end:
            raise HostUnreachable(
                f"QEMU at {qmp.path} did not let go of {what} within {timeout_seconds:g} s; try again"
            )
        time.sleep(_POLL_SECONDS)


def _explained(refused: CommandRefused, qmp: Qmp) -> Exception:
    if "busy" in refused.reason or "in use" in refused.reason:
        return Busy(f"QEMU at {qmp.path}: {refused.reason}; wait for the other job or cancel it")
    return refused
