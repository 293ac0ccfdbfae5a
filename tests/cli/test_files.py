"""files: what is inside the disks of a machine, at a point and at a moment of its journal, through the installed program."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.rig import World, make_disk
from tests.recover.filesystems import MAKERS, files_of, make_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def server(world: World, tree: Path) -> World:
    """A store with a point of a machine whose disk is an ext4."""
    world.done("init")
    MAKERS["ext4"](tree, world.folder / "disk.raw")
    world.done("backup", f"image:{world.folder}/disk.raw", "--name", "web1")
    return world


def test_a_file_is_found_and_had_back(server: World, tree: Path) -> None:
    [part] = server.done("files", "web1", "--json").json["entries"]
    assert (part["path"], part["kind"], part["note"]) == ("/0", "folder", "ext")
    listing = server.done("files", "web1", "/0/etc", "--json").json
    assert {e["name"]: e["size_bytes"] for e in listing["entries"]} == {"hosts": 20, "shadow": 7}
    assert listing["entries"][1]["mode"] == "4600"
    text = server.done("files", "web1", "/0/etc").out
    assert "-rw-r--r--" in text
    assert "hosts" in text
    done = server.done("files", "web1", "/0/many", "--to", server.folder / "out", "--json").json
    assert (done["files"], done["failed"], done["to"]) == (150, [], str(server.folder / "out/many"))
    assert files_of(server.folder / "out/many") == files_of(tree / "many")


def test_the_code_of_every_end(server: World) -> None:
    assert "there is no nothing in /0/etc" in server.refused(2, "files", "web1", "/0/etc/nothing")
    assert "There is no partition 7" in server.refused(2, "files", "web1", "/7")
    assert "No machine nobody" in server.refused(2, "files", "nobody")
    assert "belongs to --to" in server.refused(2, "files", "web1", "/0/etc", "--force")
    assert "Say what to copy" in server.refused(2, "files", "web1", "--to", server.folder / "out")
    server.done("files", "web1", "/0/etc/hosts", "--to", server.folder / "out")
    assert "say --force" in server.refused(2, "files", "web1", "/0/etc/hosts", "--to", server.folder / "out")
    server.done("files", "web1", "/0/etc/hosts", "--to", server.folder / "out", "--force")


def test_a_disk_that_holds_nothing_known(stored: World) -> None:
    assert stored.done("files", "web1", "--json").json["entries"][0]["kind"] == "other"
    assert "holds nothing that is known" in stored.refused(1, "files", "web1", "/0/etc")


def test_several_disks(world: World, tree: Path) -> None:
    world.done("init")
    MAKERS["ext4"](tree, world.folder / "a.raw")
    make_disk(world.folder / "b.raw", 2_000_384)
    source = f"image:{world.folder}/a.raw,{world.folder}/b.raw"
    world.done("backup", source, "--name", "web1")
    parts = world.done("files", "web1", "--json").json["entries"]
    assert [p["note"] for p in parts] == ["ext", "unknown"]
    assert "say which one /0/etc is on: --disk DISK" in world.refused(2, "files", "web1", "/0/etc")
    assert world.done("files", "web1", "/0/etc", "--disk", parts[0]["disk"], "--json").json["entries"]


def test_check_names_the_files_that_lie_on_what_is_lost(server: World, tree: Path) -> None:
    """One byte of one pack is flipped: the files whose blocks were in that frame are named, and exactly those can't be copied."""
    pack = max(server.store.glob("packs/*/*.pack"), key=lambda p: p.stat().st_size)
    with pack.open("r+b") as f:
        f.seek(pack.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
    assert "check --files" in server.run("check", "--deep").out
    ran = server.run("check", "--deep", "--files", "--json")
    assert ran.code == 20
    [disk] = ran.json["files"]
    assert (disk["machine"], disk["more"], disk["remarks"]) == ("web1", 0, [])
    copied = server.run("files", "web1", "/0", "--to", server.folder / "out", "--json")
    assert copied.code == 20
    assert disk["files"] == sorted(f["path"] for f in copied.json["failed"]) == ["/0/large.bin"]
    wanted = dict(files_of(tree))
    del wanted["large.bin"]
    assert files_of(server.folder / "out/0") == wanted


def test_what_only_an_older_point_lost_is_named_there(server: World, tree: Path) -> None:
    first = max(server.store.glob("packs/*/*.pack"), key=lambda p: p.stat().st_size)
    (tree / "large.bin").write_bytes((tree / "large.bin").read_bytes()[::-1])
    (server.folder / "disk.raw").unlink()
    MAKERS["ext4"](tree, server.folder / "disk.raw")
    server.done("backup", f"image:{server.folder}/disk.raw", "--name", "web1", "--full")
    second = max((p for p in server.store.glob("packs/*/*.pack") if p != first), key=lambda p: p.stat().st_size)
    for pack, part in ((first, 2), (second, 3)):
        data = bytearray(pack.read_bytes())
        data[len(data) // part] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
    newest, oldest = (p["id"] for p in server.done("points", "web1", "--json").json["points"])
    found = server.run("check", "--deep", "--files", "--json").json["files"]
    assert {(f["point"], *f["files"]) for f in found} == {(newest, "/0/large.bin"), (oldest, "/0/large.bin")}
