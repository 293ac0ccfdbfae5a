"""Makes the golden stores of copies: `python tests/golden/make_copied.py`.  Like make.py, only when format 1 itself changes.

Each NAME.tar holds a store into which points of another one were copied (one from a store of its family, one from a store with
other keys), and in which somebody has held, forgotten, pinned and tagged points and changed the settings.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hvbackup.capture import Options, capture
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.model import KiB
from hvbackup.replicate import Copier
from hvbackup.store.format import keys
from hvbackup.store.keep.forget import alone, forget
from hvbackup.store.shelves import pins
from hvbackup.store.shelves.holds import hold
from hvbackup.store.shelves.settings import HOUR_NS, Settings, change
from hvbackup.store.store import Store, init
from tests.golden.make import HERE, NOON, Clock, digest, pack, secrets_of, text

BLOCK = 64 * KiB
MACHINE = "6f1c7f7e-0000-4000-8000-000000000002"


@dataclass
class Copied:
    """One store to make."""

    name: str
    opens: dict[str, str]
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, str] = field(
        default_factory=dict
    )  # what is held, in the trash, pinned, tagged, made here: names of points


def stores() -> list[Copied]:
    """All of them."""
    return [Copied("format1-copied-key-64k", {"key": keys.new_key_text()}), Copied("format1-copied-plain-64k", {})]


def fill(golden: Copied, folder: Path) -> None:
    """The store exists in `folder`/store, and `golden` says what is in it."""
    rng, clock = random.Random(golden.name), Clock()
    disks = {"vda": FakeDisk(260 * BLOCK + 512), "vdb": FakeDisk(2 * BLOCK, sector=4096)}
    hypervisor = FakeHypervisor([FakeMachine(MACHINE, disks, "atlas")], clock=clock)
    secrets = secrets_of(golden.opens)
    secret = secrets[0] if secrets else None
    init(folder / "family", secret, BLOCK)
    init(folder / "stranger", None, BLOCK)
    with Store.open(folder / "family", folder / "state", secrets) as family:
        init(folder / "store", secret, BLOCK, family=family.ring)
    with Store.open(folder / "store", folder / "state", secrets, owner=True) as store:

        def point(into: Store, **changes: Any) -> str:
            for disk in disks.values():
                disk.write(rng.randrange(disk.size - 9000), text(rng, 9000))
            options = replace(Options(source="fake:", clock=clock, rng=rng, full=True), **changes)
            outcome = capture(into, hypervisor, hypervisor.machines()[0], options)
            assert outcome.point is not None
            path = store.path_of(outcome.point)
            golden.points[path.removeprefix("points/")] = {name: digest(d.content) for name, d in disks.items()}
            return path

        for name, opener, what in (("family", secrets, "family"), ("stranger", [], "stranger")):
            with Store.open(folder / name, folder / "state", opener, owner=True) as source:
                golden.about[what] = point(source)
                golden.about[f"{what}2"] = point(source)
                assert all(
                    c.point for c in Copier(source, store, clock, rng).copy(list(source.points()), lambda *_: None)
                )
        golden.about["own"] = point(store)
        decided(golden, store, clock)


def decided(golden: Copied, store: Store, clock: Clock) -> None:
    """Somebody holds one point, pins another, forgets a third, and sets what the store demands."""
    about = golden.about
    by_path = {store.path_of(p): p for p in store.points()}
    hold(store, about["family"], clock(), until=None, why="the law says so", by="root")
    pins.take(store, [by_path[about["stranger"]]], "boot trial on host", clock(), lasting=True)
    with alone(store):
        forget(store, [about["family2"]], Settings(trash_ns=10**6 * HOUR_NS), clock(), why="by name", by="root")
    change(store, Settings(min_age_ns=HOUR_NS), clock(), by="root")


def main() -> None:
    """Make them all."""
    for golden in stores():
        with tempfile.TemporaryDirectory() as folder:
            fill(golden, Path(folder))
            (HERE / f"{golden.name}.tar").write_bytes(pack(Path(folder) / "store"))
        about = {"opens": golden.opens, "points": golden.points, "about": golden.about, "noon": NOON}
        (HERE / f"{golden.name}.json").write_text(json.dumps(about, indent=1) + "\n")
        print(f"{golden.name}: {(HERE / f'{golden.name}.tar').stat().st_size} bytes, {len(golden.points)} points")


if __name__ == "__main__":
    main()
