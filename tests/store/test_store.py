"""Opening and making stores: what is refused, in which words, and that nothing is touched then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvbackup.errors import Busy, HvbackupError, KeyRefused, NotFound, StoreMissing, UsageError
from hvbackup.files import Files
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import MachineId
from hvbackup.store.chunks.view import leaf_count
from hvbackup.store.store import Store, describe, init
from tests.world import BLOCK, KEY, World, tree


def test_a_place_without_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(StoreMissing, match="hvbackup init"):
            Store.open(path, tmp_path / "state", [])
    assert sorted(tree(tmp_path)) == ["file"]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"format": 2}, "format 2"), ({"cipher": "rot13"}, "rot13"), ({"block": 5}, "size"), ({"page": 1024}, "size"),
     ({"id": "00"}, "size"), ({"id": None}, "description"), ({"format": None}, "format None")],
)  # fmt: skip
def test_a_store_of_another_kind_or_version_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    world = World(tmp_path).init()
    path = world.store_path / "HVBACKUP"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreMissing, match=words):
        world.open()
    with pytest.raises(StoreMissing):
        describe(Files(world.store_path))


def test_init_refuses_what_is_not_empty_and_touches_nothing(tmp_path: Path) -> None:
    world = World(tmp_path).init()
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="a store at"):
        world.init()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_text("mine")
    with pytest.raises(UsageError, match=r"photo\.jpg"):
        init(tmp_path / "other", None)
    with pytest.raises(UsageError, match="64 KiB or 256 KiB"):
        init(tmp_path / "new", None, block=4096)
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("other")} == before


def test_one_owner_and_many_readers(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as owner:
        with pytest.raises(Busy, match="in use by process"):
            world.open()
        with world.opened(owner=False) as reader:
            world.check_all(reader)
            world.scribble()
            world.capture(owner)
        with world.opened(owner=False) as reader:
            world.check_all(reader)
        owner.close()
        owner.close()
    with world.opened() as again:
        world.check_all(again)


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, KEY).life(2)
    before = tree(tmp_path)
    with world.opened(owner=False) as reader:
        world.check_all(reader)
        assert reader.runs.problems() == []
    assert tree(tmp_path) == before


def test_everything_but_the_store_can_be_deleted(tmp_path: Path) -> None:
    world = World(tmp_path, KEY).life(3)
    for path in sorted(world.state_path.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with world.opened(owner=False) as reader:
        world.check_all(reader)


def test_machines_are_found_by_id_and_by_name(tmp_path: Path) -> None:
    world = World(tmp_path).init()
    machines = [FakeMachine("u1", {"vda": FakeDisk(BLOCK)}, "web"), FakeMachine("u2", {"vda": FakeDisk(BLOCK)}, "db"),
                FakeMachine("u3", {"vda": FakeDisk(BLOCK)}, "db")]  # fmt: skip
    world.hv = FakeHypervisor(machines, clock=world.clock)
    from hvbackup.capture import capture

    with world.opened() as store:
        with pytest.raises(NotFound, match="none yet"):
            store.find_machine("web")
        for machine in machines:
            capture(store, world.hv, machine.model(), world.options())
        assert store.find_machine("web") == "u1"
        assert store.find_machine("u2") == "u2"
        with pytest.raises(UsageError, match="u2, u3"):
            store.find_machine("db")
        with pytest.raises(NotFound, match="db, db, web"):
            store.find_machine("mail")
        machines[0].name = "www"
        capture(store, world.hv, machines[0].model(), world.options())
        assert store.find_machine("www") == "u1"
        with pytest.raises(NotFound):
            store.find_machine("web")
        assert [p.machine.name for p in store.points(MachineId("u1"))] == ["web", "www"]


def test_a_point_is_never_overwritten(tmp_path: Path) -> None:
    world = World(tmp_path).life(1)
    with world.opened() as store:
        point = next(store.points())
        writer = store.writer()
        with pytest.raises(HvbackupError, match="nothing was overwritten"):
            store.commit(point, writer)
        world.check_all(store)


def test_a_wrong_key_says_what_the_store_opens_with(tmp_path: Path) -> None:
    world = World(tmp_path, KEY).init()
    world.secret = None
    with pytest.raises(KeyRefused, match="opens with: file"):
        world.open()


def test_how_many_leaves_a_disk_has_at_most() -> None:
    assert [leaf_count(size, BLOCK) for size in (0, 1, 256 * BLOCK, 256 * BLOCK + 1)] == [0, 1, 1, 2]
