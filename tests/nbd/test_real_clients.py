"""nbdinfo, nbdcopy, qemu-img, qemu-io and nbdkit on our server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvbackup.errors import StoreDamage
from hvbackup.nbd.client import NbdClient
from hvbackup.nbd.uri import NbdUri
from tests.nbd.conftest import Serve
from tests.nbd.exports import DIRTY, CachedExport, MemoryExport, TrickExport
from tests.nbd.test_real_servers import run

pytestmark = pytest.mark.real

_MiB = 1 << 20
_SIZE = 48 * _MiB + 4096


def filled(export: MemoryExport) -> MemoryExport:
    """Data, holes, and data at the very end."""
    random = np.random.default_rng(5)
    for start, length in ((0, 5 * _MiB), (9 * _MiB + 4096, 4096), (30 * _MiB, 3 * _MiB), (export.size - 4096, 4096)):
        export.data[start : start + length] = random.bytes(length)
    export.dirty = {1, 2, 5000}
    return export


@pytest.fixture(params=[MemoryExport, CachedExport])
def export(request: pytest.FixtureRequest) -> MemoryExport:
    return filled(request.param(_SIZE))


def test_nbdinfo_describes_the_export(serve: Serve, export: MemoryExport) -> None:
    export.description, export.min_block, export.read_only = "a view", 512, True
    uri = serve(export, "vda")
    (found,) = json.loads(run("nbdinfo", "--json", "--list", str(uri)))["exports"]
    expected = {
        "export-name": "vda",
        "description": "a view",
        "export-size": _SIZE,
        "is_read_only": True,
        "can_multi_conn": True,
        "can_df": True,
        "block_size_minimum": 512,
        "block_size_maximum": 32 * _MiB,
        "contexts": ["base:allocation", DIRTY],
    }
    assert {key: found[key] for key in expected} == expected


def test_nbdinfo_maps_allocation_and_bitmap(serve: Serve, export: MemoryExport) -> None:
    uri = str(serve(export))
    rows = json.loads(run("nbdinfo", "--json", "--map", uri))
    assert [(row["offset"], row["length"], row["type"]) for row in rows if row["type"] == 0] == [
        (0, 5 * _MiB, 0),
        (9 * _MiB + 4096, 4096, 0),
        (30 * _MiB, 3 * _MiB, 0),
        (_SIZE - 4096, 4096, 0),
    ]
    rows = json.loads(run("nbdinfo", "--json", f"--map={DIRTY}", uri))
    assert [(row["offset"], row["length"]) for row in rows if row["type"] == 1] == [(4096, 8192), (5000 * 4096, 4096)]


def test_nbdcopy_reads_and_writes(serve: Serve, export: MemoryExport, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    run("nbdcopy", str(serve(export, "from")), copy)
    assert copy.read_bytes() == export.data
    assert copy.stat().st_blocks * 512 < 20 * _MiB
    target = MemoryExport(_SIZE)
    run("nbdcopy", "--flush", copy, str(serve(target, "to")))
    assert target.data == export.data
    assert target.flushes > 0


def test_nbdcopy_synchronously_over_one_connection(serve: Serve, export: MemoryExport, tmp_path: Path) -> None:
    run("nbdcopy", "--synchronous", "--connections=1", "--request-size=65536", str(serve(export)), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == export.data


def test_qemu_img_agrees(serve: Serve, export: MemoryExport, tmp_path: Path) -> None:
    uri = str(serve(export))
    copy = tmp_path / "copy.qcow2"
    assert json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri))["virtual-size"] == _SIZE
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, copy)
    assert copy.stat().st_size < 20 * _MiB
    run("qemu-img", "check", copy)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, copy)
    export.data[30 * _MiB] ^= 1
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, copy)
    assert caught.value.returncode == 1


def test_qemu_img_writes_to_us(serve: Serve, export: MemoryExport, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(export.data)
    target = MemoryExport(_SIZE)
    target.data[:] = b"\xff" * _SIZE
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, str(serve(target)))
    assert target.data == export.data


@pytest.mark.parametrize("depth", [1, 16, 64])
def test_qemu_img_bench_runs(serve: Serve, export: MemoryExport, depth: int) -> None:
    run(
        "qemu-img",
        "bench",
        "-f",
        "raw",
        "-c",
        "2000",
        "-d",
        str(depth),
        "-s",
        "4096",
        "-S",
        "1052672",
        str(serve(export)),
    )


@pytest.mark.parametrize("size", [_SIZE + 512, _SIZE + 1, 100])
def test_a_disk_of_any_size_under_an_overlay(serve: Serve, tmp_path: Path, size: int) -> None:
    export = filled(MemoryExport(size)) if size > 4096 else MemoryExport(size)
    export.read_only = True
    export.data[-1:] = b"\xa5"
    before = bytes(export.data)
    overlay = tmp_path / "overlay.qcow2"
    uri = str(serve(export))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", overlay)
    run("qemu-io", "-f", "qcow2", "-c", f"read -P 165 {size - 1} 1", overlay)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 10 20", overlay)
    assert bytes(export.data) == before
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "flat")
    flat = (tmp_path / "flat").read_bytes()
    export.data[10:30] = b"\x07" * 20
    assert flat[:size] == export.data
    assert not any(flat[size:])


def test_nbdkit_as_a_proxy(serve: Serve, export: MemoryExport, program: Callable[..., Path]) -> None:
    uri = str(serve(export))
    socket = program("nbdkit", "-f", "-U", "{socket}", "nbd", f"uri={uri}", "shared=true")
    with NbdClient.open(NbdUri(socket=str(socket)), contexts=["base:allocation"]) as client:
        data = bytearray(client.size)
        client.read_into(0, memoryview(data))
        assert data == export.data
        rows = client.status("base:allocation")
        assert rows[rows[:, 2] == 0, 1].sum() == 8 * _MiB + 8192


def test_a_read_error_reaches_qemu_with_its_name(serve: Serve) -> None:
    def fail(offset: int, length: int) -> None:
        raise StoreDamage("Chunk is damaged")

    process = subprocess.run(
        ["qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", str(serve(TrickExport(_MiB, fail)))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Input/output error" in process.stdout + process.stderr


def test_several_real_clients_at_once(serve: Serve, export: MemoryExport, tmp_path: Path) -> None:
    uri = str(serve(export))
    copies = [tmp_path / f"copy{n}" for n in range(4)]
    running = [subprocess.Popen(["nbdcopy", uri, str(path)]) for path in copies]
    assert [process.wait(60) for process in running] == [0] * 4
    assert all(path.read_bytes() == export.data for path in copies)
