"""A machine that is written to and dies, the installed program that protects it, and what must be true afterwards.

The machine is a qemu-storage-daemon with two disks, its guest a thread of ours that writes over NBD.  Everything hvbackup does
is done by the installed command in processes of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hvbackup.model import KiB, MiB
from tests.cli.rig import Ran, World
from tests.endtoend.witness import Content, Guest, History
from tests.hypervisors.daemon import Daemon, make_image, node

PROGRAM = Path(sys.executable).with_name("hvbackup")
SIZES = {"vda": 12 * MiB, "vdb": 4 * MiB + 37 * KiB + 512}  # the second ends inside a block and inside a cell
DRIVERS = {"vda": "qcow2", "vdb": "raw"}  # one keeps its bitmaps, the other can't
GONE_SECONDS = 120.0


class Installed(World):
    """A world in which the installed program runs, as a user would run it."""

    def command(self, *words: str | Path) -> list[str]:
        return [str(PROGRAM), *map(str, words)]


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the names of sockets."""
    folder = Path(tempfile.mkdtemp(prefix="hvt-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Machine:
    """A storage daemon with two disks, and a guest that writes to both."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        folder.mkdir()
        self.images = {d: make_image(folder / f"{d}.{DRIVERS[d]}", size, DRIVERS[d]) for d, size in SIZES.items()}
        self.daemon = Daemon(folder, [node(d, path, DRIVERS[d]) for d, path in self.images.items()]).start()
        self.history = History({d: bytes(size) for d, size in SIZES.items()})
        self._rng = rng
        self.guest = self._new_guest()

    def _new_guest(self) -> Guest:
        return Guest(self.daemon.guest, SIZES, self.history, self._rng)

    @property
    def source(self) -> str:
        return f"qemu:{self.daemon.qmp_path}"

    @property
    def pid(self) -> int:
        assert self.daemon.process is not None
        return self.daemon.process.pid

    def kill(self) -> None:
        """SIGKILL; the guest notices."""
        self.daemon.kill()

    def revive(self) -> None:
        """Start on the same disks; what they hold was read by another program while nobody wrote to them."""
        self.guest.stop()
        self.history.rebase({d: _read(path, DRIVERS[d]) for d, path in self.images.items()})
        self.daemon.start()
        self.guest = self._new_guest()

    def restart(self) -> None:
        """A clean stop and a new start."""
        self.guest.stop()
        self.daemon.stop()
        self.revive()

    def checkpoints(self) -> dict[str, list[str]]:
        """The bitmaps of ours on each disk."""
        return {d: [name for name in self.daemon.bitmaps(d) if name.startswith("hvb-")] for d in SIZES}

    def close(self) -> None:
        self.guest.stop()
        self.daemon.kill()


def _read(path: Path, driver: str) -> bytes:
    raw = path.with_suffix(".read")
    command = ["qemu-img", "convert", "-f", driver, "-O", "raw", str(path), str(raw)]
    subprocess.run(command, check=True, timeout=60)
    data = raw.read_bytes()
    raw.unlink()
    return data


def digests(content: Content) -> dict[str, str]:
    return {disk: hashlib.sha256(data).hexdigest() for disk, data in content.items()}


@dataclass
class Protected:
    """A machine, a store, and the proof of every point in it."""

    world: Installed
    machine: Machine
    proved: dict[str, dict[str, str]] = field(default_factory=dict)  # point -> disk -> digest of its reference
    span: float = 1.0  # seconds the last backup took from its start to its end
    lowest: int = 0  # writes acknowledged before the newest capture that could have made a point began

    def start(self) -> subprocess.Popen[str]:
        """A backup that goes on."""
        self.lowest = self.machine.history.acked
        return self.world.start("backup", self.machine.source, "--name", "torture", "--json")

    def backup(self) -> tuple[Ran, list[str]]:
        """A whole backup; how each disk was read.  Its point is proved."""
        self.lowest, began = self.machine.history.acked, time.monotonic()
        ran = self.world.run("backup", self.machine.source, "--name", "torture", "--json")
        self.span = time.monotonic() - began
        assert ran.code == 0, ran
        [run] = ran.json["runs"]
        self.prove_points()
        assert run["point"]["id"] in self.proved
        return ran, [disk["how"] for disk in run["point"]["disks"]]

    def prove_points(self, most: int = 1) -> list[str]:
        """Every point that was ever proved is there and holds what it held; new ones are states of the disks.  The new ones."""
        listed = [p["id"] for p in self.world.done("points", "--json").json["points"]]
        assert set(self.proved) <= set(listed), "a committed point is gone"
        new = [point for point in listed if point not in self.proved]
        assert len(new) <= most
        for point in listed:
            content = self.restored(point)
            if point in self.proved:
                assert digests(content) == self.proved[point], f"point {point} is not what it was"
            else:
                self.machine.history.match(content, self.lowest)
                self.proved[point] = digests(content)
        return new

    def restored(self, point: str) -> dict[str, bytes]:
        """All disks of a point, restored by the program."""
        to = self.world.folder / "restored"
        self.world.done("restore", "torture", "--at", point, "--to", to, "--json")
        content = {d: (to / f"{d}.raw").read_bytes() for d in SIZES}
        shutil.rmtree(to)
        return content

    def prove_store(self) -> None:
        """`check --deep` finds nothing."""
        checked = self.world.done("check", "--deep", "--json").json
        assert checked["ok"], checked
        assert checked["points"] == len(self.proved)

    def prove_clean(self) -> None:
        """Nothing of ours is left anywhere but one recording bitmap on each disk."""
        left = self.machine.daemon.leftovers()
        assert not left, left
        for disk, names in self.machine.checkpoints().items():
            assert len(names) == 1, (disk, names)
            assert self.machine.daemon.bitmaps(disk)[names[0]]["recording"]
        assert not files_below(self.world.store / "leases", self.world.store / "tmp", self.world.state / "scratch")
        self.prove_alone()

    def prove_alone(self) -> None:
        """No process of ours is left."""
        end = time.monotonic() + GONE_SECONDS
        while running := processes(self.world.folder, {self.machine.pid}):
            assert time.monotonic() < end, running
            time.sleep(0.05)


def files_below(*folders: Path) -> list[Path]:
    """Every file and folder in them."""
    return [path for folder in folders if folder.exists() for path in folder.rglob("*")]


def processes(folder: Path, but: set[int]) -> dict[int, str]:
    """Every process that was told of the folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            said = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in said and int(path.parent.name) not in but:
                found[int(path.parent.name)] = said
    return found


@contextlib.contextmanager
def protected(seed: int) -> Iterator[Protected]:
    """A machine that is written to, an empty store, and its first point."""
    with short_folder() as folder:
        world = Installed(folder)
        world.done("init")
        machine = Machine(folder / "vm", random.Random(seed))
        try:
            found = Protected(world, machine)
            found.backup()
            yield found
        finally:
            machine.close()
