"""Our client on qemu-nbd and nbdkit."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvbackup.errors import HostUnreachable
from hvbackup.nbd.client import NbdClient, RequestFailed, Settings, list_exports
from hvbackup.nbd.protocol import BASE_ALLOCATION
from hvbackup.nbd.uri import NbdUri
from tests.nbd.conftest import listens, wait_for
from tests.ports import free_port

pytestmark = pytest.mark.real

_MiB = 1 << 20
_SIZE = 64 * _MiB + 512
Program = Callable[..., Path]


@pytest.fixture(scope="module")
def content() -> bytes:
    """A disk: data, holes, single sectors, data at the very end."""
    disk = bytearray(_SIZE)
    random = np.random.default_rng(3)
    disk[: 9 * _MiB] = random.bytes(9 * _MiB)
    disk[20 * _MiB : 20 * _MiB + 512] = random.bytes(512)
    disk[40 * _MiB : 41 * _MiB] = random.bytes(_MiB)
    disk[-512:] = random.bytes(512)
    return bytes(disk)


@pytest.fixture
def raw(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        for at in range(0, _SIZE, 65536):
            piece = content[at : at + 65536]
            if any(piece):
                file.seek(at)
                file.write(piece)
        file.truncate(_SIZE)
    return path


def run(*command: str | Path) -> str:
    """The output of a program that must succeed."""
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def read_all(client: NbdClient) -> bytes:
    data = bytearray(client.size)
    client.read_into(0, memoryview(data))
    return bytes(data)


def zeroes_by_status(client: NbdClient, content: bytes) -> int:
    """Bytes that the map calls zero; each of them is."""
    rows = client.status(BASE_ALLOCATION)
    assert rows[0, 0] == 0
    assert (rows[1:, 0] == rows[:-1, 0] + rows[:-1, 1]).all()
    assert rows[-1, 0] + rows[-1, 1] == client.size
    zero = rows[(rows[:, 2] & 2) != 0]
    assert not any(any(content[start : start + length]) for start, length, _ in zero.tolist())
    return int(zero[:, 1].sum())


@pytest.mark.parametrize("request_bytes", [65536, _MiB, 32 * _MiB])
def test_qemu_nbd_raw(program: Program, raw: Path, content: bytes, request_bytes: int) -> None:
    listener = program("qemu-nbd", "-r", "-f", "raw", "-t", "-e", "4", "-k", "{socket}", str(raw))
    settings = Settings(request_bytes=request_bytes)
    with NbdClient.open(NbdUri(socket=str(listener)), contexts=[BASE_ALLOCATION], settings=settings) as client:
        assert (client.size, client.read_only, client.can_multi_conn) == (_SIZE, True, True)
        assert read_all(client) == content
        assert zeroes_by_status(client, content) > 50 * _MiB
        with pytest.raises(RequestFailed, match="read-only"):
            client.write(0, b"x")


def test_qemu_nbd_with_a_persistent_bitmap(program: Program, tmp_path: Path, raw: Path, content: bytes) -> None:
    disk = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk)
    run("qemu-img", "bitmap", "--add", "-g", "65536", disk, "changed")
    for at in (0, 30 * _MiB, 63 * _MiB):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 170 {at} 1000", disk)
    expected = bytearray(content)
    for at in (0, 30 * _MiB, 63 * _MiB):
        expected[at : at + 1000] = b"\xaa" * 1000
    listener = program("qemu-nbd", "-r", "-f", "qcow2", "-t", "-B", "changed", "-x", "vda", "-k", "{socket}", str(disk))
    contexts = [BASE_ALLOCATION, "qemu:dirty-bitmap:changed", "qemu:dirty-bitmap:other"]
    with NbdClient.open(NbdUri("vda", socket=str(listener)), contexts=contexts) as client:
        assert sorted(client.contexts) == sorted(contexts[:2])
        rows = client.statuses()
        dirty = rows["qemu:dirty-bitmap:changed"]
        assert dirty[dirty[:, 2] == 1, :2].tolist() == [[at, 65536] for at in (0, 30 * _MiB, 63 * _MiB)]
        assert rows[BASE_ALLOCATION][:, 1].sum() == _SIZE
        assert read_all(client) == expected


def test_writing_to_qemu_nbd(program: Program, tmp_path: Path, content: bytes) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(b"\xff" * _SIZE)
    listener = program("qemu-nbd", "-f", "raw", "--discard=unmap", "-t", "-k", "{socket}", str(target))
    with NbdClient.open(NbdUri(socket=str(listener))) as client:
        client.write_zeroes(0, _SIZE)
        client.write(0, content[: 41 * _MiB])
        client.write(_SIZE - 512, content[-512:], fua=True)
        client.trim(50 * _MiB, _MiB)
        client.flush()
    assert target.read_bytes() == content


def test_nbdkit_file_and_memory(program: Program, raw: Path, content: bytes) -> None:
    file = program("nbdkit", "-f", "-r", "-U", "{socket}", "file", str(raw))
    memory = program("nbdkit", "-f", "-U", "{socket}", "memory", str(_SIZE))
    with NbdClient.open(NbdUri(socket=str(file)), contexts=[BASE_ALLOCATION]) as client:
        assert read_all(client) == content
        assert zeroes_by_status(client, content) > 50 * _MiB
    with NbdClient.open(NbdUri(socket=str(memory)), contexts=[BASE_ALLOCATION]) as client:
        assert zeroes_by_status(client, bytes(_SIZE)) == _SIZE
        client.write(0, content)
        assert read_all(client) == content


def test_a_huge_sparse_disk_is_mapped_quickly(program: Program) -> None:
    listener = program("nbdkit", "-f", "-U", "{socket}", "memory", "8T")
    with NbdClient.open(NbdUri(socket=str(listener)), contexts=[BASE_ALLOCATION]) as client:
        client.write((1 << 42) + 5, b"x")
        rows = client.status(BASE_ALLOCATION)
        assert rows[:, 1].sum() == 1 << 43
        data = rows[rows[:, 2] == 0]
        assert len(data) == 1
        assert data[0, 0] <= (1 << 42) + 5 < data[0, 0] + data[0, 1]


def test_nbdkit_without_structured_replies(program: Program, raw: Path, content: bytes) -> None:
    listener = program("nbdkit", "-f", "-r", "--no-sr", "-U", "{socket}", "file", str(raw))
    with NbdClient.open(NbdUri(socket=str(listener)), contexts=[BASE_ALLOCATION]) as client:
        assert client.contexts == ()
        assert read_all(client) == content


def test_nbdkit_with_sectors(program: Program, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "even.raw"
    path.write_bytes(content[: 64 * _MiB])
    policy = ["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"]
    listener = program("nbdkit", "-f", "-r", "-U", "{socket}", policy[0], "file", str(path), *policy[1:])
    with NbdClient.open(NbdUri(socket=str(listener)), contexts=[BASE_ALLOCATION]) as client:
        assert client.min_block == 4096
        assert read_all(client) == content[: 64 * _MiB]
        part = bytearray(5000)
        client.read_into(9 * _MiB - 4000, memoryview(part))
        assert part == content[9 * _MiB - 4000 :][:5000]


def test_some_reads_fail_and_the_rest_goes_on(program: Program, raw: Path, content: bytes, tmp_path: Path) -> None:
    trigger = tmp_path / "broken"
    options = ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}"]
    listener = program("nbdkit", "-f", "-U", "{socket}", "--filter=error", "file", str(raw), *options)
    with NbdClient.open(NbdUri(socket=str(listener))) as client:
        for _ in range(3):
            trigger.touch()
            with pytest.raises(RequestFailed, match="Input/output error"):
                read_all(client)
            trigger.unlink()
            assert read_all(client) == content


def test_one_read_in_ten_fails(program: Program, raw: Path, content: bytes) -> None:
    options = ["error-pread=EIO", "error-pread-rate=10%"]
    listener = program("nbdkit", "-f", "-U", "{socket}", "--filter=error", "file", str(raw), *options)
    failures = 0
    with NbdClient.open(NbdUri(socket=str(listener)), settings=Settings(request_bytes=65536)) as client:
        for at in range(0, 16 * _MiB, 65536):
            part = bytearray(65536)
            try:
                client.read_into(at, memoryview(part))
            except RequestFailed:
                failures += 1
            else:
                assert part == content[at : at + 65536]
    assert 0 < failures < 60


def test_a_server_that_is_too_slow_is_given_up(program: Program) -> None:
    listener = program("nbdkit", "-f", "-U", "{socket}", "--filter=delay", "memory", "1M", "rdelay=30")
    client = NbdClient.open(NbdUri(socket=str(listener)), settings=Settings(reply_seconds=0.5))
    with client, pytest.raises(HostUnreachable, match="Gave up reading"):
        client.read_into(0, memoryview(bytearray(10)))


def test_slow_replies_are_waited_for_side_by_side(program: Program) -> None:
    """The answers come two seconds after the questions, all of them: 16, one after the other, would take 32."""
    listener = program("nbdkit", "-f", "-t", "16", "-U", "{socket}", "--filter=delay", "memory", "1M", "rdelay=2")
    with NbdClient.open(
        NbdUri(socket=str(listener)), settings=Settings(request_bytes=65536, reply_seconds=25)
    ) as client:
        assert read_all(client) == bytes(_MiB)


def test_a_server_that_dies(program: Program, short_path: Path) -> None:
    listener = short_path / "dying.nbd"
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(listener), "--filter=delay", "memory", "1M", "rdelay=100"])
    assert wait_for(lambda: listens(listener))
    client = NbdClient.open(NbdUri(socket=str(listener)))
    process.kill()
    process.wait(120)
    with client, pytest.raises(HostUnreachable):
        client.read_into(0, memoryview(bytearray(10)))


def test_exports_of_qemu_storage_daemon_style_servers(program: Program, raw: Path) -> None:
    listener = program("qemu-nbd", "-r", "-f", "raw", "-t", "-x", "named", "-D", "a disk", "-k", "{socket}", str(raw))
    assert [(e.name, e.description) for e in list_exports(NbdUri(socket=str(listener)))] == [("named", "a disk")]
    with pytest.raises(HostUnreachable, match="no such export"):
        NbdClient.open(NbdUri("wrong", socket=str(listener)))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as nbdkit and qemu want it: an authority, and a server's certificate for localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("pki")
    names = folder / "names"
    names.write_text("subjectAltName=DNS:localhost")
    new = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]
    ca, key = folder / "ca-cert.pem", folder / "ca-key.pem"
    run("openssl", "req", "-x509", *new, "-subj", "/CN=test", "-keyout", key, "-out", ca)
    request = folder / "request.pem"
    run("openssl", "req", *new[:3], "-subj", "/CN=localhost", "-keyout", folder / "server-key.pem", "-out", request)
    sign = ["-CA", ca, "-CAkey", key, "-CAcreateserial", "-days", "2", "-extfile", names]
    run("openssl", "x509", "-req", "-in", request, *sign, "-out", folder / "server-cert.pem")
    return folder


def test_tls(program: Program, certificates: Path, raw: Path, content: bytes) -> None:
    options = ["--tls=require", f"--tls-certificates={certificates}"]
    unix = program("nbdkit", "-f", "-U", "{socket}", *options, "file", str(raw))
    trusted = ssl.create_default_context(cafile=str(certificates / "ca-cert.pem"))
    trusted.check_hostname = False  # a unix socket has no host name
    with NbdClient.open(NbdUri(socket=str(unix), tls=True), tls=trusted, contexts=[BASE_ALLOCATION]) as client:
        assert read_all(client) == content
        assert zeroes_by_status(client, content) > 50 * _MiB
    with pytest.raises(HostUnreachable, match="wants TLS first"):
        NbdClient.open(NbdUri(socket=str(unix)))
    with pytest.raises(HostUnreachable, match="certificate verify failed"):
        NbdClient.open(NbdUri(socket=str(unix), tls=True), tls=_without_host_name())


def test_tls_over_tcp_with_certificates_named_in_the_uri(certificates: Path, raw: Path, content: bytes) -> None:
    port = free_port()
    command = ["nbdkit", "-f", "-r", "--tls=require", f"--tls-certificates={certificates}", "-i", "127.0.0.1"]
    server = subprocess.Popen([*command, "-p", str(port), "file", str(raw)])
    try:
        assert wait_for(lambda: listens(("127.0.0.1", port)))
        uri = f"nbds://localhost:{port}/?tls-certificates={certificates}"
        with NbdClient.open(uri) as client:
            assert read_all(client) == content
        assert [export.name for export in list_exports(uri)] == [""]
        with pytest.raises(HostUnreachable, match="certificate verify failed"):
            NbdClient.open(uri.replace("localhost", "127.0.0.1"))
        with pytest.raises(HostUnreachable, match="Cannot agree with the server, no such file"):
            NbdClient.open(uri + "/none")
    finally:
        server.kill()
        server.wait(120)


def _without_host_name() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    return context


def test_tls_to_a_server_without_it(program: Program) -> None:
    listener = program("nbdkit", "-f", "-U", "{socket}", "memory", "1M")
    with pytest.raises(HostUnreachable, match="Cannot agree"):
        NbdClient.open(NbdUri(socket=str(listener), tls=True), tls=_without_host_name())
