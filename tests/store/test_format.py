"""What `docs/format.md` promises beyond reading: repair copies, and what nobody learns without the key."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import SECOND, Disk, DiskId, Instant, MachineConfig, MachineId
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack
from hvbackup.store.journal.recorder import Recorder
from hvbackup.store.store import Store
from tests.world import BLOCK, KEY, World

DOCS = Path(__file__).parents[2] / "docs" / "format.md"


@pytest.mark.parametrize("secret", [KEY, None], ids=["encrypted", "plain"])
def test_a_lost_point_file_is_in_two_packs_name_and_all(ram: Path, secret: object) -> None:
    world = World(ram, secret).life(2)  # type: ignore[arg-type]
    with world.opened() as store:
        files = {path: store.files.read(path) for path in store.point_paths(store.machine_folders()[0])}
        copies = [copy for name in store.index.packs for copy in point_copies(store, name)]
    assert sorted(copies) == sorted(list(files.items()) * 2)


def point_copies(store: Store, name: str) -> list[tuple[str, bytes]]:
    """(path, content) of every point file a pack has a copy of."""
    import zstandard

    cipher, bind = pack.cipher_of(store.files, store.ring, name)
    found = []
    for row in pack.read_footer(store.files, name):
        if row["kind"] == f.CHUNK_POINT:
            data = store.files.read_at(pack.path_of(name), int(row["offset"]), int(row["stored"]))
            plain = pack.decode(data, cipher, bind, zstandard.ZstdDecompressor(), "a copy")
            length = int.from_bytes(plain[:2], "little")
            found.append((plain[2 : 2 + length].decode(), plain[2 + length :]))
    return found


SECRETS = [
    "web-frontend",
    "6f1c7f7e-machine-id",
    "vd-secret",
    "/srv/images/secret.qcow2",
    "guest secret text",
    "-secret-argv",
]


@pytest.mark.parametrize("readable", [False, True], ids=["encrypted", "plain"])
def test_nothing_but_what_is_listed_is_readable_without_the_key(ram: Path, readable: bool) -> None:
    """In a plain store the same search finds each of them, which shows that it can."""
    disk = FakeDisk(4 * BLOCK)
    disk.write(100, b"guest secret text")
    config = MachineConfig("qemu-argv", "qemu -secret-argv", {"note": "/srv/images/secret.qcow2"})
    hypervisor = FakeHypervisor([FakeMachine("6f1c7f7e-machine-id", {"vd-secret": disk}, "web-frontend", config)])
    world = World(ram, None if readable else KEY).init()
    from hvbackup.capture import capture

    with world.opened() as store:
        capture(store, hypervisor, hypervisor.machines()[0], world.options())
        recorder = Recorder(store, MachineId("6f1c7f7e-machine-id"), [Disk(DiskId("vd-secret"), disk.size)])
        recorder.write(DiskId("vd-secret"), Instant(SECOND), [(0, 17)], b"guest secret text")
        recorder.barrier(Instant(SECOND), {}, mark={"label": "web-frontend"})
        recorder.rotate()
        recorder.finish()
        recorder.write(DiskId("vd-secret"), Instant(SECOND), [(0, 17)], b"guest secret text")
        visible = everything(store)
    assert [text for text in SECRETS if (text.encode() in visible) != readable] == []


def everything(store: Store) -> bytes:
    """All names and bytes of a store, with what anybody can decompress."""
    import zstandard

    files = [p for p in store.files.root.rglob("*") if p.is_file()]
    parts = [str(p.relative_to(store.files.root)).encode() + b"\n" + p.read_bytes() for p in files]
    raw = b"\n".join(parts)
    for match in re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), raw):
        try:
            raw += zstandard.ZstdDecompressor().decompressobj().decompress(raw[match.start() : match.start() + 200_000])
        except zstandard.ZstdError:
            continue
    return raw


@pytest.mark.parametrize(
    ("title", "size"),
    [
        ("File header", f.HEADER_BYTES),
        ("Record", f.RECORD_BYTES),
        ("Entry", f.ENTRY.itemsize),
        ("Footer row", f.ROW.itemsize),
        ("Trailer", f.TRAILER_BYTES),
        ("Frame", f.FRAME_BYTES),
        ("Fact", f.FACT.itemsize),
    ],
)
def test_the_byte_tables_are_as_long_as_the_structs(title: str, size: int) -> None:
    """And have no holes: each field begins where the one before ends."""
    section = DOCS.read_text().split(f"**{title}**", 1)[1].split("\n\n", 2)[1]
    rows = [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+) \| (\d+) \|", section, re.MULTILINE)]
    at = 0
    for offset, length in rows:
        assert offset == at
        at += length
    assert at == size


def test_pages_that_a_dead_run_stored_only_once_are_stored_again_by_the_next(ram: Path) -> None:
    world = World(ram, KEY).init()
    with world.opened() as store:
        world.scribble()
        world.capture(store)
        meta = next(p for p in store.files.root.glob("packs/*/*.pack") if p.read_bytes()[5] == f.KIND_META)
        (point,) = store.files.root.glob("points/*/*")
    for file in (meta, point):  # as if it had died after the first of the two packs
        file.unlink()
    for disk in world.disks.values():
        disk.lose_tracking()
    with world.opened() as store:
        world.capture(store)
        copies = Counter(row["id"].tobytes() for name in pack.list_packs(store.files) for row in pages_of(store, name))
    assert copies
    assert min(copies.values()) >= 2


def pages_of(store: Store, name: str) -> list[Any]:
    return [row for row in pack.read_footer(store.files, name) if row["kind"] == f.CHUNK_PAGE]
