"""What somebody with the store's files, and without its key, can learn or do: nothing, and nothing unnoticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hvbackup.errors import ChunkDamaged, KeyRefused, PointDamaged, StoreDamage, StoreMissing
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import MachineConfig, MachineId
from hvbackup.store.check.check import check
from hvbackup.store.chunks import writer
from hvbackup.store.format import keys, pack
from hvbackup.store.format import layout as f
from hvbackup.store.store import Store, init
from tests.world import BLOCK, KEY, MACHINE, OTHER_KEY, CarelessKernel, World, contents, tree


@pytest.fixture
def world(ram: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(writer, "PACK_BYTES", 3 * BLOCK)
    return World(ram / "w", KEY, disks={"vda": FakeDisk(6 * BLOCK), "vdb": FakeDisk(3 * BLOCK)}).life(4)


def headers(world: World) -> list[tuple[int, bytes]]:
    """(kind, salt) of every pack and sealed file of a store."""
    found = []
    for name, data in tree(world.store_path).items():
        if name.startswith(("packs/", "points/", "runs/", "leases/")):
            _, version, kind, flags, store, salt, _ = f.HEADER.unpack(data[:60])
            assert (version, flags) == (f.FORMAT, f.FLAG_ENCRYPTED)
            assert store.hex() == json.loads((world.store_path / "HVBACKUP").read_text())["id"]
            found.append((kind, salt))
    return found


def test_no_two_messages_are_ever_encrypted_with_the_same_key_and_nonce(world: World) -> None:
    salts = [salt for _, salt in headers(world)]
    assert len(salts) > 12
    assert len(set(salts)) == len(salts), "each file has a key of its own"
    assert all(len(set(salt)) > 8 for salt in salts)
    with world.opened() as store:
        for name in pack.list_packs(store.files):
            data = store.files.read(pack.path_of(name))
            ordinals = [
                f.RECORD.unpack_from(data, offset)[1] for offset, _ in pack.records(pack.read_footer(store.files, name))
            ]
            assert ordinals == list(range(len(ordinals))), "each record has a nonce of its own"
            nonces = {pack.nonce(i) for i in ordinals}
            assert len(nonces) == len(ordinals)


def test_two_stores_with_one_key_file_share_nothing(ram: Path) -> None:
    one, other = World(ram / "one", KEY).life(1), World(ram / "other", KEY).life(1)
    with one.opened() as a, other.opened() as b:
        assert a.ring.master != b.ring.master
        assert a.ring.machine_name(MachineId(MACHINE)) != b.ring.machine_name(MachineId(MACHINE))
        ids = [set(pack.read_footer(s.files, p)["id"].tolist()) for s in (a, b) for p in pack.list_packs(s.files)[:1]]
        assert ids[0].isdisjoint(ids[1])


def test_nothing_that_identifies_or_is_contained_can_be_read_without_the_key(ram: Path) -> None:
    secrets = {
        "machine": "finance-payroll-7f3a", "disk": "disk-of-the-ledger", "name": "Chief of Payroll",
        "config": "qemu -name mortimer-brewster", "content": "ATTACK AT DAWN, the ledger says",
        "source": "qemu:/run/teapot.sock", "token": "hvb-00c0ffee-safe",
    }  # fmt: skip
    init(ram / "store", KEY, kernel=CarelessKernel())
    disk = FakeDisk(4 * BLOCK)
    machine = FakeMachine(
        secrets["machine"], {secrets["disk"]: disk}, secrets["name"], MachineConfig("qemu-argv", secrets["config"])
    )
    world = World(ram, KEY)
    world.hv = FakeHypervisor([machine], clock=world.clock)
    for number in range(0, 4 * BLOCK, 100):
        disk.write(number, secrets["content"].encode())
    from hvbackup.capture import capture
    from hvbackup.leases import Leases

    with world.opened() as store:
        capture(store, world.hv, machine.model(), world.options(source=secrets["source"]))
        disk.write(70_000, b"other")
        capture(store, world.hv, machine.model(), world.options(source=secrets["source"]))
        Leases(store, world.clock).take(machine.model().id, secrets["source"])
        point = next(store.points())
    everything = tree(world.store_path)
    assert {n.split("/")[0] for n in everything} >= {"HVBACKUP", "keys", "packs", "points", "runs", "leases"}
    for what, secret in {**secrets, "point": f'"{point.id}"', "kind": '"vda"'}.items():
        for name, data in everything.items():
            assert secret.encode() not in data, (what, name)
            assert secret not in name, (what, name)
            assert secret.encode()[:12] not in data, (what, name)
    key = KEY.value
    assert not any(key in data or key.hex().encode() in data for data in everything.values())


def records_of(store: Store, name: str) -> list[tuple[int, int]]:
    return list(pack.records(pack.read_footer(store.files, name)))


def data_packs(world: World, store: Store) -> list[str]:
    return [n for n in pack.list_packs(store.files) if store.files.read(pack.path_of(n))[5] == f.KIND_DATA]


def swap(path: Path, one: tuple[int, int], other_path: Path, other: tuple[int, int]) -> None:
    """Two records of equal length change places."""
    a, b = bytearray(path.read_bytes()), bytearray(other_path.read_bytes())
    length = min(one[1], other[1])
    first = bytes(a[one[0] : one[0] + length])
    second = bytes(b[other[0] : other[0] + length])
    b[other[0] : other[0] + length] = first
    other_path.write_bytes(b)
    a = bytearray(path.read_bytes())
    a[one[0] : one[0] + length] = second
    path.write_bytes(a)


@pytest.mark.parametrize("where", ["same pack", "another pack"])
def test_a_swapped_record_is_refused(ram: Path, where: str) -> None:
    world = World(ram / "w", KEY, disks={"vda": FakeDisk(4 * BLOCK)}).init()
    with world.opened() as store:
        for _ in range(2):
            world.disks["vda"].write(0, world.rng.randbytes(4 * BLOCK))  # does not shrink: records of one length
            world.capture(store)
        packs = data_packs(world, store)
        a, b = (packs[0], packs[0]) if where == "same pack" else (packs[0], packs[1])
        swap(
            world.store_path / pack.path_of(a), records_of(store, a)[0],
            world.store_path / pack.path_of(b), records_of(store, b)[1],
        )  # fmt: skip
    with world.opened() as store:
        refused = 0
        for point in store.points():
            for start in range(0, 4 * BLOCK, BLOCK):
                buffer = bytearray(BLOCK)
                try:
                    store.view(point.disks[0]).read_into(start, memoryview(buffer))
                    assert buffer == world.oracle[point.id]["vda"][start : start + BLOCK]
                except ChunkDamaged:
                    refused += 1
        assert refused == 2
        assert check(store, deep=True).lost


def test_a_pack_of_another_store_is_refused(ram: Path) -> None:
    world, other = World(ram / "one", KEY).life(1), World(ram / "other", KEY, seed=2).life(1)
    with world.opened() as store, other.opened() as foreign:
        mine, theirs = data_packs(world, store)[0], data_packs(other, foreign)[0]
    shutil.copy(other.store_path / pack.path_of(theirs), world.store_path / pack.path_of(mine))
    with world.opened() as store:
        with pytest.raises(StoreDamage, match="belongs to store"):
            pack.cipher_of(store.files, store.ring, mine)
        assert check(store).lost
        with pytest.raises(ChunkDamaged):
            contents(store, next(store.points()))


def test_an_older_point_under_a_newer_name_is_refused(world: World) -> None:
    folder = next((world.store_path / "points").iterdir())
    oldest, *_, newest = sorted(folder.iterdir())
    shutil.copy(oldest, newest)
    with world.opened() as store:
        found = store.newest(MachineId(MACHINE))
        assert found is not None
        assert newest.name != store.path_of(found).rsplit("/", 1)[1]
        with pytest.raises(PointDamaged, match="signature"):
            store.load_point(f"points/{folder.name}/{newest.name}")
        assert check(store).lost


def test_a_forged_point_is_refused(world: World) -> None:
    with world.opened() as store:
        point = store.newest(MachineId(MACHINE))
        assert point is not None
        path = store.path_of(point)
        data = bytearray(store.files.read(path))
        stranger = keys.Keyring(**{**vars_of(store.ring), "sign": bytes(32)})
        from hvbackup.store.format import point as points

        (world.store_path / path).write_bytes(points.dump(stranger, point))
        with pytest.raises(PointDamaged, match="signature"):
            store.load_point(path)
        (world.store_path / path).write_bytes(data)
        assert store.load_point(path) == point


def vars_of(ring: keys.Keyring) -> dict[str, object]:
    return {k: getattr(ring, k) for k in ("store", "encrypted", "master", "ids", "names", "sign")}


def test_a_deleted_newest_point_is_noticed(world: World) -> None:
    folder = next((world.store_path / "points").iterdir())
    newest = sorted(folder.iterdir())[-1]
    newest.unlink()
    with world.opened() as store:
        assert any(newest.name in problem for problem in store.runs.problems())


def test_a_point_deleted_with_its_record_is_noticed_where_it_was_written(world: World) -> None:
    folder = next((world.store_path / "points").iterdir())
    sorted(folder.iterdir())[-1].unlink()
    sorted((world.store_path / "runs").rglob("0*"))[-1].unlink()
    with world.opened() as store:
        assert any("older copy" in problem for problem in store.runs.problems())


def test_a_store_put_back_from_an_old_copy_is_noticed(world: World) -> None:
    old = world.path / "old"
    shutil.copytree(world.store_path, old)
    with world.opened() as store:
        world.scribble()
        world.capture(store)
    shutil.rmtree(world.store_path)
    shutil.copytree(old, world.store_path)
    with world.opened() as store:
        assert any("older copy" in problem for problem in store.runs.problems())
        world.capture(store)
    with world.opened() as store:
        assert store.runs.problems(), "and that does not heal by itself"


def test_records_that_vanish_or_change_places_are_noticed(world: World) -> None:
    records = sorted(p for p in (world.store_path / "runs").rglob("0*") if p.is_file())
    data = [r.read_bytes() for r in records]
    records[1].unlink()
    with world.opened() as store:
        assert any("broken between" in problem for problem in store.runs.problems())
    records[1].write_bytes(data[2])
    with world.opened() as store:
        assert any("signature" in problem for problem in store.runs.problems())
    records[1].write_bytes(data[1])
    with world.opened() as store:
        assert store.runs.problems() == []


# --- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "HVB1", "HVB1-", "not a key", "HVB2-" + "AAAA-" * 14, "HVB1-" + "AAAA-" * 14, "HVB1-" + "AAAA-" * 13, "HVB1-!!!!",
     "# only\n# comments\n", "HVB1-" + "Ä" * 56],
)  # fmt: skip
def test_a_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(KeyRefused, match="the file"):
        keys.parse_key_text(text, "the file")


def test_every_truncation_and_every_mistyped_letter_of_a_key_is_refused() -> None:
    text = keys.new_key_text()
    whole = keys.parse_key_text(f"# a comment\n\n  {text.lower()}  \n", "the file")
    assert whole.value == keys.parse_key_text(text.replace("-", " "), "paper").value
    for length in range(len(text)):
        with pytest.raises(KeyRefused):
            keys.parse_key_text(text[:length], "the file")
    for at in range(5, len(text)):
        if text[at] != "-":
            other = "B" if text[at] == "A" else "A"
            with pytest.raises(KeyRefused):
                keys.parse_key_text(text[:at] + other + text[at + 1 :], "the file")


def test_an_empty_passphrase_is_refused() -> None:
    with pytest.raises(KeyRefused):
        keys.passphrase("")


@pytest.mark.parametrize(
    "secrets",
    [[], [OTHER_KEY], [keys.passphrase("wrong")], [OTHER_KEY, keys.passphrase("wrong")]],
    ids=["none", "another", "a passphrase", "both"],
)
def test_a_wrong_key_is_refused_before_anything_is_written(
    world: World, monkeypatch: pytest.MonkeyPatch, secrets: list[keys.Secret]
) -> None:
    monkeypatch.setattr(keys, "KDF", {**keys.KDF, "memory_kib": 64, "iterations": 1})
    with world.opened() as store:
        keys.add_wrapping(store.files, store.ring, keys.passphrase("right"))
    shutil.rmtree(world.state_path)
    before = {str(p): p.stat().st_mtime_ns for p in world.path.rglob("*")}
    with pytest.raises(KeyRefused):
        Store.open(world.store_path, world.state_path, secrets, owner=True)
    assert {str(p): p.stat().st_mtime_ns for p in world.path.rglob("*")} == before


def test_keys_are_added_removed_and_the_last_one_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "KDF", {**keys.KDF, "memory_kib": 64, "iterations": 1})
    phrase = keys.passphrase("correct horse battery staple")
    before = tree(world.store_path)
    with world.opened() as store:
        first = keys.list_wrappings(store.files)[0]["id"]
        with pytest.raises(KeyRefused, match="only key"):
            keys.remove_wrapping(store.files, first)
        second = keys.add_wrapping(store.files, store.ring, phrase, "the vault")
        assert {w["label"] for w in keys.list_wrappings(store.files)} == {"made with the store", "the vault"}
        keys.remove_wrapping(store.files, first)
        with pytest.raises(KeyRefused, match=f"No key {first}"):
            keys.remove_wrapping(store.files, first)
    with pytest.raises(KeyRefused):
        world.open()
    world.secret = phrase
    with world.opened() as store:
        world.check_all(store)
    after = tree(world.store_path)
    changed = {n for n in {*before, *after} if before.get(n) != after.get(n)}
    assert {n.split("/")[1].split(".")[0] for n in changed} == {first, second}, "no data is rewritten"


@pytest.mark.parametrize("secret", [None, KEY], ids=["plain", "encrypted"])
def test_a_store_whose_description_lies_about_encryption_is_refused(ram: Path, secret: keys.Secret | None) -> None:
    world = World(ram / "w", secret).life(1)
    path = world.store_path / "HVBACKUP"
    value = json.loads(path.read_text())
    value["cipher"] = "none" if secret else "aes-256-gcm"
    path.write_text(json.dumps(value))
    world.secret = KEY
    with pytest.raises(StoreMissing, match="HVBACKUP"):
        world.open()


def test_an_open_key_slipped_into_an_encrypted_store_is_not_used(world: World) -> None:
    with world.opened() as store:
        stranger = keys.Keyring.generate(store.id, encrypted=False)
        keys.add_wrapping(store.files, stranger, None)
    with world.opened() as store:
        assert store.ring.master != stranger.master
        world.check_all(store)


def test_another_signer_in_the_description_is_refused(world: World) -> None:
    path = world.store_path / "HVBACKUP"
    value = json.loads(path.read_text())
    value["verify_key"] = "00" * 32
    path.write_text(json.dumps(value))
    with pytest.raises(StoreMissing, match="signer"):
        world.open()
