"""Files inside disks over the API: what is listed and downloaded is what was there, for who may, and nothing else is reached."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from hvbackup.api import guestfiles
from tests.api.conftest import Site, made_site

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin"), reason="no mkfs.ext4 here"),
]
V = "/api/v1"
BIG = random.Random(1).randbytes(5_000_000)
ODD = '<img src=x onerror="alert(1)">ü\r\nX: y.html'


def filesystem(folder: Path, path: Path, size: str) -> None:
    """An ext4 of what is in a folder."""
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-F", "-d", folder, path, size], check=True, timeout=60)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with one more machine: a disk with an ext4."""
    folder = tmp_path_factory.mktemp("guestfiles")
    for site in made_site(folder):
        tree = folder / "tree"
        (tree / "etc").mkdir(parents=True)
        (tree / "etc/hosts").write_text("127.0.0.1 localhost\n")
        (tree / "big.bin").write_bytes(BIG)
        (tree / "empty").mkdir()
        (tree / ODD).write_text("<script>alert(1)</script>")
        (tree / "link").symlink_to("/etc/hosts")
        (tree / "away").symlink_to("../../../../../../etc")
        filesystem(tree, folder / "d.raw", "16M")
        site.world.done("backup", f"image:{folder / 'd.raw'}", "--name", "files1")
        site.keeper.refresh()
        yield site


def at(site: Site, more: str = "") -> str:
    return f"{V}/machines/{site.key('files1')}/files{more}"


def test_folders_are_listed_as_they_were(own: Site) -> None:
    client = own.client("restorer")
    [top] = client.get(at(own)).json()["entries"]
    assert (top["path"], top["kind"]) == ("/0", "folder")
    found = client.get(at(own), params={"path": "/0"}).json()
    entries = {e["name"]: e for e in found["entries"]}
    assert (entries["big.bin"]["size_bytes"], entries["big.bin"]["kind"]) == (len(BIG), "file")
    assert entries["link"]["target"] == "/etc/hosts"
    assert ODD in entries
    assert found["total"] == len(entries)
    part = client.get(at(own), params={"path": "/0", "first": 1, "count": 2}).json()
    assert part["entries"] == found["entries"][1:3]
    assert client.get(at(own), params={"path": "/0/empty"}).json()["entries"] == []


def test_a_file_comes_in_pieces_and_is_the_file(own: Site) -> None:
    client = own.client("restorer")
    answer = client.get(at(own, "/content"), params={"path": "/0/big.bin"})
    assert answer.status_code == 200
    assert answer.content == BIG
    assert answer.headers["content-length"] == str(len(BIG))
    row = next(r for r in own.keeper.rows() if r.name == "files1")
    caller = guestfiles.Caller(own.desk.accounts.by_token(own.tokens["restorer"]), "test")
    which = guestfiles.which(own.desk, row, "latest", "")
    size, *pieces = guestfiles._pieces(own.desk, caller, row, which, "/0/big.bin")
    assert size == len(BIG)
    assert max(map(len, pieces)) <= 1 << 20, "whatever its length, no more than this is in memory"


def test_what_a_guest_named_is_saved_and_never_shown_or_run(own: Site) -> None:
    answer = own.client("restorer").get(at(own, "/content"), params={"path": f"/0/{ODD}"})
    assert answer.content == b"<script>alert(1)</script>"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]
    said = answer.headers["content-disposition"]
    assert said.startswith('attachment; filename="')
    assert not set(said.split("filename*=")[0]) & set("<>\r\n\\")
    assert unquote(said.split("UTF-8''")[1]) == ODD
    assert "x" not in answer.headers
    assert guestfiles.disposition("../../.bashrc").startswith('attachment; filename="_.._.bashrc"')
    assert guestfiles.disposition("...").startswith('attachment; filename="file"')


@pytest.mark.parametrize(
    "path", ["/0/../../../../etc/passwd", "/0/away/passwd", "/0/%2e%2e/%2e%2e/etc/passwd", "/../etc/passwd", "/0/etc/hosts/x",
             "/7/x", "/0/nosuch"],
)  # fmt: skip
def test_no_path_leads_out_of_the_disk(own: Site, path: str) -> None:
    answer = own.client("restorer").get(at(own, "/content"), params={"path": path})
    assert answer.status_code == 404
    assert b"root:" not in answer.content


def test_links_folders_and_disks_without_files_are_refused_by_name(own: Site) -> None:
    client = own.client("restorer")
    for path in ("/0/link", "/0/etc", "/", "/0"):
        assert client.get(at(own, "/content"), params={"path": path}).status_code == 422, path
    assert client.get(at(own), params={"disk": "nosuch"}).status_code == 404
    assert client.get(at(own), params={"at": "-1000d"}).status_code == 404
    other = client.get(f"{V}/machines/{own.key('db1')}/files", params={"path": "/0/x"})
    assert (other.status_code, other.json()["error"]["kind"]) == (422, "FileSystemUnreadable")


def test_only_restorers_look_and_each_look_is_in_the_audit(own: Site) -> None:
    for who, status in (("viewer", 403), ("operator", 403), ("restorer", 200), ("admin", 200), ("admin of web", 404)):
        client = own.client(who)
        assert client.get(at(own), params={"path": "/0/etc"}).status_code == status, who
        assert client.get(at(own, "/content"), params={"path": "/0/etc/hosts"}).status_code == status, who
        page = f"/machines/{own.key('files1')}/files"
        assert client.get(page).status_code == status, who
        assert client.get(f"{page}/content", params={"path": "/0/etc/hosts"}).status_code == status, who
    newest = own.client("admin").get(f"{V}/audit").json()["entries"]
    told = [(e["what"], e["who"], e["status"], e["details"]["path"]) for e in newest if "file" in e["what"]]
    assert ("download file", "token the admin", "done", "/0/etc/hosts") in told
    assert ("list files", "token the restorer", "done", "/0/etc") in told
    own.client("restorer").get(at(own, "/content"), params={"path": "/0/nosuch"})
    assert own.desk.audited[-1]["status"].startswith("refused: ")


def test_only_so_many_disks_are_looked_into_at_once(own: Site) -> None:
    """Whoever leaves in the middle of a file leaves nothing behind: not their place, and no pin."""
    row = next(r for r in own.keeper.rows() if r.name == "files1")
    caller = guestfiles.Caller(own.desk.accounts.by_token(own.tokens["restorer"]), "test")
    begun = []
    for _ in range(guestfiles.OPEN_MAX):
        which = guestfiles.which(own.desk, row, "latest", "")
        begun.append(guestfiles._pieces(own.desk, caller, row, which, "/0/big.bin"))
        next(begun[-1])
    answer = own.client("restorer").get(at(own))
    assert (answer.status_code, answer.json()["error"]["kind"]) == (409, "Busy")
    begun.clear()
    assert own.client("restorer").get(at(own)).status_code == 200
    assert own.world.done("holds", "--json").json["pins"] == []


def test_a_damaged_block_breaks_the_download_off(own: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the length is said, an error can only be a transfer that is too short: never zeroes in its place."""
    from hvbackup.errors import ChunkDamaged
    from hvbackup.recover.browse import Volumes

    def broken(self: Volumes, path: str) -> Iterator[bytes]:
        yield BIG[:1000]
        raise ChunkDamaged("a chunk is damaged")

    monkeypatch.setattr(Volumes, "read", broken)
    row = next(r for r in own.keeper.rows() if r.name == "files1")
    caller = guestfiles.Caller(own.desk.accounts.by_token(own.tokens["restorer"]), "test")
    pieces = guestfiles._pieces(own.desk, caller, row, guestfiles.which(own.desk, row, "latest", ""), "/0/big.bin")
    assert [next(pieces), next(pieces)] == [len(BIG), BIG[:1000]]
    with pytest.raises(ChunkDamaged):
        next(pieces)
