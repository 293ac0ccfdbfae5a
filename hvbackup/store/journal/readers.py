"""Readers of a journal: what they may still come to stays, for as long as they live."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvbackup.model import MachineId
from hvbackup.store.store import Store

PINS = "pins"  # under STATE: who reads a journal now


@contextmanager
def pinned(store: Store, machine: MachineId, seq: int, pid: int) -> Iterator[None]:
    """No fact after `seq` goes for as long as the context lasts and the process lives."""
    name = f"{PINS}/{store.ring.machine_name(machine)}/{seq}-{pid}-{secrets.token_hex(4)}"
    store.state.write_new(name, b"")
    try:
        yield
    finally:
        store.state.remove(name)


def pinned_from(store: Store, machine: MachineId) -> int | None:
    """Every fact after this one is read by somebody; None when nobody reads."""
    folder = f"{PINS}/{store.ring.machine_name(machine)}"
    seqs = []
    for name in store.state.names(folder):
        seq, pid, _ = name.split("-")
        if Path(f"/proc/{pid}").exists():
            seqs.append(int(seq))
        else:
            store.state.remove(f"{folder}/{name}")
    return min(seqs, default=None)
