"""Golden stores of copies: points that came from elsewhere, and what people decided about them, read by every later version."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from hvbackup.model import Instant
from hvbackup.store.catalog.catalog import Catalog
from hvbackup.store.check.check import check
from hvbackup.store.keep.forget import alone, load_trashed, trash, undo
from hvbackup.store.shelves import holds, pins, settings
from hvbackup.store.shelves.settings import HOUR_NS
from hvbackup.store.store import Store
from tests.golden.make import secrets_of
from tests.store.test_golden import COPIED, GOLDEN, READER, SAFELY, digest

Unpacked = tuple[Path, dict[str, Any]]


@pytest.fixture(params=COPIED)
def unpacked(request: pytest.FixtureRequest, tmp_path: Path) -> Unpacked:
    """(the folder of a golden store, what is expected of it)."""
    with tarfile.open(GOLDEN / f"{request.param}.tar") as tar:
        tar.extractall(tmp_path / "store", **SAFELY)
    return tmp_path, json.loads((GOLDEN / f"{request.param}.json").read_text())


@pytest.fixture
def store(unpacked: Unpacked) -> Iterator[Store]:
    folder, expected = unpacked
    with Store.open(folder / "store", folder / "state", secrets_of(expected["opens"]), owner=True) as store:
        yield store


def test_every_point_reads_as_it_was(store: Store, unpacked: Unpacked) -> None:
    expected, about = unpacked[1]["points"], unpacked[1]["about"]
    found = {store.path_of(p).removeprefix("points/"): p for p in store.points()}
    assert set(found) == set(expected) - {about["family2"].removeprefix("points/")}
    for name, point in found.items():
        assert {d.disk.id: digest(store.view(d)) for d in point.disks} == expected[name]
    assert check(store, deep=True).problems == []
    assert store.runs.problems() == []


def test_copies_name_their_origin(store: Store, unpacked: Unpacked) -> None:
    about = unpacked[1]["about"]
    origins = {store.path_of(p): p.origin for p in store.points()}
    assert origins[about["own"]] is None
    for name in ("family", "stranger", "stranger2"):
        origin = origins[about[name]]
        assert origin is not None
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(origin.verify_key))
        key.verify(bytes.fromhex(origin.signature), bytes.fromhex(origin.digest))
    assert len({o.store for o in origins.values() if o}) == 2


def test_what_was_decided_still_counts(store: Store, unpacked: Unpacked) -> None:
    expected, now = unpacked[1], Instant(unpacked[1]["noon"] + 3600 * 10**9)
    about = expected["about"]
    assert list(holds.active(store, now)) == [about["family"]]
    assert list(pins.active(store, now)) == [about["stranger"]]
    assert settings.load(store).min_age_ns == HOUR_NS
    [gone] = trash(store)
    assert gone.path == about["family2"]
    point = load_trashed(store, gone.path)
    assert {d.disk.id: digest(store.view(d)) for d in point.disks} == expected["points"][
        gone.path.removeprefix("points/")
    ]
    with alone(store):
        undo(store, gone, now, by="root")
    assert about["family2"] in {store.path_of(p) for p in store.points()}
    assert store.runs.problems() == []


def test_the_catalog_and_the_strangers_reader_know_of_copies(store: Store, unpacked: Unpacked) -> None:
    folder, expected = unpacked
    catalog = Catalog(store.state)
    assert catalog.reconcile(store) == []
    assert catalog.query("SELECT count(*) FROM points WHERE origin IS NOT NULL")[1] == [[3]]
    assert catalog.query("SELECT count(*) FROM runs WHERE kind = 'copy'")[1] == [[4]]
    (folder / "key").write_text(expected["opens"].get("key", ""))
    name, out = expected["about"]["stranger2"].removeprefix("points/"), folder / "out"
    for disk, content in expected["points"][name].items():
        command = [sys.executable, "-I", str(READER), str(folder / "store"), "--key-file", str(folder / "key")]
        subprocess.run([*command, name, disk, str(out)], check=True, timeout=60)
        assert {"size": out.stat().st_size, "blake3": blake3(out.read_bytes()).hexdigest()} == content
