"""Makes the golden stores: `python -m tests.golden.make NAME...`.  One that is there is made anew only when format 1 itself
changes, which ends with its first release.

Each NAME.tar holds a store in which every feature of the format occurs; NAME.json says how it opens, and what every disk of
every point, and of every moment of its journal, must read as: the size and the BLAKE3 of the whole disk.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from hvbackup import capture as capturing
from hvbackup.capture import Options, capture
from hvbackup.fold import fold
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import SECOND, Disk, DiskId, Instant, KiB, MachineConfig, MachineId, Token
from hvbackup.store.format import keys
from hvbackup.store.format import layout as f
from hvbackup.store.journal.history import Moment
from hvbackup.store.journal.merging import merge
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.store import Store, init

HERE = Path(__file__).resolve().parent
NOON = 1_795_348_800 * SECOND  # 2026-11-22 12:00 UTC
PASSPHRASE = "the passphrase of a golden store"


@dataclass
class Golden:
    """One store to make."""

    name: str
    block: int
    group: int  # blocks compressed together
    opens: dict[str, str]  # {"key": text} | {"passphrase": text} | {}
    merged: bool = False  # some segments of its journal are
    streamed: bool = False  # its journal has single writes too, in a segment and in a log
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    moments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def secrets(self) -> list[keys.Secret]:
        return secrets_of(self.opens)


def secrets_of(opens: dict[str, str]) -> list[keys.Secret]:
    """What opens a golden store."""
    if "key" in opens:
        return [keys.parse_key_text(opens["key"], "the golden key")]
    return [keys.passphrase(opens["passphrase"])] if "passphrase" in opens else []


def stores() -> list[Golden]:
    """All golden stores of format 1."""
    return [
        Golden("format1-key-64k", 64 * KiB, 1, {"key": keys.new_key_text()}),
        Golden("format1-passphrase-256k", 256 * KiB, 1, {"passphrase": PASSPHRASE}),
        Golden("format1-plain-64k", 64 * KiB, 4, {}),
        Golden("format1-plain-256k", 256 * KiB, 1, {}),
        Golden("format1-merged-64k", 64 * KiB, 1, {"key": keys.new_key_text()}, merged=True),
        Golden("format1-stream-64k", 64 * KiB, 1, {"key": keys.new_key_text()}, streamed=True),
    ]


def text(rng: random.Random, length: int) -> bytes:
    """Something that compresses well and is nowhere the same."""
    words = [b"record %06d\n" % rng.randrange(10**6) for _ in range(4)]
    return b"".join(rng.choices(words, k=length // 14 + 1))[:length]


def digest(content: bytes | bytearray) -> dict[str, Any]:
    """What a disk must read as."""
    return {"size": len(content), "blake3": blake3(content).hexdigest()}


class Clock:
    """Ticks a second at each look, from a moment everybody knows."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> Instant:
        self.now += SECOND
        return Instant(self.now)


@contextmanager
def grouping(blocks: int) -> Iterator[None]:
    """Captures compress so many blocks together."""
    before = capturing.GROUP_BLOCKS
    capturing.GROUP_BLOCKS = blocks  # type: ignore[misc]
    try:
        yield
    finally:
        capturing.GROUP_BLOCKS = before  # type: ignore[misc]


def fill(golden: Golden, folder: Path) -> None:
    """The store exists in `folder`, and `golden` says what is in it."""
    rng, block, clock = random.Random(golden.name), golden.block, Clock()
    root = FakeDisk(300 * block + 1536)  # odd, and two levels of map pages
    data = FakeDisk(3 * block, sector=4096)
    clone = FakeDisk(300 * block + 1536)
    config = MachineConfig("qemu-argv", "qemu-system-x86_64 -m 1G", {"memory_bytes": 1 << 30, "firmware": "bios"})
    machines = [
        FakeMachine("6f1c7f7e-0000-4000-8000-000000000001", {"vda": root, "vdb": data}, "atlas", config),
        FakeMachine("/images/Zwölf.qcow2", {"disk": clone}, "Zwölf"),
    ]
    hypervisor = FakeHypervisor(machines, clock=clock)
    secrets = golden.secrets()
    init(folder / "store", secrets[0] if secrets else None, block)
    with Store.open(folder / "store", folder / "state", secrets, owner=True) as store, grouping(golden.group):

        def point(machine: FakeMachine, **changes: Any) -> None:
            options = replace(Options(source="fake:", clock=clock, rng=rng), **changes)
            outcome = capture(store, hypervisor, machine.model(), options)
            assert outcome.point is not None
            name = store.path_of(outcome.point).removeprefix("points/")
            golden.points[name] = {disk: digest(d.content) for disk, d in machine.disks.items()}

        root.write(5 * block + 100, text(rng, 3 * block))
        root.write(
            40 * block, rng.randbytes(block if block == 64 * KiB else 4 * KiB)
        )  # a whole block that can't shrink
        root.write(270 * block, text(rng, 9000))
        root.write(root.size - 700, text(rng, 700))
        data.write(0, text(rng, 2 * block))
        point(machines[0])
        clone.write(0, bytes(root.content))  # dedups to nothing
        clone.write(8 * block, text(rng, 4096))
        point(machines[1])
        root.write(6 * block, bytes(block))  # zeroes the guest wrote
        root.discard(270 * block, block)
        data.resize(5 * block + 512)  # grows by a part of a block
        data.write(5 * block, text(rng, 512))
        point(machines[0])
        data.resize(block // 2)  # shrinks to a part of a block
        point(machines[0])
        data.lose_tracking()
        data.write(100, b"after tracking was lost")
        point(machines[0])
        root.discard(0, root.size)  # an all-zero disk has no map at all
        point(machines[0])
        journal(golden, store, machines[1], clock, rng)


def journal(golden: Golden, store: Store, machine: FakeMachine, clock: Clock, rng: random.Random) -> None:
    """A journal over the newest point: a sealed segment, and a log with a torn end that belongs to no moment."""
    disk, folder = machine.disks["disk"], store.ring.machine_name(MachineId(machine.id))
    newest = store.newest(MachineId(machine.id))
    assert newest is not None
    base = replace(newest, t=clock(), seq=0, id=type(newest.id)("00000000000000aa"))
    store.commit(base, store.writer())
    golden.points[store.path_of(base).removeprefix("points/")] = {"disk": digest(disk.content)}
    recorder = Recorder(store, MachineId(machine.id), [Disk(DiskId("disk"), disk.size)])

    def barrier(writes: Sequence[tuple[int, bytes]], zeroes: Sequence[tuple[int, int]], **more: Any) -> None:
        for offset, content in writes:
            disk.write(offset, content)
            recorder.write(DiskId("disk"), clock(), [(offset, len(content))], content)
        for offset, length in zeroes:
            disk.write(offset, bytes(length))
            recorder.zero(DiskId("disk"), clock(), [(offset, length)])
        seq = recorder.barrier(clock(), {DiskId("disk"): Token("fake-checkpoint", "c1")}, **more)
        golden.moments[f"{folder}/{seq}"] = {"disk": digest(disk.content)}

    barrier([(512, text(rng, 1000)), (3 * golden.block - 10, text(rng, 20))], [(golden.block, 4096)])
    barrier([(600, b"over what was written before")], [], mark={"label": "before the update"})
    recorder.rotate()
    recorder.finish()

    def stream(count: int) -> None:
        facts, data, images = np.zeros(count, f.FACT), b"", []
        for n in range(count):
            offset, content = rng.randrange(disk.size // 512 - 8) * 512, text(rng, 512 * rng.randrange(1, 8))
            kind = f.FACT_ZERO if n % 3 == 2 else f.FACT_DATA
            content = bytes(len(content)) if kind == f.FACT_ZERO else content
            facts[n] = (clock(), offset, len(content), len(data), 0, kind, 0)
            data += content if kind == f.FACT_DATA else b""
            disk.write(offset, content)
            images.append(digest(disk.content))
        last = recorder.stream(facts, data, each=True)
        recorder.sync(clock())
        golden.moments |= {f"{folder}/{last - count + 1 + n}": {"disk": image} for n, image in enumerate(images)}

    if golden.streamed:
        recorder.begin_stream("00c0ffee" * 4)
        barrier([(9 * golden.block, text(rng, 2000))], [])
        stream(7)
        recorder.rotate()
        recorder.finish()
        stream(5)
    if golden.merged:
        common = {
            "id": "00c0ffee",
            "group": "shop",
            "machines": ["a", "b"],
            "spread_ms": 1.5,
            "left_out": {"c": "late"},
        }
        barrier([(7 * golden.block, text(rng, 3000))], [(300, 400)], common=common, sampled=8)
        recorder.rotate()
        recorder.finish()
        seq = recorder.last
        outcome = fold(store, MachineId(machine.id), Moment(seq, clock()), Options(clock=clock, rng=rng))
        assert outcome.point is not None
        golden.points[store.path_of(outcome.point).removeprefix("points/")] = {"disk": digest(disk.content)}
        assert merge(store, MachineId(machine.id)) == 2
    barrier([(disk.size - 5, b"tail!")], [(0, golden.block)])
    recorder.write(DiskId("disk"), clock(), [(0, 3)], b"never closed by a barrier")
    recorder.flush()
    log = next(iter(store.files.root.glob("journals/*/*.log")))
    log.write_bytes(log.read_bytes().rstrip(b"\0")[:-7])


def pack(folder: Path) -> bytes:
    """The tar of a store: sorted, and the same for the same files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size, info.mode, info.mtime = path.stat().st_size, 0o600, NOON // SECOND
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    return out.getvalue()


def main(names: Sequence[str]) -> None:
    """Make those that are named."""
    for golden in (golden for golden in stores() if golden.name in names):
        with tempfile.TemporaryDirectory() as folder:
            fill(golden, Path(folder))
            (HERE / f"{golden.name}.tar").write_bytes(pack(Path(folder) / "store"))
        about = {"opens": golden.opens, "points": golden.points, "moments": golden.moments}
        (HERE / f"{golden.name}.json").write_text(json.dumps(about, indent=1) + "\n")
        print(f"{golden.name}: {(HERE / f'{golden.name}.tar').stat().st_size} bytes, {len(golden.points)} points")


if __name__ == "__main__":
    main(sys.argv[1:])
