"""doctor: each thing that is wrong is found, with what to do about it, and nothing is changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hvbackup.model import GiB
from hvbackup.service import doctor
from hvbackup.service.doctor import Level
from tests.cli.rig import World


def findings(world: World, *sources: str, **environment: str) -> list[dict[str, Any]]:
    """What was found; the exit code is 1 with problems only."""
    ran = world.run("doctor", *sources, "--json", **environment)
    found: list[dict[str, Any]] = json.loads(ran.out.splitlines()[0])["findings"]
    assert ran.code == any(f["level"] == "problem" for f in found), ran
    assert all(bool(f["fix"]) == (f["level"] != "ok") for f in found)
    return found


def one(found: list[dict[str, Any]], subject: str, level: str) -> str:
    """The text of the only finding of this level about a subject."""
    [text] = [f["what"] for f in found if f["subject"] == subject and f["level"] == level]
    return str(text)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_healthy_store_has_no_problem_and_nothing_is_changed(stored: World) -> None:
    before = files(stored.store)
    found = findings(stored, f"image:{stored.folder}/disk.raw")
    assert [f for f in found if f["level"] == "problem" and "is in memory" not in f["what"]] == []  # /tmp may be
    assert one(found, f"image:{stored.folder}/disk.raw", "ok") == "machine disk with disk"
    assert "opens with its key" in one(found, "store", "ok")
    assert "one key opens the store" in one(found, "key", "warning")
    assert files(stored.store) == before
    stored.done("key", "paper")
    assert "key" not in [f["subject"] for f in findings(stored)]


def test_without_a_store_it_says_how_to_make_one(world: World) -> None:
    assert "hvbackup init" in one(findings(world), "store", "problem")


def test_a_key_that_others_can_read(stored: World) -> None:
    stored.key_file.chmod(0o644)
    assert str(stored.key_file) in one(findings(stored), "key", "problem")


def test_a_program_that_is_missing(stored: World) -> None:
    empty = stored.folder / "bin"
    empty.mkdir()
    (empty / "setpriv").symlink_to(str(shutil.which("setpriv")))
    found = findings(stored, PATH=str(empty))
    assert one(found, "qemu-img", "problem").startswith("is missing")
    assert one(found, "qemu-system-x86_64", "warning").startswith("is missing")
    assert [f["fix"] for f in found if f["subject"] == "qemu-img"] == ["apt install qemu-utils"]


def test_a_point_that_cannot_be_read_and_a_store_that_is_not_encrypted(world: World) -> None:
    assert world.run("init", "--no-encryption").code == 0
    (world.folder / "disk.raw").write_bytes(os.urandom(1 << 17))
    world.done("backup", f"image:{world.folder}/disk.raw")
    world.done("backup", f"image:{world.folder}/disk.raw")
    [newest] = sorted((world.store / "points").rglob("*-*"))[-1:]
    newest.write_bytes(newest.read_bytes()[:-1])
    found = findings(world)
    assert newest.name in one(found, "points", "problem")
    assert "not encrypted" in one(found, "encryption", "warning")


def test_sources_that_do_not_answer(stored: World) -> None:
    found = findings(stored, "qemu:/nowhere", "image:/nothing.raw")
    assert "/nowhere" in one(found, "qemu:/nowhere", "problem")
    assert "/nothing.raw" in one(found, "image:/nothing.raw", "problem")


def test_a_clock_that_went_back(stored: World) -> None:
    [point] = (stored.store / "points").rglob("*-*")
    now = doctor.Instant(int(point.name.split("-")[0]) - 120 * 10**9)
    overview = doctor.look.status(session(stored), now)
    [found] = [f for f in doctor.leftovers(overview, now) if f.level is Level.PROBLEM]
    assert "the clock went back" in found.what


def session(world: World) -> doctor.Session:
    from hvbackup import config

    return doctor.Session(config.places("", world.environment))


@pytest.mark.parametrize(
    ("days", "level"), [(-2, Level.PROBLEM), (3, Level.WARNING), (200, Level.OK)], ids=["expired", "soon", "good"]
)
def test_certificates(tmp_path: Path, days: int, level: Level) -> None:
    now = datetime.now(UTC)
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / "api.pem").write_bytes(certificate(now + timedelta(days=days, hours=1)))
    (tmp_path / "tls" / "key.pem").write_text("no certificate")
    [found] = doctor.certificates(tmp_path, doctor.Instant(int(now.timestamp() * 1e9)))
    assert (found.level, found.subject) == (level, "certificate api.pem")


def certificate(until: datetime) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "host")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, until - timedelta(days=300), until)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    for free, level in ((GiB // 2, Level.PROBLEM), (5 * GiB, Level.WARNING), (50 * GiB, Level.OK)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage(100 * GiB, 100 * GiB - free, free))
        assert doctor.room("store folder", tmp_path).level is level


def test_what_a_folder_is_on(tmp_path: Path) -> None:
    spaced = tmp_path / "a b"
    spaced.mkdir()
    mounts = f"/dev/vda / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\nhost:/x {tmp_path}/a\\040b nfs4 rw 0 0\n"
    assert doctor.mounted(Path("/"), mounts) == "ext4"
    assert doctor.mounted(tmp_path, mounts) == "tmpfs"
    assert doctor.mounted(spaced, mounts) == "nfs4"


@pytest.mark.real
def test_a_machine_whose_worker_is_gone_and_what_it_left(stored: World) -> None:
    from tests.hypervisors.daemon import Daemon, make_image, node

    image = make_image(stored.folder / "vm.qcow2", 1 << 20)
    (stored.folder / "d").mkdir()
    daemon = Daemon(stored.folder / "d", [node("vda", image)]).start()
    source = f"qemu:{daemon.qmp_path}"
    try:
        with stored.start("protect", source, "--name", "db1", "--every", "1s", "--json") as worker:
            assert worker.stdout is not None
            while '"event": "moment"' not in worker.stdout.readline():
                pass
            assert "is recorded by process" in one(findings(stored, source), "machine db1", "ok")
            worker.send_signal(signal.SIGKILL)
        assert "nothing is recorded since" in one(findings(stored), "machine db1", "problem")
        assert "--name" not in str(findings(stored, source))
    finally:
        daemon.stop()
