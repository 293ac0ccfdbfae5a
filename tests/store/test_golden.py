"""Golden stores: every later version reads what an earlier one wrote, bit for bit, and can go on with it."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import DiskId, KiB, MachineId
from hvbackup.store.catalog.catalog import Catalog
from hvbackup.store.check.check import check
from hvbackup.store.chunks.view import DiskView
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack
from hvbackup.store.journal.history import History
from hvbackup.store.store import Store
from tests.golden.make import secrets_of
from tests.store.test_format import point_copies

GOLDEN = Path(__file__).parents[1] / "golden"
READER = Path(__file__).parents[2] / "labs" / "readpoint.py"
NAMES = (
    *("format1-key-64k", "format1-passphrase-256k", "format1-plain-64k", "format1-plain-256k"),
    *("format1-merged-64k", "format1-stream-64k"),
)
COPIED = ("format1-copied-key-64k", "format1-copied-plain-64k")  # test_golden_copied.py
BYTES_MAX = 300_000
SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.2 has none

Unpacked = tuple[Path, dict[str, Any]]


def test_every_golden_store_is_named_here() -> None:
    named = {*NAMES, *COPIED}
    assert {p.stem for p in GOLDEN.glob("*.tar")} == named == {p.stem for p in GOLDEN.glob("*.json")}
    assert all(p.stat().st_size < BYTES_MAX for p in GOLDEN.glob("*.tar"))


@pytest.fixture(params=NAMES)
def unpacked(request: pytest.FixtureRequest, tmp_path: Path) -> Unpacked:
    """(the folder of a golden store, what is expected of it)."""
    with tarfile.open(GOLDEN / f"{request.param}.tar") as tar:
        tar.extractall(tmp_path / "store", **SAFELY)
    return tmp_path, json.loads((GOLDEN / f"{request.param}.json").read_text())


@pytest.fixture
def store(unpacked: Unpacked) -> Iterator[Store]:
    folder, expected = unpacked
    with Store.open(folder / "store", folder / "state", secrets_of(expected["opens"])) as store:
        yield store


def digest(view: Any) -> dict[str, Any]:
    content = bytearray(view.size)
    view.read_into(0, memoryview(content))
    return {"size": len(content), "blake3": blake3(content).hexdigest()}


def restored(view: DiskView) -> dict[str, Any]:
    """The same, walked as a restore does."""
    content = bytearray(view.size)
    for first, ids in view.leaves():
        for offset, data in view.contents(first, ids):
            content[offset : offset + len(data)] = data
    return {"size": len(content), "blake3": blake3(content).hexdigest()}


def test_every_disk_of_every_point_reads_as_it_was(store: Store, unpacked: Unpacked) -> None:
    found = {store.path_of(p).removeprefix("points/"): p for p in store.points()}
    expected = unpacked[1]["points"]
    assert set(found) == set(expected)
    for name, point in found.items():
        assert {d.disk.id: digest(store.view(d)) for d in point.disks} == expected[name]
        assert {d.disk.id: restored(store.view(d)) for d in point.disks} == expected[name]


def test_every_moment_of_the_journal_reads_as_it_was(store: Store, unpacked: Unpacked) -> None:
    machine = next(p.machine.id for p in store.points() if p.seq is not None)
    history = History(store, MachineId(machine))
    folder = store.ring.machine_name(machine)
    expected = unpacked[1]["moments"]
    assert [f"{folder}/{seq}" for seq in history.moments[0].tolist()] == list(expected)
    for name, disks in expected.items():
        moment = history.by_seq(int(name.split("/")[1]))
        assert {disk: digest(history.view(moment, DiskId(disk))) for disk in disks} == disks


def test_nothing_in_it_is_damaged(store: Store) -> None:
    assert check(store, deep=True).problems == []
    assert store.runs.problems() == []


def test_every_point_has_its_two_repair_copies(store: Store, unpacked: Unpacked) -> None:
    copies = [copy for name in store.index.packs for copy in point_copies(store, name)]
    files = [(f"points/{name}", store.files.read(f"points/{name}")) for name in unpacked[1]["points"]]
    assert sorted(copies) == sorted(files * 2)


def test_it_has_one_of_everything(store: Store, unpacked: Unpacked) -> None:
    """The golden stores are worth something only while every feature of the format occurs in them."""
    points = list(store.points())
    assert len({p.machine.id for p in points}) == 2
    disks = [d for p in points for d in p.disks]
    assert {d.disk.sector for d in disks} == {512, 4096}
    assert {d.how for d in disks} == {"full", "incremental", "compared"}
    assert any(d.root == bytes(32) for d in disks)
    assert any(d.disk.size % 4096 for d in disks)
    assert any(d.disk.size > 256 * store.block for d in disks)  # two levels of pages
    assert {p.config.kind for p in points} == {"", "qemu-argv"}
    assert any(p.notes for p in points)
    kinds = {int(row["kind"]) for _, rows in store.index.rows() for row in rows}
    assert kinds == {f.CHUNK_BLOCK, f.CHUNK_PAGE, f.CHUNK_POINT}
    assert {p.suffix for p in store.files.root.glob("journals/*/*")} == {".seg", ".log"}


def test_every_codec_and_records_of_several_blocks_occur(tmp_path: Path) -> None:
    codecs, counts = set(), set()
    for name in NAMES:
        with tarfile.open(GOLDEN / f"{name}.tar") as tar:
            for member in tar.getmembers():
                if member.name.startswith("packs/"):
                    file = tar.extractfile(member)
                    assert file is not None
                    data = file.read()
                    for row in pack.read_footer(_Bytes(data), "x"):  # type: ignore[arg-type]
                        fields = f.RECORD.unpack_from(data, int(row["offset"]))
                        codecs.add(fields[2])
                        counts.add(fields[4])
    assert codecs == {f.CODEC_RAW, f.CODEC_ZSTD}
    assert max(counts) > 1


class _Bytes:
    """A backend with one file."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def size(self, _: str) -> int:
        return len(self._file.getvalue())

    def read_at(self, _: str, offset: int, length: int) -> bytes:
        return self._file.getvalue()[offset : offset + length]


def test_the_catalog_tells_of_it(store: Store, unpacked: Unpacked) -> None:
    catalog = Catalog(store.state)
    assert catalog.reconcile(store) == []
    assert catalog.query("SELECT count(*), count(DISTINCT machine) FROM points")[1] == [[len(unpacked[1]["points"]), 2]]


def test_the_strangers_reader_reads_it(unpacked: Unpacked) -> None:
    folder, expected = unpacked
    (folder / "key").write_text(expected["opens"].get("key", ""))
    secret = expected["opens"].get("passphrase")
    given = ["--passphrase", secret] if secret else ["--key-file", str(folder / "key")]
    name, disks = max(expected["points"].items(), key=lambda item: item[1].keys())
    for disk, content in disks.items():
        out = folder / "out"
        command = [sys.executable, "-I", str(READER), str(folder / "store"), *given, name, disk, str(out)]
        subprocess.run(command, check=True, timeout=60)
        assert {"size": out.stat().st_size, "blake3": blake3(out.read_bytes()).hexdigest()} == content


def test_a_capture_goes_on_where_it_ended(unpacked: Unpacked) -> None:
    folder, expected = unpacked
    with Store.open(folder / "store", folder / "state", secrets_of(expected["opens"]), owner=True) as store:
        from hvbackup.capture import Options, capture

        disk = FakeDisk(300 * store.block + 1536)
        disk.write(7 * KiB, random.Random(1).randbytes(5000))
        hypervisor = FakeHypervisor([FakeMachine("/images/Zwölf.qcow2", {"disk": disk})])
        outcome = capture(store, hypervisor, hypervisor.machines()[0], Options())
        assert outcome.point is not None
        assert digest(store.view(outcome.point.disks[0]))["blake3"] == blake3(disk.content).hexdigest()
        assert outcome.point.disks[0].how == "compared"
    with Store.open(folder / "store", folder / "state", secrets_of(expected["opens"])) as store:
        test_nothing_in_it_is_damaged(store)
